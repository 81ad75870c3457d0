"""Whole matrices orthogonalised by several processes: each takes a share, and all get the parts that they hold."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamla import distributed

Orthogonalise = Callable[[list[Tensor]], list[Tensor]]
ROUND = 1 << 26  # numbers exchanged at a time, times the processes: bounds the memory of a step


@dataclass(frozen=True)
class Holders:
    """The processes that a parameter is spread over: `copies` groups, each of which holds it in `parts` parts.

    DDP is copies of one part, FSDP one copy of many parts, HSDP both.
    """

    copies: Any  # process groups, None for a single one
    parts: Any

    @classmethod
    def of(cls, parameter: Tensor) -> "Holders":
        """Those of this parameter; all are alike in a run but experts that have owners."""
        if not distributed.sharded(parameter):
            return cls(torch.distributed.group.WORLD, None)
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        return cls(mesh.get_group(0) if mesh.ndim == 2 else None, mesh.get_group(mesh.ndim - 1))


def orthogonalise_together(
    updates: Sequence[Tensor], wholes: Sequence[Tensor], orthogonalise: Orthogonalise, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """(index, this process's part of the orthogonalised matrix) for each of `updates`, in some order.

    updates: this process's parts.  wholes: the parameters they belong to; stacks of experts are cut between experts,
    so that every part is whole matrices.  dtype: of what `orthogonalise` gives.
    """
    size = distributed.world_size() * ROUND
    alike: dict[Any, list[int]] = {}
    for index, whole in enumerate(wholes):
        mesh = whole.device_mesh if distributed.sharded(whole) else None  # type: ignore[attr-defined]
        alike.setdefault(mesh, []).append(index)
    for indices in alike.values():
        holders, taken, numbers = Holders.of(wholes[indices[0]]), list[int](), 0
        for index in indices:
            if taken and numbers + wholes[index].numel() > size:
                yield from _round(holders, taken, updates, wholes, orthogonalise, dtype)
                taken, numbers = [], 0
            taken.append(index)
            numbers += wholes[index].numel()
        yield from _round(holders, taken, updates, wholes, orthogonalise, dtype)


def _round(
    holders: Holders,
    taken: list[int],
    updates: Sequence[Tensor],
    wholes: Sequence[Tensor],
    orthogonalise: Orthogonalise,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Tensor]]:
    """Share `taken` out over the copies, each over its parts; then tell the other copies."""
    place, count = _place(holders.copies)
    shares = share_out([(index, _cost(wholes[index])) for index in taken], count)
    found = dict(_in_parts(holders.parts, shares[place], updates, wholes, orthogonalise, dtype))
    for source, share in enumerate(shares):
        if count > 1 and share:
            empty = updates[share[0]].new_empty(sum(updates[index].numel() for index in share), dtype=dtype)
            flat = torch.cat([found[index].reshape(-1) for index in share]) if source == place else empty
            torch.distributed.broadcast(flat, group=holders.copies, group_src=source)
            parts = flat.split([updates[index].numel() for index in share])
            found |= {index: part.view(updates[index].shape) for index, part in zip(share, parts, strict=True)}
    yield from found.items()


def _in_parts(
    group: Any,
    share: list[int],
    updates: Sequence[Tensor],
    wholes: Sequence[Tensor],
    orthogonalise: Orthogonalise,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Tensor]]:
    """Parts of the orthogonalised matrices of `share`: cut ones are gathered by one process each, and given back."""
    place, count = _place(group)
    cut = [index for index in share if count > 1 and wholes[index].ndim == 2]
    here = [index for index in share if index not in set(cut)]
    owned = share_out([(index, _cost(wholes[index])) for index in cut], count)
    mine = owned[place]
    rows = {index: _rows(wholes[index].shape[0], count) for index in cut}

    sent = [[updates[index] for index in whose] for whose in owned]
    shapes: list[list[tuple[int, ...]]] = [
        [(rows[index][r], wholes[index].shape[1]) for index in mine] for r in range(count)
    ]
    arrived = _all_to_all(sent, shapes, group) if cut else [[] for _ in range(count)]
    gathered = [torch.cat([arrived[r][i] for r in range(count)]) for i in range(len(mine))]

    done = orthogonalise([*(updates[index] for index in here), *gathered])
    yield from zip(here, done[: len(here)], strict=True)
    if cut:
        slices = [whole.split(rows[index]) for index, whole in zip(mine, done[len(here) :], strict=True)]
        back = [[part[r].to(dtype) for part in slices] for r in range(count)]
        shapes = [[tuple(updates[index].shape) for index in whose] for whose in owned]
        returned = _all_to_all(back, shapes, group, like=updates[cut[0]].new_empty(0, dtype=dtype))
        for whose, parts in zip(owned, returned, strict=True):
            yield from zip(whose, parts, strict=True)


def share_out(costs: Sequence[tuple[int, float]], count: int) -> list[list[int]]:
    """Items over `count` processes: the costliest first, each to whoever has least to do; the same on all of them."""
    shares: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for item, cost in sorted(costs, key=lambda pair: (-pair[1], pair[0])):
        least = load.index(min(load))
        shares[least].append(item)
        load[least] += cost
    return [sorted(share) for share in shares]


def _cost(matrices: Tensor) -> float:
    """In proportion to the operations of Newton–Schulz."""
    return matrices.numel() * min(matrices.shape[-2:])


def _rows(total: int, count: int) -> list[int]:
    """How many rows of a matrix each part has: as many as fit, the last ones fewer or none."""
    most = -(-total // count)
    return [max(0, min(most, total - place * most)) for place in range(count)]


def _place(group: Any) -> tuple[int, int]:
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def _all_to_all(
    tensors: list[list[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], group: Any, like: Tensor | None = None
) -> list[list[Tensor]]:
    """Send the r-th list to process r; what arrives from process r are tensors of the r-th list of shapes."""
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
