"""What a user sees while waiting: a first line at once, the progress of preparing, lines where no live one can be."""

import gzip
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from swamla import cli
from swamla.cli import main
from swamla.cli.console import Console
from swamla.cli.progress import FIRST, progress_line, shown_progress
from swamla.data.config import DataConfig
from swamla.data.preparing import prepare
from swamla.train.tracking.display import PlainLines, ProgressBar, make_display
from tests.waiting import PATIENCE, running

SWAMLA = [sys.executable, "-m", "swamla"]
TRAIN = shlex.split(
    "train --data text.txt --tokenizer byte --held_out_fraction 0.1 --pattern swa --width 16 --n_heads 2 --steps 3 "
    "--max_minutes none --eval_seconds none --batch_size 2 --block_size 16 --log_interval 1 --threads 1"
)
# A torch whose import takes as long as on a slow disk; everything else that a command imports comes after it.
SLOW_TORCH = "import time, pathlib\npathlib.Path('begun').touch()\ntime.sleep(600)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"line {i}, which is {i * i}\n\n" for i in range(300)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_first_line_does_not_wait_for_torch(command: str, folder: Path) -> None:
    (folder / "slow").mkdir()
    (folder / "slow" / "torch.py").write_text(SLOW_TORCH)
    path = os.pathsep.join([str(folder / "slow"), os.environ["PYTHONPATH"]])
    with running(
        [*SWAMLA, command, "x"], env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"swamla {command}: starting, loading torch …\n"
        process.kill()
        assert process.stdout is not None
        assert process.stdout.read() == ""  # which is for a command's results


def test_a_terminal_erases_that_line_and_json_stays_json(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*SWAMLA, "info", "quickstart", "--json"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"}, check=True
    )
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    assert said == "swamla info: starting, loading torch …\r\x1b[K"
    assert json.loads(done.stdout)["name"] == "quickstart"


def test_help_needs_no_torch_and_half_a_second_at_most() -> None:
    code = (
        "import resource, sys; from swamla.cli import main; main(['--help']); "
        "used = resource.getrusage(resource.RUSAGE_SELF); print('torch' in sys.modules, used.ru_utime + used.ru_stime)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr == b""
    has_torch, seconds = done.stdout.split()[-2:]
    assert (has_torch, float(seconds) < 0.5) == (b"False", True)  # of the processor, which other work does not change


def test_progress_has_the_total_and_the_time_left() -> None:
    assert progress_line("encoding", 573, 4_500_000, 0.45, 9.0) == (
        "encoding: 45% of about 10.0 MB, 573 documents, 0:11 left"
    )
    assert progress_line("encoding, unit 0 of 9", 0, 0, 0.0, 1.0) == "encoding, unit 0 of 9: 0%"
    assert progress_line("encoding", 1, 10, 1.0, 1.0) == "encoding: 100% of about 10 B, 1 document, 0:00 left"
    assert progress_line("joining the units", 0, 0, None, 1.0) == "joining the units …"
    assert progress_line("training the tokenizer", 7, 2_000, None, 1.0) == (
        "training the tokenizer: 2.00 kB, 7 documents …"
    )


def test_where_no_line_can_be_erased_progress_is_occasional_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr("swamla.cli.progress._clock", lambda: now[0])
    with shown_progress(Console(file=out)) as progress:
        for step in range(300):  # half a minute, ten calls a second
            now[0] = step / 10
            progress("reading for the tokenizer" if step < 100 else "encoding", step, 1000 * step, step / 300)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("reading for the tokenizer: 7% of about 300.0 kB, 20 documents, 0:28 left")
    assert lines[1].startswith("encoding: 40%")
    assert "\r" not in out.getvalue()
    quick = io.StringIO()
    with shown_progress(Console(file=quick)) as progress:
        now[0] += FIRST / 2
        progress("encoding", 1, 1, 1.0)
    assert quick.getvalue() == ""


def test_a_terminal_has_one_line_of_progress_which_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr("swamla.cli.progress._clock", lambda: now[0])
    console = Console(file=out, force_terminal=True, width=40, color_system=None)
    with shown_progress(console) as progress:
        for step in range(1, 30):
            now[0] = step / 10
            progress("encoding", step, 10 * step, step / 30)
    assert "encoding: 97% of about 300 B" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")
    assert max(len(line) for line in re.split(r"\x1b\[[0-9?]*[A-Za-z]|[\r\n]", out.getvalue())) <= 40


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz"])
def test_the_share_that_is_done_rises_to_one(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(5):
        text = "".join(f"{number} {i} some words\n" for i in range(50))
        raw = text if suffix == ".txt" else "".join(json.dumps({"text": row}) + "\n" for row in text.splitlines())
        data = gzip.compress(raw.encode()) if suffix.endswith("gz") else raw.encode()
        (folder / f"{number}{suffix}").write_bytes(data)
    told: list[tuple[str, int, int, float | None]] = []
    config = DataConfig(source=str(folder), tokenizer="bpe:300", held_out_fraction=0.3)
    prepare(config, progress=lambda *all_of_it: told.append(all_of_it))
    for stage in ("reading for the tokenizer", "encoding"):
        shares = [share for what, _, _, share in told if what == stage and share is not None]
        assert shares == sorted(shares)
        assert 0 < shares[0] <= shares[-1] <= 1
    assert [share for what, _, _, share in told if what == "encoding"][-1] == 1
    assert ("training the tokenizer", None) in [(what, share) for what, _, _, share in told]


def test_units_tell_their_share_before_the_first_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swamla.data.sources.UNIT_BYTES", 4000)
    rows = "".join(json.dumps({"text": f"{i} " + "word " * (i % 40)}) + "\n" for i in range(300))
    (tmp_path / "rows.jsonl").write_text(rows)
    told: list[tuple[str, float | None]] = []
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), tokenizer="byte")
    prepare(config, progress=lambda stage, documents, n_bytes, share: told.append((stage, share)), workers=1)
    count = len(told) - 2
    assert told == [(f"encoding, unit {done} of {count}", done / count) for done in range(count + 1)] + [
        ("joining the units", None)
    ]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm"}, {"TERM": "xterm", "FORCE_COLOR": "1"}])
@pytest.mark.parametrize("terminal", [True, False])
def test_step_lines_appear_where_no_live_line_can(
    environment: dict[str, str], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal, raising=False)
    live = terminal and environment["TERM"] != "dumb"
    assert isinstance(make_display(Console(file=out), 1), ProgressBar if live else PlainLines)


def test_training_on_a_dumb_terminal_says_every_step(folder: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "60"}
    with running([*SWAMLA, *TRAIN], stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
        except OSError:  # the other end is closed
            pass
        assert process.wait(timeout=PATIENCE) == 0
    os.close(ours)
    text = said.decode().replace("\r\n", "\n")
    assert "\x1b" not in text
    assert "\r" not in text
    assert [f"Step {step} | Loss" in text for step in (1, 2, 3)] == [True] * 3


def test_the_preamble_is_short_and_wrapped_at_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "60")
        assert main([*TRAIN, "--run_name", "a-run"]) == 0
    wrapped = capsys.readouterr().out
    preamble = wrapped.partition("Step 1 |")[0].splitlines()
    assert all(len(line) <= 60 or len(line.split("  ")[-1].split()) == 1 for line in preamble)  # a path is not broken
    assert main([*TRAIN, "--output_dir", "verbose", "--verbose"]) == 0
    verbose = capsys.readouterr().out
    assert main([*TRAIN, "--output_dir", "usual"]) == 0
    usual = capsys.readouterr().out
    facts = usual.partition("Step 1 |")[0]
    for said in ("runs/a-run", "source ", "train ", "held out ", "model: ", "parameters", "3 steps are 96 tokens"):
        assert said in wrapped
    for detail in ("document length", "fingerprint", "utilisation", "mfu is relative to"):
        assert detail in verbose
        assert detail not in usual
    assert len(facts.splitlines()) <= 12
    assert re.sub(r"\s+", " ", facts).replace("usual", "runs/a-run") == re.sub(
        r"\s+", " ", wrapped.partition("Step 1 |")[0]
    )
