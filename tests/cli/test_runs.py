"""`swamla runs`: one row a run, whatever state it is in, and a name for what is broken."""

import fcntl
import io
import json
import os
import re
import time
from pathlib import Path

import pytest

from swamla.cli import main
from swamla.cli.runs import compress, summarize
from swamla.config import to_plain
from swamla.data.config import DataConfig, WeightedSource
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.train import RunConfig, TrainConfig
from swamla.train.claims import is_running

MODEL = LanguageModelConfig(
    width=16, vocab_size=257, pattern=("swa", "swa"), blocks={"swa": BlockConfig(mixer=SWAConfig(n_heads=2))}
)
STDLIB = DataConfig()
RECORDS = [
    {"step": 1, "loss": 5.0, "tokens": 1000, "elapsed": 1.0},
    {"step": 5, "loss": 3.0, "tokens": 5000, "elapsed": 5.0},
    {"step": 5, "held_out_loss": 2.5, "held_out_bits_per_byte": 1.25, "elapsed": 5.5},
    {"step": 10, "loss": 2.0, "tokens": 10000, "elapsed": 10.0},
    {"step": 10, "held_out_loss": 2.75, "held_out_bits_per_byte": 1.5, "elapsed": 11.0},
]


def make(
    folder: Path,
    records: list[dict[str, float]] = RECORDS,
    saved: bool = True,
    data: DataConfig = STDLIB,
    **settings: float,
) -> Path:
    """A run's folder, as training leaves it, without tensors."""
    train = TrainConfig(**({"steps": 10} | settings))
    config = {"format_version": 1, **to_plain(RunConfig(model=MODEL, data=data, train=train))}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if saved:
        (folder / "checkpoints" / "step-00000010").mkdir()
    return folder


def test_a_row_says_what_a_run_is_how_far_it_came_and_how_good_it_is(tmp_path: Path) -> None:
    run = summarize(make(tmp_path / "first"))
    parameters = sum(p.numel() for p in MODEL.build().parameters())
    assert (run.name, run.pattern, run.parameters) == ("first", "swa×2", parameters)
    assert (run.steps, run.tokens, run.loss) == (10, 10000, 2.0)
    assert (run.held_out_loss, run.bits_per_byte) == (2.5, 1.25)  # the best, not the last


@pytest.mark.parametrize(
    ("records", "saved", "settings", "state"),
    [
        (RECORDS, True, {}, "done"),
        (RECORDS[:3], True, {}, "stopped"),
        (RECORDS, True, {"steps": 11}, "stopped"),
        (RECORDS, True, {"steps": None, "max_minutes": 11 / 60}, "done"),
        (RECORDS, True, {"steps": None, "max_minutes": 1.0}, "stopped"),
        (RECORDS, False, {}, "no save"),
        ([], False, {}, "no save"),
    ],
)
def test_a_run_is_done_when_its_budget_is_spent(records, saved, settings, state, tmp_path: Path) -> None:
    assert summarize(make(tmp_path / "run", records, saved, **settings)).state == state


