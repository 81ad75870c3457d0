"""`swamla recall`: the table, the files and the picture say the same, and what cannot be scored is told in one line."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from swamla.checkpoint import load
from swamla.cli import main
from swamla.cli import recall as command
from swamla.cli.recall import _size_flags
from swamla.evaluate import Recall, recall
from swamla.registry import members_of
from swamla.tasks import Task
from swamla.tasks import parse as parse_task
from swamla.train.precision import autocast

TASK = "mqar?length=16&pairs=2&vocabulary=32"


def make(folder: Path, mixer: str = "mha", *, accuracy: tuple[float, ...] = ()) -> Path:
    """A run of two steps on `TASK`; accuracy: of evaluations that are put down in its metrics, every tenth step."""
    flags = f"--pattern {mixer} --width 16 --n_heads 2 --steps 2 --batch_size 2 --block_size 16 --eval_tokens 64"
    where = ["--data", f"task:{TASK}", "--output_dir", str(folder)]
    assert main(["train", "toy-mqar", *flags.split(), *where]) == 0
    with (folder / "metrics.jsonl").open("a") as metrics:
        for number, share in enumerate(accuracy, 1):
            metrics.write(json.dumps({"step": 10 * number, "held_out_loss": 1.0, "held_out_accuracy": share}) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/soft and runs/fixed: the state of one grows with the row's length, that of the other does not."""
    home = tmp_path_factory.mktemp("recall")
    make(home / "runs" / "soft", accuracy=(0.5, 0.99, 0.995))
    make(home / "runs" / "fixed", "gdn", accuracy=(0.1,))
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, in which runs/ is that of `made`."""
    (tmp_path / "runs").symlink_to(made / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(folder: str = "recall") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "recall.json").read_text())
    return found


def test_a_run_alone_is_scored_at_the_sizes_that_it_was_trained_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recall", "soft", "--examples", "40"]) == 0
    out = capsys.readouterr().out
    (run,) = report()["runs"]
    (cell,) = run["cells"]
    model, _ = load("runs/soft", "2")
    task = parse_task(TASK)
    with autocast(run["precision"], torch.device("cpu")):
        expected = recall(model, task, rows=40)
    assert cell["sizes"] == {size.name: getattr(task, size.name) for size in fields(task)}
    assert (cell["right"], cell["queries"], cell["rows"]) == (expected.score.right, 80, 40)
    assert (cell["low"], cell["high"]) == expected.score.interval
    assert cell["state_bytes"] == model.init_state(1, 16).nbytes
    assert "mqar, length 16, pairs 2, vocabulary 32" in out
    assert "40 held-out rows a cell" in out
    assert f"{cell['accuracy']:.3f}  {cell['low']:.3f} … {cell['high']:.3f}" in out


def test_a_grid_is_in_the_table_and_in_all_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "recall soft runs/fixed --pairs 2,4 --length 16,32,64 --examples 8 --output found"
    assert main(line.split()) == 0
    out, found = capsys.readouterr().out, report("found")
    cells = {
        (run["run"], cell["sizes"]["pairs"], cell["sizes"]["length"]): cell
        for run in found["runs"]
        for cell in run["cells"]
    }
    assert len(cells) == 12
    assert found["complete"]
    assert found["left_out"] == []
    soft, fixed = (
        {key[2]: cell["state_bytes"] for key, cell in cells.items() if run in key[0]} for run in ("soft", "fixed")
    )
    assert soft[16] < soft[32] < soft[64]
    assert fixed[16] == fixed[32] == fixed[64]
    rows = list(csv.DictReader((home / "found" / "recall.csv").open()))
    assert [(row["run"], int(row["pairs"]), int(row["length"])) for row in rows] == list(cells)
    assert [float(row["accuracy"]) for row in rows] == [cell["accuracy"] for cell in cells.values()]
    assert {row["task"] for row in rows} == {"mqar"}
    shown = re.findall(r"(\d\.\d{3}) +(\d\.\d{3}) … (\d\.\d{3})", out)
    figures = [(cell["accuracy"], cell["low"], cell["high"]) for cell in cells.values()]
    assert [tuple(map(float, words)) for words in shown] == [pytest.approx(cell, abs=6e-4) for cell in figures]
    assert imread("found/recall.png").shape[0] > 100


def test_the_steps_to_an_accuracy_are_told_where_a_run_was_evaluated(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recall", "soft", "fixed", "--examples", "2"]) == 0
    out = capsys.readouterr().out
    assert "soft: accuracy 0.99 by step 20 of its training, on mqar?length=16" in out
    assert "fixed: accuracy 0.99 in no evaluation of its training, on mqar?length=16" in out
    assert [run["steps_to_0.99"] for run in report()["runs"]] == [20, None]


def test_json_is_what_the_file_holds(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recall", "soft", "--examples", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report()


def test_sizes_of_the_task_are_those_of_each_run_unless_they_are_given(home: Path) -> None:
    assert main(["recall", "soft", "--task", "task:mqar?power=1", "--examples", "2"]) == 0
    sizes = {"length": 16, "pairs": 2, "vocabulary": 32, "power": 1.0, "filler": "keys"}
    assert report()["runs"][0]["cells"][0]["sizes"] == sizes
    assert main(["recall", "soft", "--task", "mqar?pairs=2", "--pairs", "3,3", "--examples", "2"]) == 0
    assert [cell["sizes"]["pairs"] for cell in report()["runs"][0]["cells"]] == [3]


def test_cells_that_cannot_be_are_left_out_and_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recall", "soft", "--pairs", "2,8", "--length", "16,32", "--examples", "2"]) == 0
    assert "left out: length = 16" in capsys.readouterr().err
    found = report()
    assert [(cell["sizes"]["pairs"], cell["sizes"]["length"]) for cell in found["runs"][0]["cells"]] == [
        (2, 16), (2, 32), (8, 32),
    ]  # fmt: skip
    assert len(found["left_out"]) == 1


def test_runs_of_two_tasks_are_told_so_without_a_flag_that_nobody_gave(
    home: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--data task:copy?length=16&vocabulary=9 --steps 1 --batch_size 1 --eval_tokens 16 --output_dir runs/copy"
    assert main(["train", "toy-mqar", *flags.split()]) == 0
    capsys.readouterr()
    assert main(["recall", "soft", "runs/copy"]) == 2
    error = capsys.readouterr().err
    assert "runs/copy was trained on copy" in error
    assert "runs/soft on mqar: score the runs of one task at a time" in error
    assert "--task" not in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("soft --pairs 9", "length = 16 (mqar?length=16&pairs=9"),
        ("soft --pairs 9", "must be even and >= 36, four for each pair"),
        ("soft --pairs few", "pairs = 'few'"),
        ("soft --vocabulary 64", "has 64 ids, and runs/soft was trained on 32 ids, by task:mqar?length=16"),
        ("soft --depth 3", "depth = '3'"),
        ("soft --task mqra", "no task is called 'mqra'; did you mean \"mqar\"?"),
        ("soft --task copy", "--task copy: runs/soft was trained on mqar, and ids of another task mean other things"),
        ("soft --examples 0", "--examples 0: must be > 0"),
        ("soft --output taken", "--output taken: is a file; name a folder"),
        ("text", "runs/text: was trained on "),
        ("nowhere", "nowhere: not a run folder"),
        ("soft --checkpoint 7", "no checkpoint of step 7"),
        ("", "the following arguments are required: RUNS"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_line(
    line: str, message: str, home: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "taken").touch()
    if line == "text" and not (made / "runs" / "text").exists():
        (home / "text.txt").write_text("import os\n" * 200)
        flags = "--pattern swa --width 16 --n_heads 2 --steps 1 --max_minutes none --batch_size 1 --block_size 16"
        where = f"--data text.txt --tokenizer byte --cache_dir {home}/cache --output_dir runs/text"
        assert main(["train", "quickstart", *flags.split(), *where.split()]) == 0
    capsys.readouterr()
    assert main(["recall", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swamla: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (home / "recall").exists()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_scored(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr(command, "recall", lambda *arguments, **settings: pytest.fail("scored"))
    assert main(["recall", "soft", "--output", "locked"]) == 2
    assert "--output locked: nothing can be written there: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("after", [0, 2])
def test_ctrl_c_keeps_the_cells_that_are_scored(
    after: int, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "recall", stopped(after))
    assert main(["recall", "soft", "--length", "16,32,64", "--examples", "2"]) == 130
    error = capsys.readouterr().err
    assert "swamla: interrupted" in error
    assert ("2 of 3 cells are scored, and in recall" in error) == bool(after)
    assert (home / "recall").exists() == bool(after)
    if after:
        found = report()
        assert not found["complete"]
        assert [cell["sizes"]["length"] for cell in found["runs"][0]["cells"]] == [16, 32]


def stopped(after: int) -> Callable[..., Recall]:
    """`recall` that is interrupted once it has been called so many times."""
    calls = []

    def scored(*arguments: Any, **settings: Any) -> Recall:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return recall(*arguments, **settings)

    return scored


def test_every_size_of_every_task_has_a_flag_and_no_flag_of_the_command_is_taken() -> None:
    sizes = {size.name for cls in members_of(Task).values() for size in fields(cls)}  # type: ignore[arg-type]
    assert _size_flags().keys() == sizes
    assert not sizes & {field.name for field in fields(command.Arguments)}
