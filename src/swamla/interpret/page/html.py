"""report.html: one file without links, drawn from the data of explain.json alone."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from swamla.interpret.page.evidence import SECTIONS, Section
from swamla.interpret.page.parts import Data

ON_PAPER = (
    "On paper: of all heads the one chosen on screen is large. What the screen tells of a place that is pointed at is "
    "not printed: weights between two tokens, losses of tokens, probabilities of guesses, values of a curve's marks, "
    "figures of cells too narrow for them, and further digits. All of it is in explain.json."
)


def report_html(data: Data) -> str:
    """The page."""
    parts = [*_opening(data), *(part for make in SECTIONS for part in section_parts(make(data)))]
    return document(f"{data['about']['name']}: explained", parts, data)


def document(title: str, parts: Sequence[str], data: Data) -> str:
    """A page of these parts, with style, script, and `data`: what the script draws (layers, texts, shown)."""
    here = files("swamla.interpret.page")
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    plain = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f'<link rel="icon" href="data:,"><style>{style}</style></head><body><main>',
            numbered(numbered("\n".join(parts), "figcaption", "Figure"), "caption", "Table"),
            '</main><div id="tip" role="tooltip"></div>',
            f'<script type="application/json" id="data">{plain}</script>',
            f"<script>{script}</script></body></html>",
        ]
    )


def numbered(page: str, tag: str, name: str) -> str:
    """The page with a number before the text of each of these captions."""
    first, *others = page.split(f"<{tag}>")
    return first + "".join(f"<{tag}><b>{name} {number}.</b> {rest}" for number, rest in enumerate(others, 1))


def section_parts(section: Section | None) -> Iterator[str]:
    """The parts of a section, none of one that was not measured."""
    if section is not None:
        heading, lead, body = section
        yield f'<h2>{escape(heading)}</h2><p class="lead">{lead}</p>{body}'


# ---- the question, the verdict, and what was measured ---------------------------------------------------------------


def _opening(data: Data) -> list[str]:
    about = data["about"]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in about["notes"])
    return [
        '<p class="kicker">swamla explain</p>',
        f"<h1>What “{escape(about['name'])}” does with its context</h1>",
        '<div class="box"><p class="question">Question: <i>which heads and layers carry what this model knows of the '
        f"text before, and how much does it owe to them?</i></p>{verdict_list(data['verdicts'])}{notes}</div>",
        _what_was_measured(data),
    ]


def verdict_list(verdicts: Sequence[Data]) -> str:
    """Questions with their answers, in a word and in sentences."""
    rows = "".join(
        f'<dt>{escape(each["question"])}</dt><dd><span class="answer '
        f'{each["answer"]}">{escape(each["short"])}</span></dd>'
        f"<dd>{escape(each['text'])}</dd>"
        for each in verdicts
    )
    return f'<dl class="verdicts">{rows}</dl>'


def _what_was_measured(data: Data) -> str:
    about = data["about"]
    repeated = f"{about['repeat_rows']} rows [start, r, r]"
    repeats = f"{repeated} of {about['repeat_length']} distinct random ids, seed {about['seed']}"
    positions = data["positions"]
    read = f"{sum(positions['tokens']):,} predictions, of {about['source']}" if positions else "none was given"
    rows = [
        ("layers", _stack(data)),
        ("size", f"{about['parameters']:,} parameters, width {about['width']:,}, {about['vocabulary']:,} ids"),
        ("random repeats", repeats),
        ("text", read),
        (
            "exactness",
            f"weights, values, gates and projections give each mixer's output to {_power(about['exact_to'])}",
        ),
        ("program", f"swamla {about['version']}"),
    ]
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    caption = "What was measured. Layers and heads are counted from 0, bottom first; losses are in nats a token."
    table = f'<div class="scroll"><table class="words"><caption>{caption}</caption><tbody>{body}</tbody></table></div>'
    return f'{table}<p class="note paper">{ON_PAPER}</p>'


def _power(bound: float | None) -> str:
    """A power of ten; none where numbers overflow."""
    return "no digit" if bound is None else f"{bound:.0e} of its largest value".replace("e-0", "e-").replace("-", "−")


def _stack(data: Data) -> str:
    """The mixers, with how often one follows itself, and the FFNs."""
    mixers = [f"{kind} × {n}" if (n := len(list(same))) > 1 else kind for kind, same in groupby(_kinds(data, "mixer"))]
    ffns = sorted(set(_kinds(data, "ffn")))
    return f"{', '.join(mixers)}; FFN {' and '.join(ffns)}"


def _kinds(data: Data, part: str) -> list[str]:
    return [layer[part] for layer in data["layers"]]
