"""report.html of a study: one file without links, drawn from its results alone, the same for equal results.

What a clock or the system's memory has said stands in elements of the class "clock": all else is equal to the digit in
a study that was stopped, and in one that was not.
"""

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from swamla.files import write_text_atomically
from swamla.interpret.page.html import numbered, section_parts
from swamla.study.caveats import parameters
from swamla.study.page.compared import compared
from swamla.study.page.costs import all_runs, memory, time_taken
from swamla.study.page.parts import Section, verdict_word
from swamla.study.page.published import published_rows
from swamla.study.page.scores import differences, learning, rates
from swamla.study.page.sizes import by_size, trend_word
from swamla.study.page.weights import answers, by_position, copied
from swamla.study.results import Results
from swamla.study.runs import default_question
from swamla.study.statistics import Comparison
from swamla.study.trends import Trend

REPORT = "report.html"
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    by_size,
    compared,
    differences,
    published_rows,
    learning,
    rates,
    by_position,
    copied,
    answers,
    memory,
    time_taken,
    all_runs,
)
OF_ALL = (by_size, published_rows, time_taken, all_runs)  # sections of all sizes together


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write report.html and the files of `Results.write` into a study's folder; returns them, the page first."""
    write_text_atomically(folder / REPORT, report_html(results))
    return [folder / REPORT, *results.write(folder)]


def report_html(results: Results) -> str:
    """The page."""
    parts = [*_opening(results), *(part for make in SECTIONS for part in section_parts(_at_sizes(make, results)))]
    return page_of(_title(results), parts)


def page_of(title: str, parts: Sequence[str]) -> str:
    """A page of these parts, with its style and script."""
    interpret, here = files("swamla.interpret.page"), files("swamla.study.page")
    style = "".join(
        (folder / name).read_text(encoding="utf-8") for folder, name in ((interpret, "report.css"), (here, "page.css"))
    )
    script = (here / "page.js").read_text(encoding="utf-8")
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f'<link rel="icon" href="data:,"><style>{style}</style></head><body><main>',
            numbered(numbered("\n".join(parts), "figcaption", "Figure"), "caption", "Table"),
            f'</main><div id="tip" role="tooltip"></div><script>{script}</script></body></html>',
            "",
        ]
    )


def _at_sizes(make: Callable[[Results], Section | None], results: Results) -> Section | None:
    """A section; of several sizes with a part for each, under its heading. Leads are said once, if they are equal."""
    if not results.sizes or make in OF_ALL:
        return make(results)
    made = {size: section for size, at in results.sizes.items() if (section := make(at))}
    if not made:
        return None
    heading, lead, _ = next(iter(made.values()))
    alike = all(section[1] == lead for section in made.values())
    if alike and not any(body for _, _, body in made.values()):
        return heading, lead, ""
    parts = [
        f'<h3 class="size">Width {size}</h3>{"" if alike else f"<p class={chr(34)}lead{chr(34)}>{own}</p>"}{body}'
        for size, (_, own, body) in made.items()
    ]
    return heading, lead if alike else "", "".join(parts)


def _title(results: Results) -> str:
    arms = " · ".join(dict.fromkeys(arm.label for arm in results.study.arms))
    return f"{arms}, at {parameters(results.study)} parameters"


def _opening(results: Results) -> list[str]:
    """What was asked, what was expected, what was found, and what was not."""
    study = results.study
    question, expected = study.asked.question, study.asked.expectation
    when = "Question, stated before the runs" if question else "No question was stated; asked by default"
    asked = f"{when}: <i>{escape(question or default_question(study))}</i>"
    before = f"Expected before: {f'<i>{escape(expected)}</i>' if expected else 'nothing was stated'}"
    found = "".join(_verdict(results, comparison) for comparison in results.comparisons if not results.sizes)
    for size, at in results.sizes.items():
        found += "".join(_verdict(at, comparison, size) for comparison in at.comparisons)
    found += "".join(_trend(trend) for trend in results.trends)
    said = {*results.compared(), *(trend.words() for trend in results.trends)}
    others = [text for text in results.verdict() if text not in said]
    lost = f"<p>{escape(' '.join(others))}</p>" if others else ""
    limits = "".join(f"<li>{escape(text)}</li>" for text in results.not_said())
    return [
        '<p class="kicker">swamla compare</p>',
        f"<h1>{escape(_title(results))}</h1>",
        f'<div class="box"><p class="question">{asked}</p><p class="question">{before}</p>'
        f'<h3>Found</h3><dl class="verdicts">{found}</dl>{lost}'
        f"<h3>What this does not say</h3><ul>{limits}</ul></div>",
    ]


def _trend(trend: Trend) -> str:
    short, look = trend_word(trend)
    return (
        f"<dt>{escape(trend.arm)}, {trend.sizes[0]} to {trend.sizes[1]}</dt>"
        f'<dd><span class="answer {look}">{short}</span></dd><dd>{escape(trend.words())}</dd>'
    )


def _verdict(results: Results, comparison: Comparison, size: int | None = None) -> str:
    short, look = verdict_word(comparison)
    against = f"against {comparison.reference}" if size is None else f"at width {size}"
    where = "" if size is None else f"At width {size}, "
    return (
        f"<dt>{escape(comparison.arm)} {escape(against)}</dt>"
        f'<dd><span class="answer {look}">{short}</span></dd><dd>{escape(where + results.words(comparison))}</dd>'
    )
