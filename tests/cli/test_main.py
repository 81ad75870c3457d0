"""How the program ends: one line on stderr, and an exit status that tells what kind of end it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swamla import cli
from swamla.cli import CLOSED_PIPE, main
from swamla.errors import CorruptError, Interrupted, UsageError
from tests.waiting import after_start


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> "type[Command]":
    """A command called `train` that raises what the test puts into it."""
    Command.error = None
    monkeypatch.setattr(cli, "import_module", lambda name: Command)
    return Command


class Command:
    """Stands for a command's module."""

    error: BaseException | None = None

    @classmethod
    def main(cls, argv: list[str]) -> int:
        """Raise, or be content."""
        if cls.error:
            raise cls.error
        return 0


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("no such thing"), 2, "swamla: error: no such thing\n"),
        (UsageError("two\nlines"), 2, "swamla: error: two lines\n"),
        (CorruptError("shard-0: truncated"), 3, "swamla: error: shard-0: truncated\n"),
        (Interrupted("saved", 75), 75, "swamla: saved\n"),
        (KeyboardInterrupt(), 130, "swamla: interrupted\n"),
        (PermissionError(13, "Permission denied", "/runs"), 2, "swamla: error: /runs: Permission denied\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9.\nmore"),
            2,
            "swamla: error: out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9.\n",
        ),
        (
            ZeroDivisionError("oh"),
            1,
            "swamla: error: a bug in swamla: ZeroDivisionError: oh (--debug shows the traceback)\n",
        ),
    ],
)
def test_an_error_is_one_line_and_has_its_exit_status(
    command: type[Command], error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command.error = error
    assert main(["train"]) == status
    assert capsys.readouterr() == ("", line)


def test_debug_lets_the_traceback_through_wherever_it_stands(command: type[Command]) -> None:
    command.error = UsageError("x")
    for argv in (["train", "--debug"], ["--debug", "train"]):
        with pytest.raises(UsageError):
            main(argv)


def test_a_command_that_does_not_exist_is_refused_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "swamla: error: no command 'trian'; did you mean \"train\"?\n"


def test_help_lists_every_command_and_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "swamla 0.1.0\n"


def test_every_listed_command_is_a_module_with_a_main() -> None:
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert {cli.MODULES.get(command, command) for command in cli.COMMANDS} <= modules


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "--lr", "-1"], "train.lr = -1.0 (--lr): must be > 0"),
        (["info", "nosuch"], "nosuch: no recipe of that name"),
        (["info", "shakespeare-char", "--data", "x.txt"], "depends on the data: add --vocab_size"),
        (["generate"], "the following arguments are required: RUN; swamla generate --help tells more"),
        (
            ["prepare", "--tokenizer", "char"],
            "the following arguments are required: DATA; swamla prepare --help tells more",
        ),
        (["generate", "/nonexistent"], "/nonexistent: not a run folder"),
        (["generate", "/nonexistent", "--temperature", "-1"], "--temperature -1.0: must be >= 0"),
        (["generate", "/nonexistent", "--temperature", "nan"], "--temperature nan: must be >= 0"),
        (["generate", "/nonexistent", "--top_p", "0"], "--top_p 0.0: must be in (0, 1]"),
        (["generate", "/nonexistent", "--top_k", "-3"], "--top_k -3: must be >= 0"),
        (["generate", "/nonexistent", "--max_new_tokens", "0"], "--max_new_tokens 0: must be > 0"),
        (
            ["generate", "/nonexistent", "--greedy", "--temperature", "1"],
            "--greedy and --temperature exclude each other",
        ),
        (["evaluate", "/nonexistent"], "/nonexistent: not a run folder"),
        (["evaluate", "/nonexistent", "--block_size", "-1"], "--block_size -1: must be > 0"),
        (["prepare", "notes.txt", "--source", "x"], "--source goes with a recipe"),
        (["prepare", "stdlib", "--tokenizer", "bpe:1"], "data.tokenizer = 'bpe:1' (--tokenizer): vocabulary"),
        (["train", "--run_name", "../x"], "--run_name '../x': must be a plain folder name"),
        (["train", "--run_name", ".."], "--run_name '..': must be a plain folder name"),
        (["train", "--run_name", "/x"], "--run_name '/x': must be a plain folder name"),
        (["train", "--run_name", "a\0b"], "must be a plain folder name"),
        (["train", "--output_dir", "a\0b"], "a path cannot hold NUL"),
        (["train", "--resume"], "holds no run to continue"),
        (["train", "--resume", "/nonexistent"], "--resume: /nonexistent holds no run to continue"),
        (["train", "--resume", "x", "--output_dir", "y"], "both name a folder"),
        (["train", "shakespeare-char", "--block_size", "65"], "must not exceed --learned_positions 64"),
        (["train", "--data", "/nonexistent.txt"], "/nonexistent.txt"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2_and_writes_nothing(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("swamla: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_not_empty_is_not_trained_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 50)
    assert main(["train", "--data", "text.txt", "--tokenizer", "byte", "--steps", "1", "--output_dir", "taken"]) == 2
    assert "taken: exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_a_recipe_with_a_mistake_is_refused_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text("[train]\nsteps = 5\nlr = -1\n")
    assert main(["info", str(recipe)]) == 2
    assert capsys.readouterr().err == "swamla: error: model = None: must be given\n"
    recipe.write_text(
        "[model]\nwidth = 64\npattern = ['a']\n[model.blocks.a]\nmixer = { kind = 'mha', n_heads = 2 }\n"
        "[data]\n[train]\nsteps = 5\nlr = -1\n"
    )
    assert main(["info", str(recipe)]) == 2
    assert f"train.lr = -1.0 ({recipe}:9): must be > 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--help"], ["info", "quickstart"]])
def test_the_reader_of_our_output_may_leave_early(command: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)  # it left before the first word
    done = subprocess.run(
        [sys.executable, "-m", "swamla", *command], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_end)
    assert (done.returncode, after_start(done.stderr)) == (CLOSED_PIPE, "")


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing set", "a count set", "a policy set"],
)
def test_waiting_threads_sleep_early_unless_the_user_says_how_they_wait(
    given: dict[str, str], expected: str | None
) -> None:
    code = "import os; from swamla.cli import main; main(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"
    others = {name: v for name, v in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=others | given)
    assert done.stdout.splitlines()[-1] == str(expected)
