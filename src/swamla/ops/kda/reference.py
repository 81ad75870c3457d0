"""Kimi Delta Attention, token by token (arXiv 2510.26692, equation 1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from swamla.ops.autocast import without_autocast
from swamla.ops.gated_delta.reference import delta_step
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import PADDING, Layout


class KDAInputs(NamedTuple):
    """Queries, keys and log α (B, T, H, K), values (B, T, H, V), β (B, T, H)."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_alpha_BTHK: Tensor
    beta_BTH: Tensor


@outside_graphs
def recurrent_kda(
    inputs: KDAInputs, initial_state_BHKV: Tensor | None, seq: Layout | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition that every fast path is tested against: outputs (B, T, H, V) and the final state (B, H, K, V).

        S ← (I − β k kᵀ) diag(α) S + β k vᵀ ;  o = scale · Sᵀ q

    Computed in fp32 (fp64 for fp64 inputs); outputs in q's dtype. The state restarts at position 0 of each document
    except the row's first, which continues from the initial state. Padding gives zeros and does not change the state.
    """
    given, dtype = inputs.q_BTHK.dtype, torch.promote_types(inputs.q_BTHK.dtype, torch.float32)
    if seq is not None and seq.padded:  # padding may hold NaN; zeros keep it out of values and gradients
        padding_BT = seq.document_BT == PADDING
        inputs = KDAInputs(*(x.masked_fill(padding_BT.view(*padding_BT.shape, *[1] * (x.ndim - 2)), 0) for x in inputs))
    q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, beta_BTH = (x.to(dtype) for x in inputs)
    alpha_BTHK = log_alpha_BTHK.exp()
    batch, time, heads, key_width = q_BTHK.shape
    state_BHKV = q_BTHK.new_zeros(batch, heads, key_width, v_BTHV.shape[-1])
    if initial_state_BHKV is not None:
        state_BHKV = initial_state_BHKV.to(dtype)
    outputs_BHV = []
    with without_autocast(q_BTHK.device.type):
        for t in range(time):
            before_BHKV, beta_BH11 = state_BHKV, beta_BTH[:, t, :, None, None]
            if seq is not None and t > 0:
                state_BHKV = state_BHKV.masked_fill((seq.position_BT[:, t] == 0)[:, None, None, None], 0)
            k_BHK1 = k_BTHK[:, t, :, :, None]
            state_BHKV = alpha_BTHK[:, t, :, :, None] * state_BHKV
            state_BHKV = state_BHKV - beta_BH11 * k_BHK1 @ (k_BHK1.mT @ state_BHKV)
            state_BHKV = state_BHKV + beta_BH11 * k_BHK1 @ v_BTHV[:, t, :, None, :]
            o_BHV = scale * torch.einsum("bhkv,bhk->bhv", state_BHKV, q_BTHK[:, t])
            if seq is not None:
                padding_B111 = (seq.document_BT[:, t] == PADDING)[:, None, None, None]
                state_BHKV = torch.where(padding_B111, before_BHKV, state_BHKV)
                o_BHV = o_BHV.masked_fill(padding_B111[..., 0], 0)
            outputs_BHV.append(o_BHV)
    return torch.stack(outputs_BHV, dim=1).to(given), state_BHKV


def kimi_delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    log_alpha_BHK: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """One token of the recurrence: updates `state_BHKV` in place, returns o (B, H, V) in q's dtype.

    Computed in the state's dtype, which should be fp32. A row with log α = β = 0 keeps its state. scale: K^-½ unless
    given. Source: arXiv 2510.26692, eq. 1.
    """
    return delta_step(q_BHK, k_BHK, v_BHV, log_alpha_BHK, beta_BH, state_BHKV, scale)
