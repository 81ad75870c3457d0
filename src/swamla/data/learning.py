"""The tokenizer of a dataset: found, or learned from a sample of its text that depends on the input alone."""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from swamla.data.config import DataConfig
from swamla.data.encode import Progress
from swamla.data.held_out import divide, is_held_out
from swamla.data.notes import Notes
from swamla.data.sources import Source
from swamla.data.tokenizer import Tokenizer, make_tokenizer
from swamla.data.units import Unit, unit_documents

SAMPLE = 1 << 26  # characters; a BPE learned from more is hardly another, and takes the longer
_PLACES = 64  # units that a sample is taken from, evenly over all


class Share(NamedTuple):
    """A source in units, and its share of what a tokenizer learns from."""

    source: Source
    units: list[Unit]
    weight: float = 1.0


def learn_tokenizer(config: DataConfig, parts: list[Share], progress: Progress) -> Tokenizer:
    """The tokenizer that `config` asks for; a trained one never saw what is held out."""

    def counted(texts: Iterator[str]) -> Iterator[str]:
        n_documents = n_characters = 0
        for text in texts:
            yield text
            n_documents, n_characters = n_documents + 1, n_characters + len(text)
            progress("reading for the tokenizer", n_documents, n_characters)

    total = sum(part.weight for part in parts)
    every = (text for part in parts for text in part.source.documents(Notes()))
    some = (
        training_texts(part.source, part.units, config.held_out_fraction, int(SAMPLE * part.weight / total))
        for part in parts
    )
    return make_tokenizer(config.tokenizer, counted(chain.from_iterable(some)), counted(every))


def training_texts(source: Source, units: list[Unit], held_out_fraction: float, size: int) -> Iterator[str]:
    """Texts that are trained on, `size` characters: all of a small source, some from many places of a large one."""
    count = min(len(units), _PLACES)
    for place in range(count):
        left = size // count
        for text, held_out in _divided(source, units, place * len(units) // count, held_out_fraction):
            if not held_out:
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


def _divided(source: Source, units: list[Unit], number: int, fraction: float) -> Iterator[tuple[str, bool]]:
    documents = unit_documents(source, units[number], Notes())
    if len(units) == 1:
        return divide(documents, fraction)[1]
    return ((text, is_held_out(text, fraction)) for text in documents)
