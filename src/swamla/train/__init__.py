"""Training: the loop, its state, and what watches over it."""

from swamla.train.config import RunConfig, TrainConfig
from swamla.train.loop import Diverged, train
from swamla.train.state import TrainState
from swamla.train.step import StepResult, training_step

__all__ = ["Diverged", "RunConfig", "StepResult", "TrainConfig", "TrainState", "train", "training_step"]
