"""Communication between the ranks that train one model; a single process is a group of one.

`torchrun` starts the processes and sets their ranks in the environment; `started` joins the group. Every rank must call
these functions in the same order, except `is_main`.
"""

import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from swamla.errors import FailedElsewhere, SwamlaError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")

TIMEOUT = 600.0  # seconds that a rank waits for the others within a step
PATIENCE = 7 * 86400.0  # seconds that a rank waits while the main rank prepares data

RING = 32  # largest number of ranks for one all-gather: gloo's is a ring, whose latency grows with every rank
CONNECTIONS = 6  # sockets and files that a process may need per rank: a gloo group connects every pair of ranks

_patient: "ProcessGroup | None" = None


def is_main() -> bool:
    """True in the process that writes files and prints, before and after the group is joined."""
    return not launched() or os.environ.get("RANK", "0") == "0"  # ignore a RANK left over in the environment


def launched() -> bool:
    """True if torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def started_again() -> bool:
    """True on all ranks if torchrun (--max-restarts) has restarted them after one died."""
    return bool(highest(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))


def rank() -> int:
    """This process's rank, from 0."""
    return _dist().get_rank() if _joined() else 0


def world_size() -> int:
    """Number of ranks."""
    return _dist().get_world_size() if _joined() else 1


@contextmanager
def started(*, timeout: float = TIMEOUT) -> Iterator[None]:
    """Context in which the processes that torchrun started form a group; without torchrun it does nothing.

    CPU tensors use gloo, CUDA tensors NCCL. timeout: seconds that a rank waits for the others in a step before it
    raises; a dead rank is noticed at once.
    """
    global _patient
    if not launched() or _joined():
        yield
        return
    import torch

    _allow_connections(int(os.environ["WORLD_SIZE"]))
    dist = _dist()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available() and local < torch.cuda.device_count()
    if gpu:
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", local) if gpu else None
    limit = datetime.timedelta(seconds=timeout)
    store, rank, count = next(dist.rendezvous("env://", timeout=limit))
    store = dist.PrefixStore(_attempt(store, rank, count, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit, device_id=device)
    _patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    failed = True
    try:
        yield
        dist.barrier(group=_patient)  # if a rank exits during communication, the other ranks' threads abort
        failed = False
    finally:
        # After a failure do not wait: broken connections end the other ranks. NCCL would wait.
        _patient = None
        if not (failed and gpu):
            dist.destroy_process_group()


def _allow_connections(count: int) -> None:
    """Raise the soft limit of open files as far as `count` ranks need and the hard limit allows: many have 1,024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS * count + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _attempt(store: Any, rank: int, count: int, timeout: float) -> str:
    """A name for this start of the ranks, different from those of earlier starts.

    torchrun's store survives restarts, and then has stale addresses of earlier processes. So the main rank chooses a
    name, every other rank registers a random word under it, and a rank accepts the name only if its own word is in the
    list that the main rank publishes.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        store.set("attempt", word)
        signed = [store.get(f"{word}/{other}").decode() for other in range(1, count)]
        store.set(f"{word}/all", " ".join(signed))
        return word
    while time.monotonic() < deadline:
        if store.check(["attempt"]):
            name = store.get("attempt").decode()
            store.set(f"{name}/{rank}", word)
            if store.check([f"{name}/all"]) and word in store.get(f"{name}/all").decode().split():
                return name
        time.sleep(0.02)
    raise UsageError(f"rank {rank}: rank 0 did not start within {timeout:.0f} s")


def lost_a_rank(error: BaseException) -> bool:
    """True for errors of communication, as when another rank has died or timed out."""
    known = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return known or (isinstance(error, RuntimeError) and "gloo" in str(error))


def own_store(prefix: str) -> Any:
    """The group's key-value store over a separate connection, for heartbeats."""
    return _dist().PrefixStore(prefix, _dist().distributed_c10d._get_default_store().clone())


def gathered(value: T) -> list[T]:
    """Every rank's `value`, in order of rank. Values are pickled."""
    found = [value] * world_size()
    if len(found) > 1:
        _dist().all_gather_object(found, value, group=_patient)
    return found


def barrier() -> None:
    """Wait until every rank has called this."""
    if world_size() > 1:
        _dist().barrier(group=_patient)


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on the main rank and return its result on all; the others wait, for days if necessary.

    If `work` raises, the main rank raises that error and the others `FailedElsewhere`. The result is pickled.
    """
    if world_size() == 1:
        return work()
    if not is_main():
        found, failed = _from_main(None)
        if failed is not None:
            raise FailedElsewhere(*failed)
        return found
    try:
        found = work()
    except BaseException as error:
        status = error.exit_status if isinstance(error, SwamlaError) else 1
        _from_main((None, (str(error), status)))
        raise
    _from_main((found, None))
    return found


def from_main(number: float) -> float:
    """The main rank's number, on all ranks."""
    if world_size() == 1:
        return number
    import torch

    value = torch.tensor(number, dtype=torch.float64)
    _dist().broadcast(value, src=0)
    return value.item()


def all_reduce_sum(values: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Each tensor summed over all ranks in double precision, returned in its own dtype and on its own device."""
    if world_size() == 1 or not values:
        return dict(values)
    import torch

    flat = torch.cat([value.detach().reshape(-1).to(torch.float64) for value in values.values()])
    _dist().all_reduce(flat)
    parts = flat.split([value.numel() for value in values.values()])
    return {
        name: part.view(value.shape).to(value.dtype) for (name, value), part in zip(values.items(), parts, strict=True)
    }


def exchange(numbers: Sequence[float]) -> list[list[float]]:
    """Every rank's numbers, in order of rank; each rank gives equally many.

    With more than `RING` ranks the main rank gathers them and broadcasts: a tree instead of a ring of all ranks.
    """
    if world_size() == 1:
        return [list(numbers)]
    import torch

    own = torch.tensor(numbers, dtype=torch.float64)
    every = own.new_empty(world_size(), len(own))
    if world_size() <= RING:
        _dist().all_gather(list(every.unbind()), own)
    else:
        _dist().gather(own, list(every.unbind()) if rank() == 0 else None)
        _dist().broadcast(every, src=0)
    return every.tolist()


def sum_of(number: float) -> float:
    """A number summed over all ranks."""
    return _reduced(number, "SUM")


def highest(number: float) -> float:
    """The maximum over all ranks; for flags, whether any rank's is True."""
    return _reduced(number, "MAX")


def sharded(tensor: "Tensor") -> bool:
    """True for a DTensor."""
    if not _joined():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: "Tensor") -> "Tensor":
    """This rank's shard, which shares memory; an unsharded tensor is returned as it is."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: "Tensor") -> "Tensor":
    """The full tensor, gathered from all ranks; an unsharded tensor is returned as it is."""
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(whole: "Tensor", like: "Tensor") -> "Tensor":
    """This rank's shard of `whole`, sharded like `like`; all of it if `like` is not sharded."""
    if not sharded(like) or sharded(whole):
        return local(whole)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    part = distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
    return part.to_local()


def as_sharded(part: "Tensor", like: "Tensor") -> "Tensor":
    """The DTensor with the shape and sharding of `like`, whose shard on this rank is `part`."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def require_rows(batch_size: int, accumulation: int, setting: str = "batch_size") -> None:
    """Raise `UsageError` unless the batch divides evenly into the micro-batches of all ranks."""
    ranks = world_size()
    if batch_size % (ranks * accumulation):
        raise UsageError(
            f"train.{setting} = {batch_size}: must be a multiple of {ranks} processes · accumulation = "
            f"{accumulation}; it counts the rows of all processes"
        )


def _reduced(number: float, how: str) -> float:
    if world_size() == 1:
        return number
    import torch

    dist = _dist()
    value = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(value, getattr(dist.ReduceOp, how))
    return value.item()


def _from_main(value: Any) -> Any:
    box = [value]
    _dist().broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def _joined() -> bool:
    import sys

    if "torch" not in sys.modules:
        return False
    dist = _dist()
    return dist.is_available() and dist.is_initialized()


def _dist() -> Any:
    import torch.distributed

    return torch.distributed
