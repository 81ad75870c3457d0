"""Writes results of `benchmarks.quality` into docs/speedrun.md and draws: python -m benchmarks.quality_page FILE"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

from benchmarks.markdown import Row, table
from swamla.bench.results import Results

PAGE = Path(__file__).parents[1] / "docs" / "speedrun.md"
PICTURE = PAGE.with_suffix(".png")
BEGIN, END = "<!-- outcome -->", "<!-- end of outcome -->"
OURS = "swamla"


def write_page(results: Results) -> None:
    """Replace the block of docs/speedrun.md between its two marks, and draw the picture."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{outcome(results)}\n\n{END}{after}", encoding="utf-8")
    draw(results.rows["curve"], PICTURE)


def outcome(results: Results) -> str:
    """The table of all learners, and what it says in one sentence."""
    rows, machine = results.rows["outcome"], results.machine
    lines = [
        [
            str(row["name"]),
            f"{row['parameters']:,}",
            f"{row['steps']:,}",
            f"{row['tokens']:,}",
            f"{row['bits_per_byte']:.4f}",
            "never" if row["target_after_s"] is None else f"{row['target_after_s']:.1f}",
        ]
        for row in rows
    ]
    heads = ["learner", "parameters", "steps", "tokens", "bits per byte, all held-out text", "nanoGPT's best after, s"]
    rates = ", ".join(f"{name} {value:,.0f}" for name, value in sorted(in_units(results.ceilings).items()))
    where = (
        f"`{results.command}`, {results.begun[:10]}, {machine['processor']}, {machine['threads']} threads ({rates})."
    )
    return "\n\n".join([table(heads, lines), in_words(rows), where])


def in_units(ceilings: dict[str, float]) -> dict[str, float]:
    """The machine's peak rates in GFLOP/s and GB/s, by what they are of."""
    names = {"fp32_flops": "fp32 GFLOP/s", "bf16_flops": "bf16 GFLOP/s", "copy_bytes": "copy GB/s"}
    return {names[key]: value / 1e9 for key, value in ceilings.items() if key in names}


def in_words(rows: list[Row]) -> str:
    """Means of both, with 95 % intervals (Student's t) where there are several seeds."""
    ours = [row for row in rows if str(row["name"]).startswith(OURS)]
    best = [min((r for r in rows if r["seed"] == own["seed"] and r not in ours), key=bits_of) for own in ours]
    reached = [row["target_after_s"] for row in ours]
    after = "never" if None in reached else f"after {interval([float(x) for x in reached if x is not None], 1)} s"
    return (
        f"Bits per byte of all held-out text: swamla {interval([bits_of(row) for row in ours], 4)}, nanoGPT at its "
        f"best learning rate {interval([bits_of(row) for row in best], 4)}; swamla reaches the latter {after}."
    )


def bits_of(row: Row) -> float:
    """The last score of a learner."""
    return float(row["bits_per_byte"])


def interval(values: list[float], digits: int) -> str:
    """Mean ± half of the 95 % interval of the mean; the value alone if there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


def draw(curve: list[Row], picture: Path) -> None:
    """Bits per byte over seconds of training, one line per learner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in curve:
        points[str(row["name"])].append((float(row["seconds"]), float(row["bits_per_byte"])))
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, line in points.items():
        ours = name.startswith(OURS)
        axes.plot(*zip(*line, strict=True), "o-", markersize=3, linewidth=2 if ours else 1.2, label=name)
    axes.set(xlabel="seconds of training", ylabel="held-out bits per byte")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(picture)


if __name__ == "__main__":
    write_page(Results.load(sys.argv[1]))
