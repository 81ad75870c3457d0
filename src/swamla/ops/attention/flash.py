"""Attention by FlashAttention's kernels (arXiv 2307.08691) for packed rows, with attention sinks: the backend "flash".

The library knows windows and documents, but no sinks: what queries owe to the sinks before their window is computed by
plain products and merged by log-sum-exp. Not run on a GPU: tested on a CPU with a stand-in of the library's contract.
"""

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.errors import UsageError
from swamla.ops import libraries
from swamla.ops.attention.cuda import MULTIPLE, pad_to_multiple, pad_width
from swamla.ops.attention.reference import Window, attend_by_mask
from swamla.ops.graphs import in_dtype_of, outside_graphs
from swamla.ops.layout import Layout
from swamla.ops.libraries import numbers, version_of

INSTALL = "pip install flash-attn --no-build-isolation"
OLDEST, NEWEST = (2, 8), (3,)  # of flash-attn, the newest excluded: 3 has another interface
WIDEST = 256  # heads that its kernels take
DTYPES = (torch.bfloat16, torch.float16)
CHUNK = 128  # queries whose products with sinks are one batch entry, at most the window
INSTEAD = "flex"  # the backend to take where it cannot compute


class Bounds(NamedTuple):
    """Where the documents of B packed rows lie among the B·T tokens, int32; padding counts as documents.

    bounds_M: the first token of each, and the end; on the device and on the host.
    """

    bounds_M: Tensor
    host_bounds_M: Tensor


class Sinks(NamedTuple):
    """The sinks before the window, for N chunks of C queries (of the B·T, filled up at the end).

    A chunk is no longer than the window, so all its queries that have such sinks are of its first token's document.

    token_NS: which of the B·T tokens the sinks are.  seen_NCS: which of them lie before the query's window.
    first_N: the first chunk of the same document, on which gradients of the sinks are summed.
    """

    token_NS: Tensor
    seen_NCS: Tensor
    first_N: Tensor


def flash_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: Window,
    scale: float,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """(B, T, H, V) under the mask of `reference.allowed_mask`. Raises UsageError for other than 16 bits, wide heads."""
    widest = max(q_BTHK.shape[-1], v_BTGV.shape[-1])
    if q_BTHK.dtype not in DTYPES:
        raise UsageError(f'backend = "flash": takes bf16 or fp16, not {q_BTHK.dtype}: use "flex"')
    if widest > WIDEST:
        raise UsageError(f'backend = "flash": takes heads of width {WIDEST} at most, not {widest}: use "flex"')
    bounds = bounds_of(seq)
    tables = sinks_of(seq, window) if window.size is not None and window.sinks else (None, None, None)
    q, k, v = (pad_to_multiple(pad_width(x, widest)).flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGV))
    left = -1 if window.size is None else window.size - 1
    o_NHV = _Attention.apply(q, k, v, sink_logit_H, *bounds, *tables, left, scale)
    return o_NHV[..., : v_BTGV.shape[-1]].unflatten(0, q_BTHK.shape[:2])


