"""The commands as a user types them: train, lose the end, resume, generate, evaluate. Two of them in a new process."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from swamla.cli import main
from swamla.data import hub
from tests.waiting import PATIENCE, after_start, running, until

TEXT = "".join(f"line {i}: the square of {i} is {i * i}, its half is {i // 2}\n" for i in range(400))
FLAGS = shlex.split(
    "--data text.txt --tokenizer byte --held_out_fraction 0.1 --width 32 --n_heads 2 --n_layers 4 --swa_window 16 "
    "--mla_kv_lora_rank 16 --mla_qk_nope_head_dim 8 --mla_qk_rope_head_dim 8 --mla_v_head_dim 8 --batch_size 4 "
    "--block_size 64 --steps 8 --max_minutes none --eval_seconds none --eval_interval 4 --save_interval 3 "
    "--log_interval 1 --threads 1"
)


CLOCK = ("elapsed", "tokens_per_second", "mfu", "peak_memory")  # what depends on the machine and its moment


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def swamla(folder: Path, *arguments: str, terminal: bool = False, command: str = "") -> Ended:
    """Run a command in `folder`, in this process, which has torch already."""
    out, err = Terminal() if terminal else io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.environ["SWAMLA_CACHE"] = str(folder / "cache")
        status = main(arguments, command)
    return Ended(status, out.getvalue(), err.getvalue())


def shell(folder: Path, command: str) -> Ended:
    """Run a command line in `folder`, in a process of its own."""
    environment = os.environ | {"SWAMLA_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return Ended(done.returncode, done.stdout, after_start(done.stderr))


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
    """What a run measured, without the machine's part."""
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in records(run)]


def test_quickstart_leaves_a_whole_run_and_shows_it_against_gzip_and_xz(home: Path) -> None:
    run, shown = home / "runs/quickstart", (home / "shown.txt").read_text()
    for name in ("config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "samples.txt", "checkpoints"):
        assert (run / name).exists(), name
    samples = (run / "samples.txt").read_text()
    assert "before training" in samples
    assert "after training" in samples
    assert all(word in shown for word in ("gzip -9", "xz -9e", "bits per byte", "after training", "has config.json"))
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


def test_generation_does_not_show_the_prompt_of_a_refused_request(home: Path) -> None:
    done = swamla(home, "generate", "runs/quickstart", "--prompt", "abc\ud800")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "swamla: error: the prompt has a lone surrogate at position 3: it is not valid Unicode text\n"
    )


def test_what_is_said_of_an_interrupted_generation_begins_a_line_of_its_own(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, on_text: Callable[[int, str], None], **__: object) -> None:
        on_text(0, " is")
        raise KeyboardInterrupt

    monkeypatch.setattr("swamla.cli.generate.generate_text", interrupted)
    assert main(["generate", str(home / "runs" / "quickstart"), "--prompt", "line"]) == 130
    assert capsys.readouterr() == ("line is\n", "swamla: interrupted\n")


def test_a_terminal_is_not_shown_control_characters(home: Path) -> None:
    ask = ("generate", "runs/quickstart", "--prompt", "\x1b[31mline", "--max_new_tokens", "1")
    assert swamla(home, *ask).stdout.startswith("\x1b[31mline")
    assert swamla(home, *ask, terminal=True).stdout.startswith("\N{REPLACEMENT CHARACTER}[31mline")


def test_generation_stops_at_the_last_position_or_names_the_number_that_fits(home: Path) -> None:
    pairs = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True))
    pairs = {name: value for name, value in pairs.items() if not name.startswith(("--swa", "--mla"))}
    pairs |= {"--pattern": "mha", "--learned_positions": "64", "--steps": "1", "--output_dir": "short"}
    done = swamla(home, "train", *(part for pair in pairs.items() for part in pair))
    assert done.returncode == 0, done.stderr
    prompt = ("generate", "short", "--prompt", "line ")
    done = swamla(home, *prompt, "--stats")
    assert done.returncode == 0, done.stderr
    assert "at most 59 tokens: the model has no more positions" in done.stderr  # 64 - 6 read, 1 not read back
    assert swamla(home, *prompt, "--max_new_tokens", "59").returncode == 0
    refused = swamla(home, *prompt, "--max_new_tokens", "60")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "--max_new_tokens 59, or a shorter prompt" in refused.stderr
    refused = swamla(home, "generate", "short", "--prompt", "x" * 64)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "the prompt has 65 tokens, the document's start included" in refused.stderr
    assert "shorten it by 1" in refused.stderr


