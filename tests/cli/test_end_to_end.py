"""The commands as a user types them: train, lose the end, resume, generate, evaluate. Two of them in a new process."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from swamla.cli import main

TEXT = "".join(f"line {i}: the square of {i} is {i * i}, its half is {i // 2}\n" for i in range(400))
FLAGS = shlex.split(
    "--data text.txt --tokenizer byte --held_out_fraction 0.1 --width 32 --n_heads 2 --n_layers 4 --swa_window 16 "
    "--mla_kv_lora_rank 16 --mla_qk_nope_head_dim 8 --mla_qk_rope_head_dim 8 --mla_v_head_dim 8 --batch_size 4 "
    "--block_size 64 --steps 8 --max_minutes none --eval_seconds none --eval_interval 4 --save_interval 3 "
    "--log_interval 1 --threads 1"
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def swamla(folder: Path, *arguments: str) -> Ended:
    """Run a command in `folder`, in this process, which has torch already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.environ["SWAMLA_CACHE"] = str(folder / "cache")
        status = main(arguments)
    return Ended(status, out.getvalue(), err.getvalue())


def shell(folder: Path, command: str) -> Ended:
    """Run a command line in `folder`, in a process of its own."""
    environment = os.environ | {"SWAMLA_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and in runs/quickstart what `swamla quickstart` made of it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text(TEXT)
    done = shell(folder, shlex.join([sys.executable, "-m", "swamla", "quickstart", *FLAGS]))
    assert done.returncode == 0, done.stderr
    (folder / "shown.txt").write_text(done.stdout)
    return folder


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, float]]:
    """What a run measured, without the clock."""
    return [{k: v for k, v in r.items() if k not in ("elapsed", "tokens_per_second")} for r in records(run)]


def test_quickstart_leaves_a_whole_run_and_shows_it_against_gzip_and_xz(home: Path) -> None:
    run, shown = home / "runs/quickstart", (home / "shown.txt").read_text()
    for name in ("config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "samples.txt", "checkpoints"):
        assert (run / name).exists(), name
    samples = (run / "samples.txt").read_text()
    assert "before training" in samples
    assert "after training" in samples
    assert all(word in shown for word in ("gzip -9", "xz -9e", "bits per byte", "after training", "holds config.json"))
    assert [r["step"] for r in records(run) if "loss" in r] == list(range(1, 9))


def test_the_commands_that_quickstart_recommends_work_as_printed(home: Path) -> None:
    lines = (home / "shown.txt").read_text().split("Next:\n")[1].splitlines()
    generate, evaluate, train = (line.strip() for line in lines if line.startswith("  "))
    assert shell(home, generate).returncode == 0
    program, _, arguments = evaluate.partition(" -m swamla ")
    assert swamla(home, *shlex.split(arguments)).returncode == 0
    # The third would train for minutes: the model it would train can be counted, and its run be named.
    assert train.startswith(f"{program} -m swamla train quickstart ")
    flags, _, name = train.partition(" train quickstart ")[2].partition(" --run_name ")
    assert swamla(home, "info", "quickstart", *shlex.split(flags)).returncode == 0
    assert name == Path(name).name


def test_a_second_run_does_not_touch_the_first_and_is_the_same_to_the_bit(home: Path) -> None:
    before = (home / "runs/quickstart/metrics.jsonl").read_bytes()
    done = swamla(home, "train", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert (home / "runs/quickstart/metrics.jsonl").read_bytes() == before
    assert timeless(home / "runs/quickstart-2") == timeless(home / "runs/quickstart")


def test_a_run_that_lost_its_end_resumes_to_the_same_numbers(home: Path) -> None:
    done = swamla(home, "train", *FLAGS, "--output_dir", "cut", "--keep_last", "9")
    assert done.returncode == 0, done.stderr
    whole = timeless(home / "cut")
    for step in (6, 8):  # as if the power had failed after step 5: the last checkpoint is that of step 4 or 3
        for file in (home / f"cut/checkpoints/step-{step:08d}").glob("*"):
            file.unlink()
        (home / f"cut/checkpoints/step-{step:08d}").rmdir()
    done = swamla(home, "train", "--resume", "cut")
    assert done.returncode == 0, done.stderr
    assert "resumed after step 4" in done.stdout
    assert timeless(home / "cut") == whole
    refused = swamla(home, "train", "--resume", "cut", "--width", "64")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "model.width = 64" in refused.stderr


def test_generation_streams_one_prompt_and_prints_several_alike(home: Path) -> None:
    ask = ("generate", "runs/quickstart", "--max_new_tokens", "12", "--seed", "3")
    alone = swamla(home, *ask, "--prompt", "line 7", "--stats")
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("line 7")
    assert "tokens/s" in alone.stderr
    batch = swamla(home, *ask, "--prompt", "line 7", "--prompt", "the square")
    assert batch.returncode == 0, batch.stderr
    assert f"--- 0\n{alone.stdout}" in batch.stdout
    assert "--- 1\nthe square" in batch.stdout


def test_evaluation_scores_the_runs_own_held_out_text_and_other_text(home: Path) -> None:
    done = swamla(home, "evaluate", "runs/quickstart", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    best = min(r["held_out_loss"] for r in records(home / "runs/quickstart") if "held_out_loss" in r)
    assert found["loss"] == pytest.approx(best, rel=1e-2)  # training may have evaluated in bf16 too, in other batches
    (home / "other.txt").write_text("0123456789" * 300)
    other = swamla(home, "evaluate", "runs/quickstart", "--data", "other.txt")
    assert other.returncode == 0, other.stderr
    assert "bits per byte" in other.stdout


def test_a_damaged_checkpoint_ends_with_status_3(home: Path) -> None:
    done = swamla(home, "train", *FLAGS, "--output_dir", "damaged", "--steps", "2")
    assert done.returncode == 2  # --steps twice
    flags = [flag if flag != "8" else "2" for flag in FLAGS]
    assert swamla(home, "train", *flags, "--output_dir", "damaged").returncode == 0
    for file in (home / "damaged/checkpoints").glob("step-*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    done = swamla(home, "generate", "damaged")
    assert done.returncode == 3, done.stderr
    assert "truncated" in done.stderr
