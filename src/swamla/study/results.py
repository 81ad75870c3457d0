"""The results of a study: verdicts with what they do not say, figures of every arm, and JSON, CSV and LaTeX of them."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from swamla.evaluate.recall_grid import KNOWN
from swamla.files import write_text_atomically
from swamla.interpret.sections import as_plain
from swamla.study.caveats import differing, not_said
from swamla.study.evidence import Evidence, renamed
from swamla.study.folder import Test
from swamla.study.plan import Arm, Study
from swamla.study.published import Marked, marked
from swamla.study.runs import Outcome, rate_of, rate_scores
from swamla.study.statistics import Comparison, Interval, compare_pairs, t_interval, wilson
from swamla.study.trends import Trend, trends_of

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm's figures. lr: its best rate, none if none trained.  sensitivity: rate → validation score, none if failed.

    scores: seed → test score of the runs that finished.  interval: of their mean.  finished: the rate of seeds that
    finished, by Wilson.  failed: names of its runs that diverged or failed, those of the search included.
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

    @property
    def learned(self) -> Interval:
        """The rate of finished seeds that learned the study's task, by Wilson."""
        return wilson(self.learned_seeds, len(self.scores))

    @property
    def learned_seeds(self) -> int:
        """How many have the accuracy at which a task is learned, on its test rows."""
        return sum(score >= KNOWN for score in self.scores.values())

    def learned_words(self) -> str:
        """How many seeds learned the study's task, with the interval of their share."""
        low, high = self.learned[1:]
        many = f"{self.learned_seeds} of {len(self.scores)} seeds of {self.arm.name}"
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
        """The results of a study's outcomes and of its scores on the test part."""
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
        lost = [
            f"Of {one.arm.name}, {', '.join(one.failed)} did not finish, and "
            f"{'are' if len(one.failed) > 1 else 'is'} in no interval."
            for one in self.arms
            if one.failed
        ]
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
        return not_said(self.study, self.comparisons, min(len(one.sensitivity) for one in self.arms))

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
                    _with_half(one.interval),
                    "" if compared is None else _with_half(compared.interval, sign="+"),
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
                rows.append([one.arm, str(size), f"{parameters:,}", *_figures(one), one.kind])
            change = f"{trend.sizes[0]} to {trend.sizes[1]}"
            rows.append([trend.arm, change, "", *_figures(trend.change), trend.kind])
        return heads, rows

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "format": FORMAT,
            "study": self.study.as_plain(),
            "verdict": self.verdict(),
            "not_said": self.not_said(),
            "comparisons": [
                finite(asdict(one) | {"kind": one.kind, "words": self.words(one)}) for one in self.comparisons
            ],
            **({"trends": [finite(_trend_as_dict(one)) for one in self.trends]} if self.sizes else {}),
            "arms": [finite(_arm_as_dict(one)) for one in self.arms],
            **({"published": [_marked_as_dict(one) for one in self.published()]} if self.study.asked.published else {}),
            "runs": [finite(asdict(one)) for one in self.outcomes],
            "tests": [finite(asdict(one)) for one in self.tests],
            "differing": self.differing,
            "evidence": _evidence_as_dict(self.evidence),
        }

    def write(self, folder: Path) -> list[Path]:
        """Write results.json, runs.csv, arms.csv, evidence.csv and arms.tex into `folder`; returns the files.

        Of several sizes sizes.csv and sizes.tex, too; with published figures published.csv.
        """
        heads, rows = self.table()
        tests = {test.run: test for test in self.tests}
        of_runs = [asdict(one) | {"test": tests[one.run].score if one.run in tests else ""} for one in self.outcomes]
        texts = {
            "results.json": json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            "runs.csv": as_csv(list(of_runs[0]) if of_runs else [], [list(row.values()) for row in of_runs]),
            "arms.csv": as_csv(heads, rows),
            "arms.tex": latex(heads, rows),
        }
        if self.sizes:
            heads, rows = self.size_table()
            texts |= {"sizes.csv": as_csv(heads, rows), "sizes.tex": latex(heads, rows)}
        if judged := [_marked_as_dict(one) for one in self.published()]:
            texts["published.csv"] = as_csv(list(judged[0]), [list(row.values()) for row in judged])
        if self.evidence is not None:
            texts["evidence.csv"] = as_csv(["what", "arm", "seed", "at", "value"], _long(self.evidence))
        for name, text in texts.items():
            write_text_atomically(folder / name, text)
        return [folder / name for name in texts]


