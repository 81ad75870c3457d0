"""Expert-parallel all-to-all: sends token rows to the ranks that own their experts, returns the outputs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.ops.dispatch import Dispatch
from swamla.ops.graphs import outside_graphs

Work = Callable[[Tensor, Tensor], Tensor]
"""Maps rows (N, D) sorted by expert, and the end of each expert's rows (E,), to rows (N, F), each on its own."""


@outside_graphs
def apply_at_owners(rows_ND: Tensor, load_E: Tensor, work: Work, group: Any) -> Tensor:
    """y (N, F): `work` of every row, computed by the rank of `group` that owns the row's expert.

    rows_ND: sorted by expert.  load_E: rows of each expert.  Rank p of P owns the experts p·E/P … (p + 1)·E/P − 1.
    A collective: all ranks of the group must call it, each with any number of rows. No row is dropped. Rows after
    those of the last expert are not sent and become 0. Received rows are in the order of the sending ranks, so an
    expert's rows are in the order of the whole batch, as on a single rank. The backward pass is an all-to-all as well.
    Synchronises with the device once.
    """
    received_PE, sizes_out, sizes_in = _counts(load_E, group)
    ranks, owned = received_PE.shape
    expert_N = torch.arange(owned, device=load_E.device).repeat(ranks)
    # Without output_size it would synchronise with the device to learn the number of rows.
    expert_N = expert_N.repeat_interleave(received_PE.flatten(), output_size=sum(sizes_in))
    dispatch = Dispatch(expert_N.unsqueeze(1), owned)
    sent, surplus = rows_ND.split((sum(sizes_out), len(rows_ND) - sum(sizes_out)))
    y_NF = work(dispatch.scatter(_AllToAll.apply(sent, sizes_out, sizes_in, group)), dispatch.ends_E)
    y_NF = _AllToAll.apply(dispatch.unsorted(y_NF), sizes_in, sizes_out, group)
    return F.pad(y_NF, (0, 0, 0, len(surplus))) if len(surplus) else y_NF


def _counts(load_E: Tensor, group: Any) -> tuple[Tensor, list[int], list[int]]:
    """Rows received from each rank for each expert that this rank owns; rows sent to, and received from, each rank."""
    ranks = torch.distributed.get_world_size(group)
    received_E = torch.empty_like(load_E)
    torch.distributed.all_to_all_single(received_E, load_E.contiguous(), group=group)
    sizes_out, sizes_in = torch.stack([load_E, received_E]).view(2, ranks, -1).sum(2).tolist()
    return received_E.view(ranks, -1), sizes_out, sizes_in


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows, `sizes_out[p]` of them to rank p. The gradients are sent back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes_out: list[int], sizes_in: list[int], group: Any) -> Tensor:
        ctx.sizes_out, ctx.sizes_in, ctx.group = sizes_out, sizes_in, group
        return _all_to_all(rows, sizes_out, sizes_in, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, ctx.sizes_in, ctx.sizes_out, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sizes_out: list[int], sizes_in: list[int], group: Any) -> Tensor:
    received = rows.new_empty(sum(sizes_in), *rows.shape[1:])
    torch.distributed.all_to_all_single(received, rows.contiguous(), sizes_in, sizes_out, group=group)
    return received