def test_a_run_whose_folder_a_process_holds_is_running(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert not is_running(run)
    trainer = os.open(run, os.O_RDONLY)
    fcntl.flock(trainer, fcntl.LOCK_EX)
    assert summarize(run).state == "running"
    os.close(trainer)
    assert summarize(run).state == "done"


@pytest.mark.parametrize("columns", [60, 80])
def test_the_table_fits_its_columns_and_names_what_is_broken(columns: int, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    wide = [
        {"step": 123456, "loss": 10.8251, "tokens": 123456789, "held_out_loss": 10.7, "held_out_bits_per_byte": 15.1}
    ]
    old, new = make(tmp_path / "old"), make(tmp_path / "a-name-that-is-rather-long-for-a-table", wide)
    now = time.time()
    os.utime(old / "metrics.jsonl", (now - 7300, now - 7300))
    os.utime(new / "metrics.jsonl", (now - 3540, now - 3540))
    (make(tmp_path / "bad-config") / "config.json").write_text("{")
    (make(tmp_path / "bad-metrics") / "metrics.jsonl").write_text("nothing\n")
    (tmp_path / "no-config" / "checkpoints").mkdir(parents=True)
    (tmp_path / "something-else").mkdir()
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    table, broken = shown.split("broken: ", 1)
    lines = table.splitlines()
    assert max(len(line) for line in lines) <= columns
    assert "…" not in table
    assert [line.split() for line in lines[:2]] == [
        ["run", "data", "params", "loss", "held", "state"],
        ["pattern", "tokenizer", "steps", "tokens", "bits/B", "when"],
    ]
    parameters = f"{sum(p.numel() for p in MODEL.build().parameters()) / 1000:.3g}k"
    (first,) = (index for index, line in enumerate(lines) if line.startswith("old "))
    assert lines[first].split() == ["old", "stdlib", parameters, "2.000", "2.500", "done"]
    assert lines[first + 1].split() == ["swa×2", "bpe:4096", "10", "10k", "1.250", "2", "h"]
    assert re.search(r" 10\.825 10\.700 stopped", table)
    assert re.search(r" 123k +123M 15\.100 59 min", table)
    assert table.index("a-name") < table.index("old ")
    named = [line.removeprefix("broken: ").removeprefix(f"{tmp_path}/") for line in broken.splitlines()]
    assert [re.split("[/:]", line)[0] for line in named] == ["bad-config", "bad-metrics", "no-config"]


def test_data_is_shown_by_the_last_part_of_its_path_and_stored_whole(tmp_path: Path, capsys) -> None:
    mixture = (WeightedSource(source="/far/a.txt", weight=1.0), WeightedSource(source="stdlib", weight=1.0))
    data = DataConfig(source="mixture", mixture=mixture, tokenizer="/somewhere/runs/old/tokenizer.json")
    run = summarize(make(tmp_path / "run", data=data))
    assert (run.data, run.tokenizer) == ("/far/a.txt + stdlib", "/somewhere/runs/old/tokenizer.json")
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "a.txt + stdlib" in shown
    assert "old/tokenizer.json" in shown
    assert "/far" not in shown


def test_json_has_every_run_and_every_reason(tmp_path: Path, capsys) -> None:
    make(tmp_path / "fine")
    (make(tmp_path / "bad") / "config.json").write_text("{")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    fine, bad = json.loads(capsys.readouterr().out)
    assert fine["path"] == str(tmp_path / "fine")
    assert fine["modified"].startswith("20")
    assert fine.keys() >= {
        "pattern",
        "parameters",
        "steps",
        "tokens",
        "loss",
        "held_out_loss",
        "bits_per_byte",
        "state",
    }
    assert bad["path"] == str(tmp_path / "bad")
    assert "not JSON" in bad["broken"]


def test_one_run_no_run_and_no_folder_are_answered_as_such(tmp_path: Path, capsys) -> None:
    assert main(["runs", str(make(tmp_path / "runs" / "only"))]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("only ")
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'empty'}\n"
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.endswith("nowhere: no such folder; swamla train writes runs to the folder runs\n")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (("swa", "swa", "mla") * 4, "(swa swa mla)×4"),
        (("gdn",) * 6, "gdn×6"),
        (("mla",), "mla"),
        (("swa", "mla", "mla"), "swa mla mla"),
    ],
)
def test_a_pattern_is_its_shortest_cycle(pattern: tuple[str, ...], text: str) -> None:
    assert compress(pattern) == text


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs in the folder runs of the working directory."""
    for name in ("first", "second", "third"):
        make(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


class Answer(io.StringIO):
    """A terminal on which the user has typed."""

    def isatty(self) -> bool:
        return True


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rm_removes_the_named_runs_and_says_how_much_that_was(runs: Path, capsys) -> None:
    (runs / "first/big.bin").write_bytes(bytes(2_000_000))
    assert main(["runs", "rm", "first", "runs/second/", "first", "--yes"]) == 0
    assert names(runs) == ["third"]
    first, second = capsys.readouterr().out.splitlines()
    assert first == "removed runs/first (2.00 MB, with big.bin, not of its training)"
    assert second.startswith("removed runs/second (")


@pytest.mark.parametrize(("typed", "left"), [("y\n", 2), ("yes\n", 2), ("n\n", 3), ("\n", 3), ("", 3)])
def test_rm_asks(typed: str, left: int, runs: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Answer(typed))
    assert main(["runs", "rm", "second"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Remove runs/second (")
    assert "[y/N] " in shown
    assert len(names(runs)) == left


def test_rm_without_a_terminal_and_without_yes_removes_nothing(runs: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["runs", "rm", "second"]) == 2
    assert "There is no terminal to answer on: add --yes" in capsys.readouterr().err
    assert len(names(runs)) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("secnd", 'runs/secnd: no such run; did you mean "second"?'),
        ("zzz", "runs/zzz: no such run; there are: first, "),
        ("../outside", "../outside: not in runs; runs rm removes runs of one folder"),
        ("..", "..: not in runs"),
        (".", ".: not in runs"),
        ("runs", "runs/runs: no such run"),
        ("second/checkpoints", "second/checkpoints: not in runs"),
        ("linked", "runs/linked: is a link to "),
        ("notes", "runs/notes: not a run of swamla, so it is not removed"),
        ("model", "runs/model: not a run of swamla, so it is not removed"),
    ],
)
def test_rm_removes_nothing_if_one_name_is_refused(wrong: str, message: str, runs: Path, capsys) -> None:
    make(runs.parent / "outside")
    (runs / "linked").symlink_to(runs.parent / "outside")
    (runs / "notes").mkdir()
    (runs / "model").mkdir()
    (runs / "model/config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    before = names(runs)
    assert main(["runs", "rm", "first", wrong, "--yes"]) == 2
    assert message in capsys.readouterr().err
    assert names(runs) == before
    assert (runs.parent / "outside/config.json").exists()


def test_rm_does_not_follow_links_in_a_run(runs: Path) -> None:
    outside = runs.parent / "precious"
    outside.mkdir()
    (outside / "thesis.txt").write_text("words")
    (runs / "first/elsewhere").symlink_to(outside)
    assert main(["runs", "rm", "first", "--yes"]) == 0
    assert (outside / "thesis.txt").read_text() == "words"


def test_rm_refuses_a_run_that_is_being_trained(runs: Path, capsys) -> None:
    trainer = os.open(runs / "second", os.O_RDONLY)
    fcntl.flock(trainer, fcntl.LOCK_EX)
    assert main(["runs", "rm", "first", "second", "--yes"]) == 2
    assert "runs/second: another process is training in it" in capsys.readouterr().err
    assert len(names(runs)) == 3
    os.close(trainer)
    assert main(["runs", "rm", "second", "--yes"]) == 0
    assert names(runs) == ["first", "third"]


def test_rm_removes_a_damaged_run(runs: Path) -> None:
    (runs / "first/config.json").write_text("{")
    (runs / "first/data.json").write_text("[]")
    assert main(["runs", "rm", "first", "--yes"]) == 0
    assert names(runs) == ["second", "third"]
