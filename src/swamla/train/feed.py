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
    """Reads rows one step ahead in a daemon thread, for which no exit waits. A step is named by its first sample."""

    def __init__(self, rows: Rows, batch_size: int, device: torch.device) -> None:
        self._rows, self._batch_size, self._pinned = rows, batch_size, device.type == "cuda"
        self._share = batch_size // distributed.world_size()
        self._coming: dict[int, Future[Batch]] = {}

    def wait(self, sample: int, interrupted: Callable[[], bool]) -> bool:
        """Wait for the rows of the step that begins at `sample` until `interrupted`; True if they are read."""
        self._begin(sample)
        while not self._coming[sample].done() and not interrupted():
            futures.wait([self._coming[sample]], timeout=_POLL_SECONDS)
        return self._coming[sample].done()

    def take(self, sample: int, *, another: bool) -> Batch:
        """This rank's rows of the step that begins at `sample`. Raises what reading them raised.

        another: start to read the rows of the step after it.
        """
        self._begin(sample)
        batch = self._coming.pop(sample).result()
        if another:
            self._begin(sample + self._batch_size)
        return batch

    def _begin(self, sample: int) -> None:
        if sample not in self._coming:
            self._coming = {sample: self._read(sample)}

    def _read(self, sample: int) -> "Future[Batch]":
        future: Future[Batch] = Future()

        def read() -> None:
            try:
                batch = self._rows.batch(sample + distributed.rank() * self._share, self._share)
                future.set_result(pinned(batch) if self._pinned else batch)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=read, name=f"rows from {sample}", daemon=True).start()
        return future


def pinned(batch: Batch) -> Batch:
    """The batch in pinned memory, from which a GPU copies while it computes."""
    return Batch(*(rows.pin_memory() for rows in (batch.tokens_BT, batch.labels_BT, batch.document_BT)))