class _Attention(torch.autograd.Function):
    """Attention within windows, merged with attention to the sinks before them.

    The library gives o_w and ℓ_w = log Σ exp s over a query's window; with the scores s_j of its sinks before it

        ℓ = log(exp ℓ_w + Σ_j exp s_j)        o = exp(ℓ_w − ℓ) o_w + Σ_j p_j v_j,    p_j = exp(s_j − ℓ)

    The backward pass of FlashAttention knows a softmax by its o and ℓ alone: p = exp(s − ℓ), D = do·o,
    ds = p (do·v − D). Given the merged o and ℓ it therefore returns the window's exact part of the gradients of the
    whole softmax; no gradient of ℓ_w, which the library has not, is needed. The sinks' part is the same formula:

        ds_j = p_j (do·v_j − D)        dq += scale Σ_j ds_j k_j,    dk_j += scale Σ_queries ds_j q,    dv_j += Σ p_j do

    A learned sink logit is such a score without a value: merged last, its gradient is Σ_queries −exp(logit − ℓ) D.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_MHK: Tensor,
        k_MGK: Tensor,
        v_MGK: Tensor,
        sink_logit_H: Tensor | None,
        bounds: Tensor,
        host_bounds: Tensor,
        token_NS: Tensor | None,
        seen_NCS: Tensor | None,
        first_N: Tensor | None,
        left: int,
        scale: float,
    ) -> Tensor:
        o_MHK, lse_HM = torch.ops.swamla.flash_window(q_MHK, k_MGK, v_MGK, bounds, host_bounds, left, scale)
        if token_NS is not None and seen_NCS is not None:
            score_NHCS = _scores(q_MHK, k_MGK, token_NS, seen_NCS, scale)
            window_NHC = _by_chunks(lse_HM.T, seen_NCS).transpose(1, 2)
            lse_NHC = torch.logaddexp(window_NHC, score_NHCS.logsumexp(-1))
            weight_NHCS = (score_NHCS - lse_NHC[..., None]).exp()
            rest_NCH1 = (window_NHC - lse_NHC).exp().transpose(1, 2)[..., None]
            o_NCHK = _by_chunks(o_MHK, seen_NCS) * rest_NCH1 + _of_sinks(
                weight_NHCS, _at_sinks(v_MGK, token_NS, seen_NCS), seen_NCS
            )
            o_MHK = in_dtype_of(q_MHK, o_NCHK.flatten(0, 1)[: len(q_MHK)])
            lse_HM = lse_NHC.transpose(0, 1).flatten(1)[:, : len(q_MHK)].contiguous()
        if sink_logit_H is not None:
            alone_HM, lse_HM = lse_HM, torch.logaddexp(lse_HM, sink_logit_H.to(lse_HM.dtype)[:, None])
            o_MHK = in_dtype_of(q_MHK, o_MHK * (alone_HM - lse_HM).exp().T[..., None])
        tables = bounds, host_bounds, token_NS, seen_NCS, first_N
        ctx.save_for_backward(q_MHK, k_MGK, v_MGK, o_MHK, lse_HM, sink_logit_H, *tables)
        ctx.left, ctx.scale = left, scale
        return o_MHK

    @staticmethod
    def backward(ctx: Any, d_o_MHK: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse_HM, sink_logit_H, bounds, host_bounds, token_NS, seen_NCS, first_N = ctx.saved_tensors
        found = torch.ops.swamla.flash_window_backward(
            d_o_MHK, q, k, v, o, lse_HM, bounds, host_bounds, ctx.left, ctx.scale
        )
        if token_NS is None and sink_logit_H is None:
            return *found, *(None,) * 8
        inner_MH = (d_o_MHK.float() * o.float()).sum(-1)
        d_sink_H = None
        if sink_logit_H is not None:
            d_sink_H = -((sink_logit_H[:, None] - lse_HM).exp() * inner_MH.T).sum(-1).to(sink_logit_H.dtype)
        if token_NS is None:
            return *found, d_sink_H, *(None,) * 7
        dq, dk, dv = found
        d_o_NCHK, q_NCHK = (_seeing(_by_chunks(x, seen_NCS).float(), seen_NCS) for x in (d_o_MHK, q))
        inner_NHC = _by_chunks(inner_MH, seen_NCS).transpose(1, 2)
        lse_NHC = _by_chunks(lse_HM.T, seen_NCS).transpose(1, 2)
        weight_NHCS = (_scores(q, k, token_NS, seen_NCS, ctx.scale) - lse_NHC[..., None]).exp()
        weight_NHCS = weight_NHCS.masked_fill(~seen_NCS[:, None], 0)
        d_weight_NHCS = _to_sinks(d_o_NCHK, _at_sinks(v, token_NS, seen_NCS))
        d_score_NHCS = ctx.scale * weight_NHCS * (d_weight_NHCS - inner_NHC[..., None])
        d_score_NHCS = d_score_NHCS.masked_fill(~seen_NCS[:, None], 0)
        of_q = _of_sinks(d_score_NHCS, _at_sinks(k, token_NS, seen_NCS), seen_NCS).flatten(0, 1)[: len(q)]
        for gradient, weights, outputs in ((dk, d_score_NHCS, q_NCHK), (dv, weight_NHCS, d_o_NCHK)):
            # A document's sinks get one sum over all its chunks, in fp32: at its first chunk, zeros at the others.
            chunks_NSGK = _summed(weights, outputs, k.shape[1]).masked_fill(_unseen(seen_NCS), 0)
            sums_NSGK = torch.zeros_like(chunks_NSGK).index_add_(0, first_N, chunks_NSGK)
            gradient.index_add_(0, token_NS.flatten(), sums_NSGK.flatten(0, 1).to(gradient.dtype))
        return (dq + of_q).to(dq.dtype), dk, dv, d_sink_H, *(None,) * 7


def _by_chunks(x_MX: Tensor, seen_NCS: Tensor) -> Tensor:
    """(N, C, …) of (M, …), filled up with zeros."""
    count, size = seen_NCS.shape[:2]
    missing = count * size - len(x_MX)
    filled = F.pad(x_MX, (0, 0) * (x_MX.dim() - 1) + (0, missing)) if missing else x_MX
    return filled.unflatten(0, (count, size))


def _scores(q_MHK: Tensor, k_MGK: Tensor, token_NS: Tensor, seen_NCS: Tensor, scale: float) -> Tensor:
    score_NHCS = scale * _to_sinks(_by_chunks(q_MHK, seen_NCS).float(), _at_sinks(k_MGK, token_NS, seen_NCS))
    return score_NHCS.masked_fill(~seen_NCS[:, None], float("-inf"))


def _at_sinks(x_MGK: Tensor, token_NS: Tensor, seen_NCS: Tensor) -> Tensor:
    """(N, S, G, K): the sinks' vectors, zeros for those that no query sees: they may be another document's."""
    return x_MGK[token_NS].masked_fill(_unseen(seen_NCS), 0)


def _unseen(seen_NCS: Tensor) -> Tensor:
    """(N, S, 1, 1): which sinks no query of the chunk sees."""
    return ~seen_NCS.any(1)[..., None, None]


def _to_sinks(x_NCHK: Tensor, y_NSGK: Tensor) -> Tensor:
    """(N, H, C, S): products of each query head's vectors with its key head's at the sinks."""
    x_NCGRK = x_NCHK.unflatten(2, (y_NSGK.shape[2], -1))
    return torch.einsum("ncgrk,nsgk->ngrcs", x_NCGRK, y_NSGK.float()).flatten(1, 2)


def _of_sinks(weight_NHCS: Tensor, y_NSGK: Tensor, seen_NCS: Tensor) -> Tensor:
    """(N, C, H, K): sums of the sinks' vectors, weighted for each query."""
    weight_NGRCS = weight_NHCS.unflatten(1, (y_NSGK.shape[2], -1))
    return _seeing(torch.einsum("ngrcs,nsgk->ncgrk", weight_NGRCS, y_NSGK.float()).flatten(2, 3), seen_NCS)


