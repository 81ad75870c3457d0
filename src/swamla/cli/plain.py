"""Helpers for the plain data of a recipe, which flags change."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from swamla.config import choices_of, field_types, kind_of
from swamla.model.block import BlockConfig
from swamla.registry import is_family

Plain = dict[str, Any]
BLOCK_PARTS = {
    part: choices_of(annotation) for part, annotation in field_types(BlockConfig).items() if is_family(annotation)
}
BLOCK_SETTINGS = {name: annotation for name, annotation in field_types(BlockConfig).items() if name not in BLOCK_PARTS}

DEFAULT_KINDS = {
    f.name: kind_of(type(f.default_factory())) for f in fields(BlockConfig) if f.default_factory is not MISSING
}


def choice(table: Plain, name: str) -> Plain:
    """The choice `name` in `table` as a table, even if the recipe gives only its kind or nothing."""
    written = table.setdefault(name, {"kind": DEFAULT_KINDS[name]} if name in DEFAULT_KINDS else {})
    if isinstance(written, str):
        table[name] = {"kind": written}
    return table[name]


def mixer_kind(block: Plain) -> str:
    """The kind of a block's mixer, "" if the recipe has none."""
    return choice(block, "mixer").get("kind", "")


def is_local(kind: str) -> bool:
    """True for a kind of mixer whose cost and state do not grow with the distance to the document's start."""
    mixers: Mapping[str, Any] = BLOCK_PARTS["mixer"]
    return kind in mixers and mixers[kind].is_local
