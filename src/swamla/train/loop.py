"""The training loop, read top-down: `train` is the run; its steps are in step.py."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from swamla import distributed
from swamla.checkpoint import Saver
from swamla.data.dataset import Dataset
from swamla.data.packing import Batch
from swamla.errors import FailedElsewhere, Interrupted, SwamlaError
from swamla.faults import fault
from swamla.hub import Pushes, require_hub
from swamla.model.language_model import LanguageModel
from swamla.train.backends import describe
from swamla.train.claims import Claim
from swamla.train.config import RunConfig, TrainConfig
from swamla.train.curriculum import cut
from swamla.train.epochs import Epochs
from swamla.train.keeping import Diverged, Keeper
from swamla.train.memory_advice import advised
from swamla.train.parallel import make_crew
from swamla.train.plot import plot_losses
from swamla.train.precision import autocast
from swamla.train.profiling import Profiling
from swamla.train.rank_watch import RankWatch
from swamla.train.run_folder import open_run
from swamla.train.signals import StopRequest
from swamla.train.spikes import checkpoint_to_go_back_to
from swamla.train.state import TrainState, generator_states, set_generator_states
from swamla.train.step import StepResult, training_step
from swamla.train.step_log import StepLog
from swamla.train.trackers import Records, make_records, require_trackers
from swamla.train.tracking import Display, WhileRead, make_display

__all__ = ["Diverged", "Evaluate", "train"]

Evaluate = Callable[[LanguageModel], dict[str, float]]


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    dataset: Dataset,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    console: Console | None = None,
    on_start: Callable[[TrainState], None] | None = None,
    claim: Claim | None = None,
) -> TrainState:
    """Train `config.model` on `dataset` in the folder `run_dir`, from its start or from its last checkpoint.

    evaluate: called with the model, in the run's precision; returns at least "loss", the held-out loss in nats per
    token. on_start: called once before the first step. claim: of the folder, where it is taken already. Returns the
    state at the end, with the last weights.
    Raises `Interrupted`, when all is saved, after SIGTERM or SIGHUP (exit 75), Ctrl-C (130) or where nobody reads the
    console any more (141); `Diverged` when `max_skipped` steps in a row had no finite gradient; `OutOfMemory`; and as
    `require_trackers`, `require_hub` and `open_run` do.
    """
    run_dir = Path(run_dir)
    require_trackers(config.train)
    require_hub(config.train.hf_repo_id)
    with open_run(config, run_dir, dataset=dataset, resume=resume, claim=claim) as (config, state):
        _train(config, run_dir, dataset, state, evaluate, resume, console or Console(), on_start)
    return state


def _train(
    config: RunConfig,
    run_dir: Path,
    dataset: Dataset,
    state: TrainState,
    evaluate: Evaluate | None,
    resume: bool,
    console: Console,
    on_start: Callable[[TrainState], None] | None,
) -> None:
    """Train in a folder that was opened."""
    settings, resume_after = config.train, state.step if resume else None
    with (
        advised(config, state, run_dir),
        StopRequest() as stop,
        WhileRead(make_display(console, settings.log_interval), stop.unread) as display,
        make_records(settings, run_dir, resume_after=resume_after, say=display.say) as metrics,
        Pushes(
            settings.hf_repo_id if distributed.is_main() else "",
            run_dir,
            private=settings.hf_private,
            say=display.say,
            hurry=lambda: bool(stop.received),
        ) as hub,
        Profiling(settings, run_dir, state.device, first_step=state.step + 1, say=display.say) as profiling,
        _saver(config.train, run_dir, state, display) as saver,
        RankWatch(settings.rank_timeout_minutes) as watch,
    ):
        loop = _Loop(config, run_dir, dataset, state, evaluate, metrics, display, hub, profiling, saver, watch)
        loop.announce(resume)
        if evaluate is not None:
            loop.keeper.score_best_again(evaluate)
        if on_start is not None:
            generators = generator_states()
            on_start(state)
            set_generator_states(generators)  # whatever it drew, the run is the same
        loop.run(stop)


def _saver(config: TrainConfig, run_dir: Path, state: TrainState, display: Display) -> Saver:
    return Saver(
        run_dir / "checkpoints",
        keep_last=config.keep_last,
        background=config.async_save,
        best=state.best,
        crew=make_crew(),
        say=display.say,
    )


class _Loop:
    """A run in progress: the state, and what watches over it."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        dataset: Dataset,
        state: TrainState,
        evaluate: Evaluate | None,
        metrics: Records,
        display: Display,
        hub: Pushes,
        profiling: Profiling,
        saver: Saver,
        watch: RankWatch,
    ) -> None:
        self.config, self.run_dir, self.state, self.evaluate = config.train, run_dir, state, evaluate
        self.metrics, self.display, self.hub, self.profiling, self.watch = metrics, display, hub, profiling, watch
        self.checkpoints = run_dir / "checkpoints"
        self.keeper = Keeper(
            self.config,
            self.checkpoints,
            state,
            saver,
            metrics=metrics,
            display=display,
            hub=hub,
            watch=watch,
            seconds=self.seconds,
        )
        self.rows = dataset.rows(self.config.block_size, self.config.seed)
        self.curriculum, self.length = self.config.lengths, self.config.block_size  # where there is none, none is told
        self.bits_per_nat = 1 / (math.log(2) * dataset.bytes_per_label)
        self.epochs = Epochs(dataset.epochs())
        self.log = StepLog(config, state, metrics, display, self.bits_per_nat, self.epochs)
        self.started = time.monotonic() - state.seconds
        self.step_seconds = 0.0  # of the last step

    def announce(self, resume: bool) -> None:
        """Say once what was chosen, so that nothing was chosen silently."""
        parameters = sum(p.numel() for p in self.state.model.parameters())
        where = f", resumed after step {self.state.step}" if resume else ""
        self.display.say(f"{parameters:,} parameters, {self.state.precision} on {self.state.device}{where}")
        self.display.say(f"backends: {describe(self.state.backends)}")
        for note in self.state.notes:
            self.display.say(note)
        self.display.say(f"mfu is relative to {self.log.peak.name}")
        planned = (self.config.steps or 0) * self.config.batch_size * self.config.block_size
        if planned and not self.config.curriculum and (described := self.epochs.describe(planned)):
            self.display.say(f"{self.config.steps} steps are {described}")
        if resume and self.progress(0.5) >= 1:
            step, steps, minutes = self.state.step, self.config.steps, self.config.max_minutes
            spent = [f"{step} of {steps} steps"] if steps else [f"{step} steps"]
            spent += [f"{self.state.seconds / 60:.1f} of {minutes:g} minutes"] if minutes else []
            self.display.say(f"the run is finished: {', '.join(spent)}; more steps or max_minutes go on with it")

    def run(self, stop: StopRequest) -> None:
        """Step until the budget is spent or somebody asks to stop; then evaluate, if nobody did, and save."""
        while not (stopped := self.stopped(stop)) and self.progress(0.5) < 1:  # in the middle of the next step
            self.step()
            self.keeper.settle()
            self.profiling.step()
            self.hub.attend()
            if self.evaluation_is_due():
                self.evaluate_now()
            if self.keeper.is_due():
                self.keeper.save()
        if not stopped and self.state.evaluated_step != self.state.step:
            self.evaluate_now()
        self.keeper.save_last()
        if described := self.epochs.describe(self.state.tokens):
            self.display.say(f"after step {self.state.step}: {described}")
        distributed.on_main(self.plot)
        if self.stopped(stop) and stop.received:
            where = f"after step {self.state.step}; all is saved in {self.run_dir}"
            raise Interrupted(f"stopped by {stop.received.name} {where}", stop.exit_status)

    def progress(self, steps: float) -> float:
        """How far the run will be after so many more steps, each as long as the last one."""
        return self.config.budget.progress(self.state.step + steps, self.seconds() + steps * self.step_seconds)

    def stopped(self, stop: StopRequest) -> bool:
        """True on every rank once one of them was asked to stop."""
        number = int(distributed.highest(stop.received or 0))
        if number:
            stop.received = signal.Signals(number)
        return bool(number)

    def seconds(self) -> float:
        """Time spent on this run, whenever it was taken up; by the main rank's clock, so that all decide alike."""
        return distributed.from_main(time.monotonic() - self.started)

    def step(self) -> None:
        """Take one training step, count it, tell about it."""
        state, begin = self.state, time.monotonic()
        self.watch.begin(f"step {state.step + 1}", limited=True)
        fault("begin", state.step + 1)
        lr = self.config.rate(state.step, self.seconds() + self.step_seconds)
        batch = cut(self.next_rows(), self.sequence_length())
        result = training_step(state, batch, self.config, lr)
        fault("update", state.step + 1)
        state.step += 1
        state.sample += self.config.batch_size
        before, state.tokens = state.tokens, state.tokens + (result.tokens if result.finite else 0)
        self.step_seconds = distributed.from_main(time.monotonic() - begin)
        state.seconds = self.seconds()
        self.watch.end()
        if not result.finite:
            self.skip(result)
            return
        spike = self.is_spike(result)
        if spike and self.roll_back(result):
            return
        # A spike before any checkpoint stays a step like any other, but max_skipped of them in a row end the run.
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if spike else 0
        flops = distributed.sum_of(self.log.flops.of(batch.document_BT))
        if distributed.is_main():
            self.log.write(result, lr=lr, flops=flops, seconds=self.step_seconds)
        for completed in self.epochs.completed(before, state.tokens):
            self.display.say(f"{completed}, after step {state.step}")
        if spike:
            self.end_if_too_many("had a loss spike")

    def next_rows(self) -> Batch:
        """This rank's rows of the next step. If a rank cannot read its own, all save before its error ends the run."""
        state, share = self.state, self.config.batch_size // distributed.world_size()
        failed: Exception | None = None
        batch = None
        try:
            batch = self.rows.batch(state.sample + distributed.rank() * share, share)
        except Exception as error:  # of a stream, whatever is wrong with a file that is only read now
            failed = error
        if not distributed.highest(failed is not None):
            assert batch is not None
            return batch
        self.save_before(failed)
        if failed is None:
            raise FailedElsewhere("another rank could not read its rows", SwamlaError.exit_status)
        raise failed

    def save_before(self, failed: Exception | None) -> None:
        """Save what was learned before an error ends the run, which says so then."""
        self.watch.end()
        if self.state.step:
            self.keeper.save_last()
        if failed is not None:
            again = f"mend it, and go on with --resume {self.run_dir}"
            failed.add_note(f"all is saved after step {self.state.step}: {again}")

    def sequence_length(self) -> int:
        """Of the next step, by the curriculum; a change is told."""
        length = self.curriculum.length(self.state.tokens)
        if length != self.length:
            self.display.say(f"sequence length {length} from step {self.state.step + 1}, {self.state.tokens:,} tokens")
            self.length = length
        return length

    def skip(self, result: StepResult) -> None:
        """Count a step whose gradient was not finite; too many in a row end the run."""
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        self.metrics.write(state.step, {"skipped": state.skipped, "grad_norm": result.grad_norm})
        self.display.say(
            f"warning: step {state.step} skipped, gradient norm {result.grad_norm} ({state.skipped} so far)"
        )
        self.end_if_too_many("had no finite gradient")

    def end_if_too_many(self, what: str) -> None:
        """End a run in which so many steps in a row were for nothing."""
        most = self.config.max_skipped
        if self.state.skipped_in_a_row >= most:
            self.keeper.give_up(f"{most} steps in a row, up to step {self.state.step}, {what}")

    def is_spike(self, result: StepResult) -> bool:
        """Judge a loss by the usual one, which it becomes a part of where it is none."""
        spike = self.config.spike_factor is not None and self.state.usual.exceeds(result.loss, self.config.spike_factor)
        if not spike:
            self.state.usual.note(result.loss)
        return spike

    def roll_back(self, result: StepResult) -> bool:
        """After a spike: go back to the weights of the last checkpoint, and on with the rows after those of this step.

        Saved at once, so that a resumed run goes on from there too. Steps and time go on counting. False where there is
        no checkpoint to go back to: nothing is changed then.
        """
        state, loss = self.state, f"loss {result.loss:.4f} in step {self.state.step}, usual is {self.state.usual}"
        self.keeper.settle(wait=True)
        folder, interval = self.checkpoints, self.config.save_interval
        checkpoint = distributed.on_main(lambda: checkpoint_to_go_back_to(folder, interval))
        if checkpoint is None:
            self.display.say(f"warning: {loss}: there is no checkpoint yet to go back to")
            return False
        first = state.go_back(checkpoint)
        rows = {"first": first, "last": state.sample - 1}
        self.metrics.write(state.step, {"spike": result.loss, "rolled_back_to": checkpoint.step, "rows": rows})
        self.display.say(
            f"warning: {loss}: weights are those of step {checkpoint.step} again, rows {first} to {state.sample - 1} "
            "are left behind"
        )
        self.end_if_too_many("had a loss spike")
        self.keeper.save_again()
        return True

    def evaluation_is_due(self) -> bool:
        """By the number of steps or by the time since the last one, whichever was asked for."""
        config, state = self.config, self.state
        by_step = config.eval_interval is not None and state.step % config.eval_interval == 0
        by_time = config.eval_seconds is not None and state.seconds - state.evaluated_at >= config.eval_seconds
        return by_step or by_time

    def evaluate_now(self) -> None:
        """Evaluate, tell, and keep the state if it is the best so far."""
        if self.evaluate is None:
            return
        state = self.state
        self.watch.begin(f"the evaluation after step {state.step}")
        try:
            with state.evaluated_weights(), autocast(state.precision, state.device):
                found = self.evaluate(state.model)
                state.spread.let_go()
        except Exception as error:  # as of held-out text that cannot be read any more
            if distributed.world_size() == 1:  # elsewhere the others are in the middle of it
                self.save_before(error)
            raise
        fault("evaluation", state.step)
        state.seconds = state.evaluated_at = self.seconds()
        state.evaluated_step = state.step
        self.metrics.write(state.step, {f"held_out_{k}": v for k, v in found.items()} | {"elapsed": state.seconds})
        bits = f" | Bits/byte: {found['bits_per_byte']:.4f}" if "bits_per_byte" in found else ""
        self.display.say(f"Step {state.step} | Held-out loss: {found['loss']:.4f}{bits}")
        self.keeper.settle()  # a best that could not be saved is none to compare with
        if not math.isfinite(found["loss"]):
            self.display.say(f"warning: the held-out loss after step {state.step} is not finite, so never the best")
        elif state.best_loss is None or found["loss"] < state.best_loss:
            state.best_step, state.best_loss = state.step, found["loss"]
            self.keeper.save(best_loss=found["loss"])

    def plot(self) -> None:
        """Draw loss.png from what metrics.jsonl holds."""
        title = f"{self.run_dir.name}: training and held-out loss"
        plot_losses(
            self.run_dir / "metrics.jsonl", self.run_dir / "loss.png", title=title, bits_per_nat=self.bits_per_nat
        )
