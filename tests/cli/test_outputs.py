"""The program in a world that is not as it should be: closed outputs, no home, an old locale, signals, Windows."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swamla.cli import CLOSED_PIPE, main
from swamla.config import load_file
from tests.waiting import PATIENCE, after_start, running

SWAMLA = [sys.executable, "-m", "swamla"]
RECIPE = """[train]
steps = 5
[data]
tokenizer = 'byte'
[model]
width = 16
pattern = ["a"]
"""


def shell(line: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """What a shell makes of `line`, in which $SWAMLA is the program; its stderr begins after the starting line."""
    known = os.environ | {"SWAMLA": f"{sys.executable} -m swamla"} | environment
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=known, capture_output=True, check=False)
    done.stderr = after_start(done.stderr.decode()).encode()
    return done


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("$SWAMLA info quickstart >&-", 0, ""),
        ("$SWAMLA info quickstart >&- 2>&- <&-", 0, ""),
        ("$SWAMLA info nosuch 2>&-", 2, ""),
        ("$SWAMLA info quickstart > /dev/full", 2, "swamla: error: the system refuses to read or write: No space left"),
        ("set -o pipefail; $SWAMLA info quickstart | true", CLOSED_PIPE, ""),
        ("set -o pipefail; $SWAMLA info nosuch 2>&1 | true", 2, ""),
        ("set -o pipefail; $SWAMLA info quickstart 2>&1 >/dev/null | true", 0, ""),
    ],
)
def test_outputs_that_are_closed_full_or_left_end_without_a_traceback(line, status, said, tmp_path):
    done = shell(line, tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stderr.decode().startswith(said)
    assert done.stderr.count(b"\n") <= 1


def test_nothing_that_is_opened_is_given_the_number_of_a_closed_output(tmp_path):
    code = "from swamla.cli.outputs import open_outputs; open_outputs(); print(open('x', 'w').fileno())"
    done = shell(f'{sys.executable} -c "{code}" 0<&- 2>&-', tmp_path)
    assert int(done.stdout) > 2


OLD_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "line", ["$SWAMLA --help", "$SWAMLA info quickstart", "$SWAMLA train --help", "$SWAMLA doctor --help"]
)
def test_an_output_that_has_no_place_for_a_character_is_given_a_readable_one(line, tmp_path):
    done = shell(line, tmp_path, **OLD_LOCALE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert b"\\u" not in done.stdout


@pytest.mark.parametrize("environment", [{}, OLD_LOCALE], ids=["utf-8", "C"])
def test_a_name_that_is_no_text_is_told_as_it_can_be(environment, tmp_path):
    done = shell("$SWAMLA info $'caf\\xe9.toml'", tmp_path, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(b"swamla: error: caf\\udce9.toml: no such file")


def test_without_a_home_folder_it_is_said_what_to_set(tmp_path, monkeypatch, capsys):
    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 50)
    assert main(["prepare", "text.txt", "--tokenizer", "byte"]) == 2
    assert capsys.readouterr().err == "swamla: error: there is no home folder: set HOME, or SWAMLA_CACHE to a folder\n"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 50)
    assert main(["prepare", "text.txt", "--tokenizer", "byte", "--cache_dir", "/proc/cache"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swamla: error: /proc/cache")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["run.toml", "run.json"])
def test_a_recipe_with_a_byte_order_mark_or_windows_line_ends_reads_as_it_would_without(name, tmp_path):
    text = RECIPE if name == "run.toml" else '{"train": {\n"steps": 5}}\n'
    plain = tmp_path / name
    plain.write_text(text)
    expected, _ = load_file(plain)
    for head, end in ((b"\xef\xbb\xbf", "\n"), (b"", "\r\n"), (b"\xef\xbb\xbf", "\r\n")):
        plain.write_bytes(head + text.replace("\n", end).encode())
        found, place = load_file(plain)
        assert found == expected
        assert place("train.steps") == (f"{plain}:2" if name == "run.toml" else str(plain))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.toml", "[train]\nsteps = 5\n".encode("utf-16"), "not UTF-8 text (byte 0)"),
        ("run.json", '{"train": {}}'.encode("utf-16"), "not UTF-8 text (byte 0)"),
        ("run.json", b"[" * 100_000, "not JSON: maximum recursion depth"),
        ("run.toml", b"a = " + b"[" * 100_000, "not TOML"),
        ("run.json", b'{"train": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        ("run.toml", b"a = " + b"9" * 5000, "not TOML: Exceeds the limit"),
    ],
    ids=["utf-16 toml", "utf-16 json", "deep json", "deep toml", "long json number", "long toml number"],
)
def test_a_recipe_that_no_parser_reads_is_one_line(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert main(["info", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"swamla: error: {tmp_path / name}: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_before_anything_is_trained_ends_in_one_line_and_leaves_nothing(number, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 50)
    code = "import sys, time; from swamla.cli import running; from swamla.cli import main; "
    code += "running.prepare = lambda *_, **__: (print('reading', flush=True), time.sleep(1000)); "
    code += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--data", "text.txt", "--tokenizer", "byte"]
    with running(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "reading" not in process.stdout.readline():
            assert process.poll() is None
        assert (tmp_path / "runs" / "quickstart").is_dir()
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number
        line = f"stopped by {number.name}; no run was under way, the same command starts again"
        assert after_start(process.stderr.read()) == f"swamla: {line}\n"
    assert not (tmp_path / "runs").exists()


def test_what_nohup_ignores_stays_ignored(tmp_path):
    done = shell('trap "" HUP; $SWAMLA info quickstart & wait $!', tmp_path)
    assert done.returncode == 0
    code = "import os, signal; from swamla.cli import main; from swamla import cli; "
    code += "cli._dispatch = lambda argv: os.kill(os.getpid(), signal.SIGHUP) or 0; raise SystemExit(main([]))"
    done = shell(f'trap "" HUP; {sys.executable} -c "{code}"', tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


class RustPanic(BaseException):
    """As of libraries in Rust: no `Exception`."""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MemoryError(), 2, "out of memory"),
        (OSError(28, "No space left on device"), 2, "the system refuses to read or write: No space left on device"),
        (RustPanic("index out of bounds"), 1, "a bug in swamla: RustPanic: index out of bounds (--debug shows the "),
        (RecursionError("maximum recursion depth exceeded"), 1, "a bug in swamla: RecursionError: maximum"),
    ],
)
def test_whatever_is_raised_ends_in_one_line(error, status, line, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr("swamla.cli._dispatch", fail)
    assert main(["train"]) == status
    said = capsys.readouterr().err
    assert said.startswith(f"swamla: error: {line}")
    assert said.count("\n") == 1


WINDOWS = """
import signal, sys
sys.modules["fcntl"] = None  # what Python has on Windows
for name in ("SIGHUP", "SIGUSR1", "SIGPIPE", "SIGALRM"):
    delattr(signal, name)
"""


@pytest.mark.parametrize("command", ["train", "quickstart", "evaluate x", "generate x", "prepare x", "runs"])
def test_where_the_system_is_windows_every_command_says_so_in_one_line(command, tmp_path):
    code = f"{WINDOWS}\nfrom swamla.cli import main\nsys.exit(main({command.split()!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert after_start(done.stderr).startswith(
        "swamla: error: swamla runs on Linux and macOS: this Python has no fcntl, as on Windows"
    )
    assert after_start(done.stderr).count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "use", ["import swamla; swamla.load", "from swamla.train import train", "from swamla.data import prepare"]
)
def test_where_the_system_is_windows_the_library_says_so_too(use):
    done = subprocess.run([sys.executable, "-c", WINDOWS + use], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "swamla runs on Linux and macOS" in done.stderr.splitlines()[-1]
