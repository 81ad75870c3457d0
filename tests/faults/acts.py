"""What the processes of a trial do. They are forked from a process that has imported this module and run nothing."""

import io
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # building a model takes it, which takes two seconds
from rich.console import Console

from swamla.errors import SwamlaError
from swamla.train import loop, train
from tests.train.helpers import held_out, tiny_config, tiny_dataset

loop.plot_losses = lambda *args, **options: None  # most of a tiny run's time


def play(act: Callable[..., None], args: tuple[Any, ...], env: dict[str, str], log: str) -> None:
    """Run `act` as the command line would: an error is one line and its exit status; both streams go to `log`."""
    os.environ.update(env)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True)
    warnings.simplefilter("default")
    torch.set_num_threads(1)
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

    options: settings, of the training; twist, a function that is called before with those settings and may change
    what it likes.
    """
    settings = {"accumulation": 2, "steps": 12, "save_interval": 2, "eval_interval": 4} | options.get("settings", {})
    twist = options.get("twist")
    if twist is not None:
        twist(settings)
    folder, dataset = Path(run_dir), tiny_dataset(Path(data))
    train(
        tiny_config(**settings),
        folder,
        dataset=dataset,
        evaluate=held_out(dataset),
        resume=(folder / "config.json").exists(),
        console=Console(file=sys.stdout, width=200),
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
