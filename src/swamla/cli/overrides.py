"""Flags generated from the config dataclasses, and how each changes a recipe's plain data.

A field of a config is a flag of its own name. A field that is a choice takes a kind (`--optimizer muon`), and the
choice's own fields are flags prefixed by the kind (`--muon_momentum`); for mixers and FFNs such a flag changes every
block of that kind (`--swa_window 128`). Other fields of a block are flags that change every block (`--conv 4`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from swamla.cli.flags import Apply, Flag, field_docs
from swamla.cli.plain import BLOCK_PARTS, BLOCK_SETTINGS, Plain, choice, mixer_kind
from swamla.cli.reshape import SHAPE
from swamla.config import choices_of, field_types, join, options_of
from swamla.data.config import DataConfig
from swamla.errors import UsageError
from swamla.model.block import BlockConfig
from swamla.model.compiling import Compile
from swamla.model.language_model import LanguageModelConfig
from swamla.recipes import is_recipe
from swamla.tasks import PREFIX
from swamla.train.config import TrainConfig

_RENAMED = {"data.source": "data"}  # `--data FILE` reads better than `--source FILE`
_TOKENIZER = (
    "; a tokenizer other than the recipe's also sets vocab_size to its number of ids, unless --vocab_size is given"
)
_SECTIONS: dict[str, type] = {"model": LanguageModelConfig, "data": DataConfig, "train": TrainConfig}
# A bare --compile, before a flag, a recipe or nothing, is --compile default.
_BARE_COMPILE: Any = {
    "bare": "default",
    "goes_with": lambda word: word in get_args(Compile) or not is_recipe(word),
}
# What --help shows, under these headings; --help all shows everything. The settings of a recipe's blocks are listed
# too.
_USUAL = {
    "flags": ("init_from",),
    "model": ("pattern", "local_mixer", "n_layers", "n_heads", "width", "vocab_size", "dropout"),
    "data": ("data", "text_column", "tokenizer", "held_out_fraction"),
    "length and batch": ("steps", "max_minutes", "batch_size", "accumulation", "block_size", "seed"),
    "optimizer": ("optimizer", "lr", "warmup", "schedule", "min_lr_ratio", "weight_decay", "grad_clip", "ema"),
    "evaluation and saving": ("eval_interval", "eval_seconds", "eval_tokens", "save_interval"),
    "speed and memory": ("precision", "compile", "checkpointing", "parallel", "device", "threads"),
    "watching": ("log_interval", "tensorboard", "wandb_project", "hf_repo_id", "profile"),
}


def flags() -> dict[str, Flag]:
    """Every generated flag by name, first those that reshape a whole model, which `reshape` applies."""
    found = dict(SHAPE)
    for section, cls in _SECTIONS.items():
        for flag in [*_section_flags(section, cls), *(_block_flags() if section == "model" else ())]:
            if flag.name in found:
                raise TypeError(f"two configs give rise to the flag --{flag.name}")
            found[flag.name] = flag
    usual = {name: replace(found[name], group=group) for group, names in _USUAL.items() for name in names}
    return usual | {name: replace(flag, usual=False) for name, flag in found.items() if name not in usual}


def data_flags() -> dict[str, Flag]:
    """The flags of `DataConfig` alone, each by its field's own name."""
    return {
        (name := flag.field.removeprefix("data.")): replace(flag, name=name)
        for flag in _section_flags("data", DataConfig, with_model=False)
    }


def apply_flags(plain: Plain, given: Mapping[str, Any], known: Mapping[str, Flag]) -> dict[str, str]:
    """Apply the `given` flags among `known` to `plain`, in the order of `known`; returns dotted field -> flag.

    Raises `UsageError`, with the flag as it was given, for one of a kind that the config does not use.
    """
    chosen = [flag for name, flag in known.items() if name in given and flag.field]
    for flag in chosen:
        with naming(flag.name, given[flag.name]):
            flag.apply(plain, given[flag.name])
    return {flag.field: f"--{flag.name}" for flag in chosen}


@contextmanager
def naming(name: str, value: Any) -> Iterator[None]:
    """Prefix any `UsageError` raised inside with a flag and its value."""
    try:
        yield
    except UsageError as error:
        shown = ",".join(map(str, value)) if isinstance(value, list) else value
        raise UsageError(f"--{name}: {error}" if isinstance(value, bool) else f"--{name} {shown}: {error}") from None


def _section_flags(section: str, cls: type, *, with_model: bool = True) -> Iterator[Flag]:
    """Flags of the flat fields of a config and of its choices; with_model: they may change the model too."""
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
            group=section,
            **(_BARE_COMPILE if path == "train.compile" else {}),
            apply=_apply_choice(section, name) if choices else _apply(section, name),
        )
        for kind, config in choices.items():
            yield from _kind_flags(f"{name} {kind}", kind, config, path, _apply_in_choice(section, name, kind))


