"""Flags generated from the config dataclasses, and what each of them changes in a recipe's plain data.

A field of a config is a flag of its own name. A field that is a choice takes a kind (`--optimizer muon`), and the
choice's own fields are flags prefixed by the kind (`--muon_momentum`); for mixers and FFNs such a flag changes every
block of that kind (`--swa_window 128`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, make_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_origin

import tyro

from swamla.cli.field_text import field_docs, metavar, parse_text
from swamla.cli.plain import BLOCK_PARTS, Plain, choice
from swamla.cli.reshape import SHAPE
from swamla.config import choices_of, field_types, join, options_of
from swamla.data.config import DataConfig
from swamla.errors import UsageError
from swamla.model.config import LanguageModelConfig
from swamla.train.config import TrainConfig

_RENAMED = {"data.source": "data"}  # `--data FILE` reads better than `--source FILE`
_TOKENIZER = "; another than the recipe's sets vocab_size to 0, for as many ids as it has, unless --vocab_size is given"

Put = Callable[[Plain, Any], None]


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A generated flag.

    field: dotted, for messages.  put: writes the value into plain data, where it belongs; raises `UsageError` for one
    that makes no sense there.  switch: a boolean that is only ever given bare, without a --no_ form.
    besides: a further field that it changes.
    """

    name: str
    field: str
    annotation: Any
    help: str
    default: Any
    put: Put
    switch: bool = False
    besides: str = ""


def flags() -> dict[str, Flag]:
    """Every generated flag by name, in the order of the configs' fields."""
    found: dict[str, Flag] = {}
    for section, cls in (("model", LanguageModelConfig), ("data", DataConfig), ("train", TrainConfig)):
        for flag in [*_section_flags(section, cls), *(_block_flags() if section == "model" else ())]:
            if flag.name in found:
                raise TypeError(f"two configs give rise to the flag --{flag.name}")
            found[flag.name] = flag
    return found


def data_flags() -> dict[str, Flag]:
    """The flags of `DataConfig` alone, each by its field's own name."""
    return {flag.field.removeprefix("data."): flag for flag in _section_flags("data", DataConfig, with_model=False)}


def add_flags(cls: type, generated: dict[str, Flag] | None = None) -> Any:
    """The dataclass `cls` with flags as further fields: text, or a boolean, "" where not given.

    By default every generated flag is added, and those that reshape a whole model.
    """
    added = [] if generated else [argument(name, str, shape, text, None) for name, (shape, text) in SHAPE.items()]
    for name, flag in (generated or flags()).items():
        added.append(argument(name, flag.annotation, metavar(flag.annotation), flag.help, flag.default))
    made = make_dataclass(cls.__name__, added, bases=(cls,), frozen=True, kw_only=True)
    made.__doc__ = cls.__doc__
    return made


def put_flags(plain: Plain, values: Mapping[str, Any], given: frozenset[str], known: dict[str, Flag]) -> dict[str, str]:
    """Write those of the `known` flags that are in `given` into `plain`; returns dotted field -> flag.

    Raises `UsageError`, which names the flag as it was given, for one of a kind that the config does not use.
    """
    chosen = [name for name in known if name in given]
    for name in chosen:
        with naming(name, values[name]):
            known[name].put(plain, parse_text(values[name], known[name].annotation))
    return {known[name].field: f"--{name}" for name in chosen}


@contextmanager
def naming(name: str, text: Any) -> Iterator[None]:
    """Put a flag and its value before any `UsageError` raised inside."""
    try:
        yield
    except UsageError as error:
        value = f" {text}" if isinstance(text, str) else ""
        raise UsageError(f"--{name}{value}: {error}") from None


