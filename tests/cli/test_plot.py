"""`swamla plot`: every run that was asked for is in the picture, and whatever cannot be drawn is said."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from swamla.cli import main
from swamla.train.plot import read_curve

BLUE, ORANGE = "#0072B2", "#D55E00"


def make(folder: Path, *, start: float = 4.0, **more: float) -> Path:
    """A run of 60 steps with three evaluations."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, 61):
        loss = start - step / 60
        lines.append({"step": step, "loss": loss, "tokens": 100 * step, "elapsed": 3.0 * step, **more})
        if step % 20 == 0:
            lines.append({"step": step, "held_out_loss": loss + 0.1, "elapsed": 3.0 * step + 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pixels(picture: Path, colour: str) -> int:
    """How many are of this colour."""
    return int((np.abs(imread(picture)[..., :3] - to_rgb(colour)) < 0.02).all(-1).sum())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs under runs/."""
    make(tmp_path / "runs" / "first")
    make(tmp_path / "runs" / "second", start=4.5, mfu=0.4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_run_is_drawn_in_its_own_colour(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "first", "-o", "one.png"]) == 0
    assert main(["plot", "first", "runs/second"]) == 0
    assert capsys.readouterr().out.endswith("curves.png: loss of first, second\n")
    assert pixels(home / "one.png", BLUE) > 1000
    assert pixels(home / "one.png", ORANGE) == 0
    assert min(pixels(home / "curves.png", BLUE), pixels(home / "curves.png", ORANGE)) > 1000


@pytest.mark.parametrize("flags", ["--x tokens", "--x time", "--y held_out_loss", "--y lr --x time"])
def test_every_axis_makes_another_picture(flags: str, home: Path) -> None:
    make(home / "runs" / "third", lr=0.1)
    assert main(["plot", "third", "-o", "plain.png"]) == 0
    assert main(["plot", "third", "-o", "other.png", *flags.split()]) == 0
    assert (home / "plain.png").read_bytes() != (home / "other.png").read_bytes()


def test_a_curve_has_each_record_at_its_step_tokens_or_minutes() -> None:
    records = [
        {"step": 1, "loss": 3.0, "tokens": 10, "elapsed": 60.0},
        {"step": 2, "skipped": 1, "grad_norm": None},
        {"step": 3, "loss": 2.0, "tokens": 20, "elapsed": 180.0},
        {"step": 3, "held_out_loss": 2.5, "elapsed": 240.0},
    ]
    curves = {x: read_curve("r", records, x=x, y="loss") for x in ("step", "tokens", "time")}
    assert {x: curve.training for x, curve in curves.items()} == {
        "step": [(1, 3.0), (3, 2.0)],
        "tokens": [(10, 3.0), (20, 2.0)],
        "time": [(1.0, 3.0), (3.0, 2.0)],
    }
    assert [curve.held_out for curve in curves.values()] == [[(3, 2.5)], [(20, 2.5)], [(4.0, 2.5)]]
    alone = read_curve("r", records, x="step", y="held_out_loss")
    assert (alone.training, alone.held_out) == ([], [(3, 2.5)])
    assert read_curve("r", records, x="step", y="grad_norm").training == []


def test_runs_of_the_same_name_are_told_apart_by_their_parents(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(home / "other" / "first")
    assert main(["plot", "first", "other/first"]) == 0
    assert capsys.readouterr().out.endswith("loss of runs/first, other/first\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: RUNS"),
        ("third", "third: no run (it has no metrics.jsonl), nor is there one in runs/"),
        ("first --y los", 'no run has it; did you mean "loss"?'),
        ("first second --y mfu", "first has none; leave that run out"),
        ("first -o curves.txt", "must end in .png, .pdf or .svg"),
        ("first -o nowhere/curves.png", "there is no folder nowhere"),
        ("first --x bytes", "bytes"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_nothing_written(
    line: str, message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", *line.split()]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in home.iterdir()) == ["runs"]