def _result(study: Study, arm: Arm, outcomes: Mapping[str, Outcome], scores: Mapping[int, float]) -> ArmResult:
    own = [outcome for outcome in outcomes.values() if outcome.arm == arm.name]
    seeds = [outcome for outcome in own if outcome.purpose == "seed"]
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
    )


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
    }


def _marked_as_dict(one: Marked) -> dict[str, Any]:
    """The row, with whether it is comparable, whether the author said so, and what differs."""
    return asdict(one.row) | {
        "comparable": one.comparable, "claimed": one.row.comparable, "differences": "; ".join(one.differences),
    }  # fmt: skip


def _evidence_as_dict(evidence: Evidence | None) -> Any:
    """The evidence; of studies whose generation was not timed without it, as older versions wrote them."""
    plain = as_plain(evidence)
    if evidence is not None and not evidence.decoding:
        del plain["decoding"]
    return plain


def _trend_as_dict(one: Trend) -> dict[str, Any]:
    change = {name: getattr(one.change, name) for name in ("seeds", "differences", "interval", "p", "p_equivalence")}
    more = {"more_seeds": one.change.more_seeds, "comparisons": one.change.comparisons}
    return {
        "arm": one.arm, "reference": one.reference, "sizes": one.sizes, "kind": one.kind, "words": one.words(),
        "change": change | more,
    }  # fmt: skip


def _figures(one: Comparison) -> list[str]:
    """The number of seeds, the mean with the ends of its interval, and p."""
    if not one.seeds:
        return ["0", "none", "", "", ""]
    ends = [f"{float(end):+.4f}" if abs(float(end)) < float("inf") else "" for end in one.interval[1:]]
    return [str(len(one.seeds)), f"{float(one.interval.mean):+.4f}", *ends, f"{one.p:.3g}"]


def _long(evidence: Evidence) -> list[list[Any]]:
    """A row for each figure: what it is, of which arm and seed, at which tokens or layer and head."""
    rows: list[list[Any]] = []
    for curve in evidence.curves:
        for name, (means, _, _) in (
            ("training loss", curve.loss),
            ("training loss less the first's", curve.difference),
        ):
            rows += [[name, curve.arm, "", at, mean] for at, mean in zip(curve.tokens, means, strict=False)]
    for one in evidence.measured:
        own = [one.arm, one.seed]
        if one.answers is not None:
            rows += [["accuracy", *own, one.answers.state_bytes, one.answers.accuracy]]
        if one.positions is not None:
            rows += [["loss", *own, at, loss] for at, loss in zip(one.positions.last, one.positions.loss, strict=True)]
        if one.repeats is None:
            continue
        rows += [[name, *own, "", getattr(one.repeats, name)] for name in ("accuracy", "first_loss", "second_loss")]
        for index, layer in enumerate(one.repeats.layers):
            rows += [[name, *own, index, getattr(layer, name)] for name in ("cut", "cut_conv", "control")]
            for name in ("hit", "attribution", "induction", "previous", "duplicate"):
                rows += [[name, *own, f"{index}.{head}", value] for head, value in enumerate(getattr(layer, name))]
    rows += [["state bytes", arm, "", at, size] for arm, sizes in evidence.caches.items() for at, size in sizes.items()]
    rows += [["seconds of a step", arm, "", "", speed.median] for arm, speed in evidence.speed.items()]
    for name, field_of in (("seconds of a generated token", "median"), ("seconds to the first token", "first")):
        rows += [
            [name, arm, "", one.prompt, getattr(one, field_of)]
            for arm, ones in evidence.decoding.items()
            for one in ones
        ]
    return rows + [["bytes of a run's process", arm, "", "", size] for arm, size in evidence.memory.items()]


def finite(value: Any) -> Any:
    """The value with null for what JSON lacks: infinities and NaN."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _with_half(interval: Interval | None, sign: str = "") -> str:
    """The mean with half of its interval; alone where there is no interval."""
    if interval is None or interval.mean != interval.mean:
        return "none"
    mean, low, high = interval
    half = (high - low) / 2
    return f"{mean:{sign}.4f} ± {half:.4f}" if abs(half) < float("inf") else f"{mean:{sign}.4f}"


def as_csv(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return out.getvalue()


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip


def latex(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for LaTeX with booktabs: the first column to the left, others to the right."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_SPECIAL.get(sign, sign) for sign in cell) for cell in cells) + r" \\"

    columns = "l" + "r" * (len(heads) - 1)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(heads), r"\midrule", *map(line, rows), r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"]) + "\n"
