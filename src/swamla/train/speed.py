"""The speed of configs' training steps on this machine, measured before a run, or of several in turns."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from swamla.data.dataset import TrainingData
from swamla.train.config import RunConfig
from swamla.train.run_folder import fresh_state, resolve_vocabulary
from swamla.train.step import training_step

WARM_UP, STEPS, SECONDS = 1, 3, 6.0  # steps that are not timed, and that are, unless they take longer in all


def step_seconds(
    configs: Mapping[str, RunConfig], dataset: TrainingData, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each config's training steps, timed in turns, A B A B …, so that a slower machine slows them all.

    rounds: at most so many, and at least one.  seconds: after which no further round starts. One step of each is not
    timed. All models are held at once; their weights are thrown away.
    """
    generators = torch.random.get_rng_state()
    steps = {name: _step_of(config, dataset) for name, config in configs.items()}
    begin = time.monotonic()
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(max(1, rounds)):
        if number and time.monotonic() - begin >= seconds:
            break
        for name, step in steps.items():
            found[name].append(_timed(step))
    torch.random.set_rng_state(generators)
    return found


def _step_of(config: RunConfig, dataset: TrainingData) -> Callable[[], object]:
    """A training step that changes nothing, on the first rows of the data."""
    state = fresh_state(resolve_vocabulary(config, dataset), dataset)
    batch = dataset.rows(config.train.block_size, config.train.seed).batch(0, config.train.batch_size)
    return partial(training_step, state, batch, config.train, lr=0.0)


def _timed(step: Callable[[], object]) -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    begin = time.monotonic()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic() - begin


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
