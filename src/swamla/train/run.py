"""A run in progress: its state, and the services around it: signals, records, checkpoints, hub, watchdog."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from swamla import distributed
from swamla.checkpoint import Saver, WriterGroup, list_checkpoints
from swamla.data.dataset import TrainingData
from swamla.data.packing import Batch
from swamla.errors import SwamlaError
from swamla.hub.push import Pushes
from swamla.model.language_model import LanguageModel
from swamla.train.config import RunConfig, TrainConfig
from swamla.train.curriculum import cut
from swamla.train.feed import Feed
from swamla.train.memory_advice import advised
from swamla.train.profiling import Profiling
from swamla.train.rank_watch import RankWatch
from swamla.train.signals import StopRequest
from swamla.train.state import TrainState
from swamla.train.tracking.display import Display, WhileRead, make_display
from swamla.train.tracking.step_log import Epochs, StepLog
from swamla.train.tracking.trackers import Records, make_records

T = TypeVar("T")
Evaluate = Callable[[LanguageModel], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """The next step, as all ranks know it; only `batch` differs between ranks.

    batch: this rank's rows at the curriculum's length; None if any rank failed to read its rows, or is still reading
    (missing).  rows, labels, flops: of all ranks.  stop: the signal that requested a stop, 0 for none.
    seconds: training time of the run so far, over all its processes.  step_seconds: of the last step, 0 before the
    first. Both by the main rank's clock.
    """

    batch: Batch | None = None
    missing: bool = True
    rows: int = 0
    labels: int = 0
    flops: float = 0.0
    stop: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0


@dataclass(kw_only=True)
class Run:
    """What the loop, saving and logging share.

    feed: reads the training rows.  epochs: passes over the training text.  log: reports steps.
    started: `time.monotonic` at the start, moved by the time that earlier processes of the run took.
    length, rows: the current sequence length and rows of a step.  next_step: what `look_ahead` found last.
    waiting_since: `time.monotonic` at the end of the last step.
    own_rows: this rank's rows of the step `own_step` (its first sample and its rows on all ranks); own_error: why they
    could not be read.
    saved_step: the step of the newest checkpoint.  unsaved: the error of the newest save, if it failed.
    """

    config: RunConfig
    folder: Path
    state: TrainState
    evaluate: Evaluate | None
    feed: Feed
    epochs: Epochs
    stop: StopRequest
    display: Display
    records: Records
    log: StepLog
    hub: Pushes
    profiling: Profiling
    saver: Saver
    watch: RankWatch
    started: float
    length: int
    rows: int
    saved_step: int | None
    unsaved: Exception | None = None
    next_step: NextStep = NextStep()
    waiting_since: float = 0.0
    own_step: tuple[int, int] = (-1, 0)
    own_rows: Batch | None = None
    own_error: Exception | None = None

    @property
    def settings(self) -> TrainConfig:
        """The training section of the config."""
        return self.config.train

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def seconds(self) -> float:
        """Training time so far, over all processes of the run, by the main rank's clock: all ranks decide alike."""
        return distributed.from_main(time.monotonic() - self.started)

    def progress(self, steps: float) -> float:
        """Progress of the run after `steps` more steps as long as the last one: 0 … 1, and above 1 past its end."""
        seen = self.next_step
        return self.settings.budget.progress(self.state.step + steps, seen.seconds + steps * seen.step_seconds)

    def look_ahead(self, *, step_begun: float | None = None, wait: bool = False) -> None:
        """Read this rank's rows of the next step; exchange label counts, FLOPs, stop requests and the clock.

        step_begun: the start of the step that ends now; None if no step was taken since the last call.
        wait: wait for this rank's rows until they are read or a stop is requested; otherwise they may be missing.
        """
        state = self.state
        last = self.next_step.step_seconds if step_begun is None else time.monotonic() - step_begun
        left = math.inf if self.settings.steps is None else self.settings.steps - state.step
        # Known to all ranks alike: the clock of the last exchange, and not this rank's.
        begins = min(1.0, self.settings.horizon.progress(state.step, state.seconds))
        rows = self.feed.batch_size = self.settings.batches.at(state.tokens, begins)
        step = (state.sample, rows)
        if self.own_step != step and left > 0:
            interrupted = (lambda: bool(self.stop.received)) if wait else (lambda: True)
            if self.feed.wait(state.sample, interrupted):
                self.own_step, self.own_rows, self.own_error = step, None, None
                try:
                    self.own_rows = self.feed.take(state.sample, another=left > 1)
                except Exception as error:  # e.g. a damaged file of a stream, which is first read now
                    self.own_error = error
        mine = self.own_step == step
        length = self.settings.lengths.at(state.tokens, begins)
        batch = cut(self.own_rows, length) if mine and self.own_rows is not None else None
        flops = 0 if batch is None else self.log.flops.of(batch.document_BT)
        own = (0 if batch is None else batch.n_labels, flops, not mine, mine and self.own_error is not None)
        clock = (self.stop.received or 0, time.monotonic() - self.started, last)
        labels, all_flops, missing, failed, stops, seconds, steps_seconds = zip(
            *distributed.exchange((*own, *clock)), strict=True
        )
        self.next_step = NextStep(
            batch=None if any(missing) or any(failed) else batch,
            missing=any(missing),
            rows=rows,
            labels=round(sum(labels)),
            flops=sum(all_flops),
            stop=round(max(stops)),
            seconds=seconds[0],
            step_seconds=steps_seconds[0],
        )
        if self.next_step.stop:
            self.stop.received = signal.Signals(self.next_step.stop)

    def say(self, text: str) -> None:
        """Print one line on the console."""
        self.display.say(text)


