"""Push a run's checkpoints during training, in a separate process, so that failures do not affect the run."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from swamla.errors import Interrupted, MissingBackendError, SwamlaError, UsageError
from swamla.hub import pusher
from swamla.hub.staging import stage

PUSH_SECONDS = 3600.0  # for a push during training
END_SECONDS = 900.0  # for the last push of a finished run
STOP_SECONDS = 20.0  # for the last push of a run that was stopped
_POLL_SECONDS = 0.05
_STAGING = ".to-hub"

Say = Callable[[str], None]


def require_hub(repo_id: str) -> None:
    """Raise early if a push to `repo_id` cannot work: no huggingface_hub, or no token. Nothing is checked for ""."""
    if not repo_id:
        return
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingBackendError("train.hf_repo_id: huggingface_hub is not installed: pip install 'swamla[hub]'")
    if not os.environ.get("HF_TOKEN"):
        raise UsageError(
            "train.hf_repo_id: pushing needs HF_TOKEN in the environment, a token with write access "
            "(https://huggingface.co/settings/tokens)"
        )


class Pushes:
    """Pushes a run to the hub, as a context manager: one push at a time, each in a separate process.

    A push has the state of the run's folder at its start; requests during a push are merged into one that follows it.
    A push that fails or takes too long is reported once and does not prevent later ones. The exit pushes a last time.
    """

    def __init__(
        self, repo_id: str, run_dir: Path, *, private: bool, say: Say, stop_requested: Callable[[], bool]
    ) -> None:
        """repo_id: USER/NAME, or "" to push nothing. stop_requested: True once the run was asked to stop."""
        self._repo_id, self._run_dir, self._private, self._say = repo_id, run_dir, private, say
        self._stop_requested = stop_requested
        self._staging = run_dir / _STAGING
        self._requested = self._warned = False
        self._process: subprocess.Popen[bytes] | None = None
        self._step, self._deadline = 0, 0.0

    def push(self) -> None:
        """Push the folder now, or after the running push."""
        self._requested = bool(self._repo_id)
        self.attend()

    def attend(self) -> None:
        """Handle a finished push, and start a requested one, without waiting."""
        if self._process is not None:
            late = time.monotonic() > self._deadline
            if self._process.poll() is None and not late:
                return
            self._finish(late)
        if self._requested:
            self._requested = False
            self._start(PUSH_SECONDS)

    def _start(self, seconds: float) -> None:
        try:
            self._discard()
            self._step = stage(self._run_dir, self._staging, self._repo_id)
            visibility = "private" if self._private else "public"
            command = [sys.executable, "-P", pusher.__file__, str(self._staging), self._repo_id, visibility]
            self._process = subprocess.Popen(
                [*command, f"Step {self._step}", str(seconds)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # the trainer handles Ctrl-C
                env={"HF_HUB_DISABLE_TELEMETRY": "1", **os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )
            self._deadline = time.monotonic() + seconds
        except (OSError, SwamlaError, ValueError, KeyError) as error:
            self._failed(f"{type(error).__name__}: {error}")

    def _finish(self, late: bool) -> None:
        """Report the push, which has ended or, if late, is killed here."""
        process, self._process = self._process, None
        assert process
        if late:
            _kill(process)
        output, _ = process.communicate()
        self._discard()
        try:
            answer: dict[str, Any] = json.loads(output)
        except ValueError:
            answer = {"error": "it took too long" if late else f"its process ended with status {process.returncode}"}
        if "error" in answer:
            self._failed(answer["error"])
        else:
            self._warned = False
            self._say(f"Hugging Face Hub: step {self._step} is in {answer['url']} (commit {answer['commit'][:12]})")

    def _failed(self, reason: str) -> None:
        """Warn, but only of the first of consecutive failures."""
        if not self._warned:
            what = f"warning: Hugging Face Hub: nothing pushed to {self._repo_id} ({reason})"
            self._say(f"{what}; the run continues and retries at the next best and at the end")
        self._warned = True

    def _discard(self) -> None:
        """Remove the staging folder; its files are links to the run's."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def _wait(self, end_seconds: float) -> None:
        """Wait for the running push, at most `end_seconds`, or STOP_SECONDS once a stop is requested."""
        begin = time.monotonic()
        while self._process is not None and self._process.poll() is None:
            allowed = min(end_seconds, STOP_SECONDS) if self._stop_requested() else end_seconds
            if time.monotonic() - begin > allowed:
                self._deadline = begin  # in the past
                break
            time.sleep(_POLL_SECONDS)
        if self._process is not None:
            self._finish(self._process.poll() is None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Push the last state of a run that finished or was stopped, but not of one that failed."""
        if not self._repo_id:
            return
        seconds = END_SECONDS if error is None else STOP_SECONDS
        try:
            self._wait(seconds)
            if error is None or isinstance(error, Interrupted):
                self._start(seconds)
                self._wait(seconds)
        finally:  # also after a second Ctrl-C
            if self._process is not None:
                _kill(self._process)
            self._discard()


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
