"""Trace a few steps with torch.profiler, and show which operations take the time."""

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from swamla import distributed
from swamla.train.config import TrainConfig

_ROWS, _NAME_WIDTH = 10, 44

Say = Callable[[str], None]


class Profiling:
    """Context in which `profile_steps` training steps are traced after `profile_warmup` others.

    The numbers of the run do not change. The trace is RUN/profile/steps-FIRST-LAST.json.gz, for chrome://tracing,
    Perfetto or TensorBoard. On CUDA allocations are recorded too, so that running out of memory leaves a snapshot.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, device: torch.device, *, first_step: int, say: Say) -> None:
        """first_step: the next step of the run. Does nothing if the config asks for no profile."""
        self._config, self._folder, self._device, self._say = config, run_dir / "profile", device, say
        self._first = first_step + config.profile_warmup
        profiles = config.profile and distributed.is_main()
        self._left = config.profile_warmup + config.profile_steps if profiles else 0
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        if self._left:
            config, cuda = self._config, self._device.type == "cuda"
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence; read when the first profile is created
            self._profile = profile(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda,
                schedule=schedule(wait=0, warmup=config.profile_warmup, active=config.profile_steps, repeat=1),
                on_trace_ready=self._keep,
            )
            self._profile.start()
            if cuda:
                torch.cuda.memory._record_memory_history(max_entries=100_000)
        return self

    def step(self) -> None:
        """To be called after every training step."""
        if self._profile is None:
            return
        self._left -= 1
        self._profile.step()
        if not self._left:
            self._stop()

    def _stop(self) -> None:
        done, self._profile = self._profile, None
        if done is not None:
            done.stop()

    def _keep(self, done: profile) -> None:
        """Write the trace and print the table."""
        taken = self._config.profile_steps - self._left
        if taken <= 0:
            return
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"steps-{self._first}-{self._first + taken - 1}.json"
        done.export_chrome_trace(str(file))
        packed = file.with_suffix(".json.gz")
        with file.open("rb") as plain, gzip.open(packed, "wb", compresslevel=5) as stream:
            shutil.copyfileobj(plain, stream)
        file.unlink()
        for line in _table(done, taken, self._device):
            self._say(line)
        self._say(f"profile of {taken} step{'s' * (taken > 1)}: {packed}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None and error is None and self._left >= self._config.profile_steps:
            self._say("warning: no profile: the run ended before its warm-up did; lower `profile_warmup`")
        self._stop()


def _table(done: profile, steps: int, device: torch.device) -> list[str]:
    """The operations with the longest self time, that is without the operations they call."""
    cuda = device.type == "cuda"
    found = [
        ((event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / steps, event.count, event.key)
        for event in done.key_averages()
        if not event.key.startswith("ProfilerStep")
    ]
    total = sum(time for time, _, _ in found)
    where = "GPU" if cuda else "CPU"
    lines = [f"{'operation':<{_NAME_WIDTH}}  {where} ms/step   share  calls/step"]
    for time, count, name in sorted(found, reverse=True)[:_ROWS]:
        name = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
        lines.append(f"{name:<{_NAME_WIDTH}}  {time:11.2f}  {time / max(total, 1e-9):6.1%}  {count / steps:10.0f}")
    return lines
