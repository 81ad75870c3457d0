"""The training loop, top-down: `train` opens and closes the run, `_train` is its loop and decides when it is saved."""

import math
import shlex
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from swamla import distributed
from swamla.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints, load_checkpoint, step_of
from swamla.data.dataset import TrainingData
from swamla.data.packing import Batch
from swamla.errors import CorruptError, FailedElsewhere, Interrupted, SwamlaError
from swamla.faults import fault
from swamla.hub.push import require_hub
from swamla.ops import fla
from swamla.train.backends import describe
from swamla.train.changes import extension
from swamla.train.claims import Claim
from swamla.train.config import RunConfig
from swamla.train.plot import plot_losses
from swamla.train.precision import autocast
from swamla.train.run import Evaluate, Run, in_progress
from swamla.train.run_folder import open_run
from swamla.train.saving import Diverged, finish_saves, raise_diverged, rescore_best, save
from swamla.train.signals import EVALUATION, FINISHING, SAVED, SAVING, STEP
from swamla.train.state import TrainState, generator_states, set_generator_states
from swamla.train.step import StepResult, training_step
from swamla.train.tracking.display import fill, say
from swamla.train.tracking.trackers import require_trackers

MANY = 12  # layers: a deeper model is announced without its pattern

__all__ = ["Diverged", "Evaluate", "train"]


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    dataset: TrainingData,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    console: Console | None = None,
    on_start: Callable[[TrainState], None] | None = None,
    claim: Claim | None = None,
    verbose: bool = False,
) -> TrainState:
    """Train `config.model` on `dataset` in the folder `run_dir`, from the first step or the last checkpoint (`resume`).

    evaluate: called with the model, in the run's precision; returns at least "loss", the held-out loss in nats per
    token. on_start: called once before the first step. claim: the lock on the folder, if the caller has taken it.
    verbose: print measurements too that were made to choose precision and kernels.
    Returns the final state, with the weights of the last step.
    Raises `Interrupted`, after saving, on SIGTERM or SIGHUP (exit 75), Ctrl-C (130) or a closed output (141);
    `Diverged` when `max_skipped` steps in a row had no finite gradient; `OutOfMemory`; and what `require_trackers`,
    `require_hub` and `open_run` raise.
    """
    run_dir, console = Path(run_dir), console or Console()
    require_trackers(config.train)
    require_hub(config.train.hf_repo_id)
    with suppress(OSError):  # a closed output is noticed by the run, which ends as at a signal
        if distributed.is_main():
            say(console, f"building the model, choosing kernels …{fla.patience()}")  # some are measured, for seconds
    with (
        open_run(config, run_dir, dataset=dataset, resume=resume, claim=claim) as (config, state),
        in_progress(config, run_dir, state, dataset, evaluate, console) as run,
    ):
        _announce(run, console, resumed=resume, verbose=verbose)
        rescore_best(run)
        if on_start is not None:
            generators = generator_states()
            on_start(state)
            set_generator_states(generators)  # so random numbers drawn in `on_start` do not change the run
        _train(run)
    return state


def _announce(run: Run, console: Console, *, resumed: bool, verbose: bool) -> None:
    """Print the model's size, the plan, and the choices made for this run; verbose: also what was measured for them."""

    def say(text: str) -> None:
        run.say(fill(console, text, indent=2))

    state, settings = run.state, run.settings
    parameters = sum(p.numel() for p in state.model.parameters())
    where = f", resumed after step {state.step}" if resumed else ""
    pattern = run.config.model.pattern
    layers = f"layers {' '.join(pattern)}" if len(pattern) <= MANY else f"{len(pattern)} layers"
    say(f"model: {parameters:,} parameters, {layers}, {state.precision} on {state.device}{where}")
    say(f"backends: {describe(state.backends)}")
    for note in (*state.notes, *(state.measured if verbose else ())):
        say(note)
    if verbose:
        say(f"mfu is relative to {run.log.peak.name}")
    say(f"plan: {_plan(run)}")
    if resumed and run.progress(0.5) >= 1:
        spent = [f"{state.step} of {settings.steps} steps"] if settings.steps else [f"{state.step} steps"]
        spent += [f"{state.seconds / 60:.1f} of {settings.max_minutes:g} minutes"] if settings.max_minutes else []
        longer = (
            f"--resume {shlex.quote(str(run.folder))} {extension(settings, step=state.step, seconds=state.seconds)}"
        )
        run.say(f"the run is finished: {', '.join(spent)}; to extend it: {longer}")


