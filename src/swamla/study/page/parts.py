"""Parts of the sections of a study's page: tables, legends, arms with their colours, figures in words."""

import statistics
from collections.abc import Sequence
from html import escape

from swamla.interpret.page.parts import legend
from swamla.interpret.page.svg import BLUE, GREEN, GREY, ORANGE, number
from swamla.study.evidence import Measured
from swamla.study.results import Results
from swamla.study.statistics import Comparison

Section = tuple[str, str, str]  # heading, what it asks and how to read it, evidence
COLOURS = (GREY, BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#8a6d00", "#333333")


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], meaning: str, kind: str = "", looks: Sequence[str] = ()
) -> str:
    """A table. head: names, or "name|unit".  rows: of HTML.  meaning: in words.  looks: the class of each row."""
    units = any("|" in name for name in head)
    names = ""
    for each in head:
        name, _, unit = each.partition("|")
        below = f' <span class="unit">{escape(unit) or "&nbsp;"}</span>' if units else ""
        names += f"<th>{escape(name)}{below}</th>"
    classes = [f' class="{look}"' if look else "" for look in looks] or [""] * len(rows)
    body = "".join(
        f"<tr{look}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for look, row in zip(classes, rows, strict=True)
    )
    which = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{which}><caption>{escape(meaning)}</caption><thead><tr>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def colour_of(results: Results, name: str) -> str:
    """An arm's colour, the same on the whole page."""
    labels = list(dict.fromkeys(arm.label for arm in results.study.arms))
    return COLOURS[labels.index(results.study.arm(name).label) % len(COLOURS)]


def name_of(results: Results, index: int) -> str:
    """An arm's name with its colour."""
    name = results.study.arms[index].name
    return f'<i class="arm" style="background:{colour_of(results, name)}"></i><b>{escape(name)}</b>'


def legend_of(results: Results) -> str:
    """All arms with their colours."""
    return legend([(arm.name, colour_of(results, arm.name)) for arm in results.study.arms])


def favours(one: Comparison) -> bool:
    """Whether the mean difference is in favour of the arm."""
    return (float(one.interval.mean) < 0) == (one.axis.direction == "lower")


def verdict_word(one: Comparison) -> tuple[str, str]:
    """A comparison's verdict in a word, and its look."""
    word = "better" if favours(one) else "worse"
    return {
        "difference": (word, word),
        "small difference": (f"little {word}", "partly"),
        "equivalence": ("equivalent", "figure"),
        "undecided": ("undecided", "no"),
    }[one.kind]


def two(figures: Sequence[tuple[str, str]]) -> str:
    """Charts with what they tell, side by side where there is room."""
    drawn = "".join(f"<figure>{svg}<figcaption>{told}</figcaption></figure>" for svg, told in figures)
    return f'<div class="two">{drawn}</div>'


def measured_of(results: Results) -> dict[str, list[Measured]]:
    """Arm → what was measured of its runs, of the arms that have any."""
    ones = results.evidence.measured if results.evidence else ()
    found = {arm.name: [one for one in ones if one.arm == arm.name] for arm in results.study.arms}
    return {name: each for name, each in found.items() if each}


def clock(text: str) -> str:
    """What another run of the same study would not repeat."""
    return f'<span class="clock">{text}</span>'


def against(value: float, base: float, index: int) -> str:
    """How much more or less than the first arm has."""
    return f" <small>({_percent(value / base - 1)})</small>" if index and base else ""


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−").replace("+0.0 %", "±0 %").replace("−0.0 %", "±0 %")


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """The mean, with the lowest and the highest where they differ from it."""

    def told(value: float) -> str:
        return f"{value:+.2f}".replace("-", "−").replace("−0.00", "+0.00") if signed else number(value)

    mean, low, high = (told(value) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} <small>({low} – {high})</small>"


def bytes_of(size: int) -> str:
    """Such as "164.0 KiB"."""
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 1024:,.1f} KiB"
