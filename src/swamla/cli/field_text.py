"""What a config's fields look like on the command line: how a value is read, shown and explained."""

import re
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from swamla.config import options_of


def metavar(annotation: Any) -> str:
    """What --help shows in a value's place: `INT|none`, `cosine|linear`."""
    options = options_of(annotation)
    shown = "|".join(_metavar_of(option) for option in options if option is not NoneType)
    return f"{shown}|none" if NoneType in options and str not in options else shown


def _metavar_of(option: Any) -> str:
    if get_origin(option) is Literal:
        return "|".join(map(str, get_args(option)))
    if get_origin(option) is tuple:
        return ",".join(_metavar_of(item) for item in get_args(option))
    return {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false"}[option]


def parse_text(text: str | bool, annotation: Any) -> Any:
    """Text as the plain value that `annotation` wants; left as it is where that fails, for the reader to refuse."""
    if not isinstance(text, str):
        return text
    options = options_of(annotation)
    if str in options:
        return text
    if NoneType in options and text.lower() == "none":
        return None
    for option in options:
        if get_origin(option) is tuple:
            return [parse_text(item, get_args(option)[0]) for item in re.split(r"[,\s]+", text.strip())]
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
    return text


def field_docs(cls: type) -> dict[str, str]:
    """What the docstrings of a config and its bases say about each field, for --help.

    `name: text` (of several names: with commas) at the start of a line or sentence or after two spaces; else the first
    unlabelled clause that has the name as a word, or any that has it in backticks; else nothing.
    """
    text = "  ".join(base.__doc__ or "" for base in cls.__mro__ if hasattr(base, "__dataclass_fields__"))
    names = [f.name for f in fields(cls)]
    name = "|".join(names)
    starts = list(re.finditer(rf"(?:^ *|  |\. )((?:{name})(?:, (?:{name}))*): ", text, re.MULTILINE))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    docs: dict[str, str] = {}
    for start, end in zip(starts, ends[: len(starts)], strict=True):
        said = " ".join(text[start.end() : end].split("\n\n")[0].split()).rstrip(".")
        docs = dict.fromkeys(start[1].split(", "), said) | docs
    clauses = [" ".join(clause.split()).rstrip(".") for clause in re.split(r"\.\s|;\s|\n\s*\n", text)]
    for field in names:
        plain = (clause for clause in clauses if ": " not in clause and re.search(rf"\b{field}\b", clause))
        quoted = (clause for clause in clauses if f"`{field}`" in clause)
        docs.setdefault(field, next(plain, next(quoted, "")))
    return docs
