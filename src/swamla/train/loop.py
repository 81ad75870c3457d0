"""The training loop, read top-down: `train` is the run, `_train` its loop; the optimizer's step is in step.py."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from swamla import distributed
from swamla.data.dataset import Dataset
from swamla.data.packing import Batch
from swamla.errors import FailedElsewhere, Interrupted, SwamlaError
from swamla.faults import fault
from swamla.hub.push import require_hub
from swamla.train.backends import describe
from swamla.train.claims import Claim
from swamla.train.config import RunConfig
from swamla.train.plot import plot_losses
from swamla.train.precision import autocast
from swamla.train.run import Evaluate, Run, in_progress
from swamla.train.run_folder import open_run
from swamla.train.saving import (
    Diverged,
    finish_saves,
    give_up,
    save,
    save_before,
    save_if_due,
    save_last,
    score_best_again,
)
from swamla.train.spikes import checkpoint_to_go_back_to
from swamla.train.state import TrainState, generator_states, set_generator_states
from swamla.train.step import StepResult, training_step
from swamla.train.tracking.trackers import require_trackers

__all__ = ["Diverged", "Evaluate", "train"]


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
    run_dir, console = Path(run_dir), console or Console()
    require_trackers(config.train)
    require_hub(config.train.hf_repo_id)
    with (
        open_run(config, run_dir, dataset=dataset, resume=resume, claim=claim) as (config, state),
        in_progress(config, run_dir, state, dataset, evaluate, console, resumed=resume) as run,
    ):
        _announce(run, resumed=resume)
        score_best_again(run)
        if on_start is not None:
            generators = generator_states()
            on_start(state)
            set_generator_states(generators)  # whatever it drew, the run is the same
        _train(run)
    return state


def _announce(run: Run, *, resumed: bool) -> None:
    """Print every choice once, so that none is silent."""
    state, settings = run.state, run.settings
    parameters = sum(p.numel() for p in state.model.parameters())
    where = f", resumed after step {state.step}" if resumed else ""
    run.say(f"{parameters:,} parameters, {state.precision} on {state.device}{where}")
    run.say(f"backends: {describe(state.backends)}")
    for note in state.notes:
        run.say(note)
    run.say(f"mfu is relative to {run.log.peak.name}")
    planned = (settings.steps or 0) * settings.batch_size * settings.block_size
    if planned and not settings.curriculum and (described := run.epochs.describe(planned)):
        run.say(f"{settings.steps} steps are {described}")
    if resumed and run.progress(0.5) >= 1:
        spent = [f"{state.step} of {settings.steps} steps"] if settings.steps else [f"{state.step} steps"]
        spent += [f"{state.seconds / 60:.1f} of {settings.max_minutes:g} minutes"] if settings.max_minutes else []
        run.say(f"the run is finished: {', '.join(spent)}; more steps or max_minutes go on with it")


def _train(run: Run) -> None:
    """Step until the budget is spent or somebody asks to stop; then evaluate, if nobody did, and save."""
    state = run.state
    run.look_ahead()
    while _goes_on(run):
        _step(run)
        finish_saves(run)
        run.profiling.step()
        run.hub.attend()
        if evaluated := _evaluation_is_due(run):
            _evaluate(run)
        if save_if_due(run) or evaluated:
            run.look_ahead()  # time has passed, in which somebody may have asked to stop
    if not run.next_step.stop and state.evaluated_step != state.step:
        _evaluate(run)
    save_last(run)
    if described := run.epochs.describe(state.tokens):
        run.say(f"after step {state.step}: {described}")
    distributed.on_main(lambda: _plot(run))
    run.look_ahead()
    if run.next_step.stop:
        name, where = signal.Signals(run.next_step.stop).name, f"after step {state.step}; all is saved in {run.folder}"
        raise Interrupted(f"stopped by {name} {where}", run.stop.exit_status)


def _goes_on(run: Run) -> bool:
    """Whether there is another step. Its rows may have to be waited for, which a request to stop ends."""
    run.waiting_since = time.monotonic()
    while not run.next_step.stop and run.progress(0.5) < 1:  # in the middle of the next step
        if not run.next_step.missing:
            return True
        run.watch.begin(f"the rows of step {run.state.step + 1}", limited=run.next_step.step_seconds > 0)
        run.look_ahead(wait=True)
        run.watch.end()
    return False


def _step(run: Run) -> None:
    """Take one training step, count it, log it. The time that its rows were waited for is a part of it."""
    state, settings, begin = run.state, run.settings, run.waiting_since
    run.watch.begin(f"step {state.step + 1}", limited=True)
    fault("begin", state.step + 1)
    this, batch = run.next_step, _rows(run)
    lr = settings.rate(state.step, this.seconds + this.step_seconds)
    _tell_length(run, batch)
    result = training_step(state, batch, settings, lr, this.labels)
    fault("update", state.step + 1)
    state.step += 1
    state.sample += settings.batch_size
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
    # A spike before any checkpoint stays a step like any other, but max_skipped of them in a row end the run.
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if spike else 0
    if distributed.is_main():
        run.log.write(result, lr=lr, flops=this.flops, seconds=run.next_step.step_seconds)
    for completed in run.epochs.completed(before, state.tokens):
        run.say(f"{completed}, after step {state.step}")
    if spike:
        _end_if_too_many(run, "had a loss spike")


def _rows(run: Run) -> Batch:
    """This rank's rows of the next step. If a rank could not read its own, all save before its error ends the run."""
    if run.next_step.batch is not None:
        return run.next_step.batch
    save_before(run, run.own_error)
    raise run.own_error or FailedElsewhere("another rank could not read its rows", SwamlaError.exit_status)


