"""What is kept of a run: its checkpoints, and what becomes of the run when one cannot be saved."""

import math
from collections.abc import Callable
from pathlib import Path

from swamla import distributed
from swamla.checkpoint import Saved, Saver, latest_checkpoint, list_checkpoints, step_name, whole_checkpoint
from swamla.errors import FailedElsewhere, SwamlaError
from swamla.hub import Pushes
from swamla.model.language_model import LanguageModel
from swamla.train.changes import measure
from swamla.train.config import TrainConfig
from swamla.train.precision import autocast
from swamla.train.rank_watch import RankWatch
from swamla.train.state import TrainState
from swamla.train.trackers import Records
from swamla.train.tracking import Display


class Diverged(SwamlaError):
    """Training that cannot go on because its numbers are no longer finite."""

    exit_status = 1


class Keeper:
    """Saves the state, sees what became of the saves, and tells the hub of the best.

    folder: of the checkpoints. seconds: how long the run has taken so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        state: TrainState,
        saver: Saver,
        *,
        metrics: Records,
        display: Display,
        hub: Pushes,
        watch: RankWatch,
        seconds: Callable[[], float],
    ) -> None:
        self.config, self.folder, self.state, self.saver = config, folder, state, saver
        self.metrics, self.display, self.hub, self.watch, self.seconds = metrics, display, hub, watch, seconds
        existing = list_checkpoints(folder) if state.step else []
        self.saved_step = state.step if existing else None
        self.unsaved: Exception | None = None  # why the newest save failed

    def is_due(self) -> bool:
        """By the number of steps; never amid skipped steps, so that the last checkpoint of a run that ends is good."""
        interval, state = self.config.save_interval, self.state
        return interval is not None and state.step % interval == 0 and state.skipped_in_a_row == 0

    def save(self, best_loss: float | None = None) -> None:
        """Save this moment, which is the best if it has a `best_loss`, unless that is done already."""
        state = self.state
        if self.saved_step == state.step:
            if best_loss is not None:
                self.saver.mark(state.step, best_loss)
                self.settle()
            return
        if not state.weights_are_finite():
            self.give_up(f"the weights after step {state.step} are not finite, so they are not saved")
        self.watch.begin(f"the save after step {state.step}")
        state.seconds = self.seconds()
        self.metrics.sync()
        self.saver.save(state.step, tensors=state.tensors(), state=state.plain(), best_loss=best_loss)
        self.saved_step = state.step
        self.settle()

    def score_best_again(self, evaluate: Callable[[LanguageModel], dict[str, float]]) -> None:
        """Where evaluations are now of other text than those by which the best was found, put it in their terms."""
        state, now = self.state, measure(self.config)
        best, before, state.scored_by = state.best, state.scored_by, now
        if best is None or before == now:
            return
        step, loss = best
        found = self._score(step, evaluate)
        changed = ", ".join(f"{name} {before.get(name)} → {value}" for name, value in now.items())
        said = f"the best so far, of step {step}, scored anew ({changed}): {loss:.4f} → {found['loss']:.4f}"
        if math.isfinite(found["loss"]):
            state.best_loss = found["loss"]
            self.metrics.write(state.step, {"best_step": step} | {f"best_held_out_{k}": v for k, v in found.items()})
            self.saver.mark(step, found["loss"])
            self.settle(wait=True)
        else:
            said += ", so the best is sought anew"
            state.best_step = state.best_loss = self.saver.best = None
            distributed.on_main(lambda: (self.folder / "best.json").unlink(missing_ok=True))
        self.display.say(said)
        self.saved_step = None  # what it was scored by is part of the state, also of a run that has no step left

    def _score(self, step: int, evaluate: Callable[[LanguageModel], dict[str, float]]) -> dict[str, float]:
        """The evaluation of the weights that a checkpoint holds; of a damaged one the loss is not a number."""
        state = self.state
        self.watch.begin(f"the evaluation of step {step}")
        checkpoint = distributed.on_main(lambda: whole_checkpoint(self.folder / step_name(step)))
        if checkpoint is None:
            return {"loss": math.nan}
        with state.judged_at(checkpoint), autocast(state.precision, state.device):
            found = evaluate(state.model)
            state.spread.let_go()
        return found

    def save_again(self) -> None:
        """Save this moment though its step was saved: the state is another one now."""
        self.saved_step = None
        self.save()

    def save_last(self) -> None:
        """Save the end of the run, and wait; a failure is raised whatever was asked for: all would be for nothing."""
        self.save()
        self.settle(wait=True)
        if self.unsaved is not None:
            raise self.unsaved

    def settle(self, *, wait: bool = False) -> None:
        """See what became of the saves, of all of them with `wait`: one that failed ends the run, if it is to."""
        for saved in self.saver.saved(wait=wait):
            self._tell(saved)
            if self.unsaved is not None and self.config.on_save_error == "stop":
                raise self.unsaved

    def _tell(self, saved: Saved) -> None:
        """Of a save that is done. One that failed is never the best, and is tried again."""
        state, self.unsaved = self.state, saved.error
        if saved.error is None:
            if saved.best:
                self.hub.push()
            return
        if self.config.on_save_error == "continue":
            self.display.say(f"warning: the checkpoint of step {saved.step} was not saved: {saved.error}")
        if self.saved_step == saved.step:
            self.saved_step = None
        if state.best_step == saved.step:
            state.best_step, state.best_loss = self.saver.best or (None, None)

    def give_up(self, reason: str) -> None:
        """Stop a run that diverged, naming what can be taken up again."""
        for saved in self.saver.saved(wait=True):
            self._tell(saved)
        good = latest_checkpoint(self.folder)
        where = f"the last good checkpoint is {good.path}" if good else "there is no checkpoint yet"
        if distributed.is_main():
            raise Diverged(f"{reason}; {where}; try a lower lr, now {self.config.lr}")
        raise FailedElsewhere(reason, Diverged.exit_status)
