"""When a run is saved, and what happens when a save fails."""

import math

from swamla import distributed
from swamla.checkpoint import Saved, latest_checkpoint, step_name, whole_checkpoint
from swamla.errors import FailedElsewhere, SwamlaError
from swamla.train.changes import measure
from swamla.train.precision import autocast
from swamla.train.run import Evaluate, Run


class Diverged(SwamlaError):
    """Training that cannot go on because its numbers are no longer finite."""

    exit_status = 1


def save_if_due(run: Run) -> bool:
    """By the number of steps; never amid skipped steps, so that the last checkpoint of a run that ends is good.

    Returns whether it was due.
    """
    interval, state = run.settings.save_interval, run.state
    due = interval is not None and state.step % interval == 0 and state.skipped_in_a_row == 0
    if due:
        save(run)
    return due


def save(run: Run, best_loss: float | None = None) -> None:
    """Save this moment, which is the best if it has a `best_loss`, unless that is done already."""
    state = run.state
    if run.saved_step == state.step:
        if best_loss is not None:
            run.saver.mark(state.step, best_loss)
            finish_saves(run)
        return
    if not state.weights_are_finite():
        give_up(run, f"the weights after step {state.step} are not finite, so they are not saved")
    run.watch.begin(f"the save after step {state.step}")
    state.seconds = run.seconds()
    run.records.sync()
    run.saver.save(state.step, tensors=state.tensors(), state=state.plain(), best_loss=best_loss)
    run.saved_step = state.step
    finish_saves(run)


def save_last(run: Run) -> None:
    """Save the end of the run, and wait. A failure is raised whatever `on_save_error` says: the work would be lost."""
    save(run)
    finish_saves(run, wait=True)
    if run.unsaved is not None:
        raise run.unsaved


def save_before(run: Run, error: Exception | None) -> None:
    """Save before `error` ends the run, and note that in it; None where the error is another rank's."""
    run.watch.end()
    if run.state.step:
        save_last(run)
    if error is not None and run.state.step:
        again = f"mend it, and go on with --resume {run.folder}"
        error.add_note(f"all is saved after step {run.state.step}: {again}")


def finish_saves(run: Run, *, wait: bool = False) -> None:
    """Handle finished saves, with `wait` all of them. A failed one ends the run if `on_save_error` says so."""
    for saved in run.saver.saved(wait=wait):
        _note(run, saved)
        if run.unsaved is not None and run.settings.on_save_error == "stop":
            raise run.unsaved


def _note(run: Run, saved: Saved) -> None:
    """Note a finished save. One that failed is never the best, and is tried again."""
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


def give_up(run: Run, reason: str) -> None:
    """Stop a run that diverged, naming the checkpoint to resume from."""
    for saved in run.saver.saved(wait=True):
        _note(run, saved)
    good = distributed.on_main(lambda: latest_checkpoint(run.checkpoints))  # which reads all of it
    where = f"the last good checkpoint is {good.path}" if good else "there is no checkpoint yet"
    if distributed.is_main():
        raise Diverged(f"{reason}; {where}; try a lower lr, now {run.settings.lr}")
    raise FailedElsewhere(reason, Diverged.exit_status)


def score_best_again(run: Run) -> None:
    """Score the best checkpoint again where evaluations now read other text than when it was found."""
    if run.evaluate is None:
        return
    state, now = run.state, measure(run.settings)
    best, before, state.scored_by = state.best, state.scored_by, now
    if best is None or before == now:
        return
    step, loss = best
    found = _score(run, step, run.evaluate)
    changed = ", ".join(f"{name} {before.get(name)} → {value}" for name, value in now.items())
    said = f"the best so far, of step {step}, scored anew ({changed}): {loss:.4f} → {found['loss']:.4f}"
    if math.isfinite(found["loss"]):
        state.best_loss = found["loss"]
        run.records.write(state.step, {"best_step": step} | {f"best_held_out_{k}": v for k, v in found.items()})
        run.saver.mark(step, found["loss"])
        finish_saves(run, wait=True)
    else:
        said += ", so the best is sought anew"
        state.best_step = state.best_loss = run.saver.best = None
        distributed.on_main(lambda: (run.checkpoints / "best.json").unlink(missing_ok=True))
    run.say(said)
    run.saved_step = None  # what it was scored by is part of the state, also of a run that has no step left


def _score(run: Run, step: int, evaluate: Evaluate) -> dict[str, float]:
    """Evaluate the weights of a checkpoint; the loss is NaN for a damaged one."""
    state = run.state
    run.watch.begin(f"the evaluation of step {step}")
    checkpoint = distributed.on_main(lambda: whole_checkpoint(run.checkpoints / step_name(step)))
    if checkpoint is None:
        return {"loss": math.nan}
    with state.judged_at(checkpoint), autocast(state.precision, state.device):
        found = evaluate(state.model)
        state.strategy.reshard()
    return found
