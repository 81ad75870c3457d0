"""Prefetching changes when items are made, and nothing else."""

import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest

from swamla.data.prefetch import prefetch


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("swamla-prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_items_come_in_order_and_the_thread_ends(depth: int) -> None:
    assert list(prefetch(range(20), depth)) == list(range(20))
    assert list(prefetch([], depth)) == []
    assert workers() == []


def test_an_error_surfaces_in_its_place() -> None:
    def failing() -> Iterator[int]:
        yield from range(3)
        raise KeyError("shard")

    items = prefetch(failing(), 5)
    assert list(islice(items, 3)) == [0, 1, 2]
    with pytest.raises(KeyError, match="shard"):
        next(items)
    assert workers() == []


def test_closing_an_endless_iterator_stops_its_thread() -> None:
    items = prefetch(count(), 3)
    assert next(items) == 0
    assert workers()
    items.close()  # type: ignore[attr-defined]
    assert workers() == []


def test_it_works_ahead_by_its_depth_and_no_further() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    items = prefetch(source(), 2)
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert len(made) <= 3
