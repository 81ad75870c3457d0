"""Rows are read one step ahead, each once; and what ranks must know alike costs one exchange a step."""

import json
import os
import resource
import signal
import threading
import time
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

from swamla import distributed
from swamla.checkpoint import latest_checkpoint
from swamla.errors import DataError, Interrupted
from swamla.train import loop
from swamla.train.feed import Feed
from tests.waiting import PATIENCE, until

from .helpers import run, tiny_config, tiny_dataset
from .ranks import on_ranks

CPU = torch.device("cpu")


class Rows:
    """The rows of a dataset, which notes what was read, and by which thread; some samples cannot be."""

    def __init__(self, rows, bad=()):
        self.rows, self.bad, self.read, self.threads = rows, bad, [], set()

    def batch(self, first, count):
        self.read.append((first, count))
        self.threads.add(threading.current_thread())
        if first in self.bad:
            raise DataError(f"no row {first}")
        return self.rows.batch(first, count)


def read_by(rows, *expected, patience=PATIENCE):
    """Wait for the thread that reads ahead."""
    end = time.monotonic() + patience
    while rows.read != list(expected) and time.monotonic() < end:
        time.sleep(0.005)
    return rows.read == list(expected)


def test_the_rows_of_the_next_step_are_read_while_this_one_runs(dataset):
    rows = Rows(dataset.rows(32, 0))
    feed = Feed(rows, 4, CPU)
    first = feed.take(8, another=True)
    assert read_by(rows, (8, 4), (12, 4))
    second = feed.take(12, another=False)
    time.sleep(0.05)
    assert rows.read == [(8, 4), (12, 4)]  # each once, and none after the last step
    assert threading.current_thread() not in rows.threads
    for batch, sample in ((first, 8), (second, 12)):
        assert torch.equal(batch.tokens_BT, dataset.rows(32, 0).batch(sample, 4).tokens_BT)


def test_rows_for_a_gpu_are_pinned_by_the_thread_that_reads_them(dataset, monkeypatch):
    threads = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: threads.append(threading.current_thread()) or self)
    Feed(dataset.rows(32, 0), 4, torch.device("cuda")).take(0, another=False)
    assert len(threads) == 3
    assert threading.current_thread() not in threads


def test_other_rows_than_those_read_ahead_are_read_anew(dataset):
    rows = Rows(dataset.rows(32, 0))
    feed = Feed(rows, 4, CPU)
    feed.take(0, another=True)
    assert read_by(rows, (0, 4), (4, 4))
    batch = feed.take(20, another=False)
    assert torch.equal(batch.tokens_BT, dataset.rows(32, 0).batch(20, 4).tokens_BT)


def test_rows_that_cannot_be_read_are_an_error_only_of_the_step_that_needs_them(dataset):
    feed = Feed(Rows(dataset.rows(32, 0), bad=(4,)), 4, CPU)
    assert feed.take(0, another=True).tokens_BT.shape == (4, 32)
    with pytest.raises(DataError, match="no row 4"):
        feed.take(4, another=True)


def test_waiting_for_rows_ends_with_an_interruption_and_goes_on_later(dataset):
    rows, come = Rows(dataset.rows(32, 0)), threading.Event()
    plain = rows.batch
    rows.batch = lambda *where: come.wait() and plain(*where)
    feed = Feed(rows, 4, CPU)
    assert not feed.wait(0, lambda: True)
    come.set()
    assert feed.wait(0, lambda: False)
    assert torch.equal(feed.take(0, another=False).tokens_BT, dataset.rows(32, 0).batch(0, 4).tokens_BT)
    assert rows.read == [(0, 4)]


