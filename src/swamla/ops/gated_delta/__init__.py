"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): a linear recurrence that forgets and corrects itself."""

import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.ops.gated_delta.chunked import chunked_gated_delta_rule
from swamla.ops.gated_delta.documents import documents_of
from swamla.ops.gated_delta.l2_normalize import l2_normalize
from swamla.ops.gated_delta.reference import gated_delta_step, recurrent_gated_delta_rule
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout

__all__ = ["gated_delta_rule", "gated_delta_step", "l2_normalize"]


def resolve_backend(backend: str) -> str:
    """The backend that a name means, on any device: "auto" is "torch". Raises UsageError for an unknown name."""
    if backend not in ("auto", "reference", "torch"):
        raise UsageError(f'backend = {backend!r}: the gated delta rule has "auto", "reference" and "torch"')
    return "torch" if backend == "auto" else backend


@outside_graphs
def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    seq: Layout | None = None,
    initial_state_BHKV: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V) in fp32 (double for double inputs).

        S ← e^{log α} S ;  u = β (v − Sᵀ k) ;  S ← S + k uᵀ ;  o = scale · Sᵀ q        scale: K^-½ unless given

    The initial state (zeros unless given) belongs to the document of each row's first token; every later document
    starts from zero, and the final state is that of the row's last. Padding reads zero and changes nothing. Without
    `seq` each row is one document. Backends: "reference" (token by token), "torch" (chunks), "auto" ("torch").
    Raises UsageError for any other. `chunk`: tokens a chunk, by default 32 on a CPU and 64 on an accelerator.
    """
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if resolve_backend(backend) == "reference":
        with torch.autocast(q_BTHK.device.type, enabled=False):
            o_BTHV, final_BHKV = recurrent_gated_delta_rule(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                log_alpha_BTH,
                beta_BTH,
                seq=seq,
                initial_state_BHKV=initial_state_BHKV,
                scale=scale,
            )
        return o_BTHV.to(q_BTHK.dtype), final_BHKV

    chunk = min(chunk or (32 if q_BTHK.device.type == "cpu" else 64), q_BTHK.shape[1])
    documents = documents_of(seq, chunk)
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    log_alpha_BTH, beta_BTH = log_alpha_BTH.to(dtype), beta_BTH.to(dtype)
    if documents.padding_BT is not None:
        padding_BT1 = documents.padding_BT[..., None]
        q_BTHK = q_BTHK.masked_fill(padding_BT1[..., None], 0)
        log_alpha_BTH, beta_BTH = log_alpha_BTH.masked_fill(padding_BT1, 0), beta_BTH.masked_fill(padding_BT1, 0)
    if documents.restart_BT is not None:
        log_alpha_BTH = log_alpha_BTH.masked_fill(documents.restart_BT[..., None], 0)
    if initial_state_BHKV is None:
        batch, _, heads, key_width = q_BTHK.shape
        initial_state_BHKV = beta_BTH.new_zeros(batch, heads, key_width, v_BTHV.shape[-1])
    return chunked_gated_delta_rule(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        log_alpha_BTH,
        beta_BTH,
        initial_state_BHKV.to(dtype),
        documents.masks,
        scale,
        chunk,
    )