def _section_flags(section: str, cls: type, *, with_model: bool = True) -> Iterator[Flag]:
    """Flags of the flat fields of a config and of its choices; `with_model` where they may change a model's too."""
    docs = field_docs(cls)
    defaults = {f.name: f.default for f in fields(cls)}
    for name, annotation in field_types(cls).items():
        path = f"{section}.{name}"
        if any(get_origin(option) is dict for option in options_of(annotation)) or name in ("pattern", "mixture"):
            continue
        choices = choices_of(annotation) if _is_choice(annotation) else {}
        shown = Literal[tuple(choices)] if choices else annotation
        yield Flag(
            name=_RENAMED.get(path, name),
            field=join(path, "kind") if choices else path,
            annotation=shown,
            help=docs.get(name, "") + (_TOKENIZER if path == "data.tokenizer" and with_model else ""),
            default=MISSING if choices else defaults[name],
            put=_put_choice(section, name) if choices else _put(section, name),
        )
        for kind, config in choices.items():
            yield from _kind_flags(kind, config, path, _put_in_choice(section, name, kind))


def _block_flags() -> Iterator[Flag]:
    for part, choices in BLOCK_PARTS.items():
        for kind, config in choices.items():
            yield from _kind_flags(kind, config, f"model.blocks.*.{part}", _put_in_blocks(part, kind))


def _kind_flags(kind: str, cls: type, path: str, put: Callable[[str], Put]) -> Iterator[Flag]:
    docs = field_docs(cls)
    for f in fields(cls):
        annotation = field_types(cls)[f.name]
        if not _is_choice(annotation):  # what is nested deeper (rope) is for recipes
            flag = f"{kind}_{f.name}"
            yield Flag(
                name=flag,
                field=join(path, f.name),
                annotation=annotation,
                help=docs.get(f.name, ""),
                default=f.default,
                put=put(f.name),
            )


def _put(section: str, name: str) -> Put:
    if (section, name) == ("data", "source"):
        return _put_source

    def put(plain: Plain, value: Any) -> None:
        plain.setdefault(section, {})[name] = value

    return put


def _put_source(plain: Plain, source: Any) -> None:
    """Another source takes nothing over of what the recipe says of its own; flags that come after may."""
    data = plain.setdefault("data", {})
    for name in ("hub_config", "hub_split", "hub_revision", "stream", "mixture"):
        data.pop(name, None)
    data["source"] = source


def _put_choice(section: str, name: str) -> Put:
    def put(plain: Plain, kind: Any) -> None:
        if choice(plain.setdefault(section, {}), name).get("kind") != kind:
            plain[section][name] = {"kind": kind}

    return put


def _put_in_choice(section: str, name: str, kind: str) -> Callable[[str], Put]:
    def of_field(field: str) -> Put:
        def put(plain: Plain, value: Any) -> None:
            chosen = choice(plain.setdefault(section, {}), name)
            chosen.setdefault("kind", next(iter(choices_of(field_types(_SECTIONS[section])[name]))))
            if chosen["kind"] != kind:
                raise UsageError(f"{section}.{name} is {chosen['kind']}; add --{name} {kind}")
            chosen[field] = value

        return put

    return of_field


def _put_in_blocks(part: str, kind: str) -> Callable[[str], Put]:
    def of_field(field: str) -> Put:
        def put(plain: Plain, value: Any) -> None:
            blocks = plain["model"]["blocks"].values()
            users = [block for block in blocks if choice(block, part).get("kind") == kind]
            if not users:
                raise UsageError(f"no block of the model has the {part} {kind}")
            for block in users:
                block[part][field] = value

        return put

    return of_field


_SECTIONS: dict[str, type] = {"model": LanguageModelConfig, "data": DataConfig, "train": TrainConfig}


def _is_choice(annotation: Any) -> bool:
    options = [option for option in options_of(annotation) if option is not NoneType]
    return all(hasattr(option, "__dataclass_fields__") for option in options)


def argument(
    name: str, annotation: Any, shape: str, text: str, default: Any, *, switch: bool = False
) -> tuple[str, Any, Any]:
    """A field for tyro. Values stay text: the config's own reader checks them, so that all errors read alike."""
    shown = "" if default is MISSING or default is None else f"(default: {_show(default)})"
    if annotation is bool:
        described = tyro.conf.arg(help=text, help_behavior_hint=shown)
        shown_as = Annotated[bool, described]
        return name, tyro.conf.FlagCreatePairsOff[shown_as] if switch else shown_as, default is True
    described = tyro.conf.arg(help=text, help_behavior_hint=shown, metavar=shape)
    return name, Annotated[str, described], ""


def _show(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or '""'
