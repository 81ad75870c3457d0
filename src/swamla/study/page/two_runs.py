"""report.html of two runs: one file without links, in the order in which a reader asks."""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

from swamla.files import write_text_atomically
from swamla.interpret.page.html import section_parts
from swamla.interpret.page.parts import legend, visible
from swamla.interpret.page.svg import BLUE, ORANGE, Line, line_chart
from swamla.study.page.compared import settings_table
from swamla.study.page.parts import Section, against, signed, table, two
from swamla.study.page.report import REPORT, page_of
from swamla.study.two_results import SIMILAR, Compared, Side
from swamla.study.two_runs import DocumentDifference, KindDifference, TokenDifference

COLOURS = (BLUE, ORANGE)
SPANS = 60  # points of a curve of training
START = 0.05  # the first share of training, whose high losses hide the rest


def write_report(found: Compared, folder: Path) -> list[Path]:
    """Write report.html and the files of `Compared.write`; returns them, the page first."""
    write_text_atomically(folder / REPORT, report_html(found))
    return [folder / REPORT, *found.write(folder)]


def report_html(found: Compared) -> str:
    """The page."""
    sections: tuple[Callable[[Compared], Section | None], ...] = (
        _what,
        _documents,
        _by_position,
        _tokens,
        _curves,
        _origin,
    )
    parts = [*_opening(found), *(part for make in sections for part in section_parts(make(found)))]
    return page_of(_title(found), parts)


def _title(found: Compared) -> str:
    return f"{found.second.name} against {found.first.name}"


def _opening(found: Compared) -> list[str]:
    first, second = (escape(side.name) for side in found.sides)
    short, look = {
        "better": ("better", "better"),
        "worse": ("worse", "worse"),
        "not shown": ("not shown", "no"),
        "alike": ("alike", "figure"),
        "no interval": ("no interval", "no"),
    }[found.answer]
    said, *others = found.verdict()
    more = "".join(f"<p>{escape(text)}</p>" for text in others)
    limits = "".join(f"<li>{escape(text)}</li>" for text in found.not_said())
    what = "predicts the same held-out text better" if found.kind == "text" else "answers the same test rows better"
    return [
        '<p class="kicker">swamla compare</p>',
        f"<h1>{escape(_title(found))}</h1>",
        f'<div class="box"><p class="question">Question: <i>which of these two runs {what}, and where do they '
        f'differ?</i></p><h3>Found</h3><dl class="verdicts"><dt>{second} against {first}</dt>'
        f'<dd><span class="answer {look}">{short}</span></dd><dd>{escape(said)}</dd></dl>{more}'
        f"<h3>What this does not say</h3><ul>{limits}</ul></div>",
    ]


def _name(found: Compared, index: int) -> str:
    return f'<i class="arm" style="background:{COLOURS[index]}"></i><b>{escape(found.sides[index].name)}</b>'


def _legend(found: Compared) -> str:
    return legend([(side.name, colour) for side, colour in zip(found.sides, COLOURS, strict=True)])


# ---- what was compared ----------------------------------------------------------------------------------------------


def _what(found: Compared) -> Section:
    rows = []
    first = found.first
    for index, side in enumerate(found.sides):
        flops, base = side.training_flops, first.training_flops
        seen = "unknown" if side.tokens is None else f"{side.tokens:,}"
        if side.tokens and first.tokens:
            seen += against(side.tokens, first.tokens, index)
        costs = side.costs
        rows.append(
            [
                _name(found, index),
                f"<b>{(found.score.first, found.score.second)[index]:.4f}</b>",
                f"{found.loss[index]:.4f}",
                f"{costs.total_parameters:,}{against(costs.total_parameters, first.costs.total_parameters, index)}",
                f"{costs.parameters:,}{against(costs.parameters, first.costs.parameters, index)}",
                seen,
                "unknown" if flops is None else f"{flops:.3g}{against(flops, base or 0.0, index)}",
                f"{costs.state / 1024:,.1f} KiB{against(costs.state, first.costs.state, index)}",
            ]
        )
    lengths = sorted({side.block_size for side in found.sides})
    length = f"{lengths[0]:,}" if len(lengths) == 1 else "its rows'"
    head = ["run", f"{found.unit}|{_scored(found)}", "loss|nats a label", "parameters|all", "parameters|no embeddings"]
    head += ["tokens|trained on", "FLOPs|of its training", f"state|at {length} tokens, fp32"]
    meaning = (
        f"Scored on {found.part} of {found.source}. In grey, how much more or less the second has. Parameters, FLOPs "
        "and state are exact counts, from the configs."
    )
    return (
        "What was compared",
        "Both runs as their checkpoints are, each in the precision and in rows of the length of its training.",
        table(head, rows, meaning, "stacked") + _origins(found) + _settings(found),
    )


