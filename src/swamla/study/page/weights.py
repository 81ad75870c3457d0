"""What the trained weights do: losses by what was read, induction, and answers to a task."""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from swamla.data.task_rows import HELD_OUT_ROWS
from swamla.evaluate.recall_grid import KNOWN, ROWS
from swamla.interpret.page.svg import Line, heat_map, line_chart, number
from swamla.interpret.repeats import Repeats
from swamla.interpret.verdicts import ACCURACY, CONTROL, CUT, GUESSING, HIT, NO_ACCURACY, induction_verdict
from swamla.study.evidence import Measured
from swamla.study.page.parts import (
    Section,
    bytes_of,
    colour_of,
    legend_of,
    measured_of,
    name_of,
    signed,
    spread,
    table,
    two,
)
from swamla.study.results import Results

INDUCTION_RULE = (  # of `induction_verdict`
    f"Induction: yes, where the accuracy is {number(ACCURACY)} or more, and in some layer a head hits at a rate of "
    f"{number(HIT)} or more, whose cut costs {CUT:g} nats or more, its control at most {CONTROL:.0%} of that; no, "
    f"where the accuracy is below {number(NO_ACCURACY)}, or {GUESSING:g} times that of a guess among the row's tokens, "
    "and no head is so; else partly, or unsettled, where the accuracy's 95 % interval has one of its bounds within."
)


def by_position(results: Results) -> Section | None:
    """The loss by how much of the document was read."""
    found = {
        name: {one.seed: one.positions for one in ones if one.positions} for name, ones in measured_of(results).items()
    }
    measured = {name: by_seed for name, by_seed in found.items() if by_seed}
    if not measured:
        return None
    base = measured.get(results.study.reference, {})
    lines, apart = [], []
    for name, by_seed in measured.items():
        a_run = next(iter(by_seed.values()))
        middle = [math.sqrt(begin * end) for begin, end in zip(a_run.first, a_run.last, strict=True)]
        spans = [
            f"{begin}–{end}" if begin < end else f"{begin}" for begin, end in zip(a_run.first, a_run.last, strict=True)
        ]
        tips = [
            f"{name}, {span} token{'s' * (span != '1')} read, {count:,} prediction{'s' * (count != 1)}"
            for span, count in zip(spans, a_run.tokens, strict=True)
        ]
        losses = list(zip(*(one.loss for one in by_seed.values()), strict=True))
        lines.append(_line(results, name, middle, losses, tips))
        rows = [
            [own - other for own, other in zip(one.loss, base[seed].loss, strict=True)]
            for seed, one in by_seed.items()
            if seed in base
        ]
        if name != results.study.reference and rows:
            apart.append(_line(results, name, middle, list(zip(*rows, strict=True)), tips, difference=True))
    counts = next(iter(next(iter(measured.values())).values())).tokens
    x_label = "tokens of the document read"
    figures = [
        (
            line_chart(lines, x_label=x_label, y_label="loss, nats a token", logarithmic=True),
            f"Loss on the {sum(counts):,} predictions of the test part, means over 1, 2, 3–4, 5–8 … tokens read: those "
            "of the document that its row has, the one predicted from included. The first mark has "
            f"{counts[0]:,} predictions, the last {counts[-1]:,}. Mean over seeds, band from the lowest to the "
            "highest.",
        )
    ]
    if apart:
        label = f"loss less that of {results.study.reference}"
        figures.append(
            (
                line_chart(apart, x_label=x_label, y_label=label, logarithmic=True, zero=True),
                "The same less the first arm's at the same seed, in nats a token, with a band of the seeds: below 0 is "
                "better. A line that rises to the right gains less, or loses more, the more was read: a mixer that "
                "forgets does that, and so does one whose gain is at the first tokens.",
            )
        )
    length = results.study.arms[0].config.train.block_size
    lead = (
        f"Where in a document the difference arises. Rows have {length:,} tokens: what lies further back is read by no "
        "arm, and what an arm would do with longer texts was not measured."
    )
    return "Loss by what was read", lead, legend_of(results) + two(figures)


