"""Public names of a package, each written once and imported at its first use.

    if TYPE_CHECKING:
        from swamla.model.block import Block as Block
    else:
        __all__, __getattr__, __dir__ = lazy_exports(__name__)

Type checkers read these imports as they stand; `X as X` marks a name as public (PEP 484). At run time `lazy_exports`
reads the names and their modules from the same lines.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_exports(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` (PEP 562) for the package whose `__init__.py` calls this.

    A name must not be that of a module in the package: importing the module would set the attribute to it.
    """
    module = sys.modules[package]
    assert module.__spec__ is not None
    source = module.__spec__.loader.get_source(package)  # type: ignore[union-attr]
    homes = exported_names(source)

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        value = import_module(f"{package}.{name}") if home == package else getattr(import_module(home), name)
        setattr(module, name, value)
        return value

    names = sorted(homes)
    return names, __getattr__, lambda: names


def exported_names(source: str) -> dict[str, str]:
    """Name → module of the `from module import name` statements under `if TYPE_CHECKING:`."""
    return {
        alias.name: str(statement.module)
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