def _scored(found: Compared) -> str:
    return f"{int(found.weights_N.sum()):,} {'bytes' if found.kind == 'text' else 'answers'}"


def _origins(found: Compared) -> str:
    """What the runs were trained on, a row a fact; what both have alike stands once."""

    def identified(name: str, fingerprint: str) -> str:
        return f"{escape(name)} <small>{escape(fingerprint[:16] or 'unknown')}</small>"

    facts: list[tuple[str, Callable[[Side], str]]] = [
        ("folder", lambda side: escape(side.folder)),
        ("checkpoint", lambda side: f"step {side.step:,}"),
        ("data, fingerprint", lambda side: identified(side.data, side.data_id)),
        ("tokenizer, fingerprint", lambda side: identified(side.tokenizer, side.tokenizer_id)),
        ("vocabulary", lambda side: f"{side.vocabulary:,} ids"),
        ("scored in", lambda side: f"rows of {side.block_size:,} tokens, {side.precision}"),
    ]
    if any(side.began for side in found.sides):
        facts.append(("began with", lambda side: escape(side.began or "fresh weights")))
    rows = [[name, *(fact(side) for side in found.sides)] for name, fact in facts]
    return table(["", *(side.name for side in found.sides)], rows, "Where both runs are from.", "words origins")


def _settings(found: Compared) -> str:
    differing = found.differing
    if not differing:
        return '<p class="note">Their configs are the same.</p>'
    return settings_table(
        found.configs,
        differing,
        "Settings in which the runs differ; left out are those that stand at their default wherever they exist. –: a "
        "run without that setting. compared.json has all of them, dotted.",
    )


# ---- where they differ ----------------------------------------------------------------------------------------------


def _documents(found: Compared) -> Section:
    mean, low, high = (float(value) for value in found.score.difference)
    figures = ""
    if len(found.shares) > 1:
        each = Line(
            name="documents",
            points=[(100 * share, apart) for share, apart in found.shares],
            colour=COLOURS[1],
            radius=1.8,
            tips=[f"at {100 * share:.0f} % of the weight: {signed(apart)}" for share, apart in found.shares],
        )
        whole = Line(
            name="all",
            points=[(1.0, mean), (99.0, mean)],
            colour="#333333",
            dashed=True,
            marks=False,
            band=[(low, high)] * 2 if math.isfinite(low) else [],
        )
        drawn = line_chart(
            [whole, each],
            x_label=f"{'% of the text, documents' if found.kind == 'text' else '% of the answers, rows'} in the order "
            "of their difference",
            y_label=f"{found.unit}, {_short(found.second.name)} less {_short(found.first.name)}",
            zero=True,
            size=(940, 280),
        )
        told = (
            f"A mark is one of the {found.what}: below 0 "
            f"{escape(found.second.name if found.kind == 'text' else found.first.name)} is better. Where the curve "
            "crosses 0 stands how much of the whole goes which way. Dashed: the difference of the whole, with its "
            "interval. The first and the last hundredth are left out."
        )
        figures = f"<figure>{drawn}<figcaption>{told}</figcaption></figure>"
    unit = "bits per byte" if found.kind == "text" else "nats an answer"
    weight = "bytes" if found.kind == "text" else "answers"
    head = [f"{found.what[:-1]}, its beginning", weight, *(f"{side.name}|{unit}" for side in found.sides), "difference"]
    tables = "".join(
        table(head, [_document(each) for each in some], _lead(found, better), "in-context")
        for some, better in zip(found.documents, (True, False), strict=True)
        if some
    )
    whole_rows = ""
    if (rows := found.whole_rows) is not None:
        whole_rows = (
            f"<p>Rows with every answer right: {rows['both']:,} of both, {rows['first']:,} only of "
            f"{escape(found.first.name)}, {rows['second']:,} only of {escape(found.second.name)}, "
            f"{rows['neither']:,} of neither.</p>"
        )
    effective = (
        f" They differ in size, and tell as much as {found.score.effective:,.1f} of equal size."
        if found.score.effective < SIMILAR * found.score.count
        else ""
    )
    lead = (
        f"{found.score.count:,} {found.what}, each scored by both runs.{effective} The interval draws {found.what} "
        f"anew, each with both figures and its {weight}, so that the total is that of the whole: a ratio of sums, no "
        "mean of ratios."
    )
    return f"Difference by {found.what[:-1]}", lead, whole_rows + figures + tables