def _line(
    results: Results,
    name: str,
    x: Sequence[float],
    losses: Sequence[Sequence[float]],
    tips: Sequence[str],
    *,
    difference: bool = False,
) -> Line:
    """A curve of the means over seeds, with a band."""
    means = [statistics.fmean(each) for each in losses]
    told = [signed(mean) if difference else f"{mean:.4f}" for mean in means]
    return Line(
        name=name,
        points=list(zip(x, means, strict=True)),
        colour=colour_of(results, name),
        band=[(min(each), max(each)) for each in losses],
        tips=[f"{tip}: {figure}" for tip, figure in zip(tips, told, strict=True)],
    )


def copied(results: Results) -> Section | None:
    """Induction on random repeats, of all seeds, and maps of one."""
    measured = {name: [one for one in ones if one.repeats] for name, ones in measured_of(results).items()}
    known = {name: ones for name, ones in measured.items() if ones}
    if not known:
        return None
    any_one = next(iter(known.values()))[0]
    head = ["arm", "induction|seeds", "accuracy|second copy", "loss|first copy", "loss|second copy"]
    head += ["hit rate|best head", "attribution|best head", "cut|nats, best layer", "control|nats"]
    rows = []
    for name, ones in known.items():
        found = [one.repeats for one in ones if one.repeats]
        answers = [induction_verdict(each).answer for each in found]
        told = ", ".join(f"{word} {answers.count(word)}" for word in ("yes", "partly", "no") if word in answers)
        best = [max(each.layers, key=lambda layer: layer.cut_conv) for each in found]
        rows.append(
            [
                name_of(results, [arm.name for arm in results.study.arms].index(name)),
                told,
                spread([each.accuracy for each in found]),
                spread([each.first_loss for each in found]),
                spread([each.second_loss for each in found]),
                spread([max(max(layer.hit) for layer in each.layers) for each in found]),
                spread([max(max(layer.attribution) for layer in each.layers) for each in found]),
                spread([layer.cut_conv for layer in best], signed=True),
                spread([layer.control for layer in best], signed=True),
            ]
        )
    meaning = (
        "Mean over all seeds, in grey the lowest and the highest where they differ as printed. "
        f"{_surprise(results.study.arms[0].config.model.vocab_size)} Hit rate: how often a head's largest |weight| is "
        "on the token that followed before; weights of mixers without softmax are implied, and signed. Attribution: "
        "what that token adds to the right logit, of the sum of |what all add|. Cut: how much the second copy's loss "
        "rises when exactly these edges of a layer are taken out of its output; control: as many others. "
        f"{INDUCTION_RULE}"
    )
    maps = "".join(_maps(results, name, ones[0]) for name, ones in known.items())
    told = (
        f"Layer (row) × head (column) of one run of each arm, seed {_seeds_of(known)}: hit rate, attribution (blue: "
        "for the right token, red: against it) and |weight| on the token before."
    )
    lead = (
        f"{any_one.rows} rows of {any_one.length} random tokens, the same twice: does a model copy what followed "
        "before, which heads do it, and what would the loss be without them? Exact for softmax and linear mixers "
        "alike."
    )
    silent = sorted({one.why for ones in measured_of(results).values() for one in ones if one.why})
    notes = "".join(f'<p class="note">{escape(why)}</p>' for why in silent)
    body = table(head, rows, meaning, "stacked") + notes + f"<figure>{maps}<figcaption>{told}</figcaption></figure>"
    return "Induction: copying what followed before", lead, body


def _surprise(vocabulary: int) -> str:
    """What a loss of random tokens is to be measured by."""
    return (
        f"Losses: in nats a token; a guess among all {vocabulary:,} ids costs ln {vocabulary:,} = "
        f"{math.log(vocabulary):.1f}, and more than that who expects text, which random tokens are not."
    )


def _seeds_of(known: Mapping[str, Sequence[Measured]]) -> str:
    return " and ".join(map(str, sorted({ones[0].seed for ones in known.values()})))