def _plan(run: Run) -> str:
    """The length of the run, with its passes over the data where they are known."""
    settings = run.settings
    steps, minutes = settings.steps, settings.max_minutes
    limits = [f"at most {minutes:g} minutes"] if minutes else []
    if steps:
        planned = steps * settings.batch_size * settings.block_size
        varies = settings.curriculum or settings.batch_ramp or run.config.data.chat  # labels in a step
        epochs = "" if varies else run.epochs.describe(planned)
        limits.insert(0, f"{steps} steps are {epochs}" if epochs else f"{steps} steps")
    return "; ".join(limits)


def _train(run: Run) -> None:
    """Step until the budget is spent or a stop is requested; evaluate and save on the way and at the end.

    A checkpoint is written every `save_interval` steps and before the last evaluation (here), at a new best held-out
    loss (`_evaluate`), after going back from a loss spike (`_roll_back`), and at the end, a requested stop or an error
    in the data (`_save_last`).
    """
    state = run.state
    run.look_ahead()
    if state.step and state.evaluated_step != state.step and _evaluation_is_due(run):
        _evaluate(run)  # the one that a requested stop ended
        run.look_ahead()
    while _goes_on(run):
        _step(run)
        finish_saves(run)
        run.profiling.step()
        run.hub.attend()
        if evaluate := _evaluation_is_due(run):
            _evaluate(run)
        if save_now := _save_is_due(run):
            save(run)
        if evaluate or save_now:
            run.look_ahead()  # a stop may have been requested meanwhile
    if run.evaluate is not None and not run.next_step.stop and state.evaluated_step != state.step:
        save(run)  # first, as an evaluation may take minutes, in which the machine may be lost
        _evaluate(run)
        if state.best_step != state.step:  # best.json tells a resumed run that the best step was evaluated
            run.saved_step = None
    _save_last(run)
    if described := run.epochs.describe(state.tokens):
        run.say(f"after step {state.step}: {described}")
    distributed.on_main(lambda: _plot(run))
    run.look_ahead()
    if run.next_step.stop:
        name, where = signal.Signals(run.next_step.stop).name, f"after step {state.step}; all is saved in {run.folder}"
        raise Interrupted(f"stopped by {name} {where}", run.stop.exit_status)


def _save_is_due(run: Run) -> bool:
    """True every `save_interval` steps, except after a skipped step: the last checkpoint of a diverging run is good."""
    interval, state = run.settings.save_interval, run.state
    return interval is not None and state.step % interval == 0 and state.skipped_in_a_row == 0


def _save_last(run: Run, error: Exception | None = None) -> None:
    """Save the last state and wait for it. A failed save is raised even with `on_save_error = "continue"`.

    error: what ends the run early, if anything does; it gets a note that says how to resume.
    """
    run.stop.doing = SAVING
    save(run)
    finish_saves(run, wait=True)
    if run.unsaved is not None:
        raise run.unsaved
    run.stop.doing = SAVED
    if error is not None:
        error.add_note(
            f"all is saved after step {run.state.step}: fix the error, then continue with `resume`: {run.folder}"
        )


def _goes_on(run: Run) -> bool:
    """True if there is another step to take. Waits for its rows, until they are read or a stop is requested."""
    run.waiting_since = time.monotonic()
    while not run.next_step.stop and run.progress(0.5) < 1:  # by time, a step runs if its middle is within the budget
        if not run.next_step.missing:
            return True
        run.watch.begin(f"the rows of step {run.state.step + 1}", limited=run.next_step.step_seconds > 0)
        run.look_ahead(wait=True)
        run.watch.end()
    return False


