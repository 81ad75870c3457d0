"""Documents that are given as token ids, from Python: the shards that `prepare` makes of texts."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from swamla.data.shards import (
    HELD_OUT_TEXT,
    PLACES,
    Encoded,
    Progress,
    Split,
    SplitWriter,
    place_of,
    rule_for_many,
    usable_fraction_of,
)
from swamla.data.tokenizer import Tokenizer, utf8
from swamla.errors import DataError

Ids = Iterable[Any]
"""A tensor or array of ids, (T,) or (documents, T), or an iterable of sequences of ids, one document each."""

_GIVEN = "given"  # the split of all documents, before it is known which are held out
_TOLD = 1000  # documents between two reports of progress


def write_ids(
    train: Ids, held_out: Ids | None, fraction: float, tokenizer: Tokenizer, folder: Path, progress: Progress
) -> tuple[str, Encoded]:
    """Write the shards and the held-out text into `folder`; the rule of the split, for display, and the numbers.

    A document's text is what its ids decode to. It decides, without a `held_out`, which documents are held out, as for
    texts; an only document is cut. Raises DataError for what is no id of the tokenizer.
    """
    places, n_train = _write_all(train, held_out, tokenizer, folder, progress)
    given = Split.open(folder, _GIVEN, tokenizer.vocab_size)
    parts: Iterable[tuple[np.ndarray, bool]]
    if held_out is None and len(places) == 1 and fraction < 1:
        rule, parts = f"the last {100 * fraction:g} % of the only document's ids", _cut(given.document(0), fraction)
    else:
        if held_out is None:
            fraction = usable_fraction_of(set(places), fraction)
            rule, chosen = rule_for_many(fraction), [place < fraction * PLACES for place in places]
        else:
            rule, chosen = "the ids given as held out", [index >= n_train for index in range(len(places))]
        parts = ((given.document(index), out) for index, out in enumerate(chosen))
    encoded = _write_parts(parts, tokenizer, folder)
    for path in folder.glob(f"{_GIVEN}.*"):
        path.unlink()
    return rule, encoded


def _write_all(
    train: Ids, held_out: Ids | None, tokenizer: Tokenizer, folder: Path, progress: Progress
) -> tuple[list[int], int]:
    """Write all documents as one split; each one's place (see `place_of`), and how many are not given as held out."""
    places: list[int] = []
    n_train = n_bytes = 0
    with ExitStack() as stack:
        writer = SplitWriter(folder, _GIVEN, tokenizer.vocab_size, stack)
        for name, documents in (("token_ids", train), ("held_out", () if held_out is None else held_out)):
            for ids in documents_of(documents, tokenizer, name):
                text = tokenizer.decode(ids.tolist())
                places.append(place_of(text))
                n_bytes += len(utf8(text))
                writer.append(ids, len(utf8(text)), last=True)
                if len(places) % _TOLD == 0:
                    progress("reading ids", len(places), n_bytes, None)
            n_train = n_train if name == "held_out" else len(places)
    return places, n_train


def _write_parts(parts: Iterable[tuple[np.ndarray, bool]], tokenizer: Tokenizer, folder: Path) -> Encoded:
    """Write the training and the held-out split, and the held-out text."""
    lossless, n_bytes = True, 0
    with ExitStack() as stack:
        train, held = (SplitWriter(folder, name, tokenizer.vocab_size, stack) for name in ("train", "held_out"))
        text_file = stack.enter_context((folder / HELD_OUT_TEXT).open("wb"))
        for ids, out in parts:
            text = tokenizer.decode(ids.tolist())
            raw = utf8(text)
            n_bytes += len(raw)
            (held if out else train).append(ids, len(raw), last=True)
            if out:
                text_file.write(raw)
                lossless = lossless and "\ufffd" not in text  # ids that are no text of the tokenizer
    n_tokens = train.n_tokens + held.n_tokens
    return Encoded(train.n_documents, held.n_documents, train.n_tokens, n_tokens, n_bytes, lossless)


def _cut(ids: np.ndarray, fraction: float) -> list[tuple[np.ndarray, bool]]:
    at = int(len(ids) * (1 - fraction))
    return [(part, out) for part, out in ((ids[:at], False), (ids[at:], True)) if len(part)]


def documents_of(given: Ids, tokenizer: Tokenizer, name: str) -> Iterator[np.ndarray]:
    """The ids of each document, int64, without the tokenizer's `eos_id`, which separates documents; none is empty.

    name: of what is given, for messages. Raises DataError for what is no id of the tokenizer.
    """
    given = _on_host(given)
    if isinstance(given, np.ndarray) and given.ndim == 1:
        given = given[None]
    try:
        sequences = iter(given)
    except TypeError:
        raise DataError(
            f"{name} = {given!r:.40}: must be a tensor of ids, or an iterable of sequences of ids"
        ) from None
    for number, sequence in enumerate(sequences):
        ids = _checked(sequence, tokenizer, f"{name}[{number}]")
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        for begin, end in zip([0, *(ends + 1).tolist()], [*ends.tolist(), len(ids)], strict=True):
            if begin < end:
                yield ids[begin:end]


def _checked(sequence: Any, tokenizer: Tokenizer, where: str) -> np.ndarray:
    """A document's ids, int64. DataError for anything else."""
    try:
        ids = np.asarray(_on_host(sequence))
    except (TypeError, ValueError):  # rows of several lengths
        ids = np.asarray("")
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        what = f"{sequence!r:.40}".replace("\n", " ")
        raise DataError(f"{where} is {what}: must be one document's ids, a sequence of integers")
    ids = ids.astype(np.int64)
    wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if len(wrong):
        known = f"0 to {tokenizer.vocab_size - 1}, of which {tokenizer.eos_id} ends documents"
        raise DataError(f"{where} has the id {wrong[0]}: must be one of the tokenizer, {known}")
    return ids


def _on_host(given: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    return given.detach().cpu().numpy() if hasattr(given, "detach") else given
