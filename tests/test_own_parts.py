"""docs/own-parts.md by its word: its files are written, its commands and Python run, its mixer keeps the contract."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toys import plugged

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-parts.md").read_text(encoding="utf-8")
FILES = re.findall(r"```py (\w+\.py)\n(.*?)```", PAGE, flags=re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
SMALL = "--width 64 --steps 2 --max_minutes none --batch_size 2 --block_size 32"
TEXT = "--data text.txt --tokenizer byte"
CONTRACT = "test_step test_documents test_not_a_number test_accounting test_flops test_double test_padding test_meta"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files and a text."""
    folder = tmp_path_factory.mktemp("home")
    for name, code in FILES:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(("\n\n" if file.tell() else "") + code)
    (folder / "text.txt").write_text("".join(f"import number{n}\n\n" for n in range(300)))
    return folder


def python(home: Path, *words: str, **environment: str) -> str:
    """The output of a Python process in `home`."""
    environment = os.environ | {"SWAMLA_CACHE": str(home / "cache")} | environment
    done = subprocess.run([sys.executable, *words], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def swamla_lines() -> list[str]:
    return [line for line in LINES if line.startswith("swamla ")]


def test_the_page_has_files_commands_and_python() -> None:
    assert [name for name, _ in FILES] == ["my_mixer.py"] * 2 + [
        "my_ffn.py",
        "my_optimizer.py",
        "my_source.py",
        "my_task.py",
    ]
    assert len(swamla_lines()) == len(LINES) - 1 == 9
    assert len(PYTHON) == 1


def test_its_commands_run_in_their_order(home: Path) -> None:
    """In one process of their own, which starts up once."""
    lines = []
    for line in swamla_lines():
        words = shlex.split(line)[1:]
        if words[0] in ("train", "info") and "--resume" not in words:
            words += shlex.split(SMALL if "--data" in words else f"{SMALL} {TEXT}")
        lines.append(words + ["--max_new_tokens", "4"] * (words[0] == "generate"))
    shown = python(
        home, "-c", f"from swamla.cli import main\nfor words in {lines!r}:\n    assert main(words) == 0, words"
    )
    assert "E S E M" in shown
    assert {path.name for path in (home / "runs").iterdir()} == {"ema", "bilinear", "sgd", "tables", "larger"}


def test_its_python_runs(home: Path) -> None:
    counted = int(python(home, "-c", PYTHON[0]).splitlines()[-1])
    assert counted == 3 * 32 * 32 + 32


def test_its_mixer_keeps_the_contract(home: Path) -> None:
    """By the tests of the package's own mixers, as the page says."""
    files = [str(ROOT / "tests/model" / f"{name}.py") for name in CONTRACT.split()]
    files.append(str(ROOT / "tests/train/test_resume.py"))
    plugin = str(home / "my_mixer.py")
    flags = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", "ema", *files]
    shown = python(ROOT, "-m", "pytest", *flags, SWAMLA_TEST_PLUGINS=plugin, SWAMLA_CACHE=str(home / "cache"))
    assert int(re.findall(r"(\d+) passed", shown)[-1]) > 20


def test_without_the_variable_no_plugin_is_tried() -> None:
    from swamla.model import MixerConfig

    assert "SWAMLA_TEST_PLUGINS" in os.environ or plugged(MixerConfig) == {}
