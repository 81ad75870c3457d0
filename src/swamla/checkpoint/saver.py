"""Asynchronous saving: the state is copied, and a thread writes the copy while training continues."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from swamla.checkpoint.folder import ALONE, WriterGroup, list_checkpoints, mark_best, prune, save_checkpoint, step_of
from swamla.checkpoint.shards import LocalTensors, Shard, local_tensors
from swamla.errors import SwamlaError

WRITE_ERRORS = (SwamlaError, OSError, SafetensorError)  # failures of the disk, as opposed to bugs


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The result of a save. error: None if the checkpoint is complete. best: it has the lowest held-out loss so far."""

    step: int
    best: bool
    error: Exception | None


class Saver:
    """Writes checkpoints, marks the best, and prunes old ones.

    background: `save` returns once the state is copied to CPU memory, and a thread writes it. One save runs at a time;
    the next one waits for it. The memory of the copies is reused, and is pinned for tensors on a GPU.
    best: the (step, loss) already in best.json. writers: the processes that save together.
    interval: also keep the newest checkpoint at a multiple of it, however many are saved for other reasons.
    say: prints the failure of a save whose result was never requested.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        background: bool = False,
        best: tuple[int, float] | None = None,
        interval: int | None = None,
        writers: WriterGroup = ALONE,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.best = best  # of the complete checkpoints
        self._directory, self._keep_last, self._background = directory, keep_last, background
        self._interval, self._writers, self._say = interval, writers, say
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._copies = _Copies()

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best_loss: float | None = None,
    ) -> None:
        """Save the current state, or start to. best_loss: its held-out loss, if that is the lowest so far."""
        self._wait()
        main = self._writers.rank == 0
        local = {group: local_tensors(named, main=main) for group, named in tensors.items()}
        if not self._background:
            self._write(step, local, state, best_loss)
            return
        copies = self._copies.of(local)
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, dict(state), best_loss), name=f"save-{step}", daemon=True
        )
        self._thread.start()

    def mark(self, step: int, loss: float) -> None:
        """Mark an existing checkpoint as the best."""
        self._wait()
        self._record(step, lambda: self._mark_and_prune((step, loss)), best=True)

    def saved(self, *, wait: bool = False) -> list[Saved]:
        """The results of the saves that finished since the last call, in order. wait: wait for a running save first.

        Raises an error that is a bug, not a failure of the disk.
        """
        if self._thread is not None and (wait or not self._writers.any(self._thread.is_alive())):
            self._wait()
        if self._thread is not None:
            return []
        found, self._saved = self._saved, []
        for one in found:
            if one.error is not None and not isinstance(one.error, WRITE_ERRORS):
                raise one.error
        return found

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self, step: int, tensors: Mapping[str, LocalTensors], state: Mapping[str, Any], best_loss: float | None
    ) -> None:
        def work() -> None:
            save_checkpoint(self._directory, step, tensors=tensors, state=state, writers=self._writers)
            self._mark_and_prune(None if best_loss is None else (step, best_loss))

        self._record(step, work, best=best_loss is not None)

    def _record(self, step: int, work: Callable[[], None], *, best: bool) -> None:
        """Run `work` and record its result or error, which a thread would lose."""
        error = None
        try:
            work()
        except Exception as caught:
            error = caught
        self._saved.append(Saved(step=step, best=best, error=error))

    def _mark_and_prune(self, best: tuple[int, float] | None) -> None:
        """Mark the best checkpoint and prune, on the main process; errors raise on all processes."""
        kept = best or self.best

        def work() -> None:
            if best is not None:
                mark_best(self._directory, *best)
            pinned = [] if kept is None else [kept[0]]
            steps = map(step_of, list_checkpoints(self._directory))
            regular = [step for step in steps if self._interval and step % self._interval == 0]
            prune(self._directory, keep_last=self._keep_last, pinned=[*pinned, *regular[-1:]])

        self._writers.together(lambda: work() if self._writers.rank == 0 else None)
        self.best = kept

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for a running save, except after Ctrl-C; an unfinished save leaves older checkpoints intact."""
        if isinstance(error, KeyboardInterrupt):
            return
        self._wait()
        for one in self._saved:
            if one.error is not None:
                self._say(f"warning: the checkpoint of step {one.step} was not saved: {one.error}")


class _Copies:
    """Copies of the saved tensors, in reused CPU memory."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def of(self, tensors: Mapping[str, LocalTensors]) -> dict[str, dict[str, Tensor | Shard]]:
        """Copies of all tensors; tied tensors stay tied."""
        copies = {group: dict(zip(named, self._group(group, named), strict=True)) for group, named in tensors.items()}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # wait for the asynchronous copies
        return copies

    def _group(self, group: str, named: LocalTensors) -> list[Tensor | Shard]:
        done: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
        found: list[Tensor | Shard] = []
        for name, one in named.items():
            tensor = one.tensor if isinstance(one, Shard) else one
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if key not in done or not tensor.numel():
                done[key] = self._copy((group, name), tensor)
            copy = done[key]
            found.append(Shard(tensor=copy, shape=one.shape, offset=one.offset) if isinstance(one, Shard) else copy)
        return found

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[key] = memory
        return memory.copy_(tensor, non_blocking=True)
