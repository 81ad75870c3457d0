"""Causal depthwise convolution of a few taps, then SiLU: the local mixing in front of a linear recurrence."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.errors import UsageError
from swamla.ops.graphs import OUTSIDE, open_to_graphs, outside_graphs
from swamla.ops.layout import Layout

# On a CPU the fast path works on blocks of about this many elements, so that all its passes run in cache.
CPU_BLOCK = 2**18


@open_to_graphs
def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    *,
    seq: Layout | None = None,
    history_BWD: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """silu(sum_i weight[:, i] x[t - (W - 1) + i]): y (B, T, D) in x's dtype; weight[:, -1] meets the current token.

    A token sees its own document only. `history_BWD` holds the W - 1 inputs before the row (zeros unless given); they
    belong to the document of the row's first token. Backends: "reference" (a masked sum of shifted inputs), "torch"
    (hand-written backward), "auto" ("reference" for rows shorter than two windows, and in a graph on a GPU, whose
    compiler makes one kernel of it; else "torch"). Raises UsageError for any other.
    """
    if x_BTD.device.type in OUTSIDE or backend != "auto" or not torch.compiler.is_compiling():
        return _outside(x_BTD, weight_DW, seq, history_BWD, backend)
    if history_BWD is None:
        history_BWD = x_BTD.new_zeros(x_BTD.shape[0], weight_DW.shape[-1] - 1, x_BTD.shape[2])
    return _reference(x_BTD, weight_DW, seq, history_BWD)


@outside_graphs
def _outside(x_BTD: Tensor, weight_DW: Tensor, seq: Layout | None, history_BWD: Tensor | None, backend: str) -> Tensor:
    batch, time, width = x_BTD.shape
    taps = weight_DW.shape[-1]
    if backend not in ("auto", "reference", "torch"):
        raise UsageError(f'backend = {backend!r}: short_conv has "auto", "reference" and "torch"')
    if history_BWD is None:
        history_BWD = x_BTD.new_zeros(batch, taps - 1, width)
    if backend == "reference" or (backend == "auto" and time < 2 * taps):
        return _reference(x_BTD, weight_DW, seq, history_BWD)
    if seq is None:
        edges = _edges(Layout.one_document_per_row(batch, time), taps, x_BTD.device)
    else:
        edges = seq.table(("short_conv", taps), lambda: _edges(seq, taps, x_BTD.device))
    return _ShortConv.apply(x_BTD, weight_DW, history_BWD, edges)


def _reference(x_BTD: Tensor, weight_DW: Tensor, seq: Layout | None, history_BWD: Tensor) -> Tensor:
    """The definition: one masked, shifted product a tap, in fp32 (double for double inputs)."""
    time, taps = x_BTD.shape[1], weight_DW.shape[-1]
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    line_BSD = torch.cat([history_BWD.to(dtype), x_BTD.to(dtype)], dim=1)
    age_BT = None if seq is None else _age(seq.position_BT, taps)
    y_BTD = torch.zeros_like(x_BTD, dtype=dtype)
    for tap in range(taps):
        shifted_BTD = line_BSD[:, tap : tap + time]
        if age_BT is not None:
            shifted_BTD = shifted_BTD.masked_fill((age_BT < taps - 1 - tap)[..., None], 0)
        y_BTD = y_BTD + shifted_BTD * weight_DW[:, tap].to(dtype)
    return F.silu(y_BTD).to(x_BTD.dtype)


def _age(position_BT: Tensor, taps: int) -> Tensor:
    """How many inputs before each token (B, T) it may see; the row's first document reaches back into the history."""
    index_T = torch.arange(position_BT.shape[1], device=position_BT.device)
    return torch.where(position_BT < index_T, position_BT, index_T + taps - 1)


class _Edges(NamedTuple):
    """The M tokens whose window is not simply the W rows that end with them in the flattened (B*T, D) input.

    Their windows have M*W slots: I of them hold rows of the input, J rows of the flattened history, the rest zeros.
    """

    token_M: Tensor
    input_slot_I: Tensor
    input_row_I: Tensor
    history_slot_J: Tensor
    history_row_J: Tensor
    edge_N1: Tensor  # whether a token is one of them


def _edges(seq: Layout, taps: int, device: torch.device) -> _Edges:
    """Found on the host, which would have to wait for another device to count them."""
    edges = _make_edges(_age(seq.host_position_BT, taps), taps)
    return _Edges(*(x.to(device, non_blocking=True) for x in edges))


