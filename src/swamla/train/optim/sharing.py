"""Distributed orthogonalisation: each rank does a share of the matrices; every rank gets its shards of the results."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamla import distributed

Orthogonalise = Callable[[list[Tensor]], list[Tensor]]
ROUND = 1 << 26  # numbers per rank exchanged at a time: bounds the memory of a step


@dataclass(frozen=True)
class ShardGroups:
    """The process groups of a parameter: over its replicas, and over the shards of a replica.

    DDP has replicas only, FSDP shards only, HSDP both.
    """

    replicas: Any  # process groups, None for a single process
    shards: Any

    @classmethod
    def of(cls, parameter: Tensor) -> "ShardGroups":
        """The groups of this parameter; all parameters of a run have the same, except experts in expert parallelism."""
        if not distributed.sharded(parameter):
            return cls(torch.distributed.group.WORLD, None)
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        return cls(mesh.get_group(0) if mesh.ndim == 2 else None, mesh.get_group(mesh.ndim - 1))


def orthogonalise_distributed(
    updates: Sequence[Tensor], wholes: Sequence[Tensor], orthogonalise: Orthogonalise, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """(index, this rank's shard of the orthogonalised matrix) for each of `updates`, in any order.

    updates: this rank's shards.  wholes: their full parameters; a stack of experts is sharded into whole matrices.
    dtype: of the results of `orthogonalise`.
    """
    size = distributed.world_size() * ROUND
    by_mesh: dict[Any, list[int]] = {}
    for index, whole in enumerate(wholes):
        mesh = whole.device_mesh if distributed.sharded(whole) else None  # type: ignore[attr-defined]
        by_mesh.setdefault(mesh, []).append(index)
    for indices in by_mesh.values():
        groups, taken, numbers = ShardGroups.of(wholes[indices[0]]), list[int](), 0
        for index in indices:
            if taken and numbers + wholes[index].numel() > size:
                yield from _round(groups, taken, updates, wholes, orthogonalise, dtype)
                taken, numbers = [], 0
            taken.append(index)
            numbers += wholes[index].numel()
        yield from _round(groups, taken, updates, wholes, orthogonalise, dtype)


def _round(
    groups: ShardGroups,
    taken: list[int],
    updates: Sequence[Tensor],
    wholes: Sequence[Tensor],
    orthogonalise: Orthogonalise,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Tensor]]:
    """Distribute `taken` over the replicas, and within each over its shards; then broadcast between the replicas."""
    place, count = _rank_and_size(groups.replicas)
    shares = balanced_shares([(index, _cost(wholes[index])) for index in taken], count)
    found = dict(_in_shards(groups.shards, shares[place], updates, wholes, orthogonalise, dtype))
    for source, share in enumerate(shares):
        if count > 1 and share:
            empty = updates[share[0]].new_empty(sum(updates[index].numel() for index in share), dtype=dtype)
            flat = torch.cat([found[index].reshape(-1) for index in share]) if source == place else empty
            torch.distributed.broadcast(flat, group=groups.replicas, group_src=source)
            shards = flat.split([updates[index].numel() for index in share])
            found |= {index: shard.view(updates[index].shape) for index, shard in zip(share, shards, strict=True)}
    yield from found.items()


def _in_shards(
    group: Any,
    share: list[int],
    updates: Sequence[Tensor],
    wholes: Sequence[Tensor],
    orthogonalise: Orthogonalise,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Tensor]]:
    """This rank's shards of the orthogonalised `share`; one rank gathers each matrix and returns the shards."""
    place, count = _rank_and_size(group)
    sharded = [index for index in share if count > 1 and wholes[index].ndim == 2]
    here = [index for index in share if index not in set(sharded)]
    owned = balanced_shares([(index, _cost(wholes[index])) for index in sharded], count)
    mine = owned[place]
    rows = {index: _rows(wholes[index].shape[0], count) for index in sharded}

    sent = [[updates[index] for index in whose] for whose in owned]
    shapes: list[list[tuple[int, ...]]] = [
        [(rows[index][r], wholes[index].shape[1]) for index in mine] for r in range(count)
    ]
    arrived = _all_to_all(sent, shapes, group) if sharded else [[] for _ in range(count)]
    gathered = [torch.cat([arrived[r][i] for r in range(count)]) for i in range(len(mine))]

    done = orthogonalise([*(updates[index] for index in here), *gathered])
    yield from zip(here, done[: len(here)], strict=True)
    if sharded:
        slices = [whole.split(rows[index]) for index, whole in zip(mine, done[len(here) :], strict=True)]
        back = [[part[r].to(dtype) for part in slices] for r in range(count)]
        shapes = [[tuple(updates[index].shape) for index in whose] for whose in owned]
        returned = _all_to_all(back, shapes, group, like=updates[sharded[0]].new_empty(0, dtype=dtype))
        for whose, shards in zip(owned, returned, strict=True):
            yield from zip(whose, shards, strict=True)


def balanced_shares(costs: Sequence[tuple[int, float]], count: int) -> list[list[int]]:
    """Greedy assignment of items to `count` ranks: the costliest first, to the least loaded; equal on all ranks."""
    shares: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for item, cost in sorted(costs, key=lambda pair: (-pair[1], pair[0])):
        least = load.index(min(load))
        shares[least].append(item)
        load[least] += cost
    return [sorted(share) for share in shares]


def _cost(matrices: Tensor) -> float:
    """Proportional to the FLOPs of Newton–Schulz."""
    return matrices.numel() * min(matrices.shape[-2:])


def _rows(total: int, count: int) -> list[int]:
    """Rows of a matrix per shard: equally many, but the last shards may have fewer or none."""
    most = -(-total // count)
    return [max(0, min(most, total - place * most)) for place in range(count)]


def _rank_and_size(group: Any) -> tuple[int, int]:
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def _all_to_all(
    tensors: list[list[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], group: Any, like: Tensor | None = None
) -> list[list[Tensor]]:
    """Send the r-th list of tensors to rank r; receive tensors of the r-th list of shapes from rank r."""
    flat = [t.reshape(-1) for each in tensors for t in each]
    joined = torch.cat(flat) if flat else like
    assert joined is not None
    arriving = [sum(_numbers(shape) for shape in each) for each in shapes]
    received = joined.new_empty(sum(arriving))
    leaving = [sum(t.numel() for t in each) for each in tensors]
    torch.distributed.all_to_all_single(received, joined, arriving, leaving, group=group)
    found = []
    for part, each in zip(received.split(arriving), shapes, strict=True):
        pieces = part.split([_numbers(shape) for shape in each]) if each else ()
        found.append([piece.view(shape) for piece, shape in zip(pieces, each, strict=True)])
    return found


def _numbers(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
