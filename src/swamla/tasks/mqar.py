"""Multi-query associative recall: pairs of key and value, then keys whose values are asked (arXiv 2312.04927)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from swamla.errors import require
from swamla.registry import register
from swamla.tasks.task import IGNORED, Draws, Example, Task


@register
@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """`k4 v9 k1 v3 … k1 k7 k4 k2`: at the second k1 the answer is v3, at the second k4 it is v9.

    The pairs fill the row's beginning; after them every key is asked once, at a random even distance. What stands
    between the queries is in no pair, so no pair is overwritten.

    length: tokens of a row.
    pairs: key-value pairs; each key is asked once.
    vocabulary: ids: the first half are keys, the others values.
    power: exponent of the distances d between pairs and queries, p ∝ d^(power − 1): 1 is anywhere, less means sooner.
        zoology has 0.01: then a window of sixteen tokens sees many pairs when they are asked.
    filler: what stands between the queries: "keys" of no pair, so that the row's values are exactly the answers; or
        "any" keys and values of no pair, as in zoology, but no value right after a query.
    """

    kind: ClassVar[str] = "mqar"
    length: int = 64
    pairs: int = 8
    vocabulary: int = 128
    power: float = 1.0
    filler: Literal["keys", "any"] = "keys"

    def __post_init__(self) -> None:
        require(self.pairs > 0, "pairs", self.pairs, "must be > 0, e.g. 8")
        room = f"must be even and >= {4 * self.pairs}, four for each pair: a pair and its query take four tokens"
        require(self.length % 2 == 0 and self.length >= 4 * self.pairs, "length", self.length, room)
        keys = (
            f"must be even and > {2 * self.pairs}, two for each pair: half of it are keys, of which one is in no pair"
        )
        enough = self.vocabulary % 2 == 0 and 2 * self.pairs < self.vocabulary <= 1 << 20
        require(enough, "vocabulary", self.vocabulary, f"{keys}; at most 2^20")
        require(0 < self.power <= 1, "power", self.power, "must be > 0 and <= 1, e.g. 1")

    @property
    def vocab_size(self) -> int:
        """Keys and values."""
        return self.vocabulary

    def names(self) -> Sequence[str]:
        """k0, k1, … v0, v1, …"""
        return [f"{letter}{n}" for letter in "kv" for n in range(self.vocabulary // 2)]

    def draw(self, random: Draws) -> Example:
        """Pairs, then queries among other keys."""
        half, asked = self.vocabulary // 2, self.length - 2 * self.pairs
        keys, values = random.distinct(half, half), half + random.distinct(half, half)
        key_N, value_N = keys[: self.pairs], values[: self.pairs]
        other_keys = keys[self.pairs :]
        place_N = 2 * random.distinct_weighted(np.arange(1, asked // 2 + 1) ** (self.power - 1.0), self.pairs)
        place_N = place_N[random.distinct(self.pairs, self.pairs)]  # the one drawn first tends to be the nearest
        between_T = other_keys[random.below(len(other_keys), asked)]
        if self.filler == "any":
            others = np.concatenate([other_keys, values[self.pairs :]])
            free = np.delete(np.arange(asked), place_N + 1)  # a value right after a query would overwrite its pair
            between_T[free] = others[random.below(len(others), len(free))]
        tokens_T = np.concatenate([np.stack([key_N, value_N], axis=1).ravel(), between_T])
        labels_T = np.full(self.length, IGNORED)
        tokens_T[2 * self.pairs + place_N] = key_N
        labels_T[2 * self.pairs + place_N] = value_N
        return Example(tokens_T, labels_T)
