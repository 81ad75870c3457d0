"""Start-up times of programs, in new processes."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from swamla.bench.measuring import interleaved
from swamla.bench.results import Row

_ROUNDS = 3
PROGRAMS = {
    "swamla --help": ("-m", "swamla", "--help"),
    "import torch": ("-c", "import torch"),
    "import all that training needs": ("-c", "import swamla.cli.train"),
}


def measure_start_up(programs: Mapping[str, Sequence[str]] = PROGRAMS, *, limit: float) -> list[Row]:
    """Seconds that Python takes with each of these arguments, from start to exit."""
    timings = interleaved(
        {name: partial(_run, arguments) for name, arguments in programs.items()},
        rounds=_ROUNDS,
        warmup=0,  # files that this process imported are in the page cache
        limit=limit,
    )
    return [
        {"name": name, "median_s": found.median, "low_s": found.low, "high_s": found.high, "rounds": found.rounds}
        for name, found in timings.items()
    ]


def _run(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
