"""The ranks that write a checkpoint together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from swamla import distributed
from swamla.checkpoint import WriterGroup
from swamla.errors import SwamlaError

T = TypeVar("T")


def writer_group() -> WriterGroup:
    """The processes that write this run's checkpoints."""
    return _RankWriters() if distributed.world_size() > 1 else WriterGroup()


class _RankWriters(WriterGroup):
    """All ranks write a checkpoint together, over a process group of their own, since a thread may do it."""

    def __init__(self) -> None:
        self.rank = distributed.rank()
        self._group = torch.distributed.new_group(backend="gloo")

    def together(self, work: Callable[[], T]) -> list[T]:
        found: list[Any] = [None] * distributed.world_size()
        error = mine = None
        try:
            mine = work()
        except Exception as caught:
            error = caught
        torch.distributed.all_gather_object(found, (mine, None if error is None else str(error)), group=self._group)
        if error is not None:
            raise error
        for number, (_, message) in enumerate(found):
            if message is not None:
                raise SwamlaError(f"rank {number}: {message}")
        return [result for result, _ in found]

    def any(self, flag: bool) -> bool:
        return bool(distributed.highest(flag))