def _lead(found: Compared, better: bool) -> str:
    side = found.second if better else found.first
    if found.kind == "task":
        return f"Rows in which {side.name} is better by most, by the nats of all answers."
    return f"Documents in which {side.name} is better, those that move the total most."


def _document(each: DocumentDifference) -> list[str]:
    return [
        f'<span class="text">{escape(visible(each.text))}</span> <small>no. {each.document}</small>',
        f"{each.weight:,}",
        f"{each.first:.4f}",
        f"{each.second:.4f}",
        signed(each.difference),
    ]


def _by_position(found: Compared) -> Section | None:
    if found.positions is None:
        return None
    lines, by_last = [], []
    for side, colour, one in zip(found.sides, COLOURS, found.positions, strict=True):
        spans = [f"{a}–{b}" if a < b else f"{a}" for a, b in zip(one.first, one.last, strict=True)]
        points = [(math.sqrt(a * b), loss) for a, b, loss in zip(one.first, one.last, one.loss, strict=True)]
        tips = [f"{side.name}, token {span}: {loss:.4f}" for span, (_, loss) in zip(spans, points, strict=True)]
        lines.append(Line(name=side.name, points=points, colour=colour, tips=tips))
        by_last.append({(a, b): loss for a, b, loss in zip(one.first, one.last, one.loss, strict=True)})
    total = sum(found.positions[0].tokens)
    told = f"Loss on {total:,} predictions: of the 1st, 2nd, 3rd–4th, 5th–8th … token of a document in its row."
    x_label = "which token of the document in its row"
    figures = [(line_chart(lines, x_label=x_label, y_label="loss, nats a token", logarithmic=True), told)]
    if found.first.block_size == found.second.block_size:
        apart = [(span, by_last[1][span] - loss) for span, loss in by_last[0].items()]
        line = Line(
            name=found.second.name,
            points=[(math.sqrt(a * b), value) for (a, b), value in apart],
            colour=COLOURS[1],
            tips=[f"token {span}: {signed(value)}" for span, (_, value) in zip(spans, apart, strict=True)],
        )
        label = f"loss less that of {_short(found.first.name)}"
        chart = line_chart([line], x_label=x_label, y_label=label, logarithmic=True, zero=True)
        figures.append((chart, f"The same, {escape(_title(found))}: below 0 {escape(found.second.name)} is better."))
    lead = (
        "Where in a document the difference arises. A row forgets the row before: who uses more of the text before "
        "falls further to the right."
    )
    return "Loss by position", lead, _legend(found) + two(figures)


def _tokens(found: Compared) -> Section | None:
    if found.kind != "text":
        return None
    if found.tokens is None or found.kinds is None:
        lead = (
            "The runs have different tokenizers: their tokens are other units, and single predictions cannot be set "
            "against each other. The documents above can."
        )
        return "Tokens", lead, ""
    first, second = (side.name for side in found.sides)
    head = ["the token in its context", f"{first}|nats", f"{second}|nats", "difference"]
    better, worse = (
        table(
            head,
            [_token(each) for each in some],
            f"Single predictions in which {name} is better by most.",
            "in-context",
        )
        if some
        else ""
        for some, name in zip(found.tokens, (second, first), strict=True)
    )
    kind_head = ["token", "times", f"{first}|mean nats", f"{second}|mean nats", "in all|nats"]
    kinds = "".join(
        table(kind_head, [_kind(each) for each in some], f"Tokens of the vocabulary on which {name} gains most in all.")
        for some, name in zip(found.kinds, (second, first), strict=True)
        if some
    )
    lead = (
        "The largest differences of single predictions, one for each token of the vocabulary. They are extremes of "
        f"{found.labels[0]:,}, and say what kind of thing differs, not how often: below stands what each token of the "
        "vocabulary adds up to."
    )
    return "Tokens on which they differ most", lead, better + worse + f'<div class="side">{kinds}</div>'


