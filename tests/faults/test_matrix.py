"""Every row of the fault matrix, with few trials; `make faults` makes all."""

import subprocess
import sys
from pathlib import Path

import pytest

from swamla.faults import fault

from .acts import tiny_dataset
from .matrix import ROWS
from .rows import Row
from .stage import ROOT, NotHere, Stage


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data that all trials train on, prepared once."""
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder)
    return folder


@pytest.mark.parametrize("row", [row for row in ROWS if row.trials and row.short], ids=lambda row: row.fault)
def test_what_should_survive_a_fault_survives_it(row: Row, tmp_path: Path, data: Path) -> None:
    assert row.trials is not None
    try:
        assert sum(1 for _ in row.trials(Stage(tmp_path, data), row.short)) == row.short
    except NotHere as why:
        pytest.skip(str(why))


def test_the_tests_that_rows_name_exist() -> None:
    for name in {name for row in ROWS for name in row.tests}:
        file, _, test = name.partition("::")
        assert not test or f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(), name


def test_no_two_rows_are_of_one_fault() -> None:
    assert len({row.fault for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("asked", "rank", "restarts", "killed"),
    [
        ("step:3", None, None, True),
        ("step:4", None, None, False),
        ("update:3", None, None, False),
        ("step:3@1", "1", None, True),
        ("step:3@1", "0", None, False),
        ("step:3", "2", "0", True),
        ("step:3", "2", "1", False),
    ],
)
def test_a_process_is_killed_at_the_place_that_is_named_and_nowhere_else(asked, rank, restarts, killed) -> None:
    named = {"SWAMLA_FAULT": asked, "RANK": rank, "TORCHELASTIC_RESTART_COUNT": restarts}
    env = {name: value for name, value in named.items() if value is not None}
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); from swamla.faults import fault; fault('step', 3)"
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env)
    assert done.returncode == (-9 if killed else 0)


def test_without_the_variable_nothing_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda process, _: killed.append(process))
    monkeypatch.delenv("SWAMLA_FAULT", raising=False)
    fault("step", 3)
    assert killed == []
    monkeypatch.setenv("SWAMLA_FAULT", "step:3")
    fault("step", 3)
    assert len(killed) == 1
