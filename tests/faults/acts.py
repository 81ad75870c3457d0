"""What the processes of a trial do. They are forked from a process that has imported this module and run nothing."""

import io
import json
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # building a model takes it, which takes two seconds
import torch.distributed.tensor
from rich.console import Console

from swamla import distributed
from swamla.checkpoint import folder as checkpoint_folder
from swamla.data import sources, units
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.preparing import prepare
from swamla.errors import SwamlaError
from swamla.train import loop, train
from tests.train import helpers
from tests.train.helpers import MODEL, held_out, tiny_config, tiny_dataset


def play(act: Callable[..., None], args: tuple[Any, ...], env: dict[str, str], log: str) -> None:
    """Run `act` as the command line would: an error is one line and its exit status; both streams go to `log`."""
    os.environ.update(env)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True)
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    loop.plot_losses = lambda *args, **options: None  # most of a tiny run's time
    try:
        act(*args)
    except SwamlaError as error:
        print(f"swamla: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def train_run(run_dir: str, data: str, options: dict[str, Any]) -> None:
    """Train a tiny model on tiny data, or go on where there is something to go on with.

    options: settings, of the training; twist, a function that is called before and may change what it likes; stream,
    to have the data read while training, by processes.
    """
    settings = {"accumulation": 2, "steps": 12, "save_interval": 2, "eval_interval": 4} | options.get("settings", {})
    options.get("twist", lambda: None)()
    model = replace(MODEL, dropout=settings.pop("dropout", MODEL.dropout))
    folder = Path(run_dir)
    with distributed.started(timeout=60):
        distributed.on_main(lambda: tiny_dataset(Path(data)))
        dataset = _streamed(Path(data)) if options.get("stream") else tiny_dataset(Path(data))
        train(
            tiny_config(model, **settings),
            folder,
            dataset=dataset,
            evaluate=held_out(dataset),
            resume=distributed.on_main((folder / "config.json").exists),
            console=Console(file=sys.stdout, width=200, quiet=not distributed.is_main()),
        )


def _streamed(folder: Path) -> Dataset:
    """Documents in some nine units, which two processes encode."""
    sources.UNIT_BYTES = 4000
    source = folder / "stream.jsonl"
    if not source.exists():
        texts = [f"{i} " + "stream " * (i * 7 % 40) for i in range(240)]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cache = str(folder / "stream-cache")
    config = DataConfig(source=str(source), tokenizer="byte", held_out_fraction=0.2, cache_dir=cache, stream=2)
    return prepare(config, workers=2)


def signal_in_step(number: int, step: int) -> None:
    """Let this process get a signal when a step is half done."""
    real = loop.training_step

    def disturbed(state: Any, *args: Any) -> Any:
        result = real(state, *args)
        if state.step + 1 == step:
            os.kill(os.getpid(), number)
        return result

    loop.training_step = disturbed


def signal_in_evaluation(number: int, step: int) -> None:
    """The same in an evaluation."""
    real = helpers.evaluate_split

    def disturbed(model: Any, *args: Any, **options: Any) -> Any:
        if step_under_way[0] == step:
            os.kill(os.getpid(), number)
        return real(model, *args, **options)

    helpers.evaluate_split = disturbed
    step_under_way = _watch_steps()


def signal_in_save(number: int, step: int) -> None:
    """The same in a save."""
    real = checkpoint_folder._finish

    def disturbed(staging: Path, final: Path, *args: Any) -> None:
        if final.name == f"step-{step:08d}":
            os.kill(os.getpid(), number)
        real(staging, final, *args)

    checkpoint_folder._finish = disturbed


def on_rank(rank: str, twist: Callable[[], None]) -> None:
    """A twist for one rank alone."""
    if os.environ.get("RANK") == rank:
        twist()


def stay_in_step(step: int) -> None:
    """Let this process come to a step and never out of it."""
    real = loop.training_step

    def stuck(state: Any, *args: Any) -> Any:
        while state.step + 1 == step:
            time.sleep(0.1)
        return real(state, *args)

    loop.training_step = stuck


def spoil_gradient(steps: range) -> None:
    """Let this process have a gradient of NaN in these steps."""
    real = loop.training_step

    def spoiled(state: Any, *args: Any) -> Any:
        parameter = next(iter(state.model.parameters()))
        hook = parameter.register_hook(lambda grad: grad * float("nan")) if state.step + 1 in steps else None
        try:
            return real(state, *args)
        finally:
            if hook is not None:
                hook.remove()

    loop.training_step = spoiled


def spoil_loss(step: int) -> None:
    """Let a step's loss be three times as large."""
    real = loop.training_step

    def spoiled(state: Any, *args: Any) -> Any:
        this = state.step + 1
        result = real(state, *args)
        return replace(result, loss=3 * result.loss) if this == step else result

    loop.training_step = spoiled


def kill_workers(step: int) -> None:
    """Kill a process that encodes data when it is asked to, from this step on."""
    real, step_under_way = units.Workers._ask, _watch_steps()

    def dying(self: Any, process: Any, number: int) -> Any:
        if step_under_way[0] >= step:
            process.kill()
        return real(self, process, number)

    units.Workers._ask = dying  # type: ignore[method-assign]


def slow_down(seconds: float) -> None:
    """Let every step take that much longer, so that somebody outside has time to do something."""
    real = loop.training_step

    def slow(state: Any, *args: Any) -> Any:
        time.sleep(seconds)
        return real(state, *args)

    loop.training_step = slow


def _watch_steps() -> list[int]:
    """A box that holds the number of the last step."""
    real, box = loop.training_step, [0]

    def watched(state: Any, *args: Any) -> Any:
        box[0] = state.step + 1
        return real(state, *args)

    loop.training_step = watched
    return box


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