def _seeing(x_NCHK: Tensor, seen_NCS: Tensor) -> Tensor:
    """Zeros for queries that see no sinks: some are of another document, whose NaN a weight of zero would let pass."""
    return x_NCHK.masked_fill(~seen_NCS.any(-1)[..., None, None], 0)


def _summed(weight_NHCS: Tensor, x_NCHK: Tensor, groups: int) -> Tensor:
    """(N, S, G, K): sums of the queries' vectors, weighted for each sink."""
    weight_NGRCS, x_NCGRK = weight_NHCS.unflatten(1, (groups, -1)), x_NCHK.unflatten(2, (groups, -1))
    return torch.einsum("ngrcs,ncgrk->nsgk", weight_NGRCS, x_NCGRK)


# --- what the layout's tables hold


def bounds_of(seq: Layout) -> Bounds:
    """The layout's `Bounds`, built at their first use. If they were built eagerly, no graph breaks here."""
    made = seq.made("flash")
    return _build_bounds(seq) if made is None else made


@outside_graphs
def _build_bounds(seq: Layout) -> Bounds:
    return seq.table("flash", lambda: _bounds(seq))


def _bounds(seq: Layout) -> Bounds:
    # From `seq.runs`, which is on the host: no device synchronisation.
    lengths = torch.tensor([length for count, length in seq.runs for _ in range(count)])
    host_bounds_M = F.pad(lengths.cumsum(0), (1, 0)).int()
    bounds_M = host_bounds_M.to(seq.document_BT.device, non_blocking=True, copy=True)  # a graph takes no tensor twice
    for bounds in (bounds_M, host_bounds_M):  # of another length in every batch: one graph for all
        torch._dynamo.maybe_mark_dynamic(bounds, 0)
    return Bounds(bounds_M, host_bounds_M)


def sinks_of(seq: Layout, window: Window) -> Sinks:
    """The layout's `Sinks` for this window, built at their first use. If they were built eagerly, no graph breaks."""
    made = seq.made(("flash", window.size, window.sinks))  # a flat key, as of block masks
    return _build_sinks(seq, window) if made is None else made


@outside_graphs
def _build_sinks(seq: Layout, window: Window) -> Sinks:
    return seq.table(("flash", window.size, window.sinks), lambda: _sinks(seq, window))