def _make_edges(age_BT: Tensor, taps: int) -> _Edges:
    time = age_BT.shape[1]
    index_T = torch.arange(time, device=age_BT.device)
    edge_BT = (index_T < taps - 1) | (age_BT < taps - 1)
    token_M = edge_BT.flatten().nonzero().flatten()
    back_W = torch.arange(taps - 1, -1, -1, device=age_BT.device)
    source_MW = (token_M % time)[:, None] - back_W
    visible_MW = back_W <= age_BT.flatten()[token_M][:, None]
    input_slot_I = (visible_MW & (source_MW >= 0)).flatten().nonzero().flatten()
    history_slot_J = (visible_MW & (source_MW < 0)).flatten().nonzero().flatten()
    input_row_MW = token_M[:, None] - back_W
    history_row_MW = (token_M // time)[:, None] * (taps - 1) + taps - 1 + source_MW
    return _Edges(
        token_M,
        input_slot_I,
        input_row_MW.flatten()[input_slot_I],
        history_slot_J,
        history_row_MW.flatten()[history_slot_J],
        edge_BT.flatten()[:, None],
    )


class _ShortConv(torch.autograd.Function):
    """Convolves the whole batch as one line of B*T rows, then mends the tokens at its edges."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_DW: Tensor, history_BWD: Tensor, edges: _Edges) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_DW, history_BWD)
        ctx.edges = edges
        x_ND, weight_WD = x_BTD.flatten(0, 1), _taps_first(weight_DW, x_BTD)
        y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        for start, stop in _blocks(x_ND):
            y_ND[start:stop] = F.silu(_convolve(_with_past(x_ND, start, stop, weight_WD), weight_WD))
        window_MWD = _edge_windows(x_ND, history_BWD, weight_WD, edges)
        y_ND[edges.token_M] = F.silu((window_MWD * weight_WD).sum(1)).to(y_ND.dtype)
        return y_ND.view(x_BTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weight_DW, history_BWD = ctx.saved_tensors
        edges: _Edges = ctx.edges
        x_ND, dy_ND, weight_WD = x_BTD.flatten(0, 1), dy_BTD.flatten(0, 1), _taps_first(weight_DW, x_BTD)
        dx_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        taps = weight_WD.shape[0]
        d_weight_WD = torch.zeros_like(weight_WD)
        after_WD = weight_WD.new_zeros(taps - 1, x_ND.shape[-1])  # first gradients of the block that follows
        for start, stop in reversed(_blocks(x_ND)):
            past_SD = _with_past(x_ND, start, stop, weight_WD)
            d_conv_CD = _silu_backward(dy_ND[start:stop], _convolve(past_SD, weight_WD))
            d_conv_CD.masked_fill_(edges.edge_N1[start:stop], 0)  # not times 0, which a NaN of a neighbour would pass
            for tap in range(taps):
                d_weight_WD[tap] += (d_conv_CD * past_SD[tap : tap + stop - start]).sum(0)
            future_SD = torch.cat([d_conv_CD, after_WD])
            dx_ND[start:stop] = _convolve(future_SD, weight_WD.flip(0))
            after_WD = future_SD[: taps - 1]

        window_MWD = _edge_windows(x_ND, history_BWD, weight_WD, edges)
        d_edge_MD = _silu_backward(dy_ND[edges.token_M], (window_MWD * weight_WD).sum(1))
        d_weight_WD += (d_edge_MD[:, None] * window_MWD).sum(0)
        d_slot_SD = (d_edge_MD[:, None] * weight_WD).flatten(0, 1)
        dx_ND.index_add_(0, edges.input_row_I, d_slot_SD[edges.input_slot_I].to(dx_ND.dtype))
        d_history_BWD = torch.zeros_like(history_BWD, memory_format=torch.contiguous_format)
        d_past_SD = d_slot_SD[edges.history_slot_J].to(d_history_BWD.dtype)
        d_history_BWD.flatten(0, 1).index_add_(0, edges.history_row_J, d_past_SD)
        return dx_ND.view(x_BTD.shape), d_weight_WD.T.to(weight_DW.dtype), d_history_BWD, None


def _taps_first(weight_DW: Tensor, x: Tensor) -> Tensor:
    return weight_DW.T.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _blocks(x_ND: Tensor) -> list[tuple[int, int]]:
    n, width = x_ND.shape
    size = max(1, CPU_BLOCK // width) if x_ND.device.type == "cpu" else n
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _with_past(x_ND: Tensor, start: int, stop: int, weight_WD: Tensor) -> Tensor:
    """Rows [start - (W - 1), stop) in the weight's dtype, zeros before the line's start."""
    reach = weight_WD.shape[0] - 1
    rows_SD = x_ND[max(0, start - reach) : stop].to(weight_WD.dtype)
    return F.pad(rows_SD, (0, 0, max(0, reach - start), 0))


def _convolve(line_SD: Tensor, weight_WD: Tensor) -> Tensor:
    """sum_i weight[i] line[n + i], W - 1 rows shorter than the line."""
    taps, length = weight_WD.shape[0], line_SD.shape[0] - weight_WD.shape[0] + 1
    y_CD = line_SD[:length] * weight_WD[0]
    for tap in range(1, taps):
        y_CD.addcmul_(line_SD[tap : tap + length], weight_WD[tap])
    return y_CD


def _silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(dy.to(x.dtype), x)


def _edge_windows(x_ND: Tensor, history_BWD: Tensor, weight_WD: Tensor, edges: _Edges) -> Tensor:
    """The W inputs that each edge token sees (M, W, D), zeros where it sees none."""
    taps, width = weight_WD.shape
    slot_SD = weight_WD.new_zeros(edges.token_M.shape[0] * taps, width)
    slot_SD[edges.input_slot_I] = x_ND[edges.input_row_I].to(weight_WD.dtype)
    slot_SD[edges.history_slot_J] = history_BWD.flatten(0, 1)[edges.history_row_J].to(weight_WD.dtype)
    return slot_SD.unflatten(0, (-1, taps))
