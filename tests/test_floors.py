"""The house stands: imports go strictly down, siblings on one floor do not know each other, start-up is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import swamla

PACKAGE = Path(swamla.__file__).parent
FLOORS = [
    {"errors", "faults", "lazy", "process", "registry"},
    {"config", "files", "ops", "distributed", "plugins"},
    {"model", "data", "recipes", "tensor_file"},
    {"checkpoint", "inference", "export"},
    {"hub"},
    {"train", "evaluate"},
    {"bench"},
    {"cli"},
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
ROOF = {"__init__", "__main__"}  # the public names, and the entry into cli


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(source: str) -> Iterator[str]:
    """Units of swamla that a file imports anywhere, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "swamla" and parts[1:] and not parts[1].startswith("__"):
                yield parts[1]


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if unit_of(path) not in ROOF]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_file_has_a_floor() -> None:
    assert {unit_of(path) for path in sources()} <= FLOOR.keys()


def test_imports_go_strictly_down_and_siblings_do_not_import_each_other() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} (floor {FLOOR[unit_of(path)]}) imports {unit} (floor {FLOOR.get(unit)})"
        for path in sources()
        for unit in imported_units(path.read_text(encoding="utf-8"))
        if unit != unit_of(path) and not FLOOR.get(unit, 99) < FLOOR[unit_of(path)]
    ]
    assert wrong == []


def test_the_check_of_imports_sees_every_way_to_import() -> None:
    code = (
        "import swamla.train.loop\nfrom swamla import model\ndef f():\n    from swamla.data.config import DataConfig\n"
    )
    assert set(imported_units(code)) == {"train", "model", "data"}


def test_importing_swamla_and_its_help_import_nothing_heavy() -> None:
    heavy = "[name for name in ('torch', 'numpy', 'rich', 'transformers') if name in sys.modules]"
    code = f"import sys, swamla; from swamla.cli import main; assert main(['--help']) == 0; print({heavy})"
    assert run_python(code).splitlines()[-1] == "[]"


def test_every_public_name_is_there_and_none_besides() -> None:
    assert all(hasattr(swamla, name) for name in swamla.__all__)
    assert set(dir(swamla)) == set(swamla.__all__)
    assert not hasattr(swamla, "no_such_name")
