"""The speed of a config's training steps on this machine, measured before a run."""

import time

import torch

from swamla.data.dataset import TrainingData
from swamla.train.config import RunConfig
from swamla.train.run_folder import fresh_state, resolve_vocabulary
from swamla.train.step import training_step

WARM_UP, STEPS, SECONDS = 1, 3, 6.0  # steps that are not timed, and that are, unless they take longer in all


def tokens_per_second(config: RunConfig, dataset: TrainingData) -> float:
    """Tokens a second of the config's training steps, by the shortest of a few; its weights are thrown away."""
    generators = torch.random.get_rng_state()
    state = fresh_state(resolve_vocabulary(config, dataset), dataset)
    batch = dataset.rows(config.train.block_size, config.train.seed).batch(0, config.train.batch_size)
    seconds: list[float] = []
    begin = time.monotonic()
    while len(seconds) < WARM_UP + STEPS and (len(seconds) <= WARM_UP or time.monotonic() - begin < SECONDS):
        started = time.monotonic()
        training_step(state, batch, config.train, lr=0.0)
        seconds.append(time.monotonic() - started)
    torch.random.set_rng_state(generators)
    return batch.n_labels / min(seconds[WARM_UP:])
