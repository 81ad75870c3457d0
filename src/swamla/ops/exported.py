"""Ops that stay whole in a graph for another runtime (`torch.export`), where ONNX has one of the same meaning.

While a model is exported `gated_delta_rule`, `kimi_delta_attention` and `short_conv` are these; `interop/onnx`
translates them. Called, they compute what they stand for, so an exported program also runs in torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("swamla::linear_attention", mutates_args=())
def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    state_BHKV: Tensor | None,
    log_alpha_BTHX: Tensor,
    beta_BTH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) and the final state of the delta rule, token by token; X is K, or 1 for one decay a head.

    Without a state from zeros.

    Source: arXiv 2412.06464, eq. 10; 2510.26692, eq. 1. In ONNX: LinearAttention, update_rule "gated_delta".
    """
    outputs = []
    state_BHKV = _zeros(k_BTHK, v_BTHV) if state_BHKV is None else state_BHKV.clone()
    for t in range(q_BTHK.shape[1]):
        k_BHK = k_BTHK[:, t]
        state_BHKV = state_BHKV * log_alpha_BTHX[:, t, :, :, None].exp()
        error_BHV = v_BTHV[:, t] - torch.einsum("bhkv,bhk->bhv", state_BHKV, k_BHK)
        state_BHKV = state_BHKV + k_BHK[..., None] * (beta_BTH[:, t, :, None] * error_BHV)[..., None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state_BHKV, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1), state_BHKV


@linear_attention.register_fake
def _(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    state_BHKV: Tensor | None,
    log_alpha_BTHX: Tensor,
    beta_BTH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v_BTHV), _zeros(k_BTHK, v_BTHV)


def _zeros(k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
    """The empty state, (B, H, K, V)."""
    batch, _, heads, key = k_BTHK.shape
    return k_BTHK.new_zeros(batch, heads, key, v_BTHV.shape[-1])


@torch.library.custom_op("swamla::causal_conv", mutates_args=())
def causal_conv(x_BTD: Tensor, weight_DW: Tensor, history_BWD: Tensor | None, activation: str) -> Tensor:
    """`short_conv` of rows that follow `history_BWD`, in x's dtype. In ONNX: CausalConvWithState."""
    time, taps = x_BTD.shape[1], weight_DW.shape[1]
    line_BSD = F.pad(x_BTD, (0, 0, taps - 1, 0)) if history_BWD is None else torch.cat((history_BWD, x_BTD), dim=1)
    y_BTD = torch.stack([line_BSD[:, tap : tap + time] * weight_DW[:, tap] for tap in range(taps)]).sum(dim=0)
    return F.silu(y_BTD) if activation == "silu" else y_BTD


@causal_conv.register_fake
def _(x_BTD: Tensor, weight_DW: Tensor, history_BWD: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x_BTD)