def _step(run: Run) -> None:
    """Take one training step, count it and log it. Its time includes waiting for its rows."""
    state, settings, begin = run.state, run.settings, run.waiting_since
    run.watch.begin(f"step {state.step + 1}", limited=True)
    fault("begin", state.step + 1)
    this, batch = run.next_step, _rows(run)
    ends = this.seconds + this.step_seconds
    lr = settings.rate(state.step, ends) * settings.batch_factor(this.rows)
    progress = settings.progress(state.step, ends)
    _tell_ramps(run, batch)
    result = training_step(state, batch, settings, lr, this.labels, progress)
    fault("update", state.step + 1)
    state.step += 1
    state.sample += this.rows
    before, state.tokens = state.tokens, state.tokens + (result.tokens if result.finite else 0)
    run.look_ahead(step_begun=begin)
    state.seconds = run.next_step.seconds
    run.watch.end()
    if not result.finite:
        _skip(run, result)
        return
    spike = _is_spike(run, result)
    if spike and _roll_back(run, result):
        return
    # Before the first checkpoint the update of a spike is kept, but max_skipped spikes in a row end the run.
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if spike else 0
    if distributed.is_main():
        run.log.write(result, lr=lr, flops=this.flops, seconds=run.next_step.step_seconds)
    for completed in run.epochs.completed(before, state.tokens):
        run.say(f"{completed}, after step {state.step}")
    if spike:
        _end_if_too_many(run, "had a loss spike")


def _rows(run: Run) -> Batch:
    """This rank's rows of the next step. If any rank could not read its rows, all ranks save, then the run ends."""
    if run.next_step.batch is not None:
        return run.next_step.batch
    run.watch.end()
    if run.state.step:
        _save_last(run, run.own_error)
    raise run.own_error or FailedElsewhere("another rank could not read its rows", SwamlaError.exit_status)


def _tell_ramps(run: Run, batch: Batch) -> None:
    """Report a change of the sequence length by the curriculum, and of the rows of a step."""
    length, rows = batch.tokens_BT.shape[1], run.next_step.rows
    where = f"from step {run.state.step + 1}, {run.state.tokens:,} tokens"
    if length != run.length:
        run.say(f"sequence length {length} {where}")
    if rows != run.rows:
        run.say(f"{rows} row{'s' * (rows > 1)} a step {where}")
    run.length, run.rows = length, rows


def _skip(run: Run, result: StepResult) -> None:
    """Count a step without a finite gradient; `max_skipped` in a row end the run."""
    state = run.state
    state.skipped += 1
    state.skipped_in_a_row += 1
    run.records.write(state.step, {"skipped": state.skipped, "grad_norm": result.grad_norm})
    run.say(f"warning: step {state.step} skipped, gradient norm {result.grad_norm} ({state.skipped} so far)")
    _end_if_too_many(run, "had no finite gradient")


def _end_if_too_many(run: Run, what: str) -> None:
    """End the run after `max_skipped` such steps in a row."""
    most = run.settings.max_skipped
    if run.state.skipped_in_a_row >= most:
        raise_diverged(run, f"{most} steps in a row, up to step {run.state.step}, {what}")


def _is_spike(run: Run, result: StepResult) -> bool:
    """True if the loss is a spike; otherwise it enters the running mean."""
    factor, usual = run.settings.spike_factor, run.state.usual
    spike = factor is not None and usual.exceeds(result.loss, factor)
    if not spike:
        usual.note(result.loss)
    return spike


def _roll_back(run: Run, result: StepResult) -> bool:
    """After a spike: restore the weights of the last checkpoint and continue with the rows after this step's.

    Steps and time keep counting. The new state is saved at once, so that a resumed run continues from it. Returns
    False, with nothing changed, if there is no checkpoint yet.
    """
    state, loss = run.state, f"loss {result.loss:.4f} in step {run.state.step}, usual is {run.state.usual}"
    finish_saves(run, wait=True)
    checkpoint = distributed.on_main(lambda: _checkpoint_before_spike(run))
    if checkpoint is None:
        run.say(f"warning: {loss}: there is no checkpoint yet to go back to")
        return False
    first = state.go_back(checkpoint)
    rows = {"first": first, "last": state.sample - 1}
    run.records.write(state.step, {"spike": result.loss, "rolled_back_to": checkpoint.step, "rows": rows})
    run.say(
        f"warning: {loss}: restored the weights of step {checkpoint.step}; rows {first} to {state.sample - 1} "
        "are not trained on again"
    )
    _end_if_too_many(run, "had a loss spike")
    run.saved_step = None  # a save of this step, if any, holds the state before going back
    save(run)
    run.look_ahead()  # the token count went back, which may change the curriculum's sequence length
    return True