def _maps(results: Results, name: str, one: Measured) -> str:
    repeats = one.repeats
    assert isinstance(repeats, Repeats)
    arm = results.study.arm(name)
    labels = [f"{index} {block.mixer.kind}" for index, block in enumerate(arm.config.model.layers)]
    drawn = []
    for field, title, both_signs in (
        ("hit", "hit rate", False),
        ("attribution", "attribution", True),
        ("previous", "previous token", False),
    ):
        rows = [list(getattr(layer, field)) for layer in repeats.layers]
        tips = [
            [f"{name}, layer {label}, head {head}\n{title}: {number(value)}" for head, value in enumerate(row)]
            for label, row in zip(labels, rows, strict=True)
        ]
        svg = heat_map(rows, labels, title=f"{name}: {title}", high=1.0, signed=both_signs, tips=tips)
        drawn.append(f'<div><p class="note">{title}</p>{svg}</div>')
    index = [each.name for each in results.study.arms].index(name)
    return f'<h3>{name_of(results, index)}</h3><div class="arm-maps">{"".join(drawn)}</div>'


def answers(results: Results) -> Section | None:
    """Accuracy in the study's task, beside the bytes of state that the answers are from."""
    found = {
        name: {one.seed: one.answers for one in ones if one.answers} for name, ones in measured_of(results).items()
    }
    known = {name: by_seed for name, by_seed in found.items() if by_seed}
    if not known:
        return None
    lines, rows, sizes = [], [], {}
    index_of = {arm.name: index for index, arm in enumerate(results.study.arms)}
    for name, by_seed in known.items():
        ordered = sorted(by_seed.items(), key=lambda each: each[1].accuracy)
        sizes[next(iter(by_seed.values())).state_bytes / 1024] = ""
        told = [f"{one.accuracy:.4f} ({one.low:.4f} – {one.high:.4f}), {one.queries:,} answers" for _, one in ordered]
        lines.append(
            Line(
                name=name,
                points=[(one.state_bytes / 1024, one.accuracy) for _, one in ordered],
                colour=colour_of(results, name),
                tips=[f"{name}, seed {seed}: {text}" for (seed, _), text in zip(ordered, told, strict=True)],
            )
        )
        arm = results.arms[index_of[name]]
        _, low, high = arm.learned
        rows.append(
            [
                name_of(results, index_of[name]),
                bytes_of(next(iter(by_seed.values())).state_bytes),
                spread([one.accuracy for one in by_seed.values()]),
                f"{arm.learned_seeds} of {arm.ended} <small>({number(low)} – {number(high)})</small>",
            ]
        )
    names = [(size, f"{size:,.1f}") for size in sorted(sizes)]
    drawn = line_chart(
        lines,
        x_label="state of one row, KiB",
        y_label="accuracy",
        x_ticks=names if len(names) < 9 else (),
        logarithmic=True,
        zero=True,
        size=(700, 280),
    )
    told_of = (
        "Accuracy by the bytes of state at the task's length, in fp32: a circle a seed, a line from the lowest to the "
        f"highest. Of the first {ROWS:,} test rows, equal ones once. The horizontal axis is logarithmic."
    )
    meaning = (
        f"Accuracy: of the first {ROWS:,} test rows, equal ones once, as in the figure; mean over seeds, in grey the "
        f"lowest and the highest. Learned: seeds whose accuracy is {KNOWN:g} or more on all {HELD_OUT_ROWS:,} test "
        "rows, by which the verdict is, of all seeds, also those that did not finish; in grey the 95 % interval of "
        "that share (Wilson)."
    )
    lead = (
        "How often the answers are right, and what they are remembered in. Seeds may learn a task or not at all: then "
        "look at how many did, for which a mean says little."
    )
    head = ["arm", "state|of one row", "accuracy|seeds", f"learned|accuracy ≥ {KNOWN:g}"]
    figure = f"<figure>{drawn}<figcaption>{told_of}</figcaption></figure>"
    return "Recall against memory", lead, legend_of(results) + figure + table(head, rows, meaning)
