"""What toy models reach on tasks, over seeds: the rows of docs/tasks.md beside those expected before they were run.

    python -m benchmarks.toys --output toys.jsonl   # half an hour or so of two cores; the same command goes on
    python -m benchmarks.toys --table               # only print what was measured last

Every run is a `swamla train` of one thread, whose flags are in its row. A row of the results is a run: the accuracy on
held-out rows at every evaluation, and the seconds of its process.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from swamla.process import processor

RESULTS = Path(__file__).parent / "results"
LEARNED = 0.99
PAIRS_32 = '--data "task:mqar?pairs=32&length=128&vocabulary=256"'
SWAPS = '--data "task:state_tracking?length={}&moves=swaps"'


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A recipe with flags. expected: accuracy, after so many steps, of the experiments before this project."""

    recipe: str
    flags: str
    expected: str


def mqar(flags: str, expected: str) -> Toy:
    """Recall in `toy-mqar`."""
    return Toy(recipe="toy-mqar", flags=flags, expected=expected)


def swaps(length: int, flags: str, expected: str) -> Toy:
    """State tracking over rows of `length` swaps."""
    return Toy(recipe="toy-state-tracking", flags=f"{SWAPS.format(length)} {flags}", expected=expected)


TOYS = (
    mqar("", ".99 by 500"),
    mqar("--pattern mla --steps 250", ".99 by 250"),
    mqar("--pattern gdn", ".99 by 500"),
    mqar('--pattern "swa swa"', ".11"),
    mqar('--data "task:mqar?pairs=16"', ".999@150"),
    mqar('--data "task:mqar?pairs=16" --pattern mla', ".999@200"),
    mqar('--data "task:mqar?pairs=16" --pattern mla --mla_kv_lora_rank 8', ".999@350"),
    mqar('--data "task:mqar?pairs=16" --pattern gdn', ".12@500, rising"),
    mqar(f"{PAIRS_32} --pattern mla", ".998@250"),
    mqar(f"{PAIRS_32} --pattern gdn --steps 1000", ".97@1000"),
    mqar(f"{PAIRS_32} --pattern gdn --steps 1000 --gdn_head_k_dim 16 --gdn_head_v_dim 16", ".53@1000"),
    mqar(f"{PAIRS_32} --pattern gdn --steps 1000 --gdn_head_k_dim 8 --gdn_head_v_dim 8", ".08@1000"),
    swaps(32, "--steps 500", "1.0"),
    swaps(64, "--steps 500", "1.0"),
    swaps(128, "--steps 1000", ".97"),
    swaps(32, "--steps 500 --gdn_beta_max 1", ".33"),
    swaps(64, "--steps 500 --gdn_beta_max 1", ".32"),
    swaps(128, "--steps 500 --gdn_beta_max 1", ".31"),
    swaps(32, "--steps 500 --gdn_beta_max 1 --learned_positions 32", ".33"),
    swaps(64, "--steps 500 --gdn_beta_max 1 --learned_positions 64", ".32"),
    swaps(128, "--steps 500 --gdn_beta_max 1 --learned_positions 128", ".31"),
    swaps(32, "--steps 500 --learned_positions 32", "1.0"),
    swaps(64, "--steps 500 --learned_positions 64", "1.0"),
    swaps(128, "--steps 500 --learned_positions 128", ".97"),
    mqar('--pattern "mha mha" --conv 0 --steps 3000 --eval_interval 250', ".14@3000"),
    mqar('--batch_size 16 --data "task:mqar?pairs=16"', ".999@150"),
    mqar('--batch_size 16 --data "task:mqar?pairs=16" --pattern mla', ".999@200"),
    mqar('--batch_size 16 --data "task:mqar?pairs=16" --pattern mla --mla_kv_lora_rank 8', ".999@350"),
    mqar('--batch_size 16 --data "task:mqar?pairs=16" --pattern gdn', ".12@500, rising"),
    mqar('--batch_size 16 --pattern "mha mha" --conv 0 --steps 3000 --eval_interval 250', ".14@3000"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run."""

    toy: Toy
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What names it in the file of results."""
        return self.toy.recipe, self.toy.flags, self.seed


def run(job: Job) -> dict[str, Any]:
    """Train; a row with the accuracies of the run, or with its error."""
    with tempfile.TemporaryDirectory(prefix="toys-") as folder:
        words = [job.toy.recipe, *shlex.split(job.toy.flags), "--seed", str(job.seed), "--threads", "1"]
        command = [sys.executable, "-m", "swamla", "train", *words, "--output_dir", f"{folder}/run"]
        begin = time.monotonic()
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        row: dict[str, Any] = {"recipe": job.toy.recipe, "flags": job.toy.flags, "seed": job.seed}
        if done.returncode:
            said = done.stderr.strip().splitlines()  # nothing, of a process that was killed
            return row | {"error": said[-1] if said else f"exit status {done.returncode}"}
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    accuracy = {point["step"]: point["held_out_accuracy"] for point in points if "held_out_accuracy" in point}
    return row | {"accuracy": accuracy, "seconds": round(time.monotonic() - begin, 1)}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table: what was expected, and each seed's last accuracy with the step by which .99 was reached."""
    found = {(row["recipe"], row["flags"], row["seed"]): row for row in rows}
    seeds = sorted({seed for _, _, seed in found})
    lines = []
    for toy in TOYS:
        own = [found.get((toy.recipe, toy.flags, seed)) for seed in seeds]
        lines.append([f"`{f'{toy.recipe} {toy.flags}'.strip()}`", toy.expected, *map(_cell, own)])
    return table(["`swamla train` …", "expected", *(f"seed {seed}" for seed in seeds)], lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "failed"
    points = {int(step): value for step, value in row["accuracy"].items()}
    last = max(points)
    learned = min((step for step, value in points.items() if value >= LEARNED), default=None)
    return f"{_short(points[last])}@{last}" + (f", .99 by {learned}" if learned is not None else "")


def _short(accuracy: float) -> str:
    """Without the zero before the point, and a digit more near 1."""
    digits = 3 if accuracy < LEARNED else 4
    return f"{accuracy:.{digits}f}".removeprefix("0")


def main(argv: Sequence[str]) -> int:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toys", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, help="JSON lines; by default those of today in benchmarks/results")
    options = parser.parse_args(argv)
    last = max(RESULTS.glob("toys-*.jsonl"), default=None) if options.table else None
    file = options.output or last or RESULTS / f"toys-{datetime.now(UTC):%Y-%m-%d}.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    have = {(row["recipe"], row["flags"], row["seed"]) for row in rows if "error" not in row}
    jobs = [Job(toy=toy, seed=seed) for seed in range(options.seeds) for toy in TOYS]
    if options.table:
        print(report(rows))
        return 0
    missing = [job for job in jobs if job.key not in have]
    with ThreadPoolExecutor(options.jobs) as pool, file.open("a", encoding="utf-8") as out:
        for row in pool.map(run, missing):
            rows.append(row | {"processor": processor()})
            out.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            out.flush()
            print(json.dumps(row, ensure_ascii=False), flush=True)
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
