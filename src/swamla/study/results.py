"""The results of a study: verdicts with what they do not say, figures of every arm, and JSON, CSV and LaTeX of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from swamla.evaluate.recall_grid import KNOWN
from swamla.files import write_text_atomically
from swamla.study.caveats import differing, not_said
from swamla.study.evidence import Evidence, renamed
from swamla.study.export import (
    as_csv,
    comparison_as_dict,
    comparison_rows,
    evidence_as_dict,
    figures,
    finite,
    latex,
    long_rows,
    marked_as_dict,
    trend_as_dict,
    with_half,
)
from swamla.study.folder import Test
from swamla.study.plan import Arm, Study
from swamla.study.published import Marked, marked
from swamla.study.runs import Outcome, rate_of, rate_scores, seed_runs
from swamla.study.statistics import Comparison, Interval, compare_pairs, t_interval, wilson
from swamla.study.trends import Trend, trends_of

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm's figures. lr: its best rate, none if none trained.  sensitivity: rate → validation score, none if failed.

    scores: seed → test score of the runs that finished.  interval: of their mean.  finished: the rate of seeds that
    finished, by Wilson, of `ended`.  failed: names of its runs that diverged or failed, those of the search included;
    lost: those of seeds.  left_out: seeds at a rate that was chosen before a run of the search was tried again.
    """

    arm: Arm
    lr: float | None
    sensitivity: Mapping[float, float | None]
    scores: Mapping[int, float]
    interval: Interval | None
    finished: Interval
    tokens: int
    seconds: float
    failed: tuple[str, ...]
    ended: int
    lost: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def learned(self) -> Interval:
        """The rate of seeds that learned the study's task, by Wilson; those that diverged or failed did not."""
        return wilson(self.learned_seeds, self.ended)

    @property
    def learned_seeds(self) -> int:
        """How many have the accuracy at which a task is learned, on its test rows."""
        return sum(score >= KNOWN for score in self.scores.values())

    def learned_words(self) -> str:
        """How many seeds learned the study's task, with the interval of their share."""
        low, high = self.learned[1:]
        many = f"{self.learned_seeds} of {self.ended} seeds of {self.arm.name}"
        return f"{many} (95% interval of the share {low:.0%} to {high:.0%})"


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of a study. comparisons: of every other arm with the first.  differing: settings in which arms differ.

    evidence: what the page shows beside; None if none is asked for.
    sizes: of a study of several sizes, the results at each, whose arms have their names without it; p is adjusted for
        the comparisons of all sizes.  trends: what becomes of each difference.
    """

    study: Study
    arms: tuple[ArmResult, ...]
    comparisons: tuple[Comparison, ...]
    outcomes: tuple[Outcome, ...]
    tests: tuple[Test, ...]
    differing: Mapping[str, Mapping[str, Any]]
    evidence: Evidence | None = None
    sizes: Mapping[int, "Results"] = field(default_factory=dict)
    trends: tuple[Trend, ...] = ()

    @classmethod
    def of(
        cls, study: Study, outcomes: Mapping[str, Outcome], tests: Sequence[Test], evidence: Evidence | None = None
    ) -> "Results":
        """The results of a study's outcomes and of its scores on the test part, those at the chosen rates."""
        kept = seed_runs(study, outcomes)
        tests = [test for test in tests if test.run in kept]
        scores = {arm.name: {test.seed: test.score for test in tests if test.arm == arm.name} for arm in study.arms}
        references = {arm.name: study.reference_of(arm).name for arm in study.arms}
        pairs = [(arm, reference) for arm, reference in references.items() if arm != reference]
        whole = cls(
            study=study,
            arms=tuple(_result(study, arm, outcomes, scores[arm.name]) for arm in study.arms),
            comparisons=tuple(compare_pairs(pairs, scores, study.axis)),
            outcomes=tuple(outcomes.values()),
            tests=tuple(tests),
            differing=differing(study),
            evidence=evidence,
        )
        if not study.sizes:
            return whole
        sizes = {size: whole._at(size) for size in study.sizes}
        trends = trends_of({size: found.comparisons for size, found in sizes.items()}, study.axis)
        return replace(whole, sizes=sizes, trends=tuple(trends))

    def _at(self, size: int) -> "Results":
        """The results at one size."""
        study = self.study.at(size)
        names = {arm.name: arm.label for arm in self.study.arms if arm.size == size}
        arms = [one for one in self.arms if one.arm.name in names]
        comparisons = [one for one in self.comparisons if one.arm in names]
        return Results(
            study=study,
            arms=tuple(replace(one, arm=arm) for one, arm in zip(arms, study.arms, strict=True)),
            comparisons=tuple(replace(one, arm=names[one.arm], reference=names[one.reference]) for one in comparisons),
            outcomes=renamed(self.outcomes, names),
            tests=renamed(self.tests, names),
            differing=differing(study),
            evidence=self.evidence.of(names) if self.evidence else None,
        )

    def verdict(self) -> list[str]:
        """What was found, a sentence for each comparison, then the arms of which runs did not finish."""
        lost = [text for one in self.arms for text in _lost(one)]
        untrained = [f"No learning rate trained {one.arm.name}." for one in self.arms if one.lr is None]
        return [*self.compared(), *(trend.words() for trend in self.trends), *untrained, *lost]

    def compared(self) -> list[str]:
        """A sentence for each comparison, of several sizes for each at each."""
        if not self.sizes:
            return [self.words(comparison) for comparison in self.comparisons]
        return [
            f"At width {size}, {found.words(comparison)}"
            for size, found in self.sizes.items()
            for comparison in found.comparisons
        ]

    def words(self, one: Comparison) -> str:
        """A comparison in words; where some seeds of its arms learned a task and some did not, first how many did."""
        arms = [found for name in (one.reference, one.arm) for found in self.arms if found.arm.name == name]
        if self.study.task is None or not any(0 < found.learned.mean < 1 for found in arms):
            return one.words()
        shares = " and ".join(found.learned_words() for found in arms)
        return (
            f"The task was learned (accuracy {KNOWN:g} or more) by {shares}: where some seeds learn it and some do "
            f"not, these shares say more than means. {one.words()}"
        )

    def published(self) -> list[Marked]:
        """The published figures that the study names, each judged against it."""
        study, first = self.study, self.study.arms[0]
        tokens = first.steps * first.config.train.batch_size * first.config.train.block_size
        rows = study.asked.published
        return [marked(row, unit=study.axis.name, data=study.data, tokens=tokens) for row in rows]

    def not_said(self) -> list[str]:
        """What the verdict does not say."""
        lost = [one.arm.name for one in self.arms if one.lost]
        return not_said(self.study, self.comparisons, min(len(one.sensitivity) for one in self.arms), lost)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows for the screen: an arm's cost, rate, score and difference from the first, with intervals."""
        score = {"bits per byte": "bits/byte"}.get(self.study.axis.name, self.study.axis.name)
        heads = ["arm", "params", "MFLOP", "KiB", "lr", "n", score, "difference", "verdict"]
        against = {comparison.arm: comparison for comparison in self.comparisons}
        rows = []
        for one in self.arms:
            costs, compared = one.arm.costs, against.get(one.arm.name)
            rows.append(
                [
                    one.arm.name,
                    f"{costs.parameters:,}",
                    f"{costs.flops / 1e6:.2f}",
                    f"{costs.state / 1024:.1f}",
                    "none" if one.lr is None else f"{one.lr:g}",
                    f"{len(one.scores)}",
                    with_half(one.interval),
                    "" if compared is None else with_half(compared.interval, sign="+"),
                    "" if compared is None else compared.kind,
                ]
            )
        return heads, rows

    def size_table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of the differences at all sizes, and of their changes."""
        heads = ["arm", "width", "params", "n", "difference", "low", "high", "p", "verdict"]
        rows = []
        for trend in self.trends:
            for size, found in self.sizes.items():
                (one,) = (one for one in found.comparisons if one.arm == trend.arm)
                parameters = found.study.arm(one.arm).costs.parameters
                rows.append([one.arm, str(size), f"{parameters:,}", *figures(one), one.kind])
            change = f"{trend.sizes[0]} to {trend.sizes[1]}"
            rows.append([trend.arm, change, "", *figures(trend.change), trend.kind])
        return heads, rows

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "format": FORMAT,
            "study": self.study.as_plain(),
            "verdict": self.verdict(),
            "not_said": self.not_said(),
            "comparisons": [finite(comparison_as_dict(one, self.words(one))) for one in self.comparisons],
            **({"trends": [finite(trend_as_dict(one)) for one in self.trends]} if self.sizes else {}),
            "arms": [finite(_arm_as_dict(one)) for one in self.arms],
            **({"published": [marked_as_dict(one) for one in self.published()]} if self.study.asked.published else {}),
            "runs": [finite(asdict(one)) for one in self.outcomes],
            "tests": [finite(asdict(one)) for one in self.tests],
            "differing": self.differing,
            "evidence": evidence_as_dict(self.evidence),
        }

    def write(self, folder: Path) -> list[Path]:
        """Write results.json, and as CSV runs, arms, comparisons and evidence, as LaTeX arms and comparisons.

        Of several sizes sizes.csv and sizes.tex, too; with published figures published.csv. Returns the files.
        """
        heads, rows = self.table()
        tests = {test.run: test for test in self.tests}
        of_runs = [asdict(one) | {"test": tests[one.run].score if one.run in tests else ""} for one in self.outcomes]
        texts = {
            "results.json": json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            "runs.csv": as_csv(list(of_runs[0]) if of_runs else [], [list(row.values()) for row in of_runs]),
            "arms.csv": as_csv(heads, rows),
            "arms.tex": latex(heads, rows),
            "comparisons.csv": as_csv(*comparison_rows(self.comparisons)),
            "comparisons.tex": latex(
                ["arm", "n", "difference", "low", "high", "p", "p equivalence", "verdict"],
                [[one.arm, *figures(one), f"{one.p_equivalence:.3g}", one.kind] for one in self.comparisons],
            ),
        }
        if self.sizes:
            heads, rows = self.size_table()
            texts |= {"sizes.csv": as_csv(heads, rows), "sizes.tex": latex(heads, rows)}
        if judged := [marked_as_dict(one) for one in self.published()]:
            texts["published.csv"] = as_csv(list(judged[0]), [list(row.values()) for row in judged])
        if self.evidence is not None:
            texts["evidence.csv"] = as_csv(["what", "arm", "seed", "at", "value"], long_rows(self.evidence))
        for name, text in texts.items():
            write_text_atomically(folder / name, text)
        return [folder / name for name in texts]


def _result(study: Study, arm: Arm, outcomes: Mapping[str, Outcome], scores: Mapping[int, float]) -> ArmResult:
    own = [outcome for outcome in outcomes.values() if outcome.arm == arm.name]
    seeds = [outcome for outcome in seed_runs(study, outcomes).values() if outcome.arm == arm.name]
    finished = [outcome for outcome in seeds if outcome.status == "finished"]
    rate = rate_of(study, arm, outcomes)
    tried = rate_scores(arm, outcomes)
    return ArmResult(
        arm=arm,
        lr=None if rate is None else arm.lr(rate),
        sensitivity={arm.lr(key): None if score == float("inf") else score for key, score in tried.items()},
        scores=dict(sorted(scores.items())),
        interval=t_interval(list(scores.values())) if scores else None,
        finished=wilson(len(finished), len(seeds)),
        tokens=max((outcome.tokens for outcome in finished), default=0),
        seconds=sum(outcome.seconds for outcome in finished) / len(finished) if finished else 0.0,
        failed=tuple(outcome.run for outcome in own if outcome.status != "finished"),
        ended=len(seeds),
        lost=tuple(outcome.run for outcome in seeds if outcome.status != "finished"),
        left_out=tuple(outcome.run for outcome in own if outcome.purpose == "seed" and outcome not in seeds),
    )


def _lost(one: ArmResult) -> list[str]:
    """Which of an arm's runs are in no interval, and why."""
    search = [run for run in one.failed if run not in (*one.lost, *one.left_out)]
    told = {
        "did not finish, and {be} in no interval": one.lost,
        "{be} in no figure: a run of its search was tried again, and another rate chosen": one.left_out,
    }
    said = [
        f"Of {one.arm.name}, {', '.join(runs)} {what.format(be='are' if len(runs) > 1 else 'is')}."
        for what, runs in told.items()
        if runs
    ]
    if search:
        said.append(f"Of {one.arm.name}'s search, {', '.join(search)} did not finish, so no seed has that rate.")
    return said


def _arm_as_dict(one: ArmResult) -> dict[str, Any]:
    return {
        "name": one.arm.name,
        "costs": asdict(one.arm.costs),
        "matched": one.arm.matched,
        "lr": one.lr,
        "sensitivity": [{"lr": lr, "validation": score} for lr, score in one.sensitivity.items()],
        "scores": [{"seed": seed, "test": score} for seed, score in one.scores.items()],
        "interval": one.interval,
        "finished": one.finished,
        "tokens": one.tokens,
        "seconds": one.seconds,
        "failed": one.failed,
        "ended": one.ended,
        "lost": one.lost,
        "left_out": one.left_out,
    }
