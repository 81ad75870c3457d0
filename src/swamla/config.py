"""Configs as plain data: dataclasses to and from TOML and JSON.

A config is a frozen keyword-only dataclass. A field that is a choice is annotated with a family of registered
dataclasses, or with a union of dataclasses; each has a class variable `kind`. Its plain form has that name under "kind"
and, if a plugin defines the class, the plugin's file name under "plugin". Every mistake of the user becomes a
`ConfigError` that names the dotted field, its value, its place in the file and what is allowed.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from swamla.errors import ConfigError, UsageError
from swamla.registry import Registered, is_family, members_of, plugin_of

T = TypeVar("T")
Origin = str | Callable[[str], str]  # a place ("run.toml:12"), or a function dotted field -> place ("" if unknown)

_NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}
_SECRET = re.compile(r"^(hf_|sk-|ghp_|gho_|github_pat_|xox[bp]-|AKIA|glpat-)[A-Za-z0-9_-]{8,}")
_SECRET_KEY = re.compile(r"(^|_)(token|api_key|apikey|password|passwd|secret)$", re.IGNORECASE)
_USE_ENVIRONMENT = "looks like a secret: keep it out of configs, which are stored with the run; use the environment"


def to_plain(config: Any) -> Any:
    """JSON-able form of a config: dataclasses become dicts (with "kind" where they have one), tuples become lists."""
    if is_dataclass(config) and not isinstance(config, type):
        kind = kind_of(type(config))
        plugin = plugin_of(type(config)) if isinstance(config, Registered) else ""
        head = {"kind": kind, **({"plugin": plugin} if plugin else {})} if kind else {}
        return head | {f.name: to_plain(config.__dict__[f.name]) for f in fields(config)}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_plain(value) for value in config]
    return config


def from_plain(cls: type[T], data: Any, *, path: str = "", origin: Origin = "") -> T:
    """Build a config of `cls` from plain data.

    path: dotted name of the config itself, the prefix of every field in messages. origin: where the data came from.
    Missing fields get their defaults; "none" and null both stand for None. Raises only `ConfigError`: for unknown keys,
    wrong types, and values that the config's own checks refuse.
    """
    return _Reader(origin).dataclass(cls, data, path)


def load_file(path: Path) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Plain data of a .toml or .json file, and a function dotted field -> place ("run.toml:12").

    Raises `UsageError` for a file that is unreadable, has another format, or has a key twice.
    """
    readers = {".toml": load_toml, ".json": load_json}
    if path.suffix not in readers:
        raise UsageError(f"{path}: configs are .toml or .json files")
    return readers[path.suffix](path)