def test_a_run_that_waits_for_rows_saves_at_once_when_it_is_asked_to_stop(tmp_path, dataset, monkeypatch):
    """A stream that stalls, and a SIGTERM meanwhile: what follows is SIGKILL, soon."""
    rows, never = Rows(dataset.rows(32, 0)), threading.Event()
    plain, size = rows.batch, tiny_config().train.batch_size

    def batch(first, count):
        if (first, count) == (3 * size, size):
            os.kill(os.getpid(), signal.SIGTERM)
            never.wait(60)
        return plain(first, count)

    rows.batch = batch
    monkeypatch.setattr(dataset, "rows", lambda *_: rows)
    with pytest.raises(Interrupted, match=r"after step [23]; all is saved"):
        run(tiny_config(), tmp_path / "run", dataset)
    never.set()
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").step in (2, 3)  # its rows are read while step 3 runs


def test_the_time_that_rows_are_waited_for_is_a_part_of_their_step(tmp_path, dataset, monkeypatch):
    rows, size = Rows(dataset.rows(32, 0)), tiny_config().train.batch_size
    plain, metrics = rows.batch, tmp_path / "run" / "metrics.jsonl"

    def steps():
        records = map(json.loads, metrics.read_text().rpartition("\n")[0].splitlines())
        return {record["step"]: record for record in records if "tokens_per_second" in record}

    def batch(first, count):
        if (first, count) == (2 * size, size):
            assert until(lambda: 2 in steps())  # only then is the run waiting
            time.sleep(1.0)
        return plain(first, count)

    rows.batch = batch
    monkeypatch.setattr(dataset, "rows", lambda *_: rows)
    run(tiny_config(steps=4), tmp_path / "run", dataset)
    assert steps()[3]["tokens_per_second"] <= size * 32 / 1.0


def test_a_run_reads_each_row_once_and_no_further_than_it_goes(tmp_path, dataset, monkeypatch):
    rows = Rows(dataset.rows(32, 0))
    monkeypatch.setattr(dataset, "rows", lambda *_: rows)
    config = tiny_config(steps=4)
    run(config, tmp_path / "run", dataset)
    size = config.train.batch_size
    assert [read for read in rows.read if read[1] == size] == [(size * step, size) for step in range(4)]


def count_exchanges(folder):
    """On each rank: the collectives of each step but the first, by name; those of gradients are the reducer's own."""
    dataset, real, counts, calls = tiny_dataset(folder), loop._step, [], []

    def counted(name):
        plain = getattr(torch.distributed, name)
        return patch.object(torch.distributed, name, lambda *args, **more: calls.append(name) or plain(*args, **more))

    def step(run):
        calls.clear()
        real(run)
        counts.append(sorted(calls))

    with ExitStack() as patched:
        for name in ("all_reduce", "all_gather", "broadcast", "all_gather_object", "broadcast_object_list"):
            patched.enter_context(counted(name))
        patched.enter_context(patch.object(loop, "_step", step))
        run(tiny_config(steps=4, parallel="ddp"), folder / "run", dataset)
    assert counts[1:] == [["all_gather", "all_reduce"]] * 3, counts


def test_ranks_exchange_once_on_the_host_and_once_on_the_device_in_a_step(tmp_path):
    tiny_dataset(tmp_path)
    on_ranks(2, count_exchanges, tmp_path)


def exchange_numbers():
    rank = distributed.rank()
    assert distributed.exchange([rank, 7.5, -rank]) == [[0.0, 7.5, 0.0], [1.0, 7.5, -1.0]]


def test_every_rank_is_told_every_ranks_numbers():
    assert distributed.exchange([1, 2.5]) == [[1, 2.5]]
    on_ranks(2, exchange_numbers)


def exchange_numbers_without_a_ring():
    with patch.object(distributed, "RING", 1), patch.object(torch.distributed, "all_gather", None):
        exchange_numbers()
        assert distributed.exchange([0.1]) == [[0.1], [0.1]]


def test_many_ranks_are_told_by_the_main_one_without_a_ring():
    on_ranks(2, exchange_numbers_without_a_ring)


def allow_connections():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    distributed._allow_connections(2)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (6 * 2 + 1024, hard)
    distributed._allow_connections(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (6 * 2 + 1024, hard)  # never lowered


def test_ranks_may_open_as_many_connections_as_there_are_ranks():
    on_ranks(2, allow_connections)
