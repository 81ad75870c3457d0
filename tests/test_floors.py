"""The house stands: imports go strictly down, siblings on one floor do not know each other, start-up is light."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import swamla

PACKAGE = Path(swamla.__file__).parent
FLOORS = [
    {"errors", "exports", "faults", "process", "registry", "shares", "version"},
    {"config", "files", "ops", "distributed", "plugins"},
    {"inference", "recipes", "signal_notice", "studies", "tasks", "tensor_file"},
    {"data", "model"},
    {"checkpoint", "text", "interop"},
    {"hub"},
    {"train", "evaluate", "interpret"},
    {"bench", "study", "serve"},
    {"cli"},
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
ROOF = {"__init__", "__main__"}  # the public names, and the entry into cli


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str) -> Iterator[str]:
    """Modules of swamla that a file imports anywhere, inside functions and under TYPE_CHECKING too.

    `from swamla.train import loop` may mean a module or a name in one: it is given as `swamla.train.loop`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("swamla"))


def imported_units(source: str) -> Iterator[str]:
    """Files and folders of the package that a file imports from."""
    for module in imported_modules(source):
        parts = module.split(".")
        if parts[1:]:
            yield parts[1]


def circles(imports: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves by way of others; `imports` says what each one imports."""
    reached = {module: set(found) for module, found in imports.items()}
    for between in imports:  # Warshall's algorithm
        for found in reached.values():
            if between in found:
                found |= reached[between]
    return sorted(module for module, found in reached.items() if module in found)


def module_imports() -> dict[str, set[str]]:
    """Module → the modules that it imports; a package stands for its `__init__.py`."""
    files = {
        ".".join(["swamla", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    found = {name: set(imported_modules(path.read_text(encoding="utf-8"))) for name, path in files.items()}
    return {
        name: {module if module in files else module.rpartition(".")[0] for module in modules} & files.keys() - {name}
        for name, modules in found.items()
    }


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if unit_of(path) not in ROOF]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def tour() -> str:
    return (Path(__file__).parents[1] / "docs/contributing.md").read_text(encoding="utf-8")


def test_every_file_has_a_floor() -> None:
    assert {unit_of(path) for path in sources()} <= FLOOR.keys()


def test_the_tour_names_files_that_exist() -> None:
    root = Path(__file__).parents[1]
    paths = [
        f"/{path.relative_to(root).as_posix()}"
        for folder in ("src", "tests")
        for path in root.glob(f"{folder}/**/*.py")
    ]
    named = set(re.findall(r"`([\w/]+\.py)`", tour()))
    assert len(named) > 40
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in paths)] == []


def test_the_tour_shows_the_same_floors() -> None:
    rows = re.findall(r"^\| (\d) \| (.*) \|$", tour().partition("## The floors")[2].partition("\n## ")[0], re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(FLOORS)))
    named = [set(re.findall(r"`(\w+)(?:/|\.py)?`", text)) & FLOOR.keys() for _, text in rows]
    assert named == FLOORS


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


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(module_imports()) == []


def test_the_check_for_circles_finds_the_modules_of_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_importing_swamla_and_its_help_import_nothing_heavy() -> None:
    heavy = "[name for name in ('torch', 'numpy', 'rich', 'transformers') if name in sys.modules]"
    code = f"import sys, swamla; from swamla.cli import main; assert main(['--help']) == 0; print({heavy})"
    assert run_python(code).splitlines()[-1] == "[]"
