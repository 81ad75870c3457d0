"""Loss spikes: the running mean that a loss is compared with, and the checkpoint that a run goes back to."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from swamla.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints, load_checkpoint, step_of
from swamla.errors import CorruptError

MEMORY = 100  # steps over which the mean is taken, those further back counting less and less
ENOUGH = 20  # losses without which none is unusual


@dataclass
class UsualLoss:
    """The running mean of about the last hundred losses, in nats per token. count: of the losses seen."""

    mean: float = 0.0
    count: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.4f}"

    def exceeds(self, loss: float, factor: float) -> bool:
        """True for a loss above `factor` times the usual, once that is known well enough."""
        return self.count >= ENOUGH and loss > factor * self.mean

    def note(self, loss: float) -> None:
        """Take in the loss of a step that was no spike."""
        self.count += 1
        self.mean += (loss - self.mean) / min(self.count, MEMORY)

    def plain(self) -> dict[str, Any]:
        """As JSON data; floats come back to the bit."""
        return {"mean": self.mean, "count": self.count}

    @classmethod
    def of(cls, plain: Any) -> Self:
        """Read what `plain` returned; None, from an older checkpoint, gives a new one."""
        match plain:
            case None:
                return cls()
            case {"mean": float(mean), "count": int(count)}:
                return cls(mean, count)
        raise CorruptError(f"state.json: damaged: the usual loss is {plain!r}")


def checkpoint_to_go_back_to(directory: Path, interval: int | None) -> Checkpoint | None:
    """The newest checkpoint at a multiple of `interval`, else the newest one; None where there is none.

    Checkpoints saved because the run was stopped are passed over, so that an interrupted and an uninterrupted run go
    back to the same step.
    """
    regular = [path for path in list_checkpoints(directory) if interval and step_of(path) % interval == 0]
    try:
        return load_checkpoint(regular[-1]) if regular else latest_checkpoint(directory)
    except CorruptError as error:
        warnings.warn(f"damaged checkpoint, trying the one before: {error}", stacklevel=2)
        return latest_checkpoint(directory)
