"""Make the next batches while the model works on this one."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    """Stands behind the last item."""


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items in the same order, up to `depth` of them made ahead by a thread.

    An error surfaces in the place of the item that raised it. Closing the iterator stops the thread.
    """
    source = iter(items)
    end = _End()
    pool = ThreadPoolExecutor(1, thread_name_prefix="swamla-prefetch")
    ahead: deque[Future[Item | _End]] = deque(pool.submit(next, source, end) for _ in range(depth))
    try:
        while not isinstance(item := ahead.popleft().result(), _End):
            ahead.append(pool.submit(next, source, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
