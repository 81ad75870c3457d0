"""Registries of configs by `kind`, for built-in classes and those of plugins.

@swamla.register
@dataclass(frozen=True, kw_only=True)
class ToyConfig(MixerConfig):
    kind: ClassVar[str] = "toy"
"""

import pkgutil
import sys
from abc import ABC
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Self, TypeGuard, TypeVar

PACKAGE = __name__.partition(".")[0]
RESERVED = ("kind", "plugin")  # keys of a config written as a dict that are not fields


class Registered(ABC):
    """Base of the families, e.g. `MixerConfig`. A family is a direct subclass that names its `home`.

    home: the module, or the package of modules, that registers the family's built-in members.
    kind: the name of a member.
    """

    kind: ClassVar[str]
    _home: ClassVar[str]
    _members: ClassVar[dict[str, "type[Registered]"]]
    _home_imported: ClassVar[bool]

    def __init_subclass__(cls, *, home: str = "") -> None:
        super().__init_subclass__()
        if home:
            cls._home, cls._members, cls._home_imported = home, {}, False

    @classmethod
    def example(cls) -> Self:
        """A small config for a model of width 64, which `swamla doctor` tries; default settings unless overridden."""
        return cls()


C = TypeVar("C", bound="type[Registered]")


def is_family(cls: object) -> TypeGuard[type[Registered]]:
    """Whether a class is a family, and not a member of one."""
    return isinstance(cls, type) and "_members" in vars(cls)


def register(cls: C) -> C:
    """Class decorator, above `@dataclass`: adds a config to its family under its `kind`.

    Raises `TypeError` for a class that violates the family's contract, `ValueError` for a kind that is taken. A class
    that is defined again, as in a notebook, replaces the earlier one.
    """
    family = next((base for base in cls.__mro__ if is_family(base)), None)
    if family is None or family is cls:
        raise TypeError(
            f"{cls.__qualname__}: derive it from MixerConfig, FFNConfig, NormConfig, OptimizerConfig, Source or Task"
        )
    kind = vars(cls).get("kind")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise TypeError(f'{cls.__qualname__}: needs a name of its own: kind: ClassVar[str] = "toy"')
    if "__dataclass_fields__" not in vars(cls):
        raise TypeError(f"{cls.__qualname__}: put @dataclass(frozen=True, kw_only=True) below @register")
    if missing := sorted(vars(cls)["__abstractmethods__"]):
        raise TypeError(f"{cls.__qualname__}: lacks what every {family.__name__} has: {', '.join(missing)}")
    if clash := [field.name for field in fields(cls) if field.name in RESERVED]:  # type: ignore[arg-type]
        raise TypeError(f"{cls.__qualname__}: a field cannot be called {clash[0]}")
    if _required(cls) and cls.example.__func__ is Registered.example.__func__:  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__qualname__}: lacks `example`, a classmethod, as {_required(cls)[0]} has no default")
    if not cls.__module__.startswith(f"{PACKAGE}."):
        _import_home(family)  # built-in members first, so that a plugin cannot take their kinds
    other = family._members.get(kind)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{cls.__qualname__}: the kind {kind!r} is taken by {other.__module__}.{other.__qualname__}")
    members: list[type[Registered]] = [*(known for name, known in family._members.items() if name != kind), cls]
    # Built-in members first, by module, independent of import order. In place, because `members_of` returns a view.
    members.sort(key=lambda known: (bool(plugin_of(known)), "" if plugin_of(known) else known.__module__))
    family._members.clear()
    family._members.update({known.kind: known for known in members})
    return cls


def _required(cls: type) -> list[str]:
    return [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]


def members_of(family: type[Registered]) -> Mapping[str, type[Registered]]:
    """The classes of a family by kind: a view that includes classes registered later."""
    _import_home(family)
    return MappingProxyType(family._members)


def plugin_of(cls: type) -> str:
    """The file name (or the module, without a file) of a plugin's class; "" for built-in classes."""
    if cls.__module__.startswith(f"{PACKAGE}."):
        return ""
    file = vars(sys.modules[cls.__module__]).get("__file__") if cls.__module__ in sys.modules else None
    return Path(file).name if file else cls.__module__


def _import_home(family: type[Registered]) -> None:
    if family._home_imported:
        return
    family._home_imported = True
    home = import_module(family._home)
    for module in pkgutil.iter_modules(vars(home).get("__path__", ())):
        import_module(f"{family._home}.{module.name}")
