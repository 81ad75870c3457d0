"""A run in progress: what it is, and all that watches over it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from swamla import distributed
from swamla.checkpoint import Saver, list_checkpoints
from swamla.data.dataset import Dataset, Rows
from swamla.hub.push import Pushes
from swamla.model.language_model import LanguageModel
from swamla.train.config import RunConfig, TrainConfig
from swamla.train.epochs import Epochs
from swamla.train.memory_advice import advised
from swamla.train.parallel.writers import writer_group
from swamla.train.profiling import Profiling
from swamla.train.rank_watch import RankWatch
from swamla.train.signals import StopRequest
from swamla.train.state import TrainState
from swamla.train.tracking.display import Display, WhileRead, make_display
from swamla.train.tracking.step_log import StepLog
from swamla.train.tracking.trackers import Records, make_records

Evaluate = Callable[[LanguageModel], dict[str, float]]


@dataclass(kw_only=True)
class Run:
    """What the loop, its saves and its log have in common.

    rows: of the training text.  epochs: how often it was seen.  log: what is told of steps.
    bits_per_nat: bits per byte that a loss of one nat per token is.
    started: by `time.monotonic`, as if the run had gone on without a break.
    step_seconds: of the last step, 0 before the first.  length: the sequence length, by the curriculum.
    saved_step: the step that the newest checkpoint holds.  unsaved: why the newest save failed.
    """

    config: RunConfig
    folder: Path
    state: TrainState
    evaluate: Evaluate | None
    rows: Rows
    epochs: Epochs
    bits_per_nat: float
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
    saved_step: int | None
    step_seconds: float = 0.0
    unsaved: Exception | None = None

    @property
    def settings(self) -> TrainConfig:
        """The part of the config that is about training."""
        return self.config.train

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def seconds(self) -> float:
        """Time spent on this run, whenever it was taken up; by the main rank's clock, so that all decide alike."""
        return distributed.from_main(time.monotonic() - self.started)

    def progress(self, steps: float) -> float:
        """How far the run will be after so many more steps, each as long as the last one: 0 … 1, and beyond."""
        return self.settings.budget.progress(self.state.step + steps, self.seconds() + steps * self.step_seconds)

    def say(self, text: str) -> None:
        """Show people one line that stays."""
        self.display.say(text)


@contextmanager
def in_progress(
    config: RunConfig,
    folder: Path,
    state: TrainState,
    dataset: Dataset,
    evaluate: Evaluate | None,
    console: Console,
    *,
    resumed: bool,
) -> Iterator[Run]:
    """Everything that a run needs while it goes on, from the state at which it begins; it ends with the block."""
    settings, bits_per_nat = config.train, 1 / (math.log(2) * dataset.bytes_per_label)
    epochs = Epochs(dataset.epochs())
    with (
        advised(config, state, folder),
        StopRequest() as stop,
        WhileRead(make_display(console, settings.log_interval), stop.unread) as display,
        make_records(settings, folder, resume_after=state.step if resumed else None, say=display.say) as records,
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
            rows=dataset.rows(settings.block_size, settings.seed),
            epochs=epochs,
            bits_per_nat=bits_per_nat,
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
            saved_step=state.step if state.step and list_checkpoints(folder / "checkpoints") else None,
        )
