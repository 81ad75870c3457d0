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
"""Of rows (N, D) sorted by expert and where each expert's end, (N, F): row by row, as `grouped_mm` works."""


@outside_graphs
def at_owners(rows_ND: Tensor, load_E: Tensor, work: Work, group: Any) -> Tensor:
    """y (N, F): `work` of every row, done by the process of `group` that owns the row's expert.

    Rows are sorted by expert, of which expert e has load[e]; of E experts on P processes the p-th owns the p-th E / P.
    All processes of the group call this together, each with rows of its own, as many as it has: none is dropped, and
    one that gets no row works on none. Rows beyond those of the last expert stay at home and become 0. A process's rows
    come in the order of the senders, so that as for one process alone an expert's rows are in the order of the whole
    batch. The backward pass travels as well. Waits for the device once.
    """
    arriving_PE, there, here = _counts(load_E, group)
    processes, owned = arriving_PE.shape
    expert_N = torch.arange(owned, device=load_E.device).repeat(processes)
    # Without output_size it would wait for the device to learn how many rows there are.
    expert_N = expert_N.repeat_interleave(arriving_PE.flatten(), output_size=sum(here))
    sorting = Dispatch(expert_N.unsqueeze(1), owned)
    owned_rows, at_home = rows_ND.split((sum(there), len(rows_ND) - sum(there)))
    y_NF = work(sorting.scatter(_Travel.apply(owned_rows, there, here, group)), sorting.ends_E)
    y_NF = _Travel.apply(sorting.unsorted(y_NF), here, there, group)
    return F.pad(y_NF, (0, 0, 0, len(at_home))) if len(at_home) else y_NF


def _counts(load_E: Tensor, group: Any) -> tuple[Tensor, list[int], list[int]]:
    """Rows that come from each process for each expert that this one owns, and rows to and from each process."""
    processes = torch.distributed.get_world_size(group)
    arriving_E = torch.empty_like(load_E)
    torch.distributed.all_to_all_single(arriving_E, load_E.contiguous(), group=group)
    there, here = torch.stack([load_E, arriving_E]).view(2, processes, -1).sum(2).tolist()
    return arriving_E.view(processes, -1), there, here


class _Travel(torch.autograd.Function):
    """Rows to the processes of a group: the first `leaving[0]` to its first and so on; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, leaving: list[int], arriving: list[int], group: Any) -> Tensor:
        ctx.leaving, ctx.arriving, ctx.group = leaving, arriving, group
        return _travelled(rows, leaving, arriving, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _travelled(grad, ctx.arriving, ctx.leaving, ctx.group), None, None, None


def _travelled(rows: Tensor, leaving: list[int], arriving: list[int], group: Any) -> Tensor:
    arrived = rows.new_empty(sum(arriving), *rows.shape[1:])
    torch.distributed.all_to_all_single(arrived, rows.contiguous(), arriving, leaving, group=group)
    return arrived
