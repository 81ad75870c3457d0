"""`make bench` itself: every table at tiny sizes, rows that fail, interruptions, time that is spent."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cpu, report
from benchmarks.contenders import GPT2, NANOGPT, QUICK, TRANSFORMERS, contender
from benchmarks.running import Bench, Outcome
from benchmarks.tables import training
from benchmarks.tables.generation import ROUNDED
from benchmarks.tables.training import FIVE_TO_ONE, HYBRIDS, OURS
from swamla.bench.measuring import Timing
from swamla.bench.results import Results

CEILINGS = {"fp32_flops": 1e11, "bf16_flops": 5e11, "copy_bytes": 1e10}


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ceilings", lambda: CEILINGS)


def measured(out: Path, *flags: str) -> dict[str, Any]:
    assert cpu.main(["--quick", "--out", str(out), *flags]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run at tiny sizes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cpu, "ceilings", lambda: CEILINGS)
        return measured(tmp_path_factory.mktemp("whole") / "cpu.json")


def test_a_trial_of_all_tables_fails_nowhere(whole: dict[str, Any]) -> None:
    assert list(whole["tables"]) == ["ceilings", *cpu.TABLES]
    failed = [row for rows in whole["tables"].values() for row in rows if "error" in row]
    assert failed == []


def test_every_contender_is_in_the_tables_of_models(whole: dict[str, Any]) -> None:
    for table, key in (("training", "length"), ("generation", "prompt")):
        shortest = min(row[key] for row in whole["tables"][table])
        names = {row["name"] for row in whole["tables"][table] if row[key] == shortest}
        rounded = ROUNDED if table == "generation" else ()
        assert names == {*OURS, *TRANSFORMERS, *rounded}
    assert FIVE_TO_ONE in {row["name"] for row in whole["tables"]["training"]}


def test_ratios_are_of_the_medians_of_the_same_rounds(whole: dict[str, Any]) -> None:
    rows = [row for row in whole["tables"]["training"] if "median_s" in row]
    for row in rows:
        baseline = next(other for other in rows if other["name"] == GPT2 and other["length"] == row["length"])
        assert row["ratio"] == pytest.approx(baseline["median_s"] / row["median_s"])


def test_what_the_loader_gives_is_put_beside_what_training_took_of_the_same_length(whole: dict[str, Any]) -> None:
    row = {"name": "swa swa mla", "length": 1024, "tokens_per_s": 5000.0}
    results = Results(command="", rows={"training": [*whole["tables"]["training"], row]})
    assert cpu.data.consumed_by_model(Bench(results=results), 1024) == 5000.0
    assert cpu.data.consumed_by_model(Bench(results=results), 256) is None


def test_the_page_can_be_made_of_every_table(whole: dict[str, Any]) -> None:
    results = Results(command="make bench", machine=whole["machine"], ceilings=whole["ceilings"], rows=whole["tables"])
    assert not [name for name, text in report.rendered([results]).items() if report.NOT_YET in text]


def only_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of one row, which names them."""
    for table in cpu.TABLES:
        monkeypatch.setitem(cpu.TABLES, table, (lambda bench, t=table: bench.results.add(t, {"name": t}), 1.0))


def test_only_the_tables_asked_for_are_measured_in_their_own_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_names(monkeypatch)
    found = measured(tmp_path / "some.json", "--only", "start-up,optimizers")
    assert list(found["tables"]) == ["ceilings", "optimizers", "start-up"]
    assert [row["name"] for row in found["tables"]["ceilings"]] == ["before", "after"]


