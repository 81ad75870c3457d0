"""Start-up time of programs in new processes: ours, and the import of torch."""

import subprocess
import sys

from benchmarks.running import Bench, Maker

TABLE = "start-up"
COMMANDS = {
    "python, nothing": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import swamla": ("-c", "import swamla"),
    "swamla --help": ("-m", "swamla", "--help"),
}


def measure(bench: Bench) -> None:
    """The table."""
    makers = {name: _maker(words) for name, words in COMMANDS.items()}
    outcomes = bench.race(TABLE, {}, makers, rounds=9, limit=14, warmup=0 if bench.quick else 1)
    for name, outcome in outcomes.items():
        bench.results.add(TABLE, {"name": name, **outcome.row()})


def _maker(words: tuple[str, ...]) -> Maker:
    def run() -> None:
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    return lambda: run
