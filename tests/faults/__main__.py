"""`python -m tests.faults [WORDS …]`: try every row of the fault matrix (or those with all the words), print n/n.

All rows together, when each went as expected, write docs/reliability.md.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.faults.matrix import ROWS
from tests.faults.rows import Row
from tests.faults.stage import ROOT, NotHere, Stage
from tests.pages import MACHINES_HEADING, RELIABILITY, replace_before
from tests.train.helpers import tiny_dataset


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a row: how many of its trials went as expected."""

    row: Row
    good: int
    total: int
    seconds: float
    why: str = ""  # it was not tried, or not all was

    @property
    def score(self) -> str:
        return f"{self.good}/{self.total}" if self.total else "not covered"

    @property
    def failed(self) -> bool:
        return self.good < self.total


def main(words: list[str]) -> int:
    """Try rows, print the table, and write the page when it was all of them."""
    chosen = [row for row in ROWS if all(word.lower() in row.fault.lower() for word in words)]
    results = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        data = Path(folder) / "data"
        tiny_dataset(data)
        for number, row in enumerate(chosen):
            print(f"{row.fault} …", end=" ", flush=True)
            results.append(_try(row, Stage(Path(folder) / f"row-{number}", data)))
            print(f"{results[-1].score}, {results[-1].seconds:.0f} s {results[-1].why}", flush=True)
    failed = [result for result in results if result.failed]
    good, total = sum(r.good for r in results), sum(r.total for r in results)
    print(f"{len(results)} rows, {good}/{total} trials as expected, {sum(r.seconds for r in results):.0f} s")
    if not words and not failed:
        replace_before(RELIABILITY, MACHINES_HEADING, _page(results))
        print(f"wrote {RELIABILITY.relative_to(ROOT)}")
    return 1 if failed else 0


def _try(row: Row, stage: Stage) -> Result:
    started, good, total, why = time.monotonic(), 0, row.long if row.trials else 0, ""
    if row.trials is not None:
        try:
            for _ in row.trials(stage, row.long):
                good += 1
        except NotHere as reason:
            good, total, why = 0, 0, str(reason)
        except Exception:
            print(f"\n{traceback.format_exc()}", file=sys.stderr)
    if row.tests:
        passed, tried = _run_tests(row.tests)
        good, total = good + passed, total + tried
    return Result(row=row, good=good, total=total, seconds=time.monotonic() - started, why=why)


def _run_tests(names: tuple[str, ...]) -> tuple[int, int]:
    """(passed, tried) of tests of the suite; a skipped one was not tried, a name that selects nothing failed."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    passed = counts.get("passed", 0)
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if done.returncode != 0:
        print(f"\n{done.stdout}{done.stderr}", file=sys.stderr)
        failed = max(failed, 1)
    return passed, passed + failed


def _told(result: Result) -> str:
    return f"{result.score}: {result.why}" if result.why else result.score


def _page(results: list[Result]) -> str:
    import torch

    from swamla.process import processor

    rows = "\n".join(
        f"| {r.row.fault} | {r.row.expected} | {r.row.how} | {_told(r)} | {r.seconds:.0f} |" for r in results
    )
    versions = f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"
    where = f"{processor()}, {os.cpu_count()} cores, {versions}"
    return f"""# What a run survives

Written by `make faults` on {time.strftime("%Y-%m-%d")}: {where}; tiny models, gloo where there are several processes,
no GPU. n/n: trials that went as expected, of all; where tests of the suite belong to a row, they are counted with it.
The machine was used by others too, so the seconds say only what a run of it costs.

| fault | expected | how | n/n | seconds |
|---|---|---|---|---|
{rows}

`make faults` tries all of it again; `python -m tests.faults WORDS` the rows whose fault has these words. A shorter
version of most rows is part of `make test`. To kill a run of your own at a chosen place, set `SWAMLA_FAULT=point:step`,
whose points [faults.py](../src/swamla/faults.py) lists.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
