"""Training: the loop, its state, and what watches over it."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.train.config import RunConfig as RunConfig
    from swamla.train.config import TrainConfig as TrainConfig
    from swamla.train.loop import Diverged as Diverged
    from swamla.train.loop import train as train
    from swamla.train.state import TrainState as TrainState
    from swamla.train.step import StepResult as StepResult
    from swamla.train.step import training_step as training_step
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