def load_toml(path: Path) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Plain data of a TOML file, and a function dotted field -> "file:line"; see `load_file`."""
    text = _read_text(path)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: endlessly nested tables
        raise UsageError(f"{path}: not TOML: {error}") from error
    lines = _toml_lines(text)
    return data, lambda field: f"{path}:{lines[field]}" if field in lines else ""


def load_json(path: Path) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Plain data of a JSON file, and a function that returns the file for every field; see `load_file`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for index, (key, _) in enumerate(pairs):
            if key in dict(pairs[:index]):
                raise UsageError(f'{path}: the key "{key}" is given twice')
        return dict(pairs)

    try:
        data = json.loads(_read_text(path), object_pairs_hook=unique)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:  # as in `load_toml`
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: must hold a JSON object")
    return data, lambda field: str(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte-order mark
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _toml_lines(text: str) -> dict[str, int]:
    """Line of every dotted key of a valid TOML document, except in arrays of tables.

    Lines are joined until they parse as a statement, which finds the end of multi-line values.
    """
    found: dict[str, int] = {}
    table, statement, begin = "", "", 1
    for number, line in enumerate(text.splitlines(), 1):
        statement, begin = (statement + "\n" + line, begin) if statement else (line, number)
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        keys, statement = list(_dotted(parsed)), ""
        header = line.lstrip().startswith("[") and number == begin
        if header:
            table = keys[-1]
        for key in keys:
            found.setdefault(key if header else join(table, key), begin)
    return found


def _dotted(data: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield join(path, key)
        if isinstance(value, Mapping):
            yield from _dotted(value, join(path, key))


@contextmanager
def within(path: str, origin: Origin = "", kind: str = "") -> Iterator[None]:
    """Context that adds the prefix `path`, the place in `origin` and the `kind` to the field of any `ConfigError`."""
    try:
        yield
    except ConfigError as error:
        field = join(path, error.field)
        place = error.origin or _place(origin, field)
        raise ConfigError(field, error.got, error.allowed, place, error.kind or kind) from error


def join(path: str, name: str) -> str:
    """Dotted path of `name` inside `path`."""
    return f"{path}.{name}" if path and name else path or name


def kind_of(cls: type) -> str:
    """The `kind` of a dataclass, "" if it has none."""
    return cls.__dict__.get("kind", "")


def did_you_mean(name: str, known: list[str]) -> str:
    """End of an error message: `did you mean "width"?` if a known name is similar, else all known names."""
    close = get_close_matches(name, known, n=1)
    return f'did you mean "{close[0]}"?' if close else f"there are: {', '.join(known)}"


@cache
def field_types(cls: Any) -> Mapping[str, Any]:
    """Resolved annotation of every field of a dataclass, in order. Resolving takes long, so it happens once a class."""
    hints = get_type_hints(cls)
    return MappingProxyType({f.name: hints[f.name] for f in fields(cls)})


def choices_of(annotation: Any) -> Mapping[str, Any]:
    """The dataclasses that an annotation allows, by kind; "" is the key of a single dataclass without a kind.

    For a family of registered classes it is a live view, which includes classes registered later.
    """
    options = [option for option in options_of(annotation) if option is not NoneType]
    if len(options) == 1 and is_family(options[0]):
        return members_of(options[0])
    return {kind_of(option): option for option in options}


def options_of(annotation: Any) -> tuple[Any, ...]:
    """Members of a union, or the annotation itself if it is not a union."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


