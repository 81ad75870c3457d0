"""The scores: differences by seed with their intervals, curves of training, and the search for learning rates."""

import math
from collections.abc import Sequence
from html import escape

from swamla.interpret.page.svg import Line, line_chart
from swamla.study.evidence import Curves
from swamla.study.page.intervals import Difference, interval_chart
from swamla.study.page.parts import Section, colour_of, legend_of, signed, table, two
from swamla.study.results import ArmResult, Results
from swamla.study.statistics import Comparison, t_interval

SEARCH_RULE = (  # of `swamla.study.runs.next_rates`
    "three rates √10 apart, the recipe's in the middle, one more √10 farther as long as the best stands at an edge, "
    "then one on either side of the best, a fourth root of 10 away."
)
START = 0.1  # share of the training that curves leave out: the fall from the first guess hides all else


def differences(results: Results) -> Section:
    """Differences from the first arm, against the margin."""
    study, unit = results.study, results.study.axis.name
    better = "left" if study.axis.direction == "lower" else "right"
    rows = [
        Difference(
            name=each.arm,
            colour=colour_of(results, each.arm),
            mean=float(each.interval.mean),
            low=float(each.interval.low),
            high=float(each.interval.high),
            inner=_inner(each),
            seeds=[
                (value, f"{each.arm}, seed {seed}: {value:+.4f}")
                for seed, value in zip(each.seeds, each.differences, strict=True)
            ],
        )
        for each in results.comparisons
    ]
    label = f"difference from {study.reference} in {unit} ({better} is better)"
    drawn = interval_chart(rows, margin=study.axis.margin, x_label=label)
    told = (
        f"Differences from {escape(study.reference)} at the same seed: a circle each, a bar at their mean. Thin line: "
        "the 95 % interval of the mean (Student's t), thick: the 90 % one. Grey: the margin of "
        f"±{study.axis.margin:g}, stated before the runs, within which a difference is too small to matter. Intervals "
        "are of one comparison alone. An arrow: the interval goes on."
    )
    seeds = sorted({seed for one in results.arms for seed in one.scores})
    against = {each.arm: dict(zip(each.seeds, each.differences, strict=True)) for each in results.comparisons}
    cells = []
    for seed in seeds:
        row = [str(seed)]
        for one in results.arms:
            score = f"{one.scores[seed]:.4f}" if seed in one.scores else "none"
            apart = against.get(one.arm.name, {}).get(seed)
            row.append(score if apart is None else f"{score} <small>({signed(apart)})</small>")
        cells.append(row)
    meaning = (
        f"{unit[0].upper()}{unit[1:]} on the {study.scored}, by seed; in grey the difference from {study.reference}."
    )
    known = [f"{each.arm} {each.correlation:+.2f}" for each in results.comparisons if each.correlation is not None]
    meaning += f" Correlation with {study.reference} over seeds: {', '.join(known)}." if known else ""
    lead = (
        "The same seed means the same order of the data, so seeds are compared one by one: what is common to both "
        "arms at a seed drops out (their correlation, below, tells how much that is). A 95 % interval on one side of 0 "
        "is a difference, a 90 % interval within the margin an equivalence, anything else is undecided."
    )
    if any(each.comparisons > 1 for each in results.comparisons):
        lead += " Of several comparisons each must show more than that: p is adjusted for their number (Holm)."
    body = f"<figure>{drawn}<figcaption>{told}</figcaption></figure>"
    return "Differences, seed by seed", lead, body + table(["seed", *(a.name for a in study.arms)], cells, meaning)


def _inner(one: Comparison) -> tuple[float, float]:
    """The 90 % interval of an α of 5 %: where it lies within the margin, both one-sided tests find an equivalence."""
    if not one.differences:
        return math.nan, math.nan
    interval = t_interval(one.differences, 2 * one.level - 1)
    return float(interval.low), float(interval.high)


