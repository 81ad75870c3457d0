"""Pushing a run's checkpoints while it trains; nothing that happens on the way to the hub can disturb it."""

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

PUSH_SECONDS = 3600.0  # for a push while training goes on
END_SECONDS = 900.0  # for the last one, when the run is done
STOP_SECONDS = 20.0  # for the last one when the run was asked to stop: something waits for the process to end
_POLL_SECONDS = 0.05
_STAGING = ".to-hub"

Say = Callable[[str], None]


def require_hub(repo_id: str) -> None:
    """Raise, before anything is done, where a push to `repo_id` could not even be tried; "" is no repository."""
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
    """The pushes of a run while it is entered, one at a time, each a process of its own.

    What is wanted while one is under way waits, and of several only the newest: a push takes what the run's folder has
    when it begins. One that fails or takes too long is told once; the next begins as ever, the last at the end.
    """

    def __init__(
        self, repo_id: str, run_dir: Path, *, private: bool, say: Say, stop_requested: Callable[[], bool]
    ) -> None:
        """repo_id: USER/NAME, or "" to push nothing. stop_requested: true once the end must not be long in coming."""
        self._repo_id, self._run_dir, self._private, self._say = repo_id, run_dir, private, say
        self._stop_requested = stop_requested
        self._staging = run_dir / _STAGING
        self._wanted = self._warned = False
        self._process: subprocess.Popen[bytes] | None = None
        self._step, self._deadline = 0, 0.0

    def push(self) -> None:
        """Push what the folder has now, or as soon as the push under way is done."""
        self._wanted = bool(self._repo_id)
        self.attend()

    def attend(self) -> None:
        """Note what became of a push, begin the next; it never waits."""
        if self._process is not None:
            late = time.monotonic() > self._deadline
            if self._process.poll() is None and not late:
                return
            self._conclude(late)
        if self._wanted:
            self._wanted = False
            self._begin(PUSH_SECONDS)

    def _begin(self, seconds: float) -> None:
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
                start_new_session=True,  # Ctrl-C is the trainer's to answer
                env={"HF_HUB_DISABLE_TELEMETRY": "1", **os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )
            self._deadline = time.monotonic() + seconds
        except (OSError, SwamlaError, ValueError, KeyError) as error:
            self._failed(f"{type(error).__name__}: {error}")

    def _conclude(self, late: bool) -> None:
        """Tell what became of the push under way, which is over or ended here."""
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
        """Warn, once for failures in a row."""
        if not self._warned:
            what = f"warning: Hugging Face Hub: nothing pushed to {self._repo_id} ({reason})"
            self._say(f"{what}; the run goes on, and it is tried again with the next best and at the end")
        self._warned = True

    def _discard(self) -> None:
        """Remove what was staged; its files live on in the run."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def _wait(self, end_seconds: float) -> None:
        """Give the push under way that long; less as soon as there is stop_requested."""
        begin = time.monotonic()
        while self._process is not None and self._process.poll() is None:
            allowed = min(end_seconds, STOP_SECONDS) if self._stop_requested() else end_seconds
            if time.monotonic() - begin > allowed:
                self._deadline = begin  # long over
                break
            time.sleep(_POLL_SECONDS)
        if self._process is not None:
            self._conclude(self._process.poll() is None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Push the last state of a run that ended well or was stopped; of one that failed nothing new."""
        if not self._repo_id:
            return
        seconds = END_SECONDS if error is None else STOP_SECONDS
        try:
            self._wait(seconds)
            if error is None or isinstance(error, Interrupted):
                self._begin(seconds)
                self._wait(seconds)
        finally:  # a second Ctrl-C comes through here
            if self._process is not None:
                _kill(self._process)
            self._discard()


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
