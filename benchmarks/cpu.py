"""All published CPU speeds, measured side by side: make bench, or python -m benchmarks.cpu

    make bench BENCH_ARGS="--nanogpt ../nanoGPT"     # with nanoGPT's own model.py among the contenders
    make bench BENCH_ARGS="--only ops,data"          # some tables

Contenders run alternately in one process (A B A B …). Rows have medians, quartiles and the number of rounds; ratios are
between medians of the same rounds. The machine's peak rates are measured before and after. It takes about 13 minutes on
two idle cores. Every row is printed and written at once, so that Ctrl-C loses none; a failed row has its error.
`python -m benchmarks.report` makes the tables of docs/performance.md from the last whole run.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from swamla import process

process.prepare()  # as the command line does
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warnings about missing GPU kernels

from benchmarks.libraries import nanogpt_module
from benchmarks.running import Bench
from benchmarks.tables import choices, data, generation, ops, optimizers, profile, scaling, startup, training
from swamla.bench.measuring import ceilings, machine
from swamla.bench.results import Results
from swamla.errors import UsageError

RESULTS = Path(__file__).parent / "results"
TOTAL = 840.0  # seconds for all tables; the last round of a race may end a little later
# Seconds for each table: afterwards no race starts, so only a race in progress can take longer.
TABLES: dict[str, tuple[Callable[[Bench], None], float]] = {
    training.TABLE: (training.measure, 440),
    ops.TABLE: (ops.measure, 90),
    optimizers.TABLE: (optimizers.measure, 25),
    generation.TABLE: (generation.measure, 190),
    scaling.TABLE: (scaling.measure, 45),
    profile.TABLE: (profile.measure, 20),
    choices.TABLE: (choices.measure, 60),
    data.TABLE: (data.measure, 35),
    startup.TABLE: (startup.measure, 15),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    options = parse(arguments)
    try:
        tables = chosen(options.only)
        if options.nanogpt:
            nanogpt_module(options.nanogpt)  # reports a wrong folder now, not after a quarter of an hour
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file, whole = options.out or default_file(tables == list(TABLES) and not options.quick), None
    if file.parent == RESULTS and options.out is None:
        file, whole = file.with_suffix(".unfinished.json"), file  # renamed when the run is complete
    file.parent.mkdir(parents=True, exist_ok=True)
    results = Results(command=command(options), machine=machine(), ceilings=ceilings(), file=file)
    bench = Bench(results=results, quick=options.quick, nanogpt=options.nanogpt)
    results.add("ceilings", {"name": "before", **results.ceilings})
    try:
        for table in tables:
            measure, seconds = TABLES[table]
            results.say(f"\n{table}: at most about {seconds} s")
            bench.allow(min(seconds, TOTAL - results.seconds))
            measure_table(bench, table, measure)
        results.add("ceilings", {"name": "after", **ceilings()})
        results.file = file.replace(whole) if whole else file
    except KeyboardInterrupt:
        results.say(f"interrupted; what was measured is in {file}")
        return 130
    results.say(f"\n{results.seconds:.0f} s in all, in {whole or file}")
    return 0


def measure_table(bench: Bench, table: str, measure: Callable[[Bench], None]) -> None:
    """Measure one table; an error gets a row, and the next table follows."""
    try:
        measure(bench)
    except Exception as error:
        bench.results.failed(table, "the table", error)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TABLES", help=f"some of {','.join(TABLES)}")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, as a contender")
    parser.add_argument("--quick", action="store_true", help="run everything at tiny sizes; the figures mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes (default: benchmarks/results)")
    return parser.parse_args(arguments)


def chosen(only: str) -> list[str]:
    """The requested tables, in their usual order. Raises `UsageError` for an unknown one."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in TABLES:
            raise UsageError(f"--only {name}: must be some of {', '.join(TABLES)}")
    return [name for name in TABLES if not names or name in names]


def command(options: argparse.Namespace) -> str:
    """The command line that repeats this run, with nanoGPT's folder as ../nanoGPT."""
    words = [f"--only {options.only}"] * bool(options.only) + ["--quick"] * options.quick
    words += ["--nanogpt ../nanoGPT"] * bool(options.nanogpt)
    return f'make bench BENCH_ARGS="{" ".join(words)}"' if words else "make bench"


def default_file(whole: bool) -> Path:
    """A whole run goes to `RESULTS`, a second one of a day with -2; any other run to a temporary folder."""
    day = datetime.now(UTC).date().isoformat()
    if not whole:
        return Path(tempfile.mkdtemp(prefix="swamla-bench-")) / f"cpu-{day}.json"
    names = [f"cpu-{day}.json", *(f"cpu-{day}-{number}.json" for number in range(2, 1000))]
    return next(RESULTS / name for name in names if not (RESULTS / name).exists())


if __name__ == "__main__":
    raise SystemExit(main())
