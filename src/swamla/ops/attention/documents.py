"""Attention of packed rows, one document (or a batch of equally long neighbours) at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from swamla.ops.layout import Layout


def each_document(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout
) -> Tensor:
    """Call `attend` with every run of `seq.runs` as (count, length, heads, width) and join what it returns.

    Documents never meet in one softmax, and the cost is the sum over documents, not that of the row.
    """
    if seq.whole_rows:
        return attend(q_BTHK, k_BTGK, v_BTGV)
    sizes = [count * length for count, length in seq.runs]
    parts = zip(*(torch.split(x.flatten(0, 1), sizes) for x in (q_BTHK, k_BTGK, v_BTGV)), strict=True)
    outputs = [
        attend(*(x.unflatten(0, run) for x in part)).flatten(0, 1) for run, part in zip(seq.runs, parts, strict=True)
    ]
    return torch.cat(outputs).unflatten(0, seq.shape) if outputs else torch.empty_like(q_BTHK[..., : v_BTGV.shape[-1]])