def _tell_length(run: Run, batch: Batch) -> None:
    """Say when the curriculum changes the sequence length."""
    length = batch.tokens_BT.shape[1]
    if length != run.length:
        run.say(f"sequence length {length} from step {run.state.step + 1}, {run.state.tokens:,} tokens")
        run.length = length


def _skip(run: Run, result: StepResult) -> None:
    """Count a step whose gradient was not finite; too many in a row end the run."""
    state = run.state
    state.skipped += 1
    state.skipped_in_a_row += 1
    run.records.write(state.step, {"skipped": state.skipped, "grad_norm": result.grad_norm})
    run.say(f"warning: step {state.step} skipped, gradient norm {result.grad_norm} ({state.skipped} so far)")
    _end_if_too_many(run, "had no finite gradient")


def _end_if_too_many(run: Run, what: str) -> None:
    """End a run in which so many steps in a row were for nothing."""
    most = run.settings.max_skipped
    if run.state.skipped_in_a_row >= most:
        give_up(run, f"{most} steps in a row, up to step {run.state.step}, {what}")


def _is_spike(run: Run, result: StepResult) -> bool:
    """Whether the loss is a spike; one that is not enters the running mean."""
    factor, usual = run.settings.spike_factor, run.state.usual
    spike = factor is not None and usual.exceeds(result.loss, factor)
    if not spike:
        usual.note(result.loss)
    return spike


def _roll_back(run: Run, result: StepResult) -> bool:
    """After a spike: go back to the weights of the last checkpoint, and on with the rows after those of this step.

    The state is saved at once, so that a resumed run goes on from there too. Steps and time go on counting. Returns
    False, with nothing changed, where there is no checkpoint to go back to.
    """
    state, loss = run.state, f"loss {result.loss:.4f} in step {run.state.step}, usual is {run.state.usual}"
    finish_saves(run, wait=True)
    checkpoint = distributed.on_main(lambda: checkpoint_to_go_back_to(run.checkpoints, run.settings.save_interval))
    if checkpoint is None:
        run.say(f"warning: {loss}: there is no checkpoint yet to go back to")
        return False
    first = state.go_back(checkpoint)
    rows = {"first": first, "last": state.sample - 1}
    run.records.write(state.step, {"spike": result.loss, "rolled_back_to": checkpoint.step, "rows": rows})
    run.say(
        f"warning: {loss}: weights are those of step {checkpoint.step} again, rows {first} to {state.sample - 1} "
        "are left behind"
    )
    _end_if_too_many(run, "had a loss spike")
    run.saved_step = None  # though the step was saved: the state is another one now
    save(run)
    run.look_ahead()  # again: tokens went back, by which the curriculum goes
    return True


def _evaluation_is_due(run: Run) -> bool:
    """By the number of steps, or by the time since the last evaluation."""
    settings, state = run.settings, run.state
    by_step = settings.eval_interval is not None and state.step % settings.eval_interval == 0
    by_time = settings.eval_seconds is not None and state.seconds - state.evaluated_at >= settings.eval_seconds
    return by_step or by_time


def _evaluate(run: Run) -> None:
    """Evaluate, log, and save the state if it is the best so far."""
    if run.evaluate is None:
        return
    state = run.state
    run.watch.begin(f"the evaluation after step {state.step}")
    try:
        with state.evaluated_weights(), autocast(state.precision, state.device):
            found = run.evaluate(state.model)
            state.strategy.reshard()
    except Exception as error:  # as of held-out text that cannot be read any more
        if distributed.world_size() == 1:  # elsewhere the others are in the middle of it
            save_before(run, error)
        raise
    fault("evaluation", state.step)
    state.seconds = state.evaluated_at = run.seconds()
    state.evaluated_step = state.step
    run.records.write(state.step, {f"held_out_{k}": v for k, v in found.items()} | {"elapsed": state.seconds})
    bits = f" | Bits/byte: {found['bits_per_byte']:.4f}" if "bits_per_byte" in found else ""
    run.say(f"Step {state.step} | Held-out loss: {found['loss']:.4f}{bits}")
    finish_saves(run)  # a best that could not be saved is none to compare with
    if not math.isfinite(found["loss"]):
        run.say(f"warning: the held-out loss after step {state.step} is not finite, so never the best")
    elif state.best_loss is None or found["loss"] < state.best_loss:
        state.best_step, state.best_loss = state.step, found["loss"]
        save(run, best_loss=found["loss"])


def _plot(run: Run) -> None:
    """Draw loss.png from what metrics.jsonl holds."""
    title = f"{run.folder.name}: training and held-out loss"
    plot_losses(run.folder / "metrics.jsonl", run.folder / "loss.png", title=title, bits_per_nat=run.bits_per_nat)
