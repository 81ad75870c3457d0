"""Benchmark one recipe on this machine within a time budget: training, generation, data and start-up."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from swamla.bench.feeding import library_text, local_tokenizer, measure_loader, measure_tokenizer
from swamla.bench.generation import NEW, measure_generation, name_of
from swamla.bench.generation import expected_seconds as seconds_of_generation
from swamla.bench.measuring import interleaved, memory_bytes
from swamla.bench.results import Results, Row, in_bytes, in_seconds
from swamla.bench.synthetic import synthetic_dataset
from swamla.bench.training import STEPS, Shape, batch_of, expected_bytes, expected_seconds, measure_step
from swamla.errors import SwamlaError, is_out_of_memory
from swamla.inference.decoding import decodings_on
from swamla.model.accounting import count_parameters
from swamla.model.language_model import LanguageModel
from swamla.train.config import RunConfig
from swamla.train.memory_advice import Place
from swamla.train.precision import Chosen
from swamla.train.run_folder import fresh_state
from swamla.train.state import TrainState

# The share of the time after which each measurement must have ended; unused time goes to the next one.
_OWN, _LENGTHS, _GENERATION, _LOADER, _TOKENIZER = 0.35, 0.62, 0.86, 0.89, 0.94
_MORE = "a larger --minutes makes room"
_EXPECTED = 0.3  # assumed share of the peak, before anything was measured
_STARTS = 3  # rounds of start-up times
PROGRAMS = {
    "swamla --help": ("-m", "swamla", "--help"),
    "import torch": ("-c", "import torch"),
    "import all that training needs": ("-c", "import swamla.cli.train"),
}
_clock = time.monotonic


class Allowance:
    """A time budget, which starts now."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._begin = seconds, _clock()

    @property
    def spent(self) -> float:
        """Seconds spent."""
        return _clock() - self._begin

    def until(self, share: float) -> float:
        """Seconds left until this share of the budget is spent; at least 0."""
        return max(0.0, share * self.seconds - self.spent)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to measure.

    config: the recipe, with its model's vocabulary.
    device: to train on.
    precision: to train in.
    lengths: of single rows to train on.
    prompts: lengths of prompts to generate after.
    tokenizer: the run's own, if the recipe is a run.
    """

    config: RunConfig
    device: torch.device
    precision: Chosen
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    tokenizer: Path | None = None


class RecipeBench:
    """Adds rows to `results`; a measurement that does not fit the time or memory gets a row that says so.

    folder: for synthetic data.  stage: called with the name of the current measurement.
    """

    def __init__(
        self, wanted: Wanted, results: Results, allowance: Allowance, folder: Path, stage: Callable[[str], None]
    ) -> None:
        self.wanted, self.results, self.allowance, self.stage = wanted, results, allowance, stage
        self.config, self.ceilings = wanted.config, results.ceilings
        self.peak = self.ceilings["fp32_flops" if wanted.precision == "fp32" else "bf16_flops"]
        self.flops: float | None = None  # best share of the peak in training so far
        self.free = free_memory(wanted.device)
        self.tokens_per_s: float | None = None  # of the recipe's own training
        buffer_docs = self.config.data.buffer_docs
        self.dataset = synthetic_dataset(folder, self.config.model.vocab_size, buffer_docs=buffer_docs)

    def run(self) -> None:
        """Measure it all."""
        self.generation(self.training())
        self.loader()
        self.tokenizer()
        self.start_up()

    def training(self) -> LanguageModel | None:
        """The recipe's own step, then steps on single rows of several lengths; returns the model if it fits."""
        train = self.config.train
        own = Shape(rows=train.batch_size, length=train.block_size, accumulation=train.accumulation, packed=True)
        single = [Shape(rows=1, length=length) for length in self.wanted.lengths]
        self.stage("building the model")
        smallest = min([replace(own, rows=1, accumulation=1), *single], key=lambda shape: shape.tokens)
        if reason := self.lacks_memory(smallest):
            self.results.failed("training", f"{smallest} and more", reason)
            weights = 4 * count_parameters(self.config.model).total
            return self.config.model.build(train.seed).to(self.wanted.device) if weights < self.free else None
        state = fresh_state(self.config, self.dataset)
        self.own_step(state, own)
        for index, shape in enumerate(single):
            allowed = self.allowance.until(_LENGTHS)
            self.step(state, shape, allowed, limit=allowed / (len(single) - index))
        state.optimizer.zero_grad()
        return state.model

    def own_step(self, state: TrainState, own: Shape) -> None:
        """The recipe's own step; if it does not fit, a step of fewer rows."""
        allowed, shape = self.allowance.until(_OWN), own
        while self.lacks(shape, allowed) and (smaller := shape.smaller()):
            shape = smaller
        if shape != own:
            self.step(state, own, allowed, limit=allowed)
        row = self.step(state, shape, allowed, limit=allowed)
        self.tokens_per_s = float(row["tokens_per_s"] or 0) if row else None

    def step(self, state: TrainState, shape: Shape, allowed: float, *, limit: float) -> Row | None:
        """Measure a step and add its row; updates the estimate of the speed."""

        def measure() -> Row:
            return measure_step(self.config, state, batch_of(shape, self.dataset), shape, peak=self.peak, limit=limit)

        row = self.row("training", str(shape), self.lacks(shape, allowed), measure)
        if row:
            self.flops = max(self.flops or 0.0, float(row["flops"] or 0) / float(row["median_s"] or 1))
        return row

    def lacks(self, shape: Shape, allowed: float) -> str:
        """Why steps of this shape do not fit the memory or the time; "" if they do."""
        needs = STEPS * expected_seconds(
            self.config, shape, flops=self.flops or _EXPECTED * self.peak, copy_bytes=self.ceilings["copy_bytes"]
        )
        slow = f"{STEPS} steps would take about {in_seconds(needs)}; {_MORE}" if needs > allowed else ""
        return self.lacks_memory(shape) or slow

    def lacks_memory(self, shape: Shape) -> str:
        """As `lacks`, for memory only."""
        place = Place(precision=self.wanted.precision, device=self.wanted.device)
        needs = expected_bytes(self.config, shape, place)
        return f"needs about {in_bytes(needs)}, and {in_bytes(self.free)} are free" if needs > self.free else ""

    def generation(self, model: LanguageModel | None) -> None:
        """Prefill and decoding at several prompt lengths; also by CUDA graphs on CUDA, by int8 weights on a CPU."""
        flops, copy_bytes = _EXPECTED * self.ceilings["fp32_flops"], self.ceilings["copy_bytes"]
        ways = decodings_on(self.wanted.device.type)
        rows = [(prompt, decoding) for prompt in self.wanted.prompts for decoding in ways]
        for index, (prompt, decoding) in enumerate(rows):
            name, allowed = name_of(prompt, decoding), self.allowance.until(_GENERATION)
            if model is None:
                self.results.failed("generation", name, "no memory for the weights")
                continue
            needs = seconds_of_generation(self.config.model, prompt, flops=flops, copy_bytes=copy_bytes)
            slow = f"it and {NEW} new tokens would take about {in_seconds(needs)}; {_MORE}" if needs > allowed else ""
            limit = allowed / (len(rows) - index)
            measure = partial(measure_generation, model, prompt, limit=limit, decoding=decoding)
            self.row("generation", name, slow, measure)

    def loader(self) -> None:
        """The loader on synthetic documents, and its speed relative to training."""
        train, limit = self.config.train, self.allowance.until(_LOADER)

        def measure() -> Row:
            row = measure_loader(self.dataset, train.batch_size, train.block_size, limit=limit)
            rate = float(row["tokens_per_s"] or 0)
            return row | {"times_training": rate / self.tokens_per_s if self.tokens_per_s else None}

        self.row("data", "loader", "", measure)

    def tokenizer(self) -> None:
        """The recipe's tokenizer on source code, unless it would have to be downloaded."""
        data, limit = self.config.data, self.allowance.until(_TOKENIZER)

        def measure() -> Row:
            texts = library_text()
            found = local_tokenizer(data, self.wanted.tokenizer, texts)
            return measure_tokenizer(found, data.tokenizer, texts, limit=limit)

        self.row("data", f"tokenizer, {data.tokenizer}", "", measure)

    def start_up(self) -> None:
        """Start-up times of programs."""
        left = self.allowance.until(1.0)
        if not left:
            self.results.failed("start-up", "all", f"no time is left; {_MORE}")
            return
        self.stage("start-up")
        for row in measure_start_up(limit=left):
            self.results.add("start-up", row)

    def row(self, table: str, name: str, lack: str, measure: Callable[[], Row]) -> Row | None:
        """Add a measurement, or the reason why there is none."""
        if lack:
            self.results.failed(table, name, lack)
            return None
        self.stage(f"{table}, {name}")
        try:
            found = measure()
        except Exception as error:
            if not (isinstance(error, SwamlaError) or is_out_of_memory(error)):
                raise
            self.results.failed(table, name, str(error))
            return None
        self.results.add(table, found)
        return found


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device; on a CPU of the machine, or all of its memory if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return memory_bytes()
    fields = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return min(memory_bytes(), 1024 * int(fields["MemAvailable"].split()[0]))


def measure_start_up(programs: Mapping[str, Sequence[str]] = PROGRAMS, *, limit: float) -> list[Row]:
    """Seconds of a Python process with each of these arguments, from start to exit."""
    timings = interleaved(
        {name: partial(_run, arguments) for name, arguments in programs.items()},
        rounds=_STARTS,
        warmup=0,  # this process has read the files into the page cache
        limit=limit,
    )
    return [
        {"name": name, "median_s": found.median, "low_s": found.low, "high_s": found.high, "rounds": found.rounds}
        for name, found in timings.items()
    ]


def _run(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
