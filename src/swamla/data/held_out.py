"""Which documents are held out: decided by their text alone, wherever it lies and whatever else there is."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out `fraction` of all documents.

    The first 8 bytes of the SHA-256 of its text decide. The same text is on the same side whatever file, row, name or
    compression it comes in; a byte-order mark and the kind of its line ends do not count.
    """
    identity = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def divide(documents: Iterable[str], fraction: float) -> tuple[str, Iterator[tuple[str, bool]]]:
    """How the split is made, in words, and (text, held out?) for each document.

    A document that is the only one is cut, and its last characters are the held-out document.
    """
    remaining = iter(documents)
    first = list(islice(remaining, 2))
    if len(first) == 1 and fraction < 1:
        return f"the last {100 * fraction:g} % of the only document's characters", _cut(first[0], fraction)
    return rule_for_many(fraction), ((text, is_held_out(text, fraction)) for text in chain(first, remaining))


def rule_for_many(fraction: float) -> str:
    """How more than one document are split, in words."""
    return "all of it" if fraction == 1 else f"{100 * fraction:g} % of documents, by a hash of their text"


def _cut(text: str, fraction: float) -> Iterator[tuple[str, bool]]:
    """The two parts of a text, cut after the same word whatever its line ends are."""
    pairs = [match.start() for match in re.finditer("\r\n", text)]
    kept = int((len(text) - len(pairs)) * (1 - fraction))  # characters, a line's end counted as one
    at = kept + sum(1 for earlier, place in enumerate(pairs) if place - earlier < kept)
    yield text[:at], False
    yield text[at:], True
