"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): a linear recurrence that forgets and corrects itself."""

import torch
from torch import Tensor

from swamla.errors import MissingBackendError, UsageError
from swamla.ops.gated_delta.chunked import chunked_gated_delta_rule
from swamla.ops.gated_delta.documents import documents_of
from swamla.ops.gated_delta.fla import fla_gated_delta_rule, installed, made_packing, obstacle
from swamla.ops.gated_delta.l2_normalize import l2_normalize
from swamla.ops.gated_delta.reference import gated_delta_step, recurrent_gated_delta_rule
from swamla.ops.graphs import OUTSIDE, open_to_graphs, outside_graphs
from swamla.ops.layout import Layout

__all__ = ["BACKENDS", "gated_delta_rule", "gated_delta_step", "l2_normalize"]


BACKENDS = ("auto", "reference", "torch", "fla")
WITHOUT_FLA = ("reference", "torch")


def resolve_backend(
    backend: str, device: torch.device, *, heads: int, key: int, value: int, dtype: torch.dtype = torch.bfloat16
) -> str:
    """The backend that a name means for heads of these widths on a device.

    "auto" is "torch", but on CUDA "fla" where it computes them right. Raises UsageError for an unknown name and
    MissingBackendError where "fla" cannot.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend = {backend!r}: the gated delta rule has {', '.join(map(repr, BACKENDS))}")
    if backend in WITHOUT_FLA:
        return backend
    if backend == "fla":
        if dtype.itemsize != 2:
            raise MissingBackendError(f'backend = "fla" takes bf16 or fp16, not {dtype}: use "torch"')
        if (reason := obstacle(device, heads, key, value)) is not None:
            raise MissingBackendError(f'backend = "fla" {reason}')
        return "fla"
    fits = device.type == "cuda" and dtype.itemsize == 2
    return "fla" if fits and obstacle(device, heads, key, value) is None else "torch"


def describe_backend(
    backend: str, device: torch.device, *, heads: int, key: int, value: int, dtype: torch.dtype = torch.bfloat16
) -> str:
    """`resolve_backend`, for people: says why "auto" leaves a flash-linear-attention that is there alone."""
    chosen = resolve_backend(backend, device, heads=heads, key=key, value=value, dtype=dtype)
    if (backend, chosen, device.type) != ("auto", "torch", "cuda") or not installed():
        return chosen
    reason = obstacle(device, heads, key, value) or "takes bf16 or fp16"
    return f"torch (fla {reason.partition(':')[0]})"


def prepare_rule(seq: Layout, backend: str, *, heads: int, key: int, value: int) -> None:
    """Make what the rule needs of the layout: before a graph that holds it, which would end to make it."""
    chosen = resolve_backend(backend, seq.position_BT.device, heads=heads, key=key, value=value)
    if chosen == "fla" and not seq.whole_rows:
        made_packing(seq)


@open_to_graphs
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
    `seq` each row is one document. Backends: "reference" (token by token), "torch" (chunks), "fla" (flash-linear-
    attention, on CUDA in 16 bits), "auto" (see `resolve_backend`). Raises UsageError for any other.
    `chunk`: tokens a chunk of "torch", by default 32 on a CPU and 64 on an accelerator.
    """
    inputs = (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH)
    if q_BTHK.device.type in OUTSIDE or backend in WITHOUT_FLA:
        return _rule_outside(*inputs, seq, initial_state_BHKV, scale, backend, chunk)
    heads, key, value, dtype = q_BTHK.shape[2], q_BTHK.shape[3], v_BTHV.shape[3], q_BTHK.dtype
    if resolve_backend(backend, q_BTHK.device, heads=heads, key=key, value=value, dtype=dtype) == "torch":
        return _rule_outside(*inputs, seq, initial_state_BHKV, scale, "torch", chunk)
    scale = key**-0.5 if scale is None else scale
    return fla_gated_delta_rule(*inputs, seq=seq, initial_state_BHKV=initial_state_BHKV, scale=scale)


@outside_graphs
def _rule_outside(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTH: Tensor,
    beta_BTH: Tensor,
    seq: Layout | None,
    initial_state_BHKV: Tensor | None,
    scale: float | None,
    backend: str,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    heads, key, value = q_BTHK.shape[2], q_BTHK.shape[3], v_BTHV.shape[3]
    backend = resolve_backend(backend, q_BTHK.device, heads=heads, key=key, value=value, dtype=q_BTHK.dtype)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
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
        documents,
        scale,
        chunk,
    )