def _sinks(seq: Layout, window: Window) -> Sinks:
    """From positions alone: sink j of a document lies before the window of position p if j ≤ p − size."""
    assert window.size is not None
    size, device = min(window.size, CHUNK), seq.position_BT.device
    total = seq.shape[0] * seq.shape[1]
    count = -(-total // size)
    position_NC = F.pad(seq.position_BT.flatten(), (0, count * size - total), value=-1).view(count, size)
    begin_N = torch.arange(count, device=device) * size - position_NC[:, 0]
    sink_S = torch.arange(window.sinks, device=device)
    # A position beyond the window is of a document that began before the chunk: that of the chunk's first token.
    seen_NCS = sink_S <= position_NC[..., None] - window.size
    token_NS = (begin_N[:, None] + sink_S).clamp(max=total - 1)
    return Sinks(token_NS, seen_NCS, torch.searchsorted(begin_N, begin_N))


# --- the library's kernels, as ops that a graph of torch.compile can hold


@torch.library.custom_op("swamla::flash_window", mutates_args=())
def _window(
    q_MHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, bounds: Tensor, host_bounds: Tensor, left: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs, and log-sum-exps (H, M) in fp32, of attention to at most `left` tokens before (−1: all)."""
    o_MHK, lse_HM, *_ = _library()._wrapped_flash_attn_varlen_forward(
        q_MHK, k_MGK, v_MGK, bounds, bounds, *_longest(host_bounds), **_settings(left, scale)
    )
    return o_MHK.contiguous(), lse_HM.contiguous()


@torch.library.custom_op("swamla::flash_window_backward", mutates_args=())
def _window_backward(
    d_o_MHK: Tensor,
    q_MHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    o_MHK: Tensor,
    lse_HM: Tensor,
    bounds: Tensor,
    host_bounds: Tensor,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the window's share of a softmax that o and lse describe."""
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_MHK, k_MGK, v_MGK)]
    _library()._wrapped_flash_attn_varlen_backward(
        d_o_MHK.contiguous(), q_MHK, k_MGK, v_MGK, o_MHK, lse_HM, *gradients, bounds, bounds, *_longest(host_bounds),
        **_settings(left, scale), deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    dq, dk, dv = gradients
    return dq, dk, dv


def _library() -> Any:
    return import_module("flash_attn.flash_attn_interface")


def _longest(host_bounds: Tensor) -> tuple[int, int]:
    longest = int(host_bounds.diff().max())
    return longest, longest


def _settings(left: int, scale: float) -> dict[str, Any]:
    window = {"window_size_left": left, "window_size_right": 0}
    return {"dropout_p": 0.0, "softmax_scale": scale, "causal": True, **window, "softcap": 0.0, "alibi_slopes": None}


@_window.register_fake
def _fake_window(q_MHK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _width = q_MHK.shape
    return q_MHK.new_empty(q_MHK.shape), q_MHK.new_empty(heads, tokens, dtype=torch.float32)


@_window_backward.register_fake
def _fake_window_backward(_: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:3])


# --- whether it is there


def preferred(key: int, value: int, dtype: torch.dtype) -> bool:
    """Whether "auto" takes it for these heads where it is there: those that flex would widen to a power of two.

    Nothing was measured: what decides is that flex computes a third more than it has to for heads 96 wide.
    """
    return dtype in DTYPES and key == value <= WIDEST and key % MULTIPLE == 0 and key & (key - 1) != 0


def obstacle(device: torch.device | str, width: int = 64) -> str | None:
    """Why it cannot compute heads of this width on `device`, to follow the word "flash"; None if it can.

    Runs the kernels once on packed rows and compares outputs and gradients with the reference.
    """
    return libraries.obstacle(torch.device(device), ("flash", str(width)), partial(_obstacle, width=width), INSTEAD)


def _obstacle(device: str, width: int) -> str | None:
    if find_spec("flash_attn") is None:
        return f"needs flash-attn: {INSTALL}"
    said = version_of("flash-attn")
    if not OLDEST <= numbers(said) < NEWEST:
        wanted = f"flash-attn >= {'.'.join(map(str, OLDEST))}, < {NEWEST[0]}"
        return f"needs {wanted}, {said or 'another'} is installed: {INSTALL}"
    if torch.device(device).type != "cuda":
        return f'needs a CUDA device, these tensors are on {device}: use "torch"'
    return _probe(device, width) if torch.cuda.is_available() else None


@torch.inference_mode(False)  # a generation may be the first to ask
def _probe(device: str, width: int) -> str | None:
    """What goes wrong with packed rows, windows and sinks, or None."""
    generator = torch.Generator().manual_seed(0)
    document_BT = torch.tensor([[0] * 300 + [1] * 84, [0] * 384])
    seq = Layout.from_documents(document_BT).to(device)
    inputs = [torch.randn(*seq.shape, heads, width, generator=generator).to(device, DTYPES[0]) for heads in (4, 2, 2)]
    return libraries.judged(
        lambda: (
            _with_gradients(flash_attention, inputs, seq, precise=False),
            _with_gradients(attend_by_mask, inputs, seq, precise=True),
        ),
        INSTEAD,
    )


def _with_gradients(attend: Any, inputs: list[Tensor], seq: Layout, *, precise: bool) -> list[Tensor]:
    leaves = [(x.float() if precise else x).detach().requires_grad_() for x in inputs]
    with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
        o = attend(*leaves, seq, Window(100, 4), leaves[0].shape[-1] ** -0.5)
        return [o.detach(), *torch.autograd.grad(o.float().square().sum(), leaves)]
