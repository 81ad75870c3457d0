"""How unlike the held-out text is to the training text: the share of its three-byte sequences that training lacks.

A hash chooses the held-out documents, so many of them are like the rest, but a few may be of another kind: the only
file in another language, a table among prose. Their loss then says little. What is much depends on the amount of text,
so the same share is measured of training documents, each against all others.
"""

from pathlib import Path

import numpy as np

from swamla.data.shards import Split
from swamla.data.tokenizer import Tokenizer

FEW = 100  # held-out documents from which on they are taken to be like the others, and nothing is measured
_TRAINING, _HELD_OUT = 1 << 19, 1 << 17  # most tokens that are read of each split
_DOCUMENTS = 200  # most training documents that are compared
_LEAST = 100  # held-out sequences below which chance decides
_PIECES = 10  # of a single document, which take the place of several
# Unlike: a tenth of the sequences are unseen, three times as many as of training documents. Of 610 random splits of
# Python's library, licences and Markdown (12 to 100 documents, 1 to 5 held out) 6 were; held-out text of another
# language or kind of file was at 4.5 to 33 times (docs/log.md).
_MANY, _TIMES = 0.1, 3.0


def unseen_shares(folder: Path, tokenizer: Tokenizer) -> dict[str, float] | None:
    """The shares of "held_out" and "training" sequences of three bytes that no (other) training document has.

    None if there are many held-out documents, too little held-out text, or nothing to train on.
    """
    train, held_out = (Split.open(folder, name, tokenizer.vocab_size) for name in ("train", "held_out"))
    if not train.n_documents or not 0 < held_out.n_documents < FEW:
        return None
    found, counts = _sequences(_texts(train, tokenizer, _TRAINING, _PIECES if train.n_documents == 1 else 1))
    tested, tested_counts = _sequences(_texts(held_out, tokenizer, _HELD_OUT))
    if not len(found) or tested_counts.sum() < _LEAST:
        return None
    known, place, documents = np.unique(found, return_inverse=True, return_counts=True)
    unseen = tested_counts[~np.isin(tested, known)].sum() / tested_counts.sum()
    alone = counts[documents[place] == 1].sum() / counts.sum()
    return {"held_out": round(float(unseen), 4), "training": round(float(alone), 4)}


def describe_unlike(shares: dict[str, float]) -> str:
    """What to warn of, "" if the held-out text is like the training text, or if nothing was measured."""
    unseen, usual = shares.get("held_out", 0.0), shares.get("training", 0.0)
    if unseen < _MANY or unseen < _TIMES * usual:
        return ""
    return (
        f"the held-out text is unlike the training text: {unseen:.0%} of its sequences of three bytes do not occur "
        f"there (of a training document's, {usual:.0%} are in no other), so held-out losses say little about the rest"
    )


def _sequences(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The different sequences of three bytes in each text, as numbers, and how often each occurs in it."""
    arrays = [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]
    found = [np.unique((ids[:-2] << 16) | (ids[1:-1] << 8) | ids[2:], return_counts=True) for ids in arrays]
    sequences, counts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return sequences, counts


def _texts(split: Split, tokenizer: Tokenizer, most: int, pieces: int = 1) -> list[bytes]:
    """Texts of evenly spaced documents, of long ones the middle; `most` tokens in all. pieces: of the only document."""
    edges = split.offsets if pieces == 1 else np.linspace(0, split.n_tokens, pieces + 1).astype(int)
    pairs = np.stack((edges[:-1], edges[1:]), axis=1)
    chosen = pairs[np.linspace(0, len(pairs) - 1, min(len(pairs), _DOCUMENTS)).astype(int)]
    size = most // len(chosen)
    texts = []
    for begin, end in chosen.tolist():
        cut = max(0, end - begin - size)
        ids = split.tokens[begin + cut // 2 : end - (cut - cut // 2)]
        texts.append(tokenizer.decode(ids.tolist()).encode("utf-8", "surrogatepass"))
    return texts
