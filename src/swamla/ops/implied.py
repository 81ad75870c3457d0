"""The attention that a linear recurrence implies: weights with which each output sums all values."""

from collections.abc import Callable

import torch
from torch import Tensor

from swamla.ops.layout import PADDING, Layout

Rule = Callable[..., tuple[Tensor, Tensor]]


def implied_attention(
    rule: Rule, q_BTHK: Tensor, k_BTHK: Tensor, log_alpha: Tensor, beta_BTH: Tensor, *, seq: Layout
) -> Tensor:
    """A (B, H, T, S) with o = A v for every v, where o are the outputs of `rule` (gated_delta_rule, …) for values v.

    The rule is linear in its values: column s of A is its answer to a value of 1 at token s and 0 elsewhere. Computed
    in fp64, because weights are sums of terms of both signs; returned in q's dtype, in fp32 at least. Rows and columns
    of padding are 0. Memory grows as T². For gated DeltaNet this is
    K^-½ (Q Kᵀ ⊙ D) [I + tril(diag(β) (K Kᵀ ⊙ D), −1)]⁻¹ diag(β), with D_ts the decay from s to t (arXiv 2412.06464).
    """
    batch, time, heads, _ = q_BTHK.shape
    impulse_BTHS = torch.eye(time, dtype=torch.float64, device=q_BTHK.device)[None, :, None, :].expand(
        batch, time, heads, time
    )
    inputs = (x.to(torch.float64) for x in (q_BTHK, k_BTHK, impulse_BTHS, log_alpha, beta_BTH))
    o_BTHS, _ = rule(*inputs, seq=seq, backend="torch")
    weight_BHTS = o_BTHS.permute(0, 2, 1, 3).to(torch.promote_types(q_BTHK.dtype, torch.float32))
    real_BT = seq.document_BT != PADDING
    return weight_BHTS.where(real_BT[:, None, :, None] & real_BT[:, None, None, :], 0.0)