@pytest.mark.parametrize("flags", [["--only", "opps"], ["--nanogpt", "nowhere"]])
def test_what_cannot_be_measured_is_told_before_anything_is(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cpu.main(flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {' '.join(flags)}")


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bench: Bench) -> None:
        bench.results.add("data", {"name": "first", "median_s": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setitem(cpu.TABLES, "data", (interrupted, 1.0))
    assert cpu.main(["--only", "data,start-up", "--out", str(tmp_path / "cut.json")]) == 130
    tables = json.loads((tmp_path / "cut.json").read_text())["tables"]
    assert tables["data"] == [{"name": "first", "median_s": 1.0}]
    assert "start-up" not in tables


def test_a_table_that_breaks_gets_a_row_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Bench) -> None:
        raise RuntimeError("no such thing")

    only_names(monkeypatch)
    monkeypatch.setitem(cpu.TABLES, "ops", (broken, 1.0))
    found = measured(tmp_path / "broken.json", "--only", "ops,optimizers")
    assert found["tables"]["ops"] == [{"name": "the table", "error": "RuntimeError: no such thing"}]
    assert found["tables"]["optimizers"] == [{"name": "optimizers"}]


def silent() -> Bench:
    return Bench(results=Results(command="", say=lambda line: None))


def test_a_contender_that_fails_gets_a_row_and_the_others_go_on() -> None:
    bench = silent()

    def unmakeable() -> Any:
        raise ValueError("no weights")

    def failing() -> None:
        raise RuntimeError("out of\npaper")

    makers = {"a": unmakeable, "b": lambda: failing, "c": lambda: lambda: None}
    assert list(bench.race("ops", {"length": 8}, makers, rounds=2, limit=1)) == ["c"]
    assert bench.results.rows["ops"] == [
        {"name": "a", "length": 8, "error": "ValueError: no weights"},
        {"name": "b", "length": 8, "error": "RuntimeError: out of paper"},
    ]


def test_warm_up_rounds_do_not_count() -> None:
    calls: list[int] = []
    outcome = silent().race("ops", {}, {"a": lambda: lambda: calls.append(1)}, rounds=3, limit=9, warmup=2)["a"]
    assert (len(calls), outcome.timing.rounds) == (5, 3)


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    makers = {name: (lambda name=name: lambda: calls.append(name)) for name in "ab"}
    silent().race("ops", {}, makers, rounds=2, limit=9)
    assert calls == ["a", "b"] * 3


def test_a_share_is_of_what_square_products_reach_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    with FlopCounterMode(display=False) as counted:
        training.matmuls(training.QUICK_SIDE)

    def race(self: Bench, table: str, what: Any, makers: dict[str, Any], **_: Any) -> dict[str, Outcome]:
        for name, maker in makers.items():
            if name != training.MATMUL:
                maker()
        seconds = {name: 2.0 if name == training.MATMUL else 0.5 for name in makers}
        return {name: Outcome(timing=Timing.of([s]), peak_bytes=1) for name, s in seconds.items()}

    monkeypatch.setattr(Bench, "race", race)
    bench = silent()
    bench.quick = True
    training.measure_race(bench, training.Race(length=32, names=("mha",), limit=0), QUICK)
    (row,) = bench.results.rows["training"]
    reached = counted.get_total_flops() / 2.0
    assert (row["rows"], row["tokens_per_s"], row["bf16_flops"]) == (2, 64 / 0.5, reached)
    per_token = contender("mha", QUICK, 32, None).flops_per_token(32)  # against counts of its own in test_flops.py
    assert row["bf16_share"] == pytest.approx(128 * per_token / reached, rel=1e-12)


def test_when_a_tables_time_is_spent_its_other_races_say_so() -> None:
    bench = silent()
    bench.allow(0)
    assert bench.race("ops", {"length": 8}, {"a": lambda: lambda: None}, rounds=1, limit=1) == {}
    assert bench.results.rows["ops"] == [{"name": "a", "length": 8, "note": "not run: the table's time was spent"}]


def test_with_nanogpt_it_is_the_baseline_and_runs_the_longest_rows_against_our_hybrids() -> None:
    races = training.plan(nanogpt=True, quick=False)
    assert [race.length for race in races] == [256, 1024, 4096, 8192, 16384, 32768]
    assert {race.names[0] for race in races} == {NANOGPT}
    assert races[-1].names == (NANOGPT, *HYBRIDS)
    assert {race.names[0] for race in training.plan(nanogpt=False, quick=False)} == {GPT2}


def test_every_contender_is_named_at_every_length_if_only_as_left_out() -> None:
    for race in training.plan(nanogpt=False, quick=False):
        assert {*OURS, *TRANSFORMERS} <= {*race.names, *race.left_out}


def test_whole_runs_are_numbered_by_the_day_and_parts_are_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "RESULTS", tmp_path)
    first = cpu.default_file(whole=True)
    first.touch()
    second = cpu.default_file(whole=True)
    second.touch()
    assert (second.name, cpu.default_file(whole=True).name) == (f"{first.stem}-2.json", f"{first.stem}-3.json")
    assert cpu.default_file(whole=False).parent != tmp_path


def test_the_command_that_is_kept_names_no_folder_of_this_machine() -> None:
    options = cpu.parse(["--nanogpt", "/home/me/nanoGPT", "--only", "ops", "--out", "/home/me/x.json"])
    assert cpu.command(options) == 'make bench BENCH_ARGS="--only ops --nanogpt ../nanoGPT"'
    assert cpu.command(cpu.parse([])) == "make bench"
