"""Which documents are held out: decided by their names alone, so the same everywhere and whatever else there is."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from swamla.data.sources import Document

# The salt fixes the draw. Of the standard library it holds out 5 % of documents and bytes, with the encoding tables,
# which are unlike other code, in the proportion in which they occur.
_SALT = "swamla/"


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name belongs to the held-out `fraction` of all names."""
    digest = hashlib.sha256((_SALT + name).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def divide(documents: Iterable[Document], fraction: float) -> tuple[str, Iterator[tuple[Document, bool]]]:
    """How the split is made, in words, and (document, held out?) for each document.

    A document that is the only one is cut, and its last characters are the held-out document.
    """
    remaining = iter(documents)
    first = list(islice(remaining, 2))
    if len(first) == 1:
        return f"the last {100 * fraction:g} % of the only document's characters", _cut(first[0], fraction)
    whole = ((document, is_held_out(document.name, fraction)) for document in chain(first, remaining))
    return rule_for_many(fraction), whole


def rule_for_many(fraction: float) -> str:
    """How more than one document are split, in words."""
    return f"{100 * fraction:g} % of documents, by a hash of their names"


def _cut(document: Document, fraction: float) -> Iterator[tuple[Document, bool]]:
    name, text = document
    at = int(len(text) * (1 - fraction))
    yield Document(name, text[:at]), False
    yield Document(f"{name}#held-out", text[at:]), True
