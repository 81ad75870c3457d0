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

    `name: text` (of several names: with commas) at the start of a line or sentence or after two spaces.
    """
    names = "|".join(f.name for f in fields(cls))
    label = re.compile(rf"(?:^ *|  |\. )((?:{names})(?:, (?:{names}))*): ", re.MULTILINE)
    docs: dict[str, str] = {}
    for base in cls.__mro__:
        text = (base.__doc__ or "") if hasattr(base, "__dataclass_fields__") else ""
        labels = list(label.finditer(text))
        ends = [following.start() for following in labels[1:]] + [len(text)]
        for found, end in zip(labels, ends[: len(labels)], strict=True):
            said = " ".join(text[found.end() : end].split("\n\n")[0].split()).rstrip(".")
            docs = dict.fromkeys(found[1].split(", "), said) | docs
    return docs