def test_evaluation_scores_the_runs_own_held_out_text_and_other_text(home: Path, tmp_path: Path) -> None:
    done = swamla(home, "evaluate", "runs/quickstart", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    best = min(r["held_out_loss"] for r in records(home / "runs/quickstart") if "held_out_loss" in r)
    assert found["loss"] == pytest.approx(best, rel=1e-2)  # training may have evaluated in bf16 too, in other batches
    assert found["precision"] in ("fp32", "bf16")
    elsewhere = swamla(tmp_path, "evaluate", str(home / "runs/quickstart"), "--json")
    assert json.loads(elsewhere.stdout) == found
    (home / "other.txt").write_text("0123456789" * 300)
    other = swamla(home, "evaluate", "runs/quickstart", "--data", "other.txt")
    assert (other.returncode, other.stderr) == (0, "scoring 3,001 tokens, 3,000 bytes of text …\n")
    assert "bits per byte" in other.stdout
    assert f"3,000 bytes: all of other.txt, in {found['precision']}" in other.stdout


def test_evaluation_keeps_the_runs_tokenizer_when_the_text_changes_and_says_that_it_changed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("@" + TEXT)
    flags = ["char" if flag == "byte" else flag for flag in FLAGS]
    assert swamla(tmp_path, "train", *flags, "--output_dir", "run").returncode == 0
    before = json.loads(swamla(tmp_path, "evaluate", "run", "--json").stdout)
    # What is held out, the end, stays as it was; but a vocabulary made anew would lack @ and count all letters anew.
    (tmp_path / "text.txt").write_text("a" + TEXT)
    done = swamla(tmp_path, "evaluate", "run", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == before
    assert done.stderr.startswith("swamla: warning: ")
    assert "text.txt changed (or was copied) since the run began: using its prepared tokens in " in done.stderr
    assert done.stderr.count("\n") == 1
    (tmp_path / "text.txt").write_text("☃" + TEXT)
    done = swamla(tmp_path, "evaluate", "run", "--data", "text.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "character '☃' at offset 0 is not among the" in done.stderr


def test_prepared_text_is_what_a_training_with_the_same_flags_reads(home: Path) -> None:
    (home / "rows.jsonl").write_text("".join(json.dumps({"body": f"{line}\n"}) + "\n" for line in TEXT.splitlines()))
    ask = ("prepare", "rows.jsonl", "--tokenizer", "byte", "--cache_dir", "own-cache")
    done = swamla(home, *ask)
    assert done.returncode == 2
    assert "body" in done.stderr
    done = swamla(home, *ask, "--text_column", "body")
    assert done.returncode == 0, done.stderr
    assert "utilisation" in done.stdout
    assert "100.00% of the positions in 1,024 rows of 256 carry loss" in done.stdout
    assert len(list((home / "own-cache/data").iterdir())) == 1
    (home / "recipe.json").write_text((home / "runs/quickstart/config.json").read_text())
    known = set((home / "cache/data").iterdir())
    as_trained = swamla(home, "prepare", "recipe.json")
    assert as_trained.returncode == 0, as_trained.stderr
    (trained,) = json.loads((home / "runs/quickstart/data.json").read_text())
    assert trained["fingerprint"][:16] in as_trained.stdout
    assert set((home / "cache/data").iterdir()) == known


def test_a_text_given_to_prepare_is_kept_in_the_place_of_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.txt").write_text(TEXT)
    done = swamla(tmp_path, "prepare", "shakespeare-char", "--source", "other.txt")
    assert done.returncode == 0, done.stderr
    assert "other.txt is not the text of shakespeare-char: train on it with --data other.txt" in done.stdout
    assert not (tmp_path / "cache/sources").exists()
    monkeypatch.setattr(hub, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    done = swamla(tmp_path, "prepare", "shakespeare-char", "--source", "other.txt")
    assert done.returncode == 0, done.stderr
    again = swamla(tmp_path, "prepare", "shakespeare-char")  # no test may download: it is found
    assert again.returncode == 0, again.stderr
    lines = done.stdout.splitlines()
    assert again.stdout.splitlines() == [line for line in lines if not line.startswith("encoded ")]
    assert "source           shakespeare" in again.stdout


def test_resume_alone_means_the_newest_run_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    few = ["2" if flag == "8" else flag for flag in FLAGS]
    for _ in range(2):
        assert swamla(tmp_path, "train", *few).returncode == 0
    (tmp_path / "runs/quickstart-notes").mkdir()
    (tmp_path / "runs/quickstart-notes/config.json").write_text("{}")
    done = swamla(tmp_path, "train", "--resume", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert "in runs/quickstart-2" in done.stdout
    assert [r["step"] for r in records(tmp_path / "runs/quickstart-2") if "loss" in r] == [1, 2, 3]
    assert [r["step"] for r in records(tmp_path / "runs/quickstart") if "loss" in r] == [1, 2]


def test_a_quickstart_that_is_terminated_saves_and_is_finished_by_the_command_it_names(home: Path) -> None:
    run = home / "stopped run"
    flags = list(FLAGS)
    flags[flags.index("--steps") + 1] = "100000"
    command = [sys.executable, "-m", "swamla", "quickstart", *flags, "--output_dir", run.name]
    environment = os.environ | {"SWAMLA_CACHE": str(home / "cache")}
    with running(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until(lambda: process.poll() is not None or len(records(run)) > 3)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, error
    requested, stopped = after_start(error).splitlines()
    assert requested.startswith("swamla: stop requested (SIGTERM): ")
    assert stopped.startswith("swamla: stopped by SIGTERM after step ")
    before = (run / "samples.txt").read_text()
    assert "after training" not in before
    go_on = stopped.partition("; go on with: ")[2]
    assert go_on.endswith("-m swamla quickstart --resume 'stopped run'")
    done = swamla(home, *shlex.split(go_on)[3:], "--steps", str(int(records(run)[-1]["step"]) + 2))
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("resumed after step", "xz -9e", "after training", "has config.json"))
    assert (run / "samples.txt").read_text().startswith(before)
    assert (run / "samples.txt").read_text().count("=== after training ===") == 1


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer adamw", "train.optimizer = 'adamw' (--optimizer): the run to resume had 'muon'; start a new run"),
        ("--optimizer lion", "train.optimizer = 'lion' (--optimizer): the run to resume had 'muon'"),
        (
            "--local_mixer swa",
            "model.pattern = ['swa', 'swa', 'swa', 'mla'] (--local_mixer swa): the run to resume",
        ),
        ("--norm dyt --width 64", "model.norm = 'dyt' (--norm): the run to resume had 'rmsnorm'"),
        ("--mla_ffn moe", "model.blocks.mla.ffn = 'moe' (--mla_ffn): the run to resume had 'dense'"),
        ("--swa_window 8", "model.blocks.swa.mixer.window = 8 (--swa_window): the run to resume had 16"),
        ("--batch_size 8", "train.batch_size = 8 (--batch_size): the run to resume"),
        ("small", "small is another model than that of the run runs/quickstart: leave small out to continue the run"),
        ("medium", "medium is another model than that of the run runs/quickstart: leave medium out"),
    ],
)
def test_what_would_make_another_run_of_it_is_refused_by_its_flag_before_data_is_read(
    flags: str, message: str, home: Path
) -> None:
    done = swamla(home, "train", *flags.split(), "--resume", "runs/quickstart")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"swamla: error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message", "note"),
    [
        (
            "--optimizer_type fp8_lion",
            "train.optimizer = 'lion' (--optimizer): the run to resume had 'muon'",
            "swamla: --optimizer_type is --optimizer of swamla train\n",
        ),
        (
            "--use_moe",
            "model.blocks.mla.ffn = 'moe' (--mla_ffn): the run to resume had 'dense'",
            "swamla: --use_moe is --mla_ffn of swamla train\n",
        ),
        ("--gradient_accumulation_steps 2", "train.batch_size = 8 (--batch_size): the run to resume", ""),
        ("--size medium", "medium is another model than that of the run runs/quickstart: leave medium out", ""),
    ],
)
def test_the_same_is_refused_in_the_flags_of_the_original_and_told_in_ours(
    flags: str, message: str, note: str, home: Path
) -> None:
    done = swamla(home, *flags.split(), "--resume_from", "runs/quickstart", command="original")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"swamla: error: {message}")
    assert done.stderr.partition("\n")[2] == note