class _Reader:
    """Reads plain data by annotation. origin: where the data came from."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin

    def fail(self, path: str, got: Any, allowed: str) -> ConfigError:
        return ConfigError(path or "config", got, allowed, _place(self.origin, path))

    def dataclass(self, cls: type[T], data: Any, path: str) -> T:
        with within("", kind=kind_of(cls)):
            return self._dataclass(cls, data, path)

    def _dataclass(self, cls: type[T], data: Any, path: str) -> T:
        if not isinstance(data, Mapping):
            raise self.fail(path, data, f"must be a table of {', '.join(field_types(cls))}")  # type: ignore[arg-type]
        types = field_types(cls)  # type: ignore[arg-type]
        given = {key: value for key, value in data.items() if key != "kind" or not kind_of(cls)}
        for key, value in given.items():
            if key not in types:
                raise self._unknown(key, value, list(types), path)
        for f in fields(cls):  # type: ignore[arg-type]
            if _required(f) and f.name not in given:
                raise self.fail(join(path, f.name), None, "must be given")
        values = {key: self.value(types[key], value, join(path, key)) for key, value in given.items()}
        with within(path, self.origin):
            return cls(**values)

    def _unknown(self, key: str, value: Any, known: list[str], path: str) -> ConfigError:
        if _SECRET_KEY.search(key) and isinstance(value, str):
            return self.fail(join(path, key), "…", _USE_ENVIRONMENT)
        return self.fail(join(path, key), value, f"no such setting; {did_you_mean(key, known)}")

    def value(self, annotation: Any, data: Any, path: str) -> Any:
        if isinstance(data, str) and _SECRET.match(data):
            raise self.fail(path, "…", _USE_ENVIRONMENT)
        options = options_of(annotation)
        if NoneType in options and (data is None or (data == "none" and str not in options)):
            return None
        options = tuple(option for option in options if option is not NoneType)
        if all(is_dataclass(option) for option in options):
            return self._choice(annotation, data, path)
        if len(options) > 1:
            return self._first_fitting(options, data, path)
        return self._single(options[0], data, path)

    def _choice(self, annotation: Any, data: Any, path: str) -> Any:
        """One dataclass, or one of several by their kind; a string alone names a kind with its defaults."""
        choices = choices_of(annotation)
        if list(choices) == [""]:
            return self.dataclass(choices[""], data, path)
        if isinstance(data, str):
            data = {"kind": data}
        if not isinstance(data, Mapping):
            raise self.fail(path, data, "must be a table")
        kind = data.get("kind", next(iter(choices)) if len(choices) == 1 else None)
        if not isinstance(kind, str) or kind not in choices:
            raise self.fail(join(path, "kind"), kind, self._kinds(annotation, kind, data.get("plugin"), choices))
        if any(map(is_family, options_of(annotation))):  # the plugin's file name, which is informational
            data = {key: value for key, value in data.items() if key != "plugin"}
        return self.dataclass(choices[kind], data, path)

    @staticmethod
    def _kinds(annotation: Any, kind: Any, plugin: Any, choices: Mapping[str, type]) -> str:
        """What is allowed: the plugin that defines `kind` if the data names one, else the known kinds."""
        if isinstance(kind, str) and isinstance(plugin, str):
            return f"is the kind of a plugin: name its file, --plugin {plugin}"
        allowed = f"must be one of {', '.join(choices)}"
        if not any(map(is_family, options_of(annotation))) or not isinstance(kind, str):
            return allowed
        close = get_close_matches(kind, choices, n=1)
        return f'{allowed}; did you mean "{close[0]}"?' if close else f"{allowed}; or of a plugin: --plugin FILE"

    def _first_fitting(self, options: tuple[Any, ...], data: Any, path: str) -> Any:
        for option in options:
            try:
                return self.value(option, data, path)
            except ConfigError as error:
                refused = error
        raise refused

    def _single(self, annotation: Any, data: Any, path: str) -> Any:
        origin = get_origin(annotation)
        if annotation is Any:
            return data
        if origin is Literal:
            if data not in get_args(annotation) or isinstance(data, bool):
                raise self.fail(path, data, f"must be one of {', '.join(map(str, get_args(annotation)))}")
            return data
        if origin is tuple:
            return self._tuple(get_args(annotation), data, path)
        if origin is dict:
            if not isinstance(data, Mapping):
                raise self.fail(path, data, "must be a table")
            return {key: self.value(get_args(annotation)[1], item, join(path, key)) for key, item in data.items()}
        if annotation in _NUMBERS:
            return self._number(annotation, data, path)
        if annotation in (bool, str):
            if not isinstance(data, annotation):
                raise self.fail(path, data, "must be true or false" if annotation is bool else "must be text")
            return data
        raise TypeError(f"{path}: configs cannot hold {annotation}")

    def _tuple(self, items: tuple[Any, ...], data: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(data, list | tuple):
            raise self.fail(path, data, 'must be a list, e.g. ["swa", "mla"]' if str in items else "must be a list")
        if items[-1] is Ellipsis:
            items = (items[0],) * len(data)
        if len(items) != len(data):
            raise self.fail(path, data, f"must have {len(items)} items")
        return tuple(
            self.value(item, entry, f"{path}[{index}]")
            for index, (item, entry) in enumerate(zip(items, data, strict=True))
        )

    def _number(self, kind: type, data: Any, path: str) -> int | float:
        accepted = (int,) if kind is int else (int, float)
        if isinstance(data, bool) or not isinstance(data, accepted):
            raise self.fail(path, data, f"must be {_NUMBERS[kind]}")
        try:
            number = kind(data)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.fail(path, data, "must be a finite number")
        return number


def _required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _place(origin: Origin, path: str) -> str:
    return origin if isinstance(origin, str) else origin(path)
