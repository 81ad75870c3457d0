"""Saving while the run goes on: what is saved is copied, and written by a thread."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from swamla.checkpoint.folder import ALONE, WriterGroup, mark_best, prune, save_checkpoint
from swamla.checkpoint.pieces import Held, Piece, held_here
from swamla.errors import SwamlaError

UNWRITTEN = (SwamlaError, OSError, SafetensorError)  # what the world does to a save, and not a mistake of ours


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What became of a save: `error` if it failed, else the checkpoint of `step` is in place. best: it is the best."""

    step: int
    best: bool
    error: Exception | None


class Saver:
    """Writes checkpoints, marks the best and lets go of those that are no longer kept, in this order, always.

    background: return from `save` as soon as everything is copied to the CPU's memory, and write in a thread. One save
    is under way at most: the next waits for it. The copies are kept for the next save, in pinned memory where they come
    from a GPU. best: the (step, loss) that is marked already. writers: the processes that save together.
    say: told of a save that failed when nobody asked any more.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        background: bool = False,
        best: tuple[int, float] | None = None,
        writers: WriterGroup = ALONE,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.best = best  # of what is in place
        self._directory, self._keep_last, self._background = directory, keep_last, background
        self._writers, self._say = writers, say
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
        """Begin to save this moment, or save it; best_loss: its held-out loss, where that makes it the best."""
        self._wait()
        main = self._writers.rank == 0
        held = {group: held_here(named, main=main) for group, named in tensors.items()}
        if not self._background:
            self._write(step, held, state, best_loss)
            return
        copies = self._copies.of(held)
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, dict(state), best_loss), name=f"save-{step}", daemon=True
        )
        self._thread.start()

    def mark(self, step: int, loss: float) -> None:
        """Make a checkpoint that was saved already the best."""
        self._wait()
        self._keep(step, lambda: self._settle((step, loss)), best=True)

    def saved(self, *, wait: bool = False) -> list[Saved]:
        """What became of the saves since this was last asked, in their order; wait: of all of them.

        Raises what was a mistake of ours.
        """
        if self._thread is not None and (wait or not self._writers.any(self._thread.is_alive())):
            self._wait()
        if self._thread is not None:
            return []
        found, self._saved = self._saved, []
        for one in found:
            if one.error is not None and not isinstance(one.error, UNWRITTEN):
                raise one.error
        return found

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, held: Mapping[str, Held], state: Mapping[str, Any], best_loss: float | None) -> None:
        def work() -> None:
            save_checkpoint(self._directory, step, tensors=held, state=state, writers=self._writers)
            self._settle(None if best_loss is None else (step, best_loss))

        self._keep(step, work, best=best_loss is not None)

    def _keep(self, step: int, work: Callable[[], None], *, best: bool) -> None:
        """Do `work` and note what became of it, whatever it was: in a thread nobody else would hear of it."""
        error = None
        try:
            work()
        except Exception as caught:
            error = caught
        self._saved.append(Saved(step=step, best=best, error=error))

    def _settle(self, best: tuple[int, float] | None) -> None:
        """What is done once a checkpoint is in place, by the main process; all know whether it was."""
        kept = best or self.best

        def work() -> None:
            if best is not None:
                mark_best(self._directory, *best)
            prune(self._directory, keep_last=self._keep_last, pinned=() if kept is None else (kept[0],))

        self._writers.together(lambda: work() if self._writers.rank == 0 else None)
        self.best = kept

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what is under way, unless the user wants to leave at once: what is in place is whole anyway."""
        if isinstance(error, KeyboardInterrupt):
            return
        self._wait()
        for one in self._saved:
            if one.error is not None:
                self._say(f"warning: the checkpoint of step {one.step} was not saved: {one.error}")


class _Copies:
    """Copies on the CPU of what is saved, made again into the same memory each time."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def of(self, held: Mapping[str, Held]) -> dict[str, dict[str, Tensor | Piece]]:
        """Copies of all of it; tensors that are one stay one."""
        copies = {group: dict(zip(named, self._group(group, named), strict=True)) for group, named in held.items()}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies are on their way
        return copies

    def _group(self, group: str, named: Held) -> list[Tensor | Piece]:
        done: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
        found: list[Tensor | Piece] = []
        for name, one in named.items():
            tensor = one.tensor if isinstance(one, Piece) else one
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if key not in done or not tensor.numel():
                done[key] = self._copy((group, name), tensor)
            copy = done[key]
            found.append(Piece(tensor=copy, shape=one.shape, offset=one.offset) if isinstance(one, Piece) else copy)
        return found

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[key] = memory
        return memory.copy_(tensor, non_blocking=True)
