"""A run's records: metrics.jsonl always, TensorBoard and Weights & Biases if configured.

Only metrics.jsonl may stop a run. A tracker that fails is reported once and then dropped; training does not wait for it
and is the same to the bit.
"""

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from swamla import distributed
from swamla.errors import MissingBackendError, SwamlaError
from swamla.files import write_text_atomically
from swamla.train.config import TrainConfig
from swamla.train.tracking import wandb_follower
from swamla.train.tracking.metrics import Metrics

END_SECONDS = 30.0  # for a tracker to finish when a run is done
STOP_SECONDS = 5.0  # when the run was stopped or failed, and the process should end soon

Say = Callable[[str], None]


def require_trackers(config: TrainConfig) -> None:
    """Raise `MissingBackendError`, with the install command, for a configured tracker that is not installed."""
    wanted = {
        "tensorboard": ("tensorboard", config.tensorboard),
        "wandb_project": ("wandb", bool(config.wandb_project)),
    }
    for setting, (package, asked) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise MissingBackendError(f"train.{setting}: {package} is not installed: pip install 'swamla[tracking]'")


class Records:
    """The records of a run, as a context manager. This base class, for ranks other than the main one, discards them."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a record."""

    def sync(self) -> None:
        """Flush all records to the disk, before the checkpoint of the same step is written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        return


class _WrittenRecords(Records):
    """The records of the main rank. Leaving the context waits a bounded time for the trackers."""

    def __init__(self, config: TrainConfig, run_dir: Path, *, first_step: int, say: Say) -> None:
        """first_step: the first step that will be recorded."""
        self._say = say
        self._metrics = Metrics(run_dir / "metrics.jsonl")
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            self._tensorboard = self._try(lambda: TensorBoard(run_dir / "tensorboard", first_step=first_step))
        if config.wandb_project and os.environ.get("WANDB_MODE") != "disabled":
            self._wandb = WeightsAndBiases(config.wandb_project, config.wandb_run_name, run_dir, say=say)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._metrics.write(step, values)
        if self._wandb is not None:
            self._wandb.listen()
        tensorboard = self._tensorboard
        if tensorboard is not None and self._try(lambda: tensorboard.write(step, values)) is None:
            self._tensorboard = None

    def sync(self) -> None:
        self._metrics.sync()
        tensorboard = self._tensorboard
        if tensorboard is not None and self._try(tensorboard.flush) is None:
            self._tensorboard = None

    def _try(self, action: Callable[[], Any]) -> Any:
        """The result of a TensorBoard `action`; None after a failure, which is reported."""
        try:
            return action()
        except Exception as error:
            self._say(f"warning: TensorBoard failed ({type(error).__name__}: {error}); training continues without it")
            return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._metrics.close()
        if self._tensorboard is not None:
            self._try(self._tensorboard.close)
        if self._wandb is not None:
            status = error.exit_status if isinstance(error, SwamlaError) else int(error is not None)
            self._wandb.close(status)


def make_records(config: TrainConfig, run_dir: Path, *, first_step: int, say: Say) -> Records:
    """The records of a run: written by the main rank, discarded by the others."""
    if distributed.is_main():
        return _WrittenRecords(config, run_dir, first_step=first_step, say=say)
    return Records()


class TensorBoard:
    """TensorBoard event files: one scalar for each number of a record."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """first_step: TensorBoard hides events from this step on that an earlier process wrote."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, Any]) -> bool:
        """Add a record's numbers."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        return True

    def flush(self) -> bool:
        """Flush all events."""
        self._writer.flush()
        return True

    def close(self) -> bool:
        """Close the file."""
        self._writer.close()
        return True


class WeightsAndBiases:
    """Starts and ends the process that sends the run's metrics.jsonl to Weights & Biases; see `wandb_follower`."""

    def __init__(self, project: str, name: str, run_dir: Path, *, say: Say) -> None:
        self._say, self._run_dir, self._heard = say, run_dir, b""
        command = [sys.executable, "-P", wandb_follower.__file__, str(run_dir), project, name, run_id(run_dir)]
        self._process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the trainer handles Ctrl-C
            env={"WANDB_ERROR_REPORTING": "false", **os.environ},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    def listen(self) -> None:
        """Print the messages that the process has written so far."""
        with contextlib.suppress(BlockingIOError):  # nothing more to read
            while text := os.read(self._stdout.fileno(), 4096):
                self._heard += text
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._say(line.decode(errors="replace"))

    def close(self, status: int) -> None:
        """Send the run's exit status and give the process a bounded time to finish."""
        seconds = END_SECONDS if status == 0 else STOP_SECONDS
        with contextlib.suppress(BrokenPipeError):  # the process failed, and has reported it
            self._stdin.write(f"{status}\n".encode())
            self._stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            where = self._run_dir / "wandb"
            self._say(f"warning: Weights & Biases took more than {seconds:g} s to end; its files are in {where}")
        self.listen()
        self._stdout.close()


def run_id(run_dir: Path) -> str:
    """The run's id at Weights & Biases: drawn once, then stored in the run's folder."""
    file = run_dir / "wandb" / "run_id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_text_atomically(file, secrets.token_hex(6))  # not from seeded generators: every run has its own
    return file.read_text(encoding="utf-8")