def _checkpoint_before_spike(run: Run) -> Checkpoint | None:
    """The newest checkpoint at a multiple of `save_interval`, else the newest one; None if there is none.

    Checkpoints written because the run was stopped are passed over, so that an interrupted and an uninterrupted run
    go back to the same step.
    """
    directory, interval = run.checkpoints, run.settings.save_interval
    regular = [path for path in list_checkpoints(directory) if interval and step_of(path) % interval == 0]
    try:
        return load_checkpoint(regular[-1]) if regular else latest_checkpoint(directory)
    except CorruptError as error:
        warnings.warn(f"damaged checkpoint, trying the one before: {error}", stacklevel=2)
        return latest_checkpoint(directory)


def _evaluation_is_due(run: Run) -> bool:
    """True every `eval_interval` steps, and `eval_seconds` after the last evaluation."""
    settings, state = run.settings, run.state
    by_step = settings.eval_interval is not None and state.step % settings.eval_interval == 0
    by_time = settings.eval_seconds is not None and state.seconds - state.evaluated_at >= settings.eval_seconds
    return by_step or by_time


def _evaluate(run: Run) -> None:
    """Evaluate and log; save the state as the best if its held-out loss is the lowest so far.

    On one process a requested stop ends it, and a resumed run does it again; several would have to agree.
    """
    if run.evaluate is None:
        return
    state = run.state
    run.watch.begin(f"the evaluation after step {state.step}")
    try:
        with state.evaluated_weights(), autocast(state.precision, state.device), _ended_by_stop(run):
            found = run.evaluate(state.model)
            state.strategy.reshard()
    except _StopRequested:
        run.watch.end()
        return
    except Exception as error:  # e.g. the held-out text can no longer be read
        if distributed.world_size() == 1 and state.step:  # saving takes all ranks, and the others are evaluating
            run.watch.end()
            _save_last(run, error)
        raise
    fault("evaluation", state.step)
    state.seconds = state.evaluated_at = run.seconds()
    state.evaluated_step = state.step
    run.records.write(state.step, {f"held_out_{k}": v for k, v in found.items()} | {"elapsed": state.seconds})
    bits = f" | Bits/byte: {found['bits_per_byte']:.4f}" if "bits_per_byte" in found else ""
    right = f" | Accuracy: {found['accuracy']:.4f}" if "accuracy" in found else ""
    averaged = " | averaged weights" if state.average is not None else ""
    run.say(f"Step {state.step} | Held-out loss: {found['loss']:.4f}{bits}{right}{averaged}")
    finish_saves(run)  # first, because a best whose save failed no longer counts
    if not math.isfinite(found["loss"]):
        run.say(f"warning: the held-out loss after step {state.step} is not finite, so it cannot be the best")
    elif state.best_loss is None or found["loss"] < state.best_loss:
        state.best_step, state.best_loss = state.step, found["loss"]
        save(run, best_loss=found["loss"])


class _StopRequested(Exception):
    """A stop was requested during an evaluation."""


@contextmanager
def _ended_by_stop(run: Run) -> Iterator[None]:
    """On one process, raise `_StopRequested` at the first forward pass after a stop was requested."""

    def check(*_: Any) -> None:
        if run.stop.received:
            raise _StopRequested

    alone = distributed.world_size() == 1
    run.stop.doing = EVALUATION if alone else FINISHING
    hook = run.state.model.blocks[0].register_forward_pre_hook(check) if alone else None
    try:
        yield
    finally:
        if hook:
            hook.remove()
        run.stop.doing = STEP


def _plot(run: Run) -> None:
    """Draw loss.png from metrics.jsonl."""
    title = f"{run.folder.name}: training and held-out loss"
    plot_losses(run.folder / "metrics.jsonl", run.folder / "loss.png", title=title)
