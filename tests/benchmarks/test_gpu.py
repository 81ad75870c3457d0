"""The GPU benchmark, tried without a GPU: all of its rows at tiny sizes, and what becomes of rows that go wrong."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import compared, main
from benchmarks.gpu_rows import GATES, ROWS
from benchmarks.gpu_running import Place, Processes, here
from benchmarks.gpu_timing import used
from swamla.bench.results import Results

from .gpu_faults import FAULTY, GATED

DRY = ["--device", "cpu", "--quick"]


def measured(tmp_path: Path, arguments: list[str], **options: Any) -> Results:
    """What a run leaves in its file."""
    file = tmp_path / "gpu.json"
    assert main([*arguments, "--out", str(file)], **options) == 0
    return Results.load(file)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Results:
    torch.manual_seed(0)
    return measured(tmp_path_factory.mktemp("dry"), DRY, run=here)


def test_every_row_runs_at_tiny_sizes_or_names_what_is_missing(dry: Results) -> None:
    for row in ROWS:
        found = [figures for figures in dry.rows[row.table] if figures["name"] == row.name]
        assert found, row
        assert not [figures for figures in found if "error" in figures], row
    skipped = [figures for rows in dry.rows.values() for figures in rows if "skipped" in figures]
    assert all("CUDA" in str(figures["skipped"]) or "pip install" in str(figures["skipped"]) for figures in skipped)


def test_gates_pass_on_a_cpu(dry: Results) -> None:
    verdicts = [row["passed"] for row in dry.rows[GATES] if "skipped" not in row]
    assert len(verdicts) > 10
    assert set(verdicts) == {1}


def test_training_rows_have_their_targets_beside_what_was_found(dry: Results) -> None:
    rows = {row["name"]: row for row in dry.rows["training"]}
    small = rows["small swa, bf16, compiled"]
    assert small["target_tokens_per_s"] == 300e3
    assert (small["documents_a_row"], rows["small swa, bf16, compiled, whole rows"]["documents_a_row"]) == (4, 1)
    assert small["tokens_per_s"] == pytest.approx(64 / small["median_s"])
    assert {"of_matmul_share", "of_peak_share", "parameters"} <= small.keys()
    assert "target_tokens_per_s" not in rows["GPT-2 as small, bf16, compiled"]


def test_the_machine_and_its_ceilings_are_in_the_head(dry: Results) -> None:
    assert dry.machine["torch"] == str(torch.__version__)
    assert dry.ceilings.keys() >= {"bf16_flops", "fp16_flops", "fp8_flops", "copy_bytes"}


def test_the_machine_comes_first_then_what_headlines_rest_on_and_every_row_can_go_to_a_process_of_its_own() -> None:
    assert [row.table for row in ROWS[:2]] == ["machine", "ceilings"]
    names = [row.name for row in ROWS]
    headlines = [names.index(f"{name} swa, bf16, compiled") for name in ("small", "base", "moe-1b")]
    assert all(
        names.index(gate) < min(headlines) for gate in ("attention, cudnn", "windowed attention, flex", "experts")
    )
    assert max(headlines) < names.index("decoding, graph")
    assert sum(row.needs for row in ROWS[: max(headlines) + 1]) < 240  # half of a call of eight minutes
    assert len({(row.table, row.name) for row in ROWS}) == len(ROWS)
    assert [row.name for row in pickle.loads(pickle.dumps(ROWS))] == [row.name for row in ROWS]


def test_rows_that_raise_hang_or_die_say_so_and_the_others_go_on(tmp_path: Path) -> None:
    processes = Processes(tmp_path / "rows.log")
    found = measured(tmp_path, DRY, rows=FAULTY, run=processes).rows["training"]
    by_name: dict[str, list[Any]] = {}
    for row in found:
        by_name.setdefault(str(row["name"]), []).append(row)
    figures, error = by_name["raises"]
    assert figures["median_s"] == 1.0
    assert error["error"] == "RuntimeError: says what happened"
    figures, error = by_name["hangs"]
    assert figures["median_s"] == 1.0
    assert error["error"] == "did not end within 0.4 s: killed"
    (error,) = by_name["dies"]
    assert error["error"] == "died (SIGABRT): the device is gone"
    (skipped,) = by_name["lacks"]
    assert skipped["skipped"] == "needs what is not there: pip install it"
    assert by_name["fine"] == [{"name": "fine", "median_s": 1.0}]
    assert "Traceback" in (tmp_path / "rows.log").read_text()


def test_a_real_row_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.name == "loss")
    ((kind, figures),) = Processes(tmp_path / "rows.log")(row, Place(device="cpu", quick=True))
    assert (kind, figures["passed"]) == ("figures", 1)


def test_what_no_longer_fits_the_budget_is_named(tmp_path: Path) -> None:
    found = measured(tmp_path, [*DRY, "--budget", "0"], run=here)
    for row in ROWS:
        (told,) = [figures for figures in found.rows[row.table] if figures["name"] == row.name]
        assert told["skipped"] == f"0 s are left of the budget, and it needs about {row.needs:g}"


def test_timings_of_a_path_whose_gate_failed_are_marked(tmp_path: Path) -> None:
    found = measured(tmp_path, DRY, rows=GATED, run=here).rows
    assert found["gates"] == [{"name": "gate", "output_error": "nan", "passed": 0}]
    (timed,) = found["training"]
    assert timed["not_trustworthy"] == "the gate did not pass: attention/flex"


def test_timings_of_a_path_whose_gate_comes_later_or_never_are_marked_too(tmp_path: Path) -> None:
    gate, timed = GATED
    found = measured(tmp_path, DRY, rows=(timed, gate), run=here).rows
    assert found["training"][0]["not_trustworthy"] == "the gate did not pass: attention/flex"
    found = measured(tmp_path, DRY, rows=(timed,), run=here).rows
    assert found["training"][0]["not_trustworthy"] == "the gate did not run: attention/flex, delta rule/torch"


def test_a_second_call_measures_what_the_first_did_not(tmp_path: Path) -> None:
    first = tmp_path / "first.json"
    rows = [
        row for row in ROWS if row.table in ("machine", "ceilings") or row.name in ("loss", "head and cross-entropy")
    ]
    assert main([*DRY, "--only", "gates", "--out", str(first)], rows=rows, run=here) == 0
    found = measured(tmp_path, [*DRY, "--after", str(first)], rows=rows, run=here).rows
    assert found.keys() == {"machine", "ceilings", "loss", "durations"}
    failed = Results.load(first)
    failed.rows["gates"][0] = {"name": "loss", "error": "it hung"}
    failed.file = first
    failed.save()
    assert "gates" in measured(tmp_path, [*DRY, "--after", str(first)], rows=rows, run=here).rows


def test_figures_stand_beside_those_of_an_earlier_file() -> None:
    old, new = Results(command="old", say=lambda _: None), Results(command="new", say=lambda _: None)
    old.rows = {"training": [{"name": "a", "tokens_per_s": 1e5, "median_s": 9.0}, {"name": "b", "error": "no"}]}
    new.rows = {"training": [{"name": "a", "tokens_per_s": 1.5e5}, {"name": "b", "tokens_per_s": 1.0}]}
    old.rows["loss"], new.rows["loss"] = [{"name": "c", "median_s": 0.5}], [{"name": "c", "median_s": 1.0}]
    assert [line.rpartition("  ")[2] for line in compared(old, new)] == ["1.5 times as fast", "0.5 times as fast"]


def test_some_tables_alone(tmp_path: Path) -> None:
    found = measured(tmp_path, [*DRY, "--only", "gates"], rows=GATED, run=here).rows
    assert found.keys() == {"gates", "durations"}


def test_the_backends_of_a_model_are_those_that_gates_vouch_for() -> None:
    told = {"attention": "cudnn and flex", "delta rule": "torch (fla refuses keys of width 64 here)"}
    uses = used(told)
    assert uses == ["attention/cudnn", "attention/flex", "delta rule/torch"]
    assert set(uses) <= {vouched for row in ROWS for vouched in row.vouches}


@pytest.mark.parametrize(
    ("arguments", "told"), [([], "torch sees no CUDA device here"), (["--device", "cpu"], "add --quick")]
)
def test_without_a_gpu_one_line_says_so(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments, rows=()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert told in said.err


@pytest.mark.gpu
def test_gates_and_tiny_models_on_a_gpu(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row.table == GATES or row.name.startswith("small swa")]
    found = measured(tmp_path, ["--quick"], rows=rows).rows
    assert not [row for rows in found.values() for row in rows if "error" in row or row.get("passed") == 0]
