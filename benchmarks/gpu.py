"""All published GPU speeds, in calls of less than nine minutes on one GPU: python -m benchmarks.gpu

    PYTHONPATH=src python -m benchmarks.gpu             # if swamla is not installed
    python -m benchmarks.gpu --after FIRST.json         # rows that an earlier call skipped, or that failed in it
    python -m benchmarks.gpu --compare OLD.json         # each figure beside that of an earlier file
    python -m benchmarks.gpu --only gates,training      # some tables
    python -m benchmarks.gpu --device cpu --quick       # every row at tiny sizes, as a dry run

The most important rows come first. Gates compare fast paths with their references, gradients included; a row is marked
if the gate of its path failed or did not run. Every row has its own process and a timeout; a failed row has its error,
and a row that no longer fits the time is named. Each figure is printed and written at once. Targets are shown beside
figures but not checked.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from benchmarks.gpu_rows import CEILINGS, MACHINE, ROWS
from benchmarks.gpu_running import Figures, Message, Place, Processes, Row
from swamla.bench.results import Results, in_words

RESULTS = Path(__file__).parent / "results"
BUDGET = 520.0  # seconds for all rows, so that a call ends within nine minutes
PRELOADED = ("torch", "torch._dynamo", "benchmarks.gpu_rows")
Run = Callable[[Row, Place, float], Iterator[Message]]


def main(arguments: Sequence[str] | None = None, *, rows: Sequence[Row] = ROWS, run: Run | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    options = parse(arguments, rows)
    place = Place(device=options.device, quick=options.quick)
    refused = refusal(place)
    if refused:
        print(f"benchmarks.gpu: {refused}", file=sys.stderr)
        return 2
    file = options.out or default_file(whole=not place.quick and not options.only)
    file.parent.mkdir(parents=True, exist_ok=True)
    log = file.with_suffix(".log")
    results = Results(command=shlex.join(["python", "-m", "benchmarks.gpu", *(arguments or sys.argv[1:])]), file=file)
    done = measured(options.after) if options.after else set()
    old = Results.load(options.compare) if options.compare else None
    checked = [path for row in rows if (row.table, row.name) in done for path in row.vouches]
    session = Session(results, place, run or Processes(log, PRELOADED), options.budget, checked)
    try:
        for row in rows:
            asked = not options.only or row.table in options.only
            if row.table in (MACHINE, CEILINGS) or (asked and (row.table, row.name) not in done):
                session.measure(row)
    except KeyboardInterrupt:
        results.say(f"interrupted; what was measured is in {file}")
        return 130
    finally:
        session.close()
    if old is not None:
        results.say("\n".join(compared(old, results)))
    results.say(f"{results.seconds:.0f} s in all, in {file}; output of the rows is in {log.name}")
    return 0


def parse(arguments: Sequence[str] | None, rows: Sequence[Row]) -> argparse.Namespace:
    """The options."""
    tables = list(dict.fromkeys(row.table for row in rows))
    parser = argparse.ArgumentParser("benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument(
        "--only", metavar="TABLES", default=[], type=lambda text: text.split(","), help=f"of {','.join(tables)}"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all (default: %(default).0f)")
    parser.add_argument("--after", type=Path, metavar="FILE", help="leave out the rows that have figures in this file")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print each figure beside that of this file")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/gpu-DATE.json)")
    options = parser.parse_args(arguments)
    unknown = set(options.only) - set(tables)
    if unknown:
        parser.error(f"--only: no table {', '.join(sorted(unknown))}; there are {', '.join(tables)}")
    return options


def default_file(whole: bool) -> Path:
    """A whole run goes to `RESULTS`, a second one of a day with -2; any other run to a temporary folder."""
    day = datetime.now(UTC).date().isoformat()
    if not whole:
        return Path(tempfile.mkdtemp(prefix="swamla-bench-")) / f"gpu-{day}.json"
    names = [f"gpu-{day}.json", *(f"gpu-{day}-{number}.json" for number in range(2, 1000))]
    return next(RESULTS / name for name in names if not (RESULTS / name).exists())


def measured(file: Path) -> set[tuple[str, str]]:
    """Table and name of the rows without failures in a file of results."""
    tables = Results.load(file).rows.items()
    named = [(table, str(row["name"]), row) for table, rows in tables for row in rows if "name" in row]
    failed = {(table, name) for table, name, row in named if row.keys() & {"error", "skipped"}}
    return {(table, name) for table, name, _ in named} - failed


def compared(old: Results, new: Results) -> Iterator[str]:
    """A line for each row in both: its rate, or else its time, before and now."""
    before = {(table, row.get("name")): row for table, rows in old.rows.items() for row in rows}
    for table, rows in new.rows.items():
        for row in rows:
            earlier = before.get((table, row.get("name")), {})
            for key in ("tokens_per_s", "median_s"):
                was, now = earlier.get(key), row.get(key)
                if isinstance(was, int | float) and isinstance(now, int | float) and was:
                    faster = now / was if key == "tokens_per_s" else was / now
                    figures = f"{in_words(key, was)} → {in_words(key, now)}"
                    yield f"{table}  {row['name']}  {figures}  {faster:.3g} times as fast"
                    break


def refusal(place: Place) -> str:
    """Why this device cannot be measured; "" if it can."""
    if place.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device here; to try every row at tiny sizes: --device cpu --quick"
    if place.device == "cpu" and not place.quick:
        return "--device cpu is for a dry run: add --quick; speed on a CPU is measured by python -m benchmarks.cpu"
    return ""


class Session:
    """A benchmark in progress: its results, the time left, and which paths passed their gates."""

    def __init__(self, results: Results, place: Place, run: Run, budget: float, checked: Sequence[str] = ()) -> None:
        """checked: paths whose gates passed in an earlier call."""
        self._results, self._place, self._run = results, place, run
        self._end = time.monotonic() + budget
        self._checked = dict.fromkeys(checked, True)  # whether the gate of a path passed
        self._using: list[tuple[Figures, list[str]]] = []

    def measure(self, row: Row) -> None:
        """Run a row and store its figures, or why it has none."""
        begin = time.monotonic()
        left = self._end - begin
        if left < row.needs:
            self._keep(row, "skipped", f"{max(0, left):.0f} s are left of the budget, and it needs about {row.needs:g}")
            return
        for kind, content in self._run(row, self._place, left):
            self._keep(row, kind, content)
        took: Figures = {"table": row.table, "name": row.name, "took_s": round(time.monotonic() - begin, 2)}
        self._results.rows.setdefault("durations", []).append(took)

    def _keep(self, row: Row, kind: str, content: Any) -> None:
        passed = kind == "figures" and content.get("passed") != 0
        self._checked |= {path: passed and self._checked.get(path, True) for path in row.vouches}
        if kind == "failed":
            self._results.failed(row.table, row.name, content)
        elif kind == "skipped":
            self._results.add(row.table, {"name": row.name, "skipped": content})
        else:
            self._keep_figures(row, content)

    def _keep_figures(self, row: Row, figures: Figures) -> None:
        uses = figures.pop("uses", [])
        if row.table == MACHINE:
            self._results.machine |= figures
        if row.table == CEILINGS:
            self._results.ceilings |= figures
        kept = {"name": row.name, **figures}
        if uses and "skipped" not in figures:
            self._using.append((kept, uses))
            self._distrust(kept, [path for path in uses if self._checked.get(path) is False], "did not pass")
        self._results.add(row.table, kept)

    def close(self) -> None:
        """Mark rows whose gates failed later, or never ran; then write the file."""
        for figures, uses in self._using:
            self._distrust(figures, [path for path in uses if path not in self._checked], "did not run")
            self._distrust(figures, [path for path in uses if self._checked.get(path) is False], "did not pass")
        self._results.save()

    def _distrust(self, figures: Figures, paths: Sequence[str], why: str) -> None:
        if paths:
            figures["not_trustworthy"] = f"the gate {why}: {', '.join(paths)}"


if __name__ == "__main__":
    sys.exit(main())
