"""Reads this rank's rows; those of the next step are read while a step runs."""

import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future

import torch

from swamla import distributed
from swamla.data.dataset import Rows
from swamla.data.packing import Batch

_POLL_SECONDS = 0.1


class Feed:
    """Reads rows one step ahead in a daemon thread, for which no exit waits. A step is known by its first sample.

    batch_size: rows of the steps that are asked for from now on; rows read ahead for another size are read anew.
    """

    def __init__(self, rows: Rows, batch_size: int, device: torch.device) -> None:
        self._rows, self.batch_size, self._pinned = rows, batch_size, device.type == "cuda"
        self._coming: dict[tuple[int, int], Future[Batch]] = {}

    def wait(self, sample: int, interrupted: Callable[[], bool]) -> bool:
        """Wait for the rows of the step that begins at `sample` until `interrupted`; True if they are read."""
        coming = self._begin(sample)
        while not coming.done() and not interrupted():
            futures.wait([coming], timeout=_POLL_SECONDS)
        return coming.done()

    def take(self, sample: int, *, another: bool) -> Batch:
        """This rank's rows of the step that begins at `sample`. Raises what reading them raised.

        another: start to read the rows of the step after it.
        """
        coming = self._begin(sample)
        self._coming.clear()
        batch = coming.result()
        if another:
            self._begin(sample + self.batch_size)
        return batch

    def _begin(self, sample: int) -> "Future[Batch]":
        step = (sample, self.batch_size)
        if step not in self._coming:
            self._coming = {step: self._read(*step, after=list(self._coming.values()))}
        return self._coming[step]

    def _read(self, sample: int, batch_size: int, after: "list[Future[Batch]]") -> "Future[Batch]":
        """after: what is still being read, but no longer wanted; a source is read by one thread at a time."""
        future: Future[Batch] = Future()
        share = batch_size // distributed.world_size()

        def read() -> None:
            futures.wait(after)
            try:
                batch = self._rows.batch(sample + distributed.rank() * share, share)
                future.set_result(pinned(batch) if self._pinned else batch)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=read, name=f"rows from {sample}", daemon=True).start()
        return future


def pinned(batch: Batch) -> Batch:
    """The batch in pinned memory, from which a GPU copies while it computes."""
    return Batch(*(rows.pin_memory() for rows in (batch.tokens_BT, batch.labels_BT, batch.document_BT)))
