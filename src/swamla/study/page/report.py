"""report.html of a study: one file without links, drawn from its results alone, the same for equal results.

What a clock or the system's memory has said stands in elements of the class "clock": all else is equal to the digit in
a study that was stopped, and in one that was not.
"""

from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path

from swamla.files import write_text_atomically
from swamla.interpret.page.html import numbered, section_parts
from swamla.study.page.compared import compared
from swamla.study.page.costs import all_runs, memory, time_taken
from swamla.study.page.parts import Section
from swamla.study.page.scores import differences, learning, rates
from swamla.study.page.weights import answers, by_position, copied
from swamla.study.results import Results
from swamla.study.statistics import Comparison

REPORT = "report.html"
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    compared,
    differences,
    learning,
    rates,
    by_position,
    copied,
    answers,
    memory,
    time_taken,
    all_runs,
)


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write report.html and the files of `Results.write` into a study's folder; returns them, the page first."""
    write_text_atomically(folder / REPORT, report_html(results))
    return [folder / REPORT, *results.write(folder)]


def report_html(results: Results) -> str:
    """The page."""
    interpret, here = files("swamla.interpret.page"), files("swamla.study.page")
    style = "".join(
        (folder / name).read_text(encoding="utf-8") for folder, name in ((interpret, "report.css"), (here, "page.css"))
    )
    script = (here / "page.js").read_text(encoding="utf-8")
    parts = [*_opening(results), *(part for make in SECTIONS for part in section_parts(make(results)))]
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(_title(results))}</title>',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f'<link rel="icon" href="data:,"><style>{style}</style></head><body><main>',
            numbered(numbered("\n".join(parts), "figcaption", "Figure"), "caption", "Table"),
            f'</main><div id="tip" role="tooltip"></div><script>{script}</script></body></html>',
            "",
        ]
    )


def _title(results: Results) -> str:
    parameters = results.study.arms[0].costs.parameters
    return f"{' · '.join(arm.name for arm in results.study.arms)}, at {parameters:,} parameters"


def _opening(results: Results) -> list[str]:
    """What was asked, what was expected, what was found, and what was not."""
    study = results.study
    asked = study.asked.question or f"Do {', '.join(arm.name for arm in study.arms)} differ?"
    expected = study.asked.expectation
    before = f'<p class="question">Expected before: <i>{escape(expected)}</i></p>' if expected else ""
    found = "".join(_verdict(comparison) for comparison in results.comparisons)
    others = [text for text in results.verdict() if text not in {each.words() for each in results.comparisons}]
    lost = f"<p>{escape(' '.join(others))}</p>" if others else ""
    limits = "".join(f"<li>{escape(text)}</li>" for text in results.not_said())
    return [
        '<p class="kicker">swamla compare</p>',
        f"<h1>{escape(_title(results))}</h1>",
        f'<div class="box"><p class="question">Question, stated before the runs: <i>{escape(asked)}</i></p>{before}'
        f'<h3>Found</h3><dl class="verdicts">{found}</dl>{lost}'
        f"<h3>What this does not say</h3><ul>{limits}</ul></div>",
    ]


def _verdict(comparison: Comparison) -> str:
    kind, mean = comparison.kind, float(comparison.interval.mean)
    word = "better" if (mean < 0) == (comparison.axis.direction == "lower") else "worse"
    short, look = {
        "difference": (word, word),
        "small difference": (f"little {word}", "partly"),
        "equivalence": ("equivalent", "figure"),
        "undecided": ("undecided", "no"),
    }[kind]
    return (
        f"<dt>{escape(comparison.arm)} against {escape(comparison.reference)}</dt>"
        f'<dd><span class="answer {look}">{short}</span></dd><dd>{escape(comparison.words())}</dd>'
    )
