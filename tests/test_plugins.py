"""A plugin is a file that is imported once, and whatever is wrong with it is told in one line."""

import sys
from pathlib import Path

import pytest

from swamla.errors import UsageError
from swamla.plugins import load_plugin

DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass, fields
from typing import get_type_hints
import sys
@dataclass(frozen=True, kw_only=True)
class Point:
    x: int = 1
assert get_type_hints(Point) == {"x": int}  # which looks the module up by its name
sys.loaded = [*getattr(sys, "loaded", []), __name__]
"""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules that plugins with `DATACLASS` in them became, in turn."""
    names: list[str] = []
    monkeypatch.setattr(sys, "loaded", names, raising=False)
    return names


def test_a_plugin_is_imported_once_however_it_is_named(
    tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "point.py").write_text(DATACLASS)
    (tmp_path / "link.py").symlink_to("point.py")
    load_plugin(tmp_path / "point.py")
    monkeypatch.chdir(tmp_path)
    for again in (Path("point.py"), Path("link.py"), tmp_path / ".." / tmp_path.name / "point.py"):
        load_plugin(again)
    assert len(sys.loaded) == 1  # type: ignore[attr-defined]
    assert load_plugin(str(tmp_path / "point.py")).Point(x=3).x == 3
    assert {file.name for file in tmp_path.iterdir()} == {"point.py", "link.py"}  # and leaves nothing behind


def test_plugins_of_one_name_are_two_modules_and_neither_hides_a_library(tmp_path: Path, loaded: list[str]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(DATACLASS)
        load_plugin(tmp_path / folder / "json.py")
    names = sys.loaded  # type: ignore[attr-defined]
    assert len(set(names)) == 2
    assert "json" not in names


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("missing.py", None, "plugin {path}: cannot be read: No such file or directory"),
        ("folder.py", "", "plugin {path}: cannot be read: Is a directory"),
        ("notes.txt", "x = 1", "plugin {path}: must be a Python file, e.g. toy_mixer.py"),
        ("syntax.py", "x = 1\ny = = 2\n", "plugin {path}:2: not Python: invalid syntax"),
        ("latin.py", b"x = '\xe9'", "plugin {path}: cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ("nul.py", "x = 1\0", "plugin {path}:1: not Python: source code string cannot contain null bytes"),
        ("raises.py", "def f():\n    return {}['no']\n\nf()\n", "plugin {path}:2: KeyError: 'no'"),
        ("elsewhere.py", "import json\n\njson.loads('{')\n", "plugin {path}:3: JSONDecodeError: Expecting property"),
        ("imports.py", "import no_such_library\n", "plugin {path}:1: ModuleNotFoundError: No module named 'no_such_l"),
        ("lines.py", "raise ValueError('one\\ntwo')", "plugin {path}:1: ValueError: one two"),
        ("mute.py", "raise ValueError", "plugin {path}:1: ValueError: ValueError"),
        ("leaves.py", "import sys\nsys.exit(3)", "plugin {path}:2: SystemExit: 3"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_one_line(
    tmp_path: Path, name: str, text: str | bytes | None, told: str
) -> None:
    path = tmp_path / name
    if name == "folder.py":
        path.mkdir()
    elif text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    for _ in range(2):  # a plugin that failed is not there
        with pytest.raises(UsageError) as caught:
            load_plugin(path)
        assert str(caught.value).startswith(told.format(path=path))
        assert "\n" not in str(caught.value)


def test_a_plugin_that_failed_may_be_mended_and_loaded(tmp_path: Path, loaded: list[str]) -> None:
    path = tmp_path / "point.py"
    path.write_text("1 / 0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        load_plugin(path)
    path.write_text(DATACLASS)
    load_plugin(path)
    assert len(sys.loaded) == 1  # type: ignore[attr-defined]


def test_ctrl_c_in_a_plugin_is_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text("raise KeyboardInterrupt")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            load_plugin(path)
