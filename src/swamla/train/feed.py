"""This rank's rows of each step, those of the next one prepared while a step runs."""

import threading
from concurrent.futures import Future

import torch

from swamla import distributed
from swamla.data.dataset import Rows
from swamla.data.packing import Batch


class Feed:
    """Rows by the sample at which a step begins, read one step ahead by a thread that no exit waits for."""

    def __init__(self, rows: Rows, batch_size: int, device: torch.device) -> None:
        self._rows, self._batch_size, self._pinned = rows, batch_size, device.type == "cuda"
        self._share = batch_size // distributed.world_size()
        self._coming: dict[int, Future[Batch]] = {}

    def take(self, sample: int, *, another: bool) -> Batch:
        """This rank's rows of the step that begins at `sample`. Raises what reading them did.

        another: whether to read those of the step after it.
        """
        coming = self._coming.pop(sample, None) or self._read(sample)
        self._coming.clear()
        batch = coming.result()
        if another:
            self._coming[sample + self._batch_size] = self._read(sample + self._batch_size)
        return batch

    def _read(self, sample: int) -> "Future[Batch]":
        future: Future[Batch] = Future()

        def read() -> None:
            try:
                batch = self._rows.batch(sample + distributed.rank() * self._share, self._share)
                future.set_result(_pinned(batch) if self._pinned else batch)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=read, name=f"rows from {sample}", daemon=True).start()
        return future


def _pinned(batch: Batch) -> Batch:
    """The batch in memory from which a GPU can copy while it computes."""
    return Batch(*(rows.pin_memory() for rows in (batch.tokens_BT, batch.labels_BT, batch.document_BT)))
