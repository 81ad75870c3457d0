"""What the README and the guides show can be done: their Python runs, and their commands' flags exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from swamla.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
OWN_PARTS = ROOT / "docs" / "own-parts.md"  # a page in one piece, with files: tests/test_own_parts.py
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - {OWN_PARTS})]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


PYTHON = [(page.name, code) for page in PAGES for code in blocks(page, "python")]
LINES = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if "swamla " in line]


COMMAND = re.compile(rf"\s*(\S+/)?(torchrun .*)?swamla ({'|'.join(COMMANDS)})\b")
TINY = "--pattern swa --width 16 --n_heads 2 --steps 1 --max_minutes none --batch_size 1 --block_size 16"


@pytest.fixture(scope="module", params=["", "--vocab_size 4096"], ids=["exact", "padded"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run where the README has its quickstart's; also of a vocabulary that text fills in part."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text("import os\n" * 200)
    run = folder / "runs" / "quickstart"
    flags = f"{TINY} {request.param}"
    where = f"--data {folder}/text.txt --tokenizer byte --cache_dir {folder}/cache --output_dir {run}"
    assert main(["train", "quickstart", *shlex.split(f"{flags} {where}")]) == 0
    return folder


HALF_A_MINUTE = '"--max_minutes", "0.5"'
ONE_STEP = f"{TINY} --data text.txt --tokenizer byte --cache_dir cache"


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[page for page, _ in PYTHON])
def test_the_python_shown_runs(page: str, code: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    names: dict[str, object] = {}
    exec(compile(code.replace(HALF_A_MINUTE, f"*{shlex.split(ONE_STEP)}"), page, "exec"), names)
    assert names.keys() - {"__builtins__"}, "the example does nothing"


def test_there_is_python_to_run_and_there_are_commands_to_check() -> None:
    assert len(PYTHON) >= 3
    assert sum(HALF_A_MINUTE in code for _, code in PYTHON) == 1
    assert len(LINES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_block_stands_in_one_that_is_checked(page: Path) -> None:
    """An indented block, or one of another language, hides its flags from the tests below."""
    prose = re.sub(r"```sh\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks = re.findall(r"```.*?```|^ {4}.*$", prose, flags=re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines() if COMMAND.match(line)]
    assert commands == []


WITH_ACTIONS = {"checkpoint"}  # commands whose first word chooses what they do


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_the_commands_shown_and_their_flags_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    command, *arguments = words[next(i for i, word in enumerate(words) if Path(word).name == "swamla") + 1 :]
    assert command in COMMANDS
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, *arguments[: command in WITH_ACTIONS], "--help", "all"])
    help_text = capsys.readouterr().out
    for flag in (argument for argument in arguments if argument.startswith("--")):
        assert re.search(rf"{re.escape(flag)}\b", help_text), flag


def modelled(line: str) -> list[str]:
    """The recipe and flags of a line that trains, without those that only say where; empty for any other line."""
    words = shlex.split(line.replace("…", ""), comments=True)
    command, *arguments = words[next(i for i, word in enumerate(words) if Path(word).name == "swamla") + 1 :]
    elsewhere = any(a.endswith((".toml", ".json")) or a in ("--resume", "--resume_from_hf") for a in arguments)
    if command != "train" or elsewhere:
        return []
    where = [i for i, word in enumerate(arguments) if word in ("--output_dir", "--run_name")]
    return [word for i, word in enumerate(arguments) if i not in where and i - 1 not in where]


@pytest.mark.parametrize("line", sorted({line for line in LINES if modelled(line)}))
def test_the_trainings_shown_are_possible_ones(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *modelled(line), "--vocab_size", "60000"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", [*PAGES, OWN_PARTS], ids=lambda page: page.name)
def test_every_file_a_page_links_to_exists(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        assert (page.parent / target).is_file(), target


def test_the_image_has_what_its_examples_need() -> None:
    """Its second one trains a recipe on the recipe's own data, which is on the hub."""
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"pip install .*'\.\[(.*)\]'", image)
    assert "hub" in extras.split(",")
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
