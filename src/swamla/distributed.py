"""Several processes that train one model, each a rank: what they say to each other. One process is a group of one.

`torchrun` starts the processes and tells each its place by the environment; `started` joins them. All functions here
but `is_main` are to be called by every rank, in the same order.
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

TIMEOUT = 600.0  # seconds that one rank waits for the others, in steps
PATIENCE = 7 * 86400.0  # and where the main one prepares data meanwhile

_patient: "ProcessGroup | None" = None


def is_main() -> bool:
    """True in the one process that writes files and speaks, before and after the group is joined."""
    return not launched() or os.environ.get("RANK", "0") == "0"  # a RANK that something else left behind is none


def launched() -> bool:
    """True in a process that torchrun started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def started_again() -> bool:
    """True on all ranks where torchrun (--max-restarts) has started them again, after one of them died."""
    return bool(highest(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))


def rank() -> int:
    """This process's number in the group, from 0."""
    return _dist().get_rank() if _joined() else 0


def world_size() -> int:
    """How many processes the group has."""
    return _dist().get_world_size() if _joined() else 1


@contextmanager
def started(*, timeout: float = TIMEOUT) -> Iterator[None]:
    """Join the other processes that torchrun started, if there are any; gloo on CPUs, NCCL on GPUs.

    Tensors on the CPU go over gloo in either case. timeout: seconds that a rank waits for the others in a step
    before it ends with an error; a rank that died is noticed at once.
    """
    global _patient
    if not launched() or _joined():
        yield
        return
    import torch

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
        dist.barrier(group=_patient)  # a rank that ends while others still speak makes their threads abort
        failed = False
    finally:
        # After a failure nobody waits for anybody: connections that break end the others. NCCL would wait.
        _patient = None
        if not (failed and gpu):
            dist.destroy_process_group()


def _attempt(store: Any, rank: int, count: int, timeout: float) -> str:
    """A name for this start of the ranks, which all of them and no earlier ones have.

    torchrun's store outlives the processes that it starts again, with the addresses of those that are gone. So the
    main rank makes a name, the others sign it, each with a word of its own, and none believes a name until its own
    word stands in what the main rank publishes.
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
    """True for what a rank meets when another one is gone, or did not come in time."""
    known = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return known or (isinstance(error, RuntimeError) and "gloo" in str(error))


def own_store(prefix: str) -> Any:
    """What all ranks can read and write by keys, over a connection of its own; for signs of life between them."""
    return _dist().PrefixStore(prefix, _dist().distributed_c10d._get_default_store().clone())


def gathered(value: T) -> list[T]:
    """Every rank's `value`, in the order of the ranks. They are pickled."""
    found = [value] * world_size()
    if len(found) > 1:
        _dist().all_gather_object(found, value, group=_patient)
    return found


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        _dist().barrier(group=_patient)


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main rank, which alone runs it while the others wait, for days if need be.

    Where it raises, every rank does: the main one what it was, the others `FailedElsewhere`. The result is pickled.
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
    """The main rank's number, whatever the others have."""
    if world_size() == 1:
        return number
    import torch

    value = torch.tensor(number, dtype=torch.float64)
    _dist().broadcast(value, src=0)
    return value.item()


def all_reduce_sum(values: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Each tensor summed over all ranks, in double precision on the way; in its own dtype and on its own device."""
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
    """Every rank's numbers, as many from each, in the order of the ranks."""
    if world_size() == 1:
        return [list(numbers)]
    import torch

    own = torch.tensor(numbers, dtype=torch.float64)
    every = [torch.empty_like(own) for _ in range(world_size())]
    _dist().all_gather(every, own)
    return [numbers.tolist() for numbers in every]


def sum_of(number: float) -> float:
    """A number summed over all ranks."""
    return _reduced(number, "SUM")


def highest(number: float) -> float:
    """The largest of all ranks' numbers: a flag that one rank raises is up on all."""
    return _reduced(number, "MAX")


def sharded(tensor: "Tensor") -> bool:
    """True for a tensor of which every rank holds a part: a DTensor."""
    if not _joined():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: "Tensor") -> "Tensor":
    """The part that this rank holds, not a copy; a tensor that is not sharded as it is."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: "Tensor") -> "Tensor":
    """The whole of a tensor, gathered from all ranks; one that is not sharded as it is."""
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(whole: "Tensor", like: "Tensor") -> "Tensor":
    """This rank's part of a tensor, whole or sharded as `like` is, cut as `like` is; where that is whole, all of it."""
    if not sharded(like) or sharded(whole):
        return local(whole)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    part = distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
    return part.to_local()


def as_sharded(part: "Tensor", like: "Tensor") -> "Tensor":
    """The sharded tensor, of the shape of `like` and cut as it is, of which this rank holds `part`."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def require_rows(batch_size: int, accumulation: int) -> None:
    """Raise `UsageError` where the ranks cannot share a batch evenly."""
    ranks = world_size()
    if batch_size % (ranks * accumulation):
        raise UsageError(
            f"train.batch_size = {batch_size}: must be a multiple of the {ranks} processes · accumulation = "
            f"{accumulation}, it is the rows of all of them together"
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
