"""Kimi Delta Attention (arXiv 2510.26692): the gated delta rule with a decay of its own for each channel of a key."""

import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.ops.exported import linear_attention
from swamla.ops.kda.cpu import chunked_kda
from swamla.ops.kda.reference import KDAInputs, recurrent_kda
from swamla.ops.kda.reference import kimi_delta_step as kimi_delta_step
from swamla.ops.layout import Layout

BACKENDS = ("auto", "reference", "torch")


def resolve_backend(backend: str) -> str:
    """The backend that a name means, on every device; "auto" is "torch". Raises UsageError for an unknown name."""
    if backend not in BACKENDS:
        raise UsageError(f"backend = {backend!r}: Kimi Delta Attention has {', '.join(map(repr, BACKENDS))}")
    return "torch" if backend == "auto" else backend


def kimi_delta_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor,
    beta_BTH: Tensor,
    *,
    seq: Layout | None = None,
    initial_state_BHKV: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V) in fp32 (fp64 for fp64 inputs).

        S ← diag(e^{log α}) S ;  u = β (v − Sᵀ k) ;  S ← S + k uᵀ ;  o = scale · Sᵀ q        scale: K^-½ unless given

    The initial state (zeros by default) belongs to the document of each row's first token. Later documents start from
    zero, and the final state is that of the row's last document. Padding gives zeros and does not change the state.
    Without `seq` each row is one document. Backends: "reference" (token by token), "torch" (chunkwise parallel), and
    "auto", which is "torch". chunk: tokens per chunk of "torch", a power of two, by default 32 on a CPU and 64
    elsewhere. Raises UsageError for another chunk or an unknown backend.
    Source: arXiv 2510.26692, eq. 1.
    """
    path = resolve_backend(backend)
    inputs = KDAInputs(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, beta_BTH)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting():
        return linear_attention(q_BTHK, k_BTHK, v_BTHV, initial_state_BHKV, log_alpha_BTHK, beta_BTH, scale)
    if path == "reference":
        return recurrent_kda(inputs, initial_state_BHKV, seq, scale=scale)
    chunk = chunk or (32 if q_BTHK.device.type == "cpu" else 64)
    if chunk < 1 or chunk & (chunk - 1):
        raise UsageError(f"chunk = {chunk}: must be a power of two, e.g. 32")
    fitting = 1 << (q_BTHK.shape[1] - 1).bit_length()  # the least power of two that holds all tokens
    return chunked_kda(inputs, initial_state_BHKV, seq, scale=scale, chunk=min(chunk, fitting))
