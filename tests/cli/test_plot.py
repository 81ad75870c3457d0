"""`swamla plot`: every run that was asked for is in the picture, and whatever cannot be drawn is said."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from swamla.cli import main
from swamla.cli import plot as plot_command
from swamla.config import to_plain
from swamla.data.config import DataConfig
from swamla.data.tokenizer import ByteTokenizer, CharTokenizer
from swamla.model.accounting import training_flops_per_token
from swamla.train import RunConfig, TrainConfig
from swamla.train.plot import Curve, plot_losses, read_curve
from tests.cli.test_runs import MODEL

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
    return pixels_of(imread(picture), colour)


def pixels_of(picture: np.ndarray, colour: str) -> int:
    return int((np.abs(picture[..., :3] - to_rgb(colour)) < 0.02).all(-1).sum())


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


@pytest.mark.parametrize("flags", ["--x tokens", "--x time", "--x flops", "--y held_out_loss", "--y lr --x time"])
def test_every_axis_makes_another_picture(flags: str, home: Path) -> None:
    configure(make(home / "runs" / "third", lr=0.1))
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
    curves = {
        x: read_curve("r", records, x=x, y="loss", flops_per_token=1e6) for x in ("step", "tokens", "flops", "time")
    }
    assert {x: curve.training for x, curve in curves.items()} == {
        "step": [(1, 3.0), (3, 2.0)],
        "tokens": [(10, 3.0), (20, 2.0)],
        "flops": [(10e6, 3.0), (20e6, 2.0)],
        "time": [(1.0, 3.0), (3.0, 2.0)],
    }
    assert [curve.held_out for curve in curves.values()] == [[(3, 2.5)], [(20, 2.5)], [(20e6, 2.5)], [(4.0, 2.5)]]
    assert [curve.lost for curve in curves.values()] == [[2], [10], [10e6], [1.0]], "the skipped step"
    alone = read_curve("r", records, x="step", y="held_out_loss")
    assert (alone.training, alone.held_out) == ([], [(3, 2.5)])
    norms = read_curve("r", records, x="step", y="grad_norm")
    assert (norms.training, norms.lost) == ([], [2])


def test_flops_are_those_of_the_accounting(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(home / "runs" / "first")
    drawn: list[Curve] = []
    monkeypatch.setattr(plot_command, "plot_runs", lambda curves, *_, **__: drawn.extend(curves))
    assert main(["plot", "first", "--x", "flops"]) == 0
    per_token = training_flops_per_token(config.model, config.train.block_size)
    assert drawn[0].training[-1] == (pytest.approx(6000 * per_token), 3.0)


def test_values_that_are_not_finite_are_crosses_at_the_edge_and_other_points_stay(home: Path) -> None:
    run = make(home / "runs" / "lost")
    assert main(["plot", "lost", "-o", "before.png"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spoiled = [record | ({"loss": None} if record["step"] in (7, 30) and "loss" in record else {}) for record in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in spoiled))
    curve = read_curve("r", spoiled, x="step", y="loss")
    assert curve.lost == [7, 30]
    assert len(curve.training) == 58
    assert main(["plot", "lost", "-o", "after.png"]) == 0

    def at_the_top(name: str) -> int:  # the curve begins below
        return pixels_of(imread(home / name)[: 750 // 6, : 1350 // 2 + 100], BLUE)

    assert at_the_top("after.png") > at_the_top("before.png") + 20


@pytest.mark.parametrize("records", [1, 2])
def test_few_points_are_seen(records: int, home: Path) -> None:
    short = home / "runs" / "short"
    short.mkdir()
    (short / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 3.0 + n, "bits_per_byte": 4.0}) + "\n" for n in range(records))
    )
    assert main(["plot", "short"]) == 0
    assert pixels(home / "curves.png", BLUE) > 60
    plot_losses(short / "metrics.jsonl", home / "loss.png", title="t")
    assert pixels(home / "loss.png", "#4c72b0") > 60


def configure(run: Path, **data: str) -> RunConfig:
    """Give a run a config, a tokenizer and an identity. data: fields of its `DataConfig`, "text" its fingerprint."""
    identity = data.pop("text", "f")
    settings = DataConfig(**({"tokenizer": "byte"} | data))
    config = RunConfig(model=MODEL, data=settings, train=TrainConfig(steps=60))
    (run / "config.json").write_text(json.dumps({"format_version": 1, **to_plain(config)}))
    (run / "data.json").write_text(json.dumps([{"fingerprint": identity, "raw": ""}]))
    tokenizer = CharTokenizer(data["tokenizer"]) if "tokenizer" in data else ByteTokenizer()
    tokenizer.save(run / "tokenizer.json")
    return config


def test_nats_of_different_tokenizers_are_refused_and_bits_per_byte_are_the_default(home: Path, capsys) -> None:
    for name, spec in (("first", "abc"), ("second", "abcd")):
        make(home / "runs" / f"{name}-bits", bits_per_byte=2.0)
        configure(home / "runs" / f"{name}-bits", tokenizer=spec, source="stdlib", text="same")
    runs = ["plot", "first-bits", "second-bits"]
    for y in ("loss", "held_out_loss", "perplexity"):
        assert main([*runs, "--y", y]) == 2
        assert (
            f"--y {y}: the runs have different tokenizers (abc on stdlib, abcd on stdlib), and nats per token of "
            "different tokens cannot be compared: --y bits_per_byte\n"
        ) in capsys.readouterr().err
    assert main(runs) == 0
    assert "bits_per_byte of first-bits (stdlib, abc), second-bits (stdlib, abcd)\n" in capsys.readouterr().out
    assert main([*runs, "--y", "grad_norm"]) == 2  # they have none, and it may be compared
    assert "no run has it" in capsys.readouterr().err


def test_runs_of_other_texts_are_marked_unless_their_held_out_text_is_the_same(home: Path, capsys) -> None:
    for name, text in (("first", "a" * 64), ("second", "b" * 64)):
        configure(home / "runs" / name, source=f"/far/{name}.txt", text=text)
    assert main(["plot", "first", "second"]) == 0
    shown = capsys.readouterr().out
    assert "loss of first (first.txt, byte), second (second.txt, byte)\n" in shown
    assert "note: the runs may be of different texts (the cache no longer has them), so their losses do not" in shown
    for text, hashed in (("a", "1"), ("b", "2")):
        folder = home / "cache/data" / text
        folder.mkdir(parents=True)
        meta = {"fingerprint": text * 64, "files": {"held_out.txt": {"sha256": hashed}}}
        (folder / "meta.json").write_text(json.dumps(meta))
    assert main(["plot", "first", "second"]) == 0
    assert "note: the runs are of different texts, so their losses do not show" in capsys.readouterr().out
    (folder / "meta.json").write_text(json.dumps(meta | {"files": {"held_out.txt": {"sha256": "1"}}}))
    assert main(["plot", "first", "second"]) == 0
    assert capsys.readouterr().out == "curves.png: loss of first, second\n"


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