def _block_flags() -> Iterator[Flag]:
    yield Flag(
        name="ffn",
        field="model.blocks.*.ffn.kind",
        annotation=Literal[tuple(BLOCK_PARTS["ffn"])],
        help="the FFN of every layer, none for mixers alone; a kind other than the recipe's has its default settings",
        group="model",
        apply=_apply_ffn(),
    )
    docs, defaults = field_docs(BlockConfig), {f.name: f.default for f in fields(BlockConfig)}
    for name, annotation in BLOCK_SETTINGS.items():
        yield Flag(
            name=name,
            field=f"model.blocks.*.{name}",
            annotation=annotation,
            help=f"of every layer: {docs[name]}",
            default=defaults[name],
            group="model",
            apply=_apply_to_blocks(name),
        )
    for kind in BLOCK_PARTS["mixer"]:
        yield Flag(
            name=f"{kind}_ffn",
            field="model.blocks.*.ffn.kind",
            annotation=Literal[tuple(BLOCK_PARTS["ffn"])],
            help="the FFN of this mixer's layers; a kind other than the recipe's has its default settings",
            group=f"mixer {kind}",
            apply=_apply_ffn(kind),
        )
    for part, choices in BLOCK_PARTS.items():
        for kind, config in choices.items():
            yield from _kind_flags(
                f"{part} {kind}", kind, config, f"model.blocks.*.{part}", _apply_in_blocks(part, kind)
            )


def _kind_flags(group: str, kind: str, cls: type, path: str, apply: Callable[[str], Apply]) -> Iterator[Flag]:
    docs = field_docs(cls)
    for f in fields(cls):
        annotation = field_types(cls)[f.name]
        if not _is_choice(annotation):  # deeper settings (rope) have no flags
            flag = f"{kind}_{f.name}"
            yield Flag(
                name=flag,
                field=join(path, f.name),
                annotation=annotation,
                help=docs.get(f.name, ""),
                default=f.default,
                group=group,
                apply=apply(f.name),
            )


def _apply(section: str, name: str) -> Apply:
    if (section, name) == ("data", "source"):
        return _apply_source

    def apply(plain: Plain, value: Any) -> None:
        plain.setdefault(section, {})[name] = value

    return apply


def _apply_source(plain: Plain, source: Any) -> None:
    """Another source: the recipe's settings of its own source are dropped; later flags may set them."""
    data = plain.setdefault("data", {})
    of_texts = ("held_out_fraction", "buffer_docs") if str(source).startswith(PREFIX) else ()
    for name in ("hub_config", "hub_split", "hub_revision", "stream", "mixture", *of_texts):
        data.pop(name, None)
    data["source"] = source


def _apply_choice(section: str, name: str) -> Apply:
    def apply(plain: Plain, kind: Any) -> None:
        if choice(plain.setdefault(section, {}), name).get("kind") != kind:
            plain[section][name] = {"kind": kind}

    return apply


def _apply_in_choice(section: str, name: str, kind: str) -> Callable[[str], Apply]:
    def of_field(field: str) -> Apply:
        def apply(plain: Plain, value: Any) -> None:
            chosen = choice(plain.setdefault(section, {}), name)
            chosen.setdefault("kind", next(iter(choices_of(field_types(_SECTIONS[section])[name]))))
            if chosen["kind"] != kind:
                raise UsageError(f"{section}.{name} is {chosen['kind']}; add --{name} {kind}")
            chosen[field] = value

        return apply

    return of_field


def _apply_to_blocks(name: str) -> Apply:
    def apply(plain: Plain, value: Any) -> None:
        for block in plain["model"]["blocks"].values():
            block[name] = value

    return apply


def _apply_in_blocks(part: str, kind: str) -> Callable[[str], Apply]:
    def of_field(field: str) -> Apply:
        def apply(plain: Plain, value: Any) -> None:
            blocks = plain["model"]["blocks"].values()
            users = [block for block in blocks if choice(block, part).get("kind") == kind]
            if not users:
                raise UsageError(f"no block of the model has the {part} {kind}")
            for block in users:
                block[part][field] = value

        return apply

    return of_field


def _apply_ffn(mixer: str = "") -> Apply:
    """Set the FFN of the blocks with this mixer, by default of all."""

    def apply(plain: Plain, kind: Any) -> None:
        users = [block for block in plain["model"]["blocks"].values() if mixer_kind(block) == mixer or not mixer]
        if not users:
            raise UsageError(f"no block of the model has the mixer {mixer}")
        for block in users:
            if choice(block, "ffn").get("kind") != kind:
                block["ffn"] = {"kind": kind}

    return apply


def _is_choice(annotation: Any) -> bool:
    options = [option for option in options_of(annotation) if option is not NoneType]
    return all(hasattr(option, "__dataclass_fields__") for option in options)
