"""How results of studies are written: cells of their tables, CSV, LaTeX, and what JSON can hold."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from swamla.interpret.sections import as_plain
from swamla.study.evidence import Evidence
from swamla.study.published import Marked
from swamla.study.statistics import Comparison, Interval
from swamla.study.trends import Trend


def marked_as_dict(one: Marked) -> dict[str, Any]:
    """The row, with whether it is comparable, whether the author said so, and what differs."""
    return asdict(one.row) | {
        "comparable": one.comparable, "claimed": one.row.comparable, "differences": "; ".join(one.differences),
    }  # fmt: skip


def comparison_as_dict(one: Comparison, words: str) -> dict[str, Any]:
    """All of it, with the verdict and what p is of this comparison alone."""
    alone = dict(zip(("p", "p_equivalence"), one.alone, strict=True))
    return asdict(one) | {"kind": one.kind, "alone": alone, "words": words}


def comparison_rows(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of all figures of comparisons, with the difference at each seed."""
    seeds = sorted({seed for one in comparisons for seed in one.seeds})
    heads = ["arm", "reference", "unit", "margin", "n", "difference", "low", "high", "p", "p_equivalence"]
    heads += ["p_alone", "p_equivalence_alone", "comparisons", "correlation", "more_seeds", "verdict"]
    rows = []
    for one in comparisons:
        at = dict(zip(one.seeds, one.differences, strict=True))
        row = [one.arm, one.reference, one.axis.name, one.axis.margin, len(one.seeds), *one.interval]
        row += [one.p, one.p_equivalence, *one.alone, one.comparisons, one.correlation, one.more_seeds, one.kind]
        rows.append(["" if finite(each) is None else each for each in (*row, *(at.get(seed) for seed in seeds))])
    return [*heads, *(f"seed {seed}" for seed in seeds)], rows


def evidence_as_dict(evidence: Evidence | None) -> Any:
    """The evidence; of studies whose generation was not timed without it, as older versions wrote them."""
    plain = as_plain(evidence)
    if evidence is not None and not evidence.decoding:
        del plain["decoding"]
    return plain


def trend_as_dict(one: Trend) -> dict[str, Any]:
    change = {name: getattr(one.change, name) for name in ("seeds", "differences", "interval", "p", "p_equivalence")}
    more = {"more_seeds": one.change.more_seeds, "comparisons": one.change.comparisons}
    return {
        "arm": one.arm, "reference": one.reference, "sizes": one.sizes, "kind": one.kind, "words": one.words(),
        "change": change | more,
    }  # fmt: skip


def figures(one: Comparison) -> list[str]:
    """The number of seeds, the mean with the ends of its interval, and p."""
    if not one.seeds:
        return ["0", "none", "", "", ""]
    ends = [f"{float(end):+.4f}" if abs(float(end)) < float("inf") else "" for end in one.interval[1:]]
    return [str(len(one.seeds)), f"{float(one.interval.mean):+.4f}", *ends, f"{one.p:.3g}"]


def long_rows(evidence: Evidence) -> list[list[Any]]:
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


def with_half(interval: Interval | None, sign: str = "") -> str:
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
