"""What a run tells: programs read metrics.jsonl, people a line or a bar."""

import io
import json
import math

import pytest
from rich.console import Console

from swamla.errors import CorruptError
from swamla.train.plot import plot_losses, smooth
from swamla.train.tracking.display import PlainLines, ProgressBar, make_display, time_left
from swamla.train.tracking.metrics import Metrics, drop_records_after, read_metrics

VALUES = {"step": 100, "loss": 3.45671, "bits_per_byte": 1.234, "lr": 1e-4, "tokens_per_second": 45123.4}


def test_plain_lines_are_as_promised():
    out = io.StringIO()
    display = make_display(Console(file=out), 50)
    assert isinstance(display, PlainLines)
    with display:
        display.update(0.5, 60, VALUES)
        display.update(0.5, 60, VALUES | {"step": 101})
        display.update(0.5, 60, VALUES | {"step": 102})
        display.update(1.0, 60, VALUES | {"step": 103})
    expected = "Step 100 | Loss: 3.4567 | LR: 1.00e-04 | Tokens/sec: 45,123 | Bits/byte: 1.2340 | 1:00 left\n"
    assert out.getvalue() == expected + expected.replace("100", "103").replace("1:00", "0:00")


def test_the_last_step_of_a_run_that_ends_by_time_is_said_at_its_end():
    out = io.StringIO()
    with make_display(Console(file=out), 50) as display:
        display.update(0.98, 60, VALUES | {"step": 100})
        display.update(0.99, 60, VALUES | {"step": 101})
        display.say("Step 101 | Held-out loss: 3.1")
    begun = [text.split(":")[0].rpartition(" | ") for text in out.getvalue().splitlines()]
    assert [(step, what) for step, _, what in begun] == [
        ("Step 100", "Loss"),
        ("Step 101", "Loss"),
        ("Step 101", "Held-out loss"),
    ]


@pytest.mark.parametrize(
    ("progress", "seconds", "text"),
    [(0.25, 60, "3:00"), (0.5, 59.7, "1:00"), (0.01, 180, "4:57:00"), (1.2, 9, "0:00"), (0.0, 9, "0:00")],
)
def test_the_time_left_is_what_the_pace_so_far_lets_expect(progress, seconds, text):
    assert time_left(progress, seconds) == f"{text} left"


def test_a_terminal_gets_one_live_line_with_loss_speed_and_time_left():
    out = io.StringIO()
    display = make_display(Console(file=out, force_terminal=True, width=140, color_system=None), 50)
    assert isinstance(display, ProgressBar)
    with display:
        display.update(0.25, 60, VALUES)
        display.say("Step 100 | Held-out loss: 3.1")
    text = out.getvalue()
    assert "step 100  loss 3.457  1.234 bits/byte  45,123 tok/s" in text
    assert "3:00 left" in text
    assert "Held-out loss: 3.1" in text


def test_metrics_are_valid_json_whatever_the_numbers(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 5})
    metrics.close()
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5}


def test_floats_come_back_to_the_bit(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write(1, {"loss": 0.1 + 0.2})
    assert read_metrics(tmp_path / "m.jsonl")[0]["loss"] == 0.1 + 0.2


def test_resuming_keeps_what_came_before_the_checkpoint_and_drops_a_cut_line(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_records_after(file, 2)
    metrics = Metrics(file)
    metrics.write(3, {"again": True})
    metrics.close()
    assert read_metrics(file) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize("line", ["{", "3", "{}", '{"step": "1"}', "\xff"])
def test_a_damaged_line_is_a_corrupt_artefact_with_its_place(tmp_path, line):
    file = tmp_path / "m.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n', encoding="latin-1")
    with pytest.raises(CorruptError, match=r"m\.jsonl:2: not"):
        read_metrics(file)


def test_smoothing_keeps_constants_and_slopes_and_averages_noise():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    falling = [float(100 - i) for i in range(101)]
    assert smooth(falling)[:97] == pytest.approx(falling[:97])  # no lag; only the very end has no neighbours after it
    noisy = smooth([3.0 + (-1) ** i for i in range(1000)])
    assert max(abs(v - 3.0) for v in noisy[500:]) < 0.05


def test_a_picture_is_drawn_without_held_out_points_and_none_without_records(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text("")
    plot_losses(file, tmp_path / "none.png", title="t")
    assert not (tmp_path / "none.png").exists()
    file.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    plot_losses(file, tmp_path / "some.png", title="t")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bits", [True, False])
def test_a_picture_has_each_text_in_the_bits_of_its_own_bytes_or_all_in_nats(tmp_path, monkeypatch, bits):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, _: drawn.append(figure.axes))
    held_out = {"held_out_loss": 2.5} | ({"held_out_bits_per_byte": 0.679} if bits else {})
    records = [{"step": 1, "loss": 3.0, "bits_per_byte": 2.9}, {"step": 2, **held_out}]
    file = tmp_path / "m.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_losses(file, tmp_path / "some.png", title="t")
    (axes,) = drawn[0]
    training, _, evaluations = (list(line.get_ydata()) for line in axes.lines)
    assert (training, evaluations) == (([2.9], [0.679]) if bits else ([3.0], [2.5]))
    assert axes.get_ylabel() == ("bits per byte" if bits else "loss (nats per token)")
