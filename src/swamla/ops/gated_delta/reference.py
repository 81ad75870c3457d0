"""The gated delta rule, token by token (Gated DeltaNet, arXiv 2412.06464, equation 10)."""

from typing import NamedTuple

import torch
from torch import Tensor

from swamla.ops.autocast import without_autocast
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import PADDING, Layout


class RuleInputs(NamedTuple):
    """Queries and keys (B, T, H, K), values (B, T, H, V), log α and β (B, T, H)."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_alpha_BTH: Tensor
    beta_BTH: Tensor


@outside_graphs
def recurrent_gated_delta_rule(
    inputs: RuleInputs, initial_state_BHKV: Tensor | None, seq: Layout | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition that every fast path is tested against: outputs (B, T, H, V) and the final state (B, H, K, V).

    Decay first, then the error, then the write. Computed in fp32 (fp64 for fp64 inputs); outputs in q's dtype. The
    state restarts at position 0 of each document except the row's first, which continues from the initial state.
    Padding gives zeros and does not change the state.
    """
    given, dtype = inputs.q_BTHK.dtype, torch.promote_types(inputs.q_BTHK.dtype, torch.float32)
    if seq is not None and seq.padded:  # padding may hold NaN; zeros keep it out of values and gradients
        padding_BT = seq.document_BT == PADDING
        inputs = RuleInputs(
            *(x.masked_fill(padding_BT.view(*padding_BT.shape, *[1] * (x.ndim - 2)), 0) for x in inputs)
        )
    q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH = (x.to(dtype) for x in inputs)
    alpha_BTH = log_alpha_BTH.exp()
    batch, time, heads, key_width = q_BTHK.shape
    state_BHKV = q_BTHK.new_zeros(batch, heads, key_width, v_BTHV.shape[-1])
    if initial_state_BHKV is not None:
        state_BHKV = initial_state_BHKV.to(dtype)
    outputs_BHV = []
    with without_autocast(q_BTHK.device.type):
        for t in range(time):
            before_BHKV = state_BHKV
            if seq is not None and t > 0:
                state_BHKV = state_BHKV.masked_fill((seq.position_BT[:, t] == 0)[:, None, None, None], 0)
            state_BHKV = alpha_BTH[:, t, :, None, None] * state_BHKV
            error_BHV = v_BTHV[:, t] - torch.einsum("bhkv,bhk->bhv", state_BHKV, k_BTHK[:, t])
            write_BHV = beta_BTH[:, t, :, None] * error_BHV
            state_BHKV = state_BHKV + torch.einsum("bhk,bhv->bhkv", k_BTHK[:, t], write_BHV)
            o_BHV = scale * torch.einsum("bhkv,bhk->bhv", state_BHKV, q_BTHK[:, t])
            if seq is not None:
                padding_B111 = (seq.document_BT[:, t] == PADDING)[:, None, None, None]
                state_BHKV = torch.where(padding_B111, before_BHKV, state_BHKV)
                o_BHV = o_BHV.masked_fill(padding_B111[..., 0], 0)
            outputs_BHV.append(o_BHV)
    return torch.stack(outputs_BHV, dim=1).to(given), state_BHKV


def gated_delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    log_alpha_BH: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """One token of the recurrence: updates `state_BHKV` in place, returns o (B, H, V) in q's dtype.

    Computed in the state's dtype, which should be fp32. A row with log α = β = 0 keeps its state. scale: K^-½ unless
    given. Source: arXiv 2412.06464, eq. 10.
    """
    return delta_step(q_BHK, k_BHK, v_BHV, log_alpha_BH[..., None], beta_BH, state_BHKV, scale)


def delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    log_alpha_BHK: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    scale: float | None,
) -> Tensor:
    """`gated_delta_step` with a decay for each channel of a key, or one for all, (B, H, 1)."""
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    dtype = state_BHKV.dtype
    with without_autocast(q_BHK.device.type):
        state_BHKV.mul_(log_alpha_BHK.to(dtype).exp()[..., None])
        k_BHK = k_BHK.to(dtype)
        error_BHV = v_BHV.to(dtype) - read(k_BHK, state_BHKV)
        write_BHV = beta_BH.to(dtype)[..., None] * error_BHV
        state_BHKV.addcmul_(k_BHK[..., None], write_BHV[..., None, :])
        o_BHV = read(q_BHK.to(dtype) * scale, state_BHKV)
    return o_BHV.to(q_BHK.dtype)


def read(key_BHK: Tensor, state_BHKV: Tensor) -> Tensor:
    """(B, H, V): Sᵀ k of every head."""
    if torch.compiler.is_compiling():  # a sum, which the compiler joins with what is before and behind it
        return (key_BHK[..., None] * state_BHKV).sum(dim=-2)
    return (key_BHK[..., None, :] @ state_BHKV).squeeze(-2)