def learning(results: Results) -> Section | None:
    """Losses in training over tokens and FLOPs, and less the first arm's."""
    drawn = results.evidence.curves if results.evidence else ()
    if not drawn:
        return None
    flops = {arm.name: arm.costs.flops for arm in results.study.arms}
    scale, unit = (1e6, "million tokens") if drawn[0].tokens[-1] >= 1e6 else (1e3, "thousand tokens")
    most = max(each.tokens[-1] * flops[each.arm] for each in drawn)
    units = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP"))
    power, flops_unit = next(each for each in units if most >= each[0])
    by_tokens = [_curve(results, each, 1 / scale) for each in drawn]
    by_flops = [_curve(results, each, flops[each.arm] / power) for each in drawn]
    apart = [_curve(results, each, 1 / scale, difference=True) for each in drawn if each.difference[0]]
    count = max(len(one.scores) for one in results.arms)
    figures = [
        (
            line_chart(by_tokens, x_label=unit, y_label=f"training loss, {results.study.loss_unit}"),
            f"Training loss by tokens seen: mean over seeds, band from the lowest to the highest of {count}.",
        ),
        (
            line_chart(
                by_flops,
                x_label=f"{flops_unit} of training so far",
                y_label=f"training loss, {results.study.loss_unit}",
            ),
            f"The same by floating-point operations so far: tokens times those of a token in the table of arms"
            f"{f'; 1 {flops_unit} is 10^{round(math.log10(power))} of them' if power > 1 else ''}.",
        ),
    ]
    if apart:
        label = f"loss less that of {results.study.reference}"
        told = (
            f"The loss less that of {escape(results.study.reference)} at the same seed, on the same rows, in "
            f"{results.study.loss_unit}, with a band of the seeds: below 0 is better."
        )
        figures.append((line_chart(apart, x_label=unit, y_label=label, zero=True), told))
    lead = (
        f"Losses in training, at each arm's chosen rate. {_spans(results, drawn)} The first tenth is left out. "
        "Training rows are the same in all arms, so the last figure shows what the first hides. The verdict does not "
        "rest on these."
    )
    return "How they learn", lead, legend_of(results) + two(figures)


def _spans(results: Results, drawn: Sequence[Curves]) -> str:
    """How many steps a point has; a point stands at half of what its span saw, so the first at half a span."""
    arms = {arm.name: arm for arm in results.study.arms}
    steps = {}
    for each in drawn:
        train = arms[each.arm].config.train
        steps[each.arm] = round(2 * each.tokens[0] / (train.batch_size * train.block_size))
    rest = any(arms[name].steps % span for name, span in steps.items())
    many = " or ".join(f"{span:,}" for span in sorted(set(steps.values())))
    left = "; a rest of steps at the end, fewer than that, is no point" if rest else ""
    return f"A point is the mean over {many} step{'s' * (many != '1')}, and stands at their middle{left}."


def _curve(results: Results, one: Curves, scale: float, *, difference: bool = False) -> Line:
    """An arm's curve without its start; the horizontal axis is tokens times `scale`."""
    mean, low, high = one.difference if difference else one.loss
    kept = range(min(math.ceil(START * len(mean)), len(mean) - 1), len(mean))
    told = [signed(mean[at]) if difference else f"{mean[at]:.3f} ({low[at]:.3f} – {high[at]:.3f})" for at in kept]
    return Line(
        name=one.arm,
        points=[(one.tokens[at] * scale, mean[at]) for at in kept],
        colour=colour_of(results, one.arm),
        radius=2.0,
        band=[(low[at], high[at]) for at in kept],
        tips=[f"{one.arm}, {one.tokens[at]:,.0f} tokens: {text}" for at, text in zip(kept, told, strict=True)],
    )


def rates(results: Results) -> Section:
    """The score by the learning rate."""
    lines, tried = [], sorted({lr for one in results.arms for lr in one.sensitivity})
    for one in results.arms:
        points = [(lr, score) for lr, score in one.sensitivity.items() if score is not None]
        if points:
            ring = next((at for at, (lr, _) in enumerate(points) if lr == one.lr), None)
            tips = [f"{one.arm.name}, learning rate {lr:g}: {score:.4f}" for lr, score in points]
            colour = colour_of(results, one.arm.name)
            lines.append(Line(name=one.arm.name, points=points, colour=colour, tips=tips, ring=ring))
    if not lines:
        lead = "Every arm was trained at the recipe's rate: how sensitive it is to it was not measured."
        return "Learning rates", lead, ""
    edges = [one.arm.name for one in results.arms if one.sensitivity and _at_edge(one)]
    lost = sum(score is None for one in results.arms for score in one.sensitivity.values())
    told = f"Seed 0 at every rate that was tried, on the {results.study.choosing[0]}; a ring: chosen."
    told += f" {lost} runs did not finish and are not drawn." if lost > 1 else ""
    told += " 1 run did not finish and is not drawn." if lost == 1 else ""
    lead = (
        "How much hangs on the rate: compare the depth of a curve with the differences above. Each arm tried "
        f"{SEARCH_RULE} That is why arms have tried other rates, and some more than others. "
    ) + (
        f"The best rate of {escape(', '.join(edges))} stands at the edge of what was tried."
        if edges
        else "No arm's best rate stands at the edge of what was tried."
    )
    names = [(lr, f"{lr:g}") for lr in tried]
    label = f"{results.study.choosing[0].partition(' of ')[0]}, {results.study.choosing[1]}"
    drawn = line_chart(lines, x_label="learning rate", y_label=label, x_ticks=names, logarithmic=True, size=(700, 270))
    figure = f"<figure>{drawn}<figcaption>{told}</figcaption></figure>"
    return "How sensitive they are to the learning rate", lead, legend_of(results) + figure


def _at_edge(one: ArmResult) -> bool:
    finished = [lr for lr, score in one.sensitivity.items() if score is not None]
    return bool(finished) and one.lr in (min(one.sensitivity), max(one.sensitivity))
