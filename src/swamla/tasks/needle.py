"""A needle in a haystack: one sentence of a long text has to be found again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swamla.errors import require
from swamla.registry import register
from swamla.tasks.task import IGNORED, Draws, Example, Task

DEPTHS = 10

_DIGITS = [str(digit) for digit in range(10)]
# fmt: off
_PEOPLE = [
    "Ada", "Alan", "Barbara", "Claude", "Edsger", "Emmy", "Frances", "Grace",
    "John", "Kurt", "Leslie", "Margaret", "Niklaus", "Radia", "Sophie", "Tony",
]
_ADJECTIVES = [
    "old", "small", "green", "quiet", "bright", "heavy", "cold", "empty", "round", "wild", "narrow", "young",
]
_NOUNS = [
    "river", "house", "garden", "train", "letter", "bridge", "forest", "window", "stone", "boat", "mirror", "market",
]
_VERBS = ["follows", "meets", "hides", "leaves", "crosses", "carries", "shows", "reaches"]
# fmt: on
_WORDS = ["the", "code", "of", "is", "what", ".", "?", *_DIGITS, *_PEOPLE, *_ADJECTIVES, *_NOUNS, *_VERBS]
_ID = {word: number for number, word in enumerate(_WORDS)}
_QUESTION = [_ID[word] for word in ("what", "is", "the", "code", "of")]
_HAY = 8  # tokens of a sentence of hay


@register
@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """`… the old river meets the small boat . the code of Ada is 4 0 7 . … what is the code of Ada ? 4 0`.

    The hay is sentences of random words, without digits or names. Asked are the digits of one needle, at the end.

    length: tokens of a row.
    depth: where the needle stands, from 0, the text's beginning, to 9, right before the question; -1 is a random one of
        these ten in every row.
    digits: of a code.
    needles: sentences with a code, of different people; one of them is asked for, the others stand anywhere.
    """

    kind: ClassVar[str] = "needle"
    length: int = 128
    depth: int = -1
    digits: int = 3
    needles: int = 1

    def __post_init__(self) -> None:
        require(-1 <= self.depth < DEPTHS, "depth", self.depth, f"must be from 0 to {DEPTHS - 1}, or -1 for any")
        require(self.digits > 0, "digits", self.digits, "must be > 0, e.g. 3")
        most = len(_PEOPLE)
        require(0 < self.needles <= most, "needles", self.needles, f"must be from 1 to {most}, the people there are")
        least = self._taken + (DEPTHS - 1) * _HAY
        room = f"must be >= {least}: needles, question, and {DEPTHS - 1} sentences of hay, so that all depths differ"
        require(self.length >= least, "length", self.length, room)

    @property
    def _taken(self) -> int:
        """The tokens of needles and question."""
        return self.needles * len(self._needle(0, [0] * self.digits)) + len(_QUESTION) + 1 + self.digits

    @property
    def vocab_size(self) -> int:
        """The words."""
        return len(_WORDS)

    def names(self) -> Sequence[str]:
        """The words."""
        return _WORDS

    def draw(self, random: Draws) -> Example:
        """Hay, with the needles between its sentences, then the question."""
        hay, size = list[list[int]](), self.length - self._taken
        while size > 0:
            hay.append(_hay(random)[-size:])  # the first one of all may be an end of a sentence
            size -= len(hay[-1])
        hay.reverse()
        people = random.distinct(len(_PEOPLE), self.needles).tolist()
        codes = random.below(10, self.needles * self.digits).reshape(self.needles, self.digits).tolist()
        depth = random.integer(0, DEPTHS - 1) if self.depth < 0 else self.depth
        places = [round(depth * len(hay) / (DEPTHS - 1)), *random.below(len(hay) + 1, self.needles - 1).tolist()]
        sentences = list[int]()
        for place in range(len(hay) + 1):
            at_place = [i for i in range(self.needles) if places[i] == place]
            for i in sorted(at_place, reverse=depth > 0):  # the asked one, the first, at the very beginning or end
                sentences += self._needle(people[i], codes[i])
            sentences += hay[place] if place < len(hay) else []
        answer = [_ID[str(digit)] for digit in codes[0]]
        question = [*_QUESTION, _ID[_PEOPLE[people[0]]], _ID["?"]]
        tokens_T = np.array([*sentences, *question, *answer[:-1]])
        labels_T = np.full(self.length, IGNORED)
        labels_T[-self.digits :] = answer
        return Example(tokens_T, labels_T)

    def _needle(self, person: int, code: list[int]) -> list[int]:
        words = ["the", "code", "of", _PEOPLE[person], "is", *map(str, code), "."]
        return [_ID[word] for word in words]


def _hay(random: Draws) -> list[int]:
    """A sentence: the ADJECTIVE NOUN VERB the ADJECTIVE NOUN."""
    lists = (_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS)
    raw = random.below(1 << 32, len(lists)).tolist()
    adjective, noun, verb, other, thing = (_ID[words[n % len(words)]] for words, n in zip(lists, raw, strict=True))
    the = _ID["the"]
    return [the, adjective, noun, verb, the, other, thing, _ID["."]]
