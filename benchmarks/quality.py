"""Time to quality: quickstart against nanoGPT on the same text, in slices of time that take turns.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    make speedrun                                   # one seed, about a quarter of an hour
    make speedrun SPEEDRUN_ARGS="--seeds 3"         # a record: three seeds, about 28 minutes

Every learner has the same minutes of training. A learner's clock runs in its own slices only, so a busy machine is busy
for all of them; scoring is not counted. docs/speedrun.md has the rules.
"""

import argparse
import contextlib
import io
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swamla import process

process.prepare()  # as the command line does

import torch
from torch import Tensor, nn

from benchmarks.libraries import nanogpt
from benchmarks.quality_page import write_page
from benchmarks.shape import Shape
from swamla.bench.measuring import ceilings, machine
from swamla.bench.results import Results
from swamla.cli.fitting import fitted
from swamla.cli.run_config import resolve
from swamla.data.dataset import Dataset
from swamla.data.packing import NO_LABEL
from swamla.data.preparing import prepare
from swamla.errors import SwamlaError, UsageError
from swamla.evaluate import evaluate_split
from swamla.ops.layout import Layout
from swamla.train.config import RunConfig
from swamla.train.precision import Chosen, autocast
from swamla.train.run_folder import fresh_state, resolve_vocabulary
from swamla.train.schedule import Schedule
from swamla.train.step import training_step

RESULTS = Path(__file__).parent / "results"
RATES = (3e-4, 1e-3, 3e-3)  # nanoGPT's; each is tried on the first seed
MARKS = (5, 10, 15, 20, 30, 45, 60, 90, 120, 150)  # seconds at which every learner is scored, and at the end
SLICE = 4.0  # seconds of a turn, at least one step
EVALUATED = 65_536  # held-out tokens of a score on the way; the last one is of all
NANOGPT_ROWS, NANOGPT_LENGTH = 8, 256
TOLERANCE = 0.05  # largest relative difference in parameters


