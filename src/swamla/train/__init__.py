"""Training: the loop, its state, and what watches over it."""

from swamla.train.config import RunConfig, TrainConfig
from swamla.train.loop import Diverged, StepResult, train, training_step
from swamla.train.state import TrainState

__all__ = ["Diverged", "RunConfig", "StepResult", "TrainConfig", "TrainState", "train", "training_step"]
