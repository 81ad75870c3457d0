"""What becomes of a difference as models grow: whether it fades, grows, turns or stays from the smallest size to the
largest.

The change is paired by seed, as the differences are: a seed gives every size the same rows in the same order, so the
differences at two sizes are not independent, and an interval for independent ones would promise too much where they are
negatively correlated (tests/study/test_trends.py).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from swamla.study.statistics import Axis, Comparison, compare_pairs

TrendKind = Literal["turns", "fades", "grows", "changes", "stays", "undecided"]
SHOWN = ("difference", "small difference")


@dataclass(frozen=True, kw_only=True)
class Trend:
    """An arm's difference from the reference at the smallest and at the largest size, and its change.

    change: the difference at the largest size minus that at the smallest, at the same seeds; its p is adjusted by Holm
    over the trends of a study.
    """

    arm: str
    reference: str
    sizes: tuple[int, int]
    first: Comparison
    last: Comparison
    change: Comparison

    @property
    def kind(self) -> TrendKind:
        """The trend in a word.

        A change that was shown is a turn if both differences were shown, on either side of 0; otherwise, by the first
        one, fading or growing, or, if that was not shown, a change alone. A change within the margin is none.
        """
        if self.change.kind == "undecided":
            return "undecided"
        if self.change.kind != "difference":
            return "stays"
        if self.first.kind not in SHOWN:
            return "changes"
        first, last = float(self.first.interval.mean), float(self.last.interval.mean)
        if self.last.kind in SHOWN and first * last < 0:
            return "turns"
        return "fades" if first * float(self.change.interval.mean) < 0 else "grows"

    def _at_common_seeds(self, one: Comparison) -> float:
        """The mean difference at the seeds of the change, so that the one mean less the other is its mean."""
        own = dict(zip(one.seeds, one.differences, strict=True))
        return statistics.fmean(own[seed] for seed in self.change.seeds)

    def words(self) -> str:
        """The trend in a sentence, with the interval of the change, the number of seeds and p."""
        change, unit, n = self.change, self.change.axis.name, len(self.change.seeds)
        of = f"the difference of {self.arm} from {self.reference}"
        between = f"From width {self.sizes[0]} to {self.sizes[1]}"
        if n < 2:
            return f"{between}, {of}: undecided. It is known at {n} seed{'s' * (n != 1)} of both sizes, of 2 at least."
        first, last = (self._at_common_seeds(one) for one in (self.first, self.last))
        mean, low, high = (float(value) for value in change.interval)
        by = f"95% interval of the change {low:+.4f} to {high:+.4f}, {n} seeds, {change.p_words()}"
        seen = f"from {first:+.4f} to {last:+.4f} {unit} ({by})"
        if self.kind == "undecided":
            needed = change.needed(("a change", "that it stays"))
            return f"{between}, whether {of} fades, stays or turns is undecided: it went {seen}; {needed}."
        if self.kind == "stays":
            return f"{between}, {of} stays, within the margin of {change.axis.margin:g}: it went {seen}."
        gains = (mean < 0) == (change.axis.direction == "lower")
        favoured = self.arm if gains else self.reference
        ends = {
            "turns": f"{of} turns: {self.arm} is {'better' if gains else 'worse'} at the larger size only",
            "fades": f"{of} fades",
            "grows": f"{of} grows",
            "changes": f"{of}, not shown at the smaller size, changes in favour of {favoured}",
        }
        return f"{between}, {ends[self.kind]}: it went {seen}."


def trends_of(comparisons: Mapping[int, Sequence[Comparison]], axis: Axis) -> list[Trend]:
    """The trend of every arm. comparisons: size, the smallest first → all arms against the reference."""
    smallest, *_, largest = comparisons
    first, last = ({one.arm: one for one in comparisons[size]} for size in (smallest, largest))
    scores = {
        f"{one.arm}@{size}": dict(zip(one.seeds, one.differences, strict=True))
        for size, found in ((smallest, first), (largest, last))
        for one in found.values()
    }
    changes = compare_pairs([(f"{arm}@{largest}", f"{arm}@{smallest}") for arm in first], scores, axis)
    return [
        Trend(
            arm=arm,
            reference=one.reference,
            sizes=(smallest, largest),
            first=one,
            last=last[arm],
            change=change,
        )
        for (arm, one), change in zip(first.items(), changes, strict=True)
    ]
