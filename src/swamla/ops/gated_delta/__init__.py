"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): linear attention with a decaying, error-correcting state."""

import torch
from torch import Tensor

from swamla.errors import MissingBackendError, UsageError
from swamla.ops.exported import linear_attention
from swamla.ops.fla import installed, packing_of
from swamla.ops.gated_delta.cpu import chunked_gated_delta_rule
from swamla.ops.gated_delta.cuda import fla_gated_delta_rule, obstacle
from swamla.ops.gated_delta.reference import RuleInputs, recurrent_gated_delta_rule
from swamla.ops.gated_delta.reference import gated_delta_step as gated_delta_step
from swamla.ops.layout import Layout

BACKENDS = ("auto", "reference", "torch", "fla")


def resolve_backend(
    backend: str, device: torch.device, *, heads: int, key: int, value: int, dtype: torch.dtype = torch.bfloat16
) -> str:
    """The backend that a name means on a device, for `heads` heads with these key and value widths.

    "auto" is "fla" on CUDA where flash-linear-attention computes these heads correctly, else "torch". Raises
    UsageError for an unknown name and MissingBackendError where "fla" cannot compute them.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend = {backend!r}: the gated delta rule has {', '.join(map(repr, BACKENDS))}")
    if backend in ("reference", "torch"):
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
    """`resolve_backend` as a text to print: says why "auto" does not use an installed flash-linear-attention."""
    chosen = resolve_backend(backend, device, heads=heads, key=key, value=value, dtype=dtype)
    if (backend, chosen, device.type) != ("auto", "torch", "cuda") or not installed():
        return chosen
    reason = obstacle(device, heads, key, value) or "takes bf16 or fp16"
    return f"torch (fla {reason.partition(':')[0]})"


def prepare_rule(seq: Layout, backend: str, *, heads: int, key: int, value: int) -> None:
    """Probe the backend and build the document bounds eagerly, so that the compiled rule has no graph break."""
    chosen = resolve_backend(backend, seq.position_BT.device, heads=heads, key=key, value=value)
    if chosen == "fla" and not seq.whole_rows:
        packing_of(seq)


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
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V) in fp32 (fp64 for fp64 inputs).

        S ← e^{log α} S ;  u = β (v − Sᵀ k) ;  S ← S + k uᵀ ;  o = scale · Sᵀ q        scale: K^-½ unless given

    The initial state (zeros by default) belongs to the document of each row's first token. Later documents start from
    zero, and the final state is that of the row's last document. Padding gives zeros and does not change the state.
    Without `seq` each row is one document. Backends: "reference" (token by token), "torch" (chunkwise parallel), "fla"
    (flash-linear-attention, on CUDA in 16 bits), "auto" (see `resolve_backend`, also for what is raised).
    chunk: tokens per chunk of "torch", by default 32 on a CPU and 64 elsewhere. Source: arXiv 2412.06464, eq. 10.
    """
    heads, key, value = q_BTHK.shape[2], q_BTHK.shape[3], v_BTHV.shape[3]
    path = resolve_backend(backend, q_BTHK.device, heads=heads, key=key, value=value, dtype=q_BTHK.dtype)
    inputs = RuleInputs(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH)
    scale = key**-0.5 if scale is None else scale
    if torch.compiler.is_exporting():
        return linear_attention(q_BTHK, k_BTHK, v_BTHV, initial_state_BHKV, log_alpha_BTH[..., None], beta_BTH, scale)
    if path == "reference":
        return recurrent_gated_delta_rule(inputs, initial_state_BHKV, seq, scale=scale)
    if path == "fla":
        return fla_gated_delta_rule(inputs, initial_state_BHKV, seq, scale=scale)
    chunk = min(chunk or (32 if q_BTHK.device.type == "cpu" else 64), q_BTHK.shape[1])
    return chunked_gated_delta_rule(inputs, initial_state_BHKV, seq, scale=scale, chunk=chunk)
