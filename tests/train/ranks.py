"""Several ranks on this machine for a test: processes forked from one that has imported everything, over gloo."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swamla.distributed import started
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.train.helpers", "torch.distributed.tensor"])


def on_ranks(count: int, work: Callable[..., None], *args: Any) -> None:
    """Run `work(*args)`, a function of a module, on `count` ranks as torchrun would; raises what one of them said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    said, tell = _context.Pipe(duplex=False)
    ranks = [_context.Process(target=_rank, args=(tell, rank, count, port, work, args)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    tell.close()
    failures = []
    for rank in ranks:
        rank.join(PATIENCE)
        if rank.exitcode is None:
            rank.kill()
            failures.append("hangs")
        elif rank.exitcode:
            failures.append(f"exit status {rank.exitcode}")
    while said.poll():
        try:
            failures.append(said.recv())
        except EOFError:
            break
    assert not failures, "\n".join(failures)


def _rank(tell: Any, rank: int, count: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        with started(timeout=PATIENCE):
            work(*args)
    except BaseException:
        tell.send(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
