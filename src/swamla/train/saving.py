"""How a run is saved: one checkpoint, what becomes of it, and the mark of the best. When, is decided in loop.py."""

import math
from typing import NoReturn

from swamla import distributed
from swamla.checkpoint import Saved, latest_checkpoint, step_name, whole_checkpoint
from swamla.errors import FailedElsewhere, SwamlaError
from swamla.train.changes import SCORED_BY_DEFAULT, scoring_of
from swamla.train.precision import autocast
from swamla.train.run import Evaluate, Run

REMEDY = "try a lower lr"  # in the message of every run that diverged, and of no other


class Diverged(SwamlaError):
    """Training that cannot go on because its numbers are no longer finite."""

    exit_status = 1


def save(run: Run, best_loss: float | None = None) -> None:
    """Save the current state, unless its step is saved already. best_loss: marks the step as the best so far.

    Weights that are not finite are never saved: they end the run.
    """
    state = run.state
    if run.saved_step == state.step:
        if best_loss is not None:
            run.saver.mark(state.step, best_loss)
            finish_saves(run)
        return
    if not state.weights_are_finite():
        raise_diverged(run, f"the weights after step {state.step} are not finite, so they are not saved")
    run.watch.begin(f"the save after step {state.step}")
    state.seconds = run.seconds()
    run.records.sync()
    run.saver.save(state.step, tensors=state.tensors(), state=state.plain(), best_loss=best_loss)
    run.saved_step = state.step
    finish_saves(run)


def finish_saves(run: Run, *, wait: bool = False) -> None:
    """Handle finished saves; `wait` waits for all of them. With `on_save_error = "stop"` raises a save's error."""
    for saved in run.saver.saved(wait=wait):
        _note(run, saved)
        if run.unsaved is not None and run.settings.on_save_error == "stop":
            raise run.unsaved


def _note(run: Run, saved: Saved) -> None:
    """Push a new best to the hub. A failed save is reported, is not the best, and leaves its step to be saved again."""
    state, run.unsaved = run.state, saved.error
    if saved.error is None:
        if saved.best:
            run.hub.push()
        return
    if run.settings.on_save_error == "continue":
        run.say(f"warning: the checkpoint of step {saved.step} was not saved: {saved.error}")
    if run.saved_step == saved.step:
        run.saved_step = None
    if state.best_step == saved.step:
        state.best_step, state.best_loss = run.saver.best or (None, None)


def raise_diverged(run: Run, reason: str) -> NoReturn:
    """End a run that diverged: raise `Diverged`, which names the checkpoint to resume from."""
    for saved in run.saver.saved(wait=True):
        _note(run, saved)
    good = distributed.on_main(lambda: latest_checkpoint(run.checkpoints))  # which reads all of it
    where = f"the last good checkpoint is {good.path}" if good else "there is no checkpoint yet"
    if distributed.is_main():
        raise Diverged(f"{reason}; {where}; {REMEDY}, now {run.settings.lr}")
    raise FailedElsewhere(reason, Diverged.exit_status)


def rescore_best(run: Run) -> None:
    """Evaluate the best checkpoint again if a resumed run evaluates on other text than when it was found.

    Otherwise new losses would be compared with one of another text.
    """
    if run.evaluate is None:
        return
    state, now = run.state, scoring_of(run.settings)
    best, before, state.scored_by = state.best, state.scored_by, now
    # What a checkpoint does not name is newer than it, and was at its default.
    before = SCORED_BY_DEFAULT | before
    changes = [f"{name} {before[name]} → {value}" for name, value in now.items() if before[name] != value]
    if best is None or not changes:
        return
    step, loss = best
    found = _evaluate_checkpoint(run, step, run.evaluate)
    changed = ", ".join(changes)
    message = f"evaluated the best checkpoint, step {step}, again ({changed}): {loss:.4f} → {found['loss']:.4f}"
    if math.isfinite(found["loss"]):
        state.best_loss = found["loss"]
        run.records.write(state.step, {"best_step": step} | {f"best_held_out_{k}": v for k, v in found.items()})
        run.saver.mark(step, found["loss"])
        finish_saves(run, wait=True)
    else:
        message += ", so the next evaluation sets a new best"
        state.best_step = state.best_loss = run.saver.best = None
        distributed.on_main(lambda: (run.checkpoints / "best.json").unlink(missing_ok=True))
    run.say(message)
    run.saved_step = None  # `scored_by` is part of the state, so it is saved even if no step is left


def _evaluate_checkpoint(run: Run, step: int, evaluate: Evaluate) -> dict[str, float]:
    """Evaluate the weights of a checkpoint; the loss is NaN for a damaged one."""
    state = run.state
    run.watch.begin(f"the evaluation of step {step}")
    checkpoint = distributed.on_main(lambda: whole_checkpoint(run.checkpoints / step_name(step)))
    if checkpoint is None:
        return {"loss": math.nan}
    with state.weights_of(checkpoint), autocast(state.precision, state.device):
        found = evaluate(state.model)
        state.strategy.reshard()
    return found
