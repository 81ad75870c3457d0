"""What each option gains: runs of a recipe that differ in a few flags, at equal tokens, over seeds and widths.

    python -m benchmarks.gains gains            # about two hours of two cores; a later day goes on with --output FILE
    python -m benchmarks.gains mup --jobs 1
    python -m benchmarks.gains gains --arms rows momentum    # those arms, and the first
    python -m benchmarks.gains gains --table    # only print what was measured

Every run is a `swamla train` of one thread, whose flags are in its row. Differences are paired by seed, which decides
weights and order of the data; intervals are Student's t over seeds.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from benchmarks.markdown import table
from swamla.process import processor

RESULTS = Path(__file__).parent / "results"
# Width → its heads. quickstart's own is 256; heads stay 64 wide.
SIZES = {64: "--width 64 --n_heads 1", 128: "--width 128 --n_heads 2", 256: "--width 256 --n_heads 4"}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms, each a name and its flags beside the base's; the first is what the others are compared with.

    steps: of a run; an arm's own flags may name others.
    """

    recipe: str = "quickstart"
    base: str = ""
    steps: int = 200
    widths: tuple[int, ...] = (64, 128)
    seeds: int = 3
    arms: dict[str, str] = field(default_factory=dict)


GAINS = {
    "quickstart as it is": "",
    "without tables of tokens and pairs": "--ngram_buckets none",
    "the table of tokens alone": "--ngram_buckets 4096",
    "and hashed triples": "--ngram_buckets 4096,16384,16384",
    "tables before the first layer": "--ngram_layer 0",
    "embeddings at the rate of matrices": "--lr_embedding 1",
    "without NorMuon": "--muon_normuon none",
    "without `qk_norm`": "--swa_qk_norm none",
    "gains, gates, convolutions at 4 × lr": "--lr_scalars 4",
    "Muon's momentum warmed up from .85 over half": "--muon_momentum_warmup 0.5",
    "cautious weight decay": "--muon_decay cautious",
    "Polar Express": "--muon_coefficients polar_express",
    "logits bounded by 15": "--logit_cap 15",
    "squared ReLU": "--dense_activation relu2",
    "average of the weights, width .05": "--ema_width 0.05",
    "rows of 128 tokens for .3 of the run": "--curriculum 128:0.3,512:inf",
    "2 rows for .1, 4 for .3 of the run, √ rule": "--batch_ramp 2:0.1,4:0.3,8:inf --batch_rule sqrt --steps 258",
    "4 rows": "--batch_size 4 --steps 400",
    "AdamW at 4e-3": "--optimizer adamw --lr 4e-3 --lr_embedding 1 --muon_normuon - --muon_momentum_warmup -",
}
# Optimum of the learning rate against width: it should stay where it is with µP, and move without.
MUP = {
    f"{name}, lr {lr:g}": f"{flags} --lr {lr:g}"
    for name, flags in (("standard", ""), ("µP from width 64", "--mup_base_width 64"))
    for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
}
EXPERIMENTS = {
    # From the recipe as it was when this was measured.
    "gains": Experiment(base="--muon_normuon 0.95 --lr_scalars 1 --muon_momentum_warmup 0", arms=GAINS),
    "mup": Experiment(
        base="--optimizer adamw --lr_embedding 1 --lr_scalars 1 --mla_kv_lora_rank 64",
        widths=(64, 128, 256),
        seeds=1,
        arms=MUP,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: its place in the experiment and its command."""

    arm: str
    width: int
    seed: int
    flags: str

    @property
    def key(self) -> tuple[str, int, int]:
        """What names it in the file of results."""
        return self.arm, self.width, self.seed


def jobs_of(experiment: Experiment) -> Iterator[Job]:
    """All runs, seed by seed, so that an experiment that was stopped has whole comparisons of fewer seeds."""
    ends = f"--steps {experiment.steps} --max_minutes none --eval_seconds none --eval_tokens none --threads 1"
    for seed in range(experiment.seeds):
        for width in experiment.widths:
            for arm, flags in experiment.arms.items():
                yield Job(arm=arm, width=width, seed=seed, flags=merged(SIZES[width], experiment.base, ends, flags))


def merged(*texts: str) -> str:
    """Flags with their values; of a flag that is named twice the last one, and none if that is "-"."""
    found: dict[str, str] = {}
    for text in texts:
        words = shlex.split(text)
        found |= dict(zip(words[::2], words[1::2], strict=True))
    return " ".join(f"{name} {value}" for name, value in found.items() if value != "-")


def run(job: Job, recipe: str) -> dict[str, Any]:
    """Train; a row with the figures of the run's last evaluation, of all held-out text, or with its error."""
    with tempfile.TemporaryDirectory(prefix="gains-") as folder:
        command = f"{sys.executable} -m swamla train {recipe} {job.flags} --seed {job.seed} --output_dir {folder}/run"
        begin = time.monotonic()
        done = subprocess.run(shlex.split(command), check=False, capture_output=True, text=True)
        row = {"arm": job.arm, "width": job.width, "seed": job.seed, "flags": job.flags, "recipe": recipe}
        if done.returncode:
            return row | {"error": done.stderr.strip().splitlines()[-1]}
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = [json.loads(line) for line in lines]
    return row | {
        "bits_per_byte": measured[-1]["held_out_bits_per_byte"],
        "tokens": max(point.get("tokens", 0) for point in measured),
        "seconds": round(time.monotonic() - begin, 1),
    }


def report(rows: Sequence[dict[str, Any]], experiment: Experiment) -> str:
    """A table: bits per byte of the first arm, and each other arm's difference from it, per width."""
    at = {(row["arm"], row["width"], row["seed"]): row["bits_per_byte"] for row in rows if "error" not in row}
    first = next(iter(experiment.arms))
    lines = []
    for arm in experiment.arms:
        cells = []
        for width in experiment.widths:
            own = {seed: at[arm, width, seed] for seed in range(experiment.seeds) if (arm, width, seed) in at}
            if arm == first or experiment.seeds == 1:
                cells.append(f"{mean(own.values()):.4f}" if own else "")
            else:
                cells.append(
                    interval([bits - at[first, width, s] for s, bits in own.items() if (first, width, s) in at])
                )
        lines.append([arm, *cells])
    return table([f"`{experiment.recipe}`, {experiment.steps} steps", *map(str, experiment.widths)], lines)


def interval(differences: Sequence[float]) -> str:
    """The mean with half of its 95 % interval; alone if there is one value."""
    if not differences:
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.4f}"
    half = t.ppf(0.975, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return f"{mean(differences):+.4f} ± {half:.4f}"


def main(argv: Sequence[str]) -> int:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gains", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument(
        "--arms", nargs="+", default=[""], help="only those whose name has one of these words, and the first"
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, help="JSON lines; by default benchmarks/results/NAME-DATE.jsonl")
    options = parser.parse_args(argv)
    experiment = EXPERIMENTS[options.experiment]
    file = options.output or RESULTS / f"{options.experiment}-{datetime.now(UTC):%Y-%m-%d}.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    have = {(row["arm"], row["width"], row["seed"]) for row in rows}
    first = next(iter(experiment.arms))
    wanted = {arm for arm in experiment.arms if arm == first or any(word in arm for word in options.arms)}
    jobs = [job for job in jobs_of(experiment) if job.arm in wanted and job.key not in have]
    missing = [] if options.table else jobs
    with ThreadPoolExecutor(options.jobs) as pool, file.open("a", encoding="utf-8") as out:
        for row in pool.map(lambda job: run(job, experiment.recipe), missing):
            rows.append(row | {"processor": processor()})
            out.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            out.flush()
            print(json.dumps(row, ensure_ascii=False), flush=True)
    print(report(rows, experiment))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
