"""What `swamla train` ends with: a sample, what its figures mean, and commands that work as printed."""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from swamla.cli import train as command
from swamla.data.caching import remembered_runs
from tests.cli.test_end_to_end import FLAGS, TEXT, Ended, records, swamla

FEW = re.compile(r"the model saw ([\d,]+) tokens: ([\d.]+) per parameter, .*, ([\d.]+) times its text")


def train(folder: Path, *flags: str, **changed: str) -> Ended:
    """A run of a few steps, with flags that change or follow those of FLAGS."""
    (folder / "text.txt").write_text(TEXT)
    words = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True)) | {f"--{name}": value for name, value in changed.items()}
    return swamla(folder, "train", *(word for pair in words.items() for word in pair), *flags)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a finished run in "two words", and what its training printed."""
    folder = tmp_path_factory.mktemp("afterwards")
    done = train(folder, "--output_dir", "two words")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_training_ends_with_a_sample_that_continues_held_out_words(home: tuple[Path, str]) -> None:
    folder, shown = home
    prompt, sample = re.search(r"=== a sample: '(.*)' continued ===\n(.*)", shown, re.DOTALL).groups()  # type: ignore[union-attr]
    assert sample.startswith(prompt)
    assert len(sample) > 60
    held_out = (folder / "text.txt").read_text()[int(0.9 * len(TEXT)) :]
    assert prompt in held_out
    assert prompt.startswith("line "), "the first whole line"


def test_training_says_in_one_line_what_its_held_out_figures_mean(home: tuple[Path, str]) -> None:
    folder, shown = home
    evaluations = [record for record in records(folder / "two words") if "held_out_loss" in record]
    best = min(evaluations, key=lambda record: record["held_out_loss"])
    (line,) = (line for line in shown.splitlines() if line.startswith("Held out: "))
    which = f" in step {best['step']}, which" if best is not evaluations[-1] else ": the cost"
    assert f"{best['held_out_bits_per_byte']:.3f} bits per byte{which}" in line
    assert f"the loss ({best['held_out_loss']:.3f} nats per token)" in line
    assert "minutes the model saw" not in shown, "its steps ended it"
    assert remembered_runs(folder / "cache") == [folder / "two words"], "swamla cache knows that it needs its data"


def test_the_commands_that_training_recommends_work_as_printed(home: tuple[Path, str]) -> None:
    folder, shown = home
    lines = [line for line in shown.split("Next:\n")[1].splitlines() if line]
    assert all(line.startswith("  ") for line in lines)
    generate, evaluate, longer = (shlex.split(line.partition(" -m swamla ")[2]) for line in lines)
    assert [words[0] for words in (generate, evaluate, longer)] == ["generate", "evaluate", "train"]
    for words in (generate, evaluate, longer):
        done = swamla(folder, *words)
        assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(folder / "two words") if "loss" in record] == list(range(1, 17))
    finished = swamla(folder, "train", "--resume", "two words")
    assert "the run is finished: 16 of 16 steps; to extend it: --resume 'two words' --steps 32" in finished.stdout
    assert "Next:" not in finished.stdout


def test_a_run_that_its_minutes_ended_says_how_little_it_saw_and_how_to_go_on(tmp_path: Path) -> None:
    done = train(tmp_path, "--output_dir", "short", steps="none", max_minutes="0.02", eval_interval="none")
    assert done.returncode == 0, done.stderr
    tokens, ratio, epochs = FEW.search(done.stdout).groups()  # type: ignore[union-attr]
    seen = max(record["tokens"] for record in records(tmp_path / "short") if "tokens" in record)
    assert int(tokens.replace(",", "")) == seen
    parameters = int(re.search(r"([\d,]+) parameters, ", done.stdout)[1].replace(",", ""))  # type: ignore[index]
    assert float(ratio) == pytest.approx(seen / parameters, rel=0.05)
    assert float(epochs) == pytest.approx(seen / (int(0.9 * len(TEXT)) + 1), rel=0.05)
    go_on = "train --resume short --max_minutes 0.04 --schedule_minutes 0.04"
    assert done.stdout.count(go_on) == 2
    assert swamla(tmp_path, *go_on.split()).returncode == 0
    assert max(record["step"] for record in records(tmp_path / "short")) > seen // 256


def test_a_run_that_a_signal_stopped_ends_with_the_command_that_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluation(*_: object) -> object:
        def stopped(model: object) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return {"loss": 1.0}

        return stopped

    monkeypatch.setattr(command, "validation", evaluation)
    done = train(tmp_path, "--output_dir", "stopped")
    assert done.returncode == 75
    assert done.stderr.endswith(" -m swamla train --resume stopped\n")
    assert "Next:" not in done.stdout
    assert "=== a sample" not in done.stdout


def test_a_model_of_few_learned_positions_has_a_sample_and_a_command_that_goes_on_too(tmp_path: Path) -> None:
    changed = {"pattern": "mha", "learned_positions": "16", "block_size": "16", "steps": "1", "output_dir": "few"}
    (tmp_path / "text.txt").write_text(TEXT)
    words = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True)) | {f"--{name}": value for name, value in changed.items()}
    words = {name: value for name, value in words.items() if not name.startswith(("--swa", "--mla"))}
    done = swamla(tmp_path, "train", *(word for pair in words.items() for word in pair))
    assert done.returncode == 0, done.stderr
    assert "=== a sample: 'line " in done.stdout
    generate = next(line for line in done.stdout.splitlines() if " generate few " in line)
    assert swamla(tmp_path, *shlex.split(generate.partition(" -m swamla ")[2])).returncode == 0
    assert "--crop" in generate


def test_a_run_without_an_evaluation_that_counts_has_no_sample_and_all_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "validation", lambda *_: lambda model: {"loss": float("nan")})
    done = train(tmp_path, "--output_dir", "lost", steps="1")
    assert done.returncode == 0, done.stderr
    assert "=== a sample" not in done.stdout
    assert "Held out: " not in done.stdout
    assert done.stdout.rstrip().endswith("train --resume lost --steps 2 --schedule_steps 2")
    assert json.loads((tmp_path / "lost/config.json").read_text())["train"]["steps"] == 1
