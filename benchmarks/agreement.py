"""Agreement between two runs of the same benchmark."""

from collections.abc import Iterator

from benchmarks.markdown import Row, folded, shown, table
from swamla.bench.results import Results

WITHIN = 0.10  # largest expected difference between the medians of two consecutive runs
_WHICH = ("name", "op", "axis", "what", "length", "prompt", "vocabulary", "dtype")
_TIMES = {"median_s": "", "token_s": ", a token", "prefill_s": ", prefill"}


def changes(last: Results, before: Results) -> Iterator[tuple[str, str, float]]:
    """Table, row and relative change of every median in both runs; 0.1 if the last run took a tenth longer."""
    for name, rows in last.rows.items():
        known = {_identity(row): row for row in before.rows.get(name, [])}
        for row in rows:
            other = known.get(_identity(row), {})
            for key, what in _TIMES.items():
                if key in row and key in other:
                    yield name, f"{_label(row)}{what}", row[key] / other[key] - 1


def _identity(row: Row) -> tuple[object, ...]:
    return tuple(row.get(key) for key in _WHICH)


def _label(row: Row) -> str:
    return " ".join([shown(str(row["name"])), *(str(row[key]) for key in _WHICH[1:] if key in row)])


def agreement(last: Results, before: Results) -> str:
    """As Markdown: the differences between medians by table, and which exceed `WITHIN`."""
    by_table: dict[str, list[float]] = {}
    apart: list[str] = []
    for name, row, change in changes(last, before):
        by_table.setdefault(name, []).append(abs(change))
        if abs(change) > WITHIN:
            apart.append(f"{row} {100 * change:+.0f} %")
    lines = [
        [name, str(len(found)), f"{100 * sorted(found)[len(found) // 2]:.1f} %", f"{100 * max(found):.1f} %"]
        for name, found in by_table.items()
    ]
    header = ["table", "medians in both", "half of them differ by at most", "all by at most"]
    verdict = f"Further apart than {WITHIN:.0%}: {', '.join(apart)}." if apart else f"All are within {WITHIN:.0%}."
    source = f"The runs of {before.begun} and {last.begun}, both `{last.command}`."
    if before.command != last.command:
        source = f"The runs of {before.begun}, `{before.command}`, and {last.begun}, `{last.command}`."
    return "\n\n".join([table(header, lines), folded(verdict), folded(source)])