def _token(each: TokenDifference) -> list[str]:
    before, after = escape(visible(each.before)), escape(visible(each.after))
    token = escape(_marked(each.token))
    place = f"<small>no. {each.document}, token {each.position}</small>"
    return [
        f'<span class="text">{before}<mark>{token}</mark>{after}</span> {place}',
        f"{each.first:.2f}",
        f"{each.second:.2f}",
        _two_digits(each.difference),
    ]


def _kind(each: KindDifference) -> list[str]:
    name = f'<span class="text">{escape(_marked(each.token))}</span>'
    total = f"{each.total:+,.1f}".replace("-", "−")
    return [name, f"{each.count:,}", f"{each.first:.3f}", f"{each.second:.3f}", total]


def _marked(token: str) -> str:
    """A token with signs for what cannot be seen."""
    return visible(token).replace(" ", "␣") or "(nothing)"


def _two_digits(value: float) -> str:
    return f"{value:+,.2f}".replace("-", "−")


# ---- training, and where the figures are from -----------------------------------------------------------------------


def _curves(found: Compared) -> Section | None:
    drawn = []
    for side, colour in zip(found.sides, COLOURS, strict=True):
        for points, held_out in ((_means(side.curve.training), False), (side.curve.held_out, True)):
            end = max((x for x, _ in points), default=0)
            kept = [(x, y) for x, y in points if x >= START * end]
            name = f"{side.name}, {'held-out' if held_out else 'training'}"
            if kept:
                tips = [f"{name}, {x:,.0f} tokens: {y:.4f}" for x, y in kept]
                drawn.append(
                    Line(
                        name=name,
                        points=kept,
                        colour=colour,
                        dashed=held_out,
                        tips=tips,
                        radius=3.5 if held_out else 1.8,
                    )
                )
    if not drawn:
        return None
    scale = 1e6 if max(x for line in drawn for x, _ in line.points) >= 2e6 else 1e3
    scaled = [
        Line(
            name=line.name,
            points=[(x / scale, y) for x, y in line.points],
            colour=line.colour,
            dashed=line.dashed,
            tips=line.tips,
            radius=line.radius,
        )
        for line in drawn
    ]
    unit = "million tokens" if scale == 1e6 else "thousand tokens"
    chart = line_chart(scaled, x_label=f"{unit} trained on", y_label=found.curve_unit, size=(940, 290))
    without = [side.name for side in found.sides if not side.curve.training]
    told = (
        "Losses in training, means over spans of steps (small marks), and of the evaluations in training (dashed, "
        "large marks), each run on its own text; the first twentieth is left out."
    )
    told += f" {escape(' and '.join(without))} has no record of its training." if without else ""
    lead = "How they got there, by the runs' own records. The verdict does not rest on these."
    return "Training", lead, _legend(found) + f"<figure>{chart}<figcaption>{told}</figcaption></figure>"


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `SPANS` points: means of equal numbers of records; the last has the rest, too, alone a noisier one."""
    span = max(1, math.ceil(len(points) / SPANS))
    ends = [span * number for number in range(len(points) // span)][1:]
    parts = [points[begin:end] for begin, end in pairwise([0, *ends, len(points)])] if points else []
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _origin(found: Compared) -> Section:
    rows = [
        ("command", found.command),
        ("text" if found.kind == "text" else "task", f"{found.part} of {found.source}"),
        ("interval", "95 %, percentile bootstrap over " + found.what + ", widened for few as Student's t is"),
        ("program", f"swamla {found.version}"),
    ]
    if found.kind == "text":
        rows.insert(2, ("bytes counted minus bytes of the decoded tokens", f"{found.apart:,}"))
    body = table(
        ["", ""], [[escape(name), escape(value)] for name, value in rows], "How this page was made.", "words origins"
    )
    files = "compared.json has all figures of this page; " + (
        f"{found.what}.csv every one of the {found.what}" + ("; tokens.csv the tokens." if found.tokens else ".")
    )
    return "Where the figures are from", escape(files), body


def _short(name: str, most: int = 24) -> str:
    """A name for an axis."""
    return name if len(name) <= most else name[: most - 1] + "…"