def test_a_recipe_and_flags_that_give_the_runs_own_model_go_on_with_it(home: Path) -> None:
    shutil.copytree(home / "runs/quickstart", home / "same")
    flags = list(FLAGS)
    flags[flags.index("--steps") + 1] = "9"
    flags[flags.index("--log_interval") + 1] = "5"
    done = swamla(home, "train", "quickstart", *flags, "--resume", "same")
    assert done.returncode == 0, done.stderr
    assert "resumed after step 8" in done.stdout
    assert "\nStep 9 | Loss: " in done.stdout  # the last step, though not one of every five


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "mine", "--max_new_tokens", "2"),
        ("evaluate", "mine"),
        ("info", "mine"),
        ("checkpoint", "list", "mine"),
        ("export", "mine", "out"),
        ("train", "--resume", "mine"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_finds_a_run_by_its_name_as_runs_lists_it(home: Path, words: tuple[str, ...]) -> None:
    if not (home / "runs/mine").exists():
        shutil.copytree(home / "runs/quickstart", home / "runs/mine")
    done = swamla(home, *words)
    assert "mine: not a run folder" not in done.stderr
    assert done.returncode == 0, done.stderr
    nobody = swamla(home, *(word.replace("mine", "nobodys") for word in words))
    assert nobody.returncode == 2
    assert "nobodys" in nobody.stderr