class Learner(ABC):
    """A model, its optimizer and its schedule. seconds: training time so far; budget: all of it."""

    def __init__(self, name: str, model: nn.Module, budget: float, precision: Chosen) -> None:
        self.name = name
        self.model = model
        self.budget = budget
        self.precision = precision
        self.seconds = 0.0
        self.steps = 0
        self.tokens = 0
        self.last = 0.0  # seconds of the last step
        self.curve: list[tuple[float, float]] = []

    @property
    def n_parameters(self) -> int:
        """Trained numbers."""
        return sum(p.numel() for p in self.model.parameters())

    @abstractmethod
    def step(self) -> int:
        """One optimizer step; returns its tokens."""

    @property
    def done(self) -> bool:
        """True if the middle of another step were beyond the budget, as in `swamla.train`."""
        return self.seconds + 0.5 * self.last >= self.budget

    def run(self, until: float) -> None:
        """Train until the own clock shows `until`, or the budget is spent."""
        while not self.done and self.seconds < until:
            begin = time.monotonic()
            self.tokens += self.step()
            self.steps += 1
            self.last = time.monotonic() - begin
            self.seconds += self.last

    def score(self, dataset: Dataset, length: int, most: int | None = EVALUATED) -> float:
        """Bits per byte of the held-out text, and a point of the curve."""
        with autocast(self.precision, torch.device("cpu")):
            found = evaluate_split(
                self.model,  # type: ignore[arg-type]  # or a model with the same `loss`
                dataset.held_out,
                eos_id=dataset.tokenizer.eos_id,
                block_size=length,
                batch_size=max(1, 4096 // length),
                max_tokens=most,
            )
        return found.bits_per_byte


class Ours(Learner):
    """A recipe, trained by the steps of `swamla.train`."""

    def __init__(self, config: RunConfig, dataset: Dataset, seed: int, budget: float) -> None:
        for name in ("batch_ramp", "curriculum"):
            if getattr(config.train, name):
                raise UsageError(f"{name}: the speedrun trains steps of one shape; take a recipe without it")
        self.settings = config.train
        self.state = fresh_state(config, dataset)
        super().__init__(f"swamla, seed {seed}", self.state.model, budget, self.state.precision)
        self.rows = dataset.rows(config.train.block_size, seed)

    def step(self) -> int:
        state, settings = self.state, self.settings
        batch = self.rows.batch(state.sample, settings.batch_size)
        ends = self.seconds + self.last
        lr, progress = settings.rate(state.step, ends), settings.progress(state.step, ends)
        result = training_step(state, batch, settings, lr, progress=progress)
        state.step += 1
        state.sample += settings.batch_size
        return result.tokens

    def score(self, dataset: Dataset, length: int, most: int | None = EVALUATED) -> float:
        with self.state.evaluated_weights():
            return super().score(dataset, length, most)


class NanoModel(nn.Module):
    """nanoGPT's model with the loss that our evaluation calls. It attends across documents, as nanoGPT does."""

    device = torch.device("cpu")

    def __init__(self, gpt: nn.Module) -> None:
        super().__init__()
        self.gpt = gpt

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        labels = labels_BT.masked_fill(labels_BT == NO_LABEL, -1)
        _, mean = self.gpt(tokens_BT, labels)
        return mean * (labels != -1).sum(), {}


class NanoGPT(Learner):
    """nanoGPT with its own AdamW, warm-up and cosine decay over the budget, gradients clipped at 1."""

    schedule = Schedule(name="cosine", warmup=0.05, decay=0.2, floor=0.1)

    def __init__(
        self, shape: Shape, folder: Path, dataset: Dataset, lr: float, seed: int, budget: float, precision: Chosen
    ) -> None:
        torch.manual_seed(seed)
        gpt = nanogpt(shape, NANOGPT_LENGTH, folder)
        super().__init__(f"nanoGPT, lr {lr:g}, seed {seed}", NanoModel(gpt), budget, precision)
        self.lr = lr
        self.rows = dataset.rows(NANOGPT_LENGTH, seed)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its groups
            self.optimizer = gpt.configure_optimizers(0.1, lr, (0.9, 0.95), "cpu")  # type: ignore[operator]

    def step(self) -> int:
        batch = self.rows.batch(self.steps * NANOGPT_ROWS, NANOGPT_ROWS)
        progress = min(1.0, (self.seconds + self.last) / self.budget)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule.factor(max(progress, 1e-9), self.steps)
        self.model.train()
        with autocast(self.precision, torch.device("cpu")):
            total, _ = self.model.loss(batch.tokens_BT, batch.labels_BT)  # type: ignore[operator]
        (total / batch.n_labels).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return batch.n_labels


def nanogpt_shape(config: RunConfig, vocabulary: int, n_parameters: int) -> Shape:
    """nanoGPT of our depth and heads, as wide as its parameters allow. Raises `UsageError` beyond `TOLERANCE`."""
    depth, heads = config.model.depth, 4
    widths = range(8 * heads, 4096, 8 * heads // 4)
    width = min(widths, key=lambda width: abs(nanogpt_parameters(width, depth, vocabulary) - n_parameters))
    found = nanogpt_parameters(width, depth, vocabulary)
    if abs(found / n_parameters - 1) > TOLERANCE:
        raise UsageError(f"no width of nanoGPT has {n_parameters:,} parameters: {width} has {found:,}")
    return Shape(width=width, depth=depth, heads=heads, vocabulary=vocabulary)


def nanogpt_parameters(width: int, depth: int, vocabulary: int) -> int:
    """Of its GPT without biases: 12 D² and two gains a layer, tokens, positions, the last gain."""
    return depth * (12 * width**2 + 2 * width) + (vocabulary + NANOGPT_LENGTH + 1) * width


def race(learners: Sequence[Learner], lengths: dict[str, int], dataset: Dataset) -> Iterator[tuple[Learner, float]]:
    """Train in turns; yields each learner's score at `MARKS` and, of all held-out text, at the end."""
    marks = {learner.name: [mark for mark in MARKS if mark < learner.budget] for learner in learners}
    while racing := [learner for learner in learners if not learner.done]:
        for learner in racing:
            own = marks[learner.name]
            learner.run(min([learner.seconds + SLICE, *own[:1]]))
            if own and learner.seconds >= own[0] and not learner.done:
                own.pop(0)
                yield learner, learner.score(dataset, lengths[learner.name])
            if learner.done:
                yield learner, learner.score(dataset, lengths[learner.name], None)


def seconds_until(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """When the curve of (seconds, bits per byte) first reaches `target`, interpolated; None if it never does."""
    before: tuple[float, float] | None = None
    for seconds, bits in curve:
        if bits <= target:
            if before is None or before[1] == bits:
                return seconds
            share = (before[1] - target) / (before[1] - bits)
            return before[0] + share * (seconds - before[0])
        before = seconds, bits
    return None


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, default=Path("../nanoGPT"), help="a checkout of nanoGPT")
    parser.add_argument("--recipe", default="quickstart", help="ours: a recipe or its file")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, for each learner")
    parser.add_argument("--seeds", type=int, default=1, help="nanoGPT's learning rates are tried on the first only")
    parser.add_argument("--output", type=Path, help="the JSON file; by default benchmarks/results/quality-DATE.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the race, print every score, write the results and the page."""
    options = options_of(argv)
    minutes: dict[str, Any] = {"max_minutes": options.minutes}
    config = resolve(options.recipe, minutes).config
    dataset, budget = prepare(config.data), 60 * options.minutes
    if options.recipe == "quickstart":  # as `swamla quickstart` does
        config = fitted(config, options.recipe, minutes, dataset, print)
    config = resolve_vocabulary(config, dataset)
    file = options.output or RESULTS / f"quality-{datetime.now(UTC):%Y-%m-%d}.json"
    command = f"python -m benchmarks.quality --seeds {options.seeds} --minutes {options.minutes:g}"
    results = Results(command=command, machine=machine(), ceilings=ceilings(), file=file)
    best = math.nan
    for seed in range(options.seeds):
        ours = Ours(replace(config, train=replace(config.train, seed=seed)), dataset, seed, budget)
        shape = nanogpt_shape(config, dataset.tokenizer.vocab_size, ours.n_parameters)
        rates = RATES if seed == 0 else (best,)
        theirs = [NanoGPT(shape, options.nanogpt, dataset, lr, seed, budget, ours.precision) for lr in rates]
        learners: list[Learner] = [ours, *theirs]
        lengths = {learner.name: NANOGPT_LENGTH for learner in theirs} | {ours.name: config.train.block_size}
        for learner, bits in race(learners, lengths, dataset):
            learner.curve.append((learner.seconds, bits))
            results.add("curve", {"name": learner.name, "seconds": round(learner.seconds, 2), "bits_per_byte": bits})
        theirs.sort(key=lambda learner: learner.curve[-1][1])
        best = theirs[0].lr
        target = theirs[0].curve[-1][1]
        for learner in learners:
            reached = seconds_until(learner.curve, target)
            results.add(
                "outcome",
                {
                    "name": learner.name,
                    "seed": seed,
                    "parameters": learner.n_parameters,
                    "steps": learner.steps,
                    "tokens": learner.tokens,
                    "precision": learner.precision,
                    "bits_per_byte": learner.curve[-1][1],
                    "target": target,
                    "target_after_s": reached,
                },
            )
    write_page(results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SwamlaError as error:
        sys.exit(f"error: {error}")