@contextmanager
def in_progress(
    config: RunConfig,
    folder: Path,
    state: TrainState,
    dataset: TrainingData,
    evaluate: Evaluate | None,
    console: Console,
) -> Iterator[Run]:
    """The run with all its services, which start from `state` and are closed with the block."""
    settings, size = config.train, dataset.bytes_per_label
    bits_per_nat = None if size is None else 1 / (math.log(2) * size)
    epochs = Epochs(dataset.epochs())
    with (
        advised(config, state, folder),
        StopRequest() as stop,
        WhileRead(make_display(console, settings.log_interval), stop.unread) as display,
        make_records(settings, folder, first_step=state.step + 1, say=display.say) as records,
        Pushes(
            settings.hf_repo_id if distributed.is_main() else "",
            folder,
            private=settings.hf_private,
            say=display.say,
            stop_requested=lambda: bool(stop.received),
        ) as hub,
        Profiling(settings, folder, state.device, first_step=state.step + 1, say=display.say) as profiling,
        Saver(
            folder / "checkpoints",
            keep_last=settings.keep_last,
            background=settings.async_save,
            best=state.best,
            # Keeps one checkpoint at a multiple of the interval to go back to, besides those of requested stops.
            interval=settings.save_interval if settings.spike_factor else None,
            writers=writer_group(),
            say=display.say,
        ) as saver,
        RankWatch(settings.rank_timeout_minutes) as watch,
    ):
        yield Run(
            config=config,
            folder=folder,
            state=state,
            evaluate=evaluate,
            feed=Feed(dataset.rows(settings.block_size, settings.seed), settings.batch_size, state.device),
            epochs=epochs,
            stop=stop,
            display=display,
            records=records,
            log=StepLog(config, state, records, display, bits_per_nat, epochs),
            hub=hub,
            profiling=profiling,
            saver=saver,
            watch=watch,
            started=time.monotonic() - state.seconds,
            length=settings.block_size,
            rows=settings.batch_size,
            saved_step=state.step if state.step and list_checkpoints(folder / "checkpoints") else None,
        )


def writer_group() -> WriterGroup:
    """The ranks that write this run's checkpoints: all of them, or the only process."""
    return _RankWriters() if distributed.world_size() > 1 else WriterGroup()


class _RankWriters(WriterGroup):
    """All ranks write a checkpoint. They have their own process group, since a background thread may use it."""

    def __init__(self) -> None:
        self.rank = distributed.rank()
        self._group = torch.distributed.new_group(backend="gloo")

    def together(self, work: Callable[[], T]) -> list[T]:
        found: list[Any] = [None] * distributed.world_size()
        error = mine = None
        try:
            mine = work()
        except Exception as caught:
            error = caught
        torch.distributed.all_gather_object(found, (mine, None if error is None else str(error)), group=self._group)
        if error is not None:
            raise error
        for number, (_, message) in enumerate(found):
            if message is not None:
                raise SwamlaError(f"rank {number}: {message}")
        return [result for result, _ in found]

    def any(self, flag: bool) -> bool:
        return bool(distributed.highest(flag))
