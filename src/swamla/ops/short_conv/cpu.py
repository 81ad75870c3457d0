"""The short convolution with a hand-written backward pass: the backend "torch", a CPU's fast path."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout
from swamla.ops.short_conv.reference import Activation, visible_inputs

# Elements of a block on a CPU. With one thread a block fits the cache. Several threads would synchronise at every pass
# over such a block, so they give larger blocks to oneDNN, as images of PIECE tokens each (on one long image oneDNN is
# half as fast).
BLOCK, THREADS_BLOCK = 2**18, 2**22
PIECE = 512


@outside_graphs
def convolve_line(
    x_BTD: Tensor, weight_DW: Tensor, seq: Layout | None, history_BWD: Tensor | None, activation: Activation
) -> Tensor:
    """`short_conv` of the batch as one sequence of B*T rows; tokens at document edges are then computed separately."""
    batch, time, width = x_BTD.shape
    taps = weight_DW.shape[-1]
    if history_BWD is None:
        history_BWD = x_BTD.new_zeros(batch, taps - 1, width)
    if seq is None:
        edges = _edges(Layout.one_document_per_row(batch, time), taps, x_BTD.device)
    else:
        edges = seq.table(("short_conv", taps), lambda: _edges(seq, taps, x_BTD.device))
    return _ShortConv.apply(x_BTD, weight_DW, history_BWD, edges, activation == "silu")


class _Edges(NamedTuple):
    """The M edge tokens, whose window is not the last W rows of the flattened (B*T, D) input.

    Of the M*W slots of their windows, I are rows of the input, J are rows of the flattened history, the others are 0.
    """

    token_M: Tensor
    input_slot_I: Tensor
    input_row_I: Tensor
    history_slot_J: Tensor
    history_row_J: Tensor

    def within(self, start: int, stop: int, n: int) -> Tensor:
        """The edge tokens in [start, stop) of N tokens, counted from `start`."""
        if stop - start == n:  # all of them: no synchronisation with an accelerator
            return self.token_M
        return self.token_M[(self.token_M >= start) & (self.token_M < stop)] - start


def _edges(seq: Layout, taps: int, device: torch.device) -> _Edges:
    """Computed on the host: their number depends on the data, which would synchronise with the device."""
    edges = _edges_of(visible_inputs(seq.host_position_BT, taps), taps)
    return _Edges(*(x.to(device, non_blocking=True) for x in edges))


def _edges_of(age_BT: Tensor, taps: int) -> _Edges:
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
    )


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_DW: Tensor, history_BWD: Tensor, edges: _Edges, silu: bool) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_DW, history_BWD)
        ctx.edges, ctx.silu = edges, silu
        x_ND, weight_WD = x_BTD.flatten(0, 1), _taps_first(weight_DW, x_BTD)
        y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        for start, stop in _blocks(x_ND, len(weight_WD)):
            if _suits_onednn(x_ND[start:stop], weight_WD):
                y_CD = _rows(_convolve_images(_images(x_ND, start, stop, weight_WD), weight_WD))[: stop - start]
            else:
                y_CD = _convolve(_with_past(x_ND, start, stop, weight_WD), weight_WD)
            y_ND[start:stop] = F.silu(y_CD) if silu else y_CD
        window_MWD = _edge_windows(x_ND, history_BWD, weight_WD, edges)
        y_MD = (window_MWD * weight_WD).sum(1)
        y_ND[edges.token_M] = (F.silu(y_MD) if silu else y_MD).to(y_ND.dtype)
        return y_ND.view(x_BTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weight_DW, history_BWD = ctx.saved_tensors
        edges: _Edges = ctx.edges
        silu: bool = ctx.silu
        x_ND, dy_ND, weight_WD = x_BTD.flatten(0, 1), dy_BTD.flatten(0, 1), _taps_first(weight_DW, x_BTD)
        dx_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        taps = weight_WD.shape[0]
        d_weight_WD = torch.zeros_like(weight_WD)
        after_WD = weight_WD.new_zeros(taps - 1, x_ND.shape[-1])  # the next block's gradients of this block's last rows
        for start, stop in reversed(_blocks(x_ND, taps)):
            edge_M = edges.within(start, stop, len(x_ND))
            if _suits_onednn(x_ND[start:stop], weight_WD):
                line = _images(x_ND, start, stop, weight_WD)
                after_WD, d_taps_WD = _backward_of_images(
                    dy_ND[start:stop], edge_M, line, weight_WD, after_WD, dx_ND[start:stop], silu=silu
                )
            else:
                line = _with_past(x_ND, start, stop, weight_WD)
                d_past_SD, d_taps_WD = _backward(dy_ND[start:stop], edge_M, line, weight_WD, silu=silu)
                d_past_SD[stop - start :].add_(after_WD)
                dx_ND[start:stop] = d_past_SD[taps - 1 :]
                after_WD = d_past_SD[: taps - 1]
            d_weight_WD += d_taps_WD

        window_MWD = _edge_windows(x_ND, history_BWD, weight_WD, edges)
        d_edge_MD = dy_ND[edges.token_M].to(weight_WD.dtype)
        if silu:
            d_edge_MD = _silu_backward(d_edge_MD, (window_MWD * weight_WD).sum(1))
        d_weight_WD += (d_edge_MD[:, None] * window_MWD).sum(0)
        d_slot_SD = (d_edge_MD[:, None] * weight_WD).flatten(0, 1)
        dx_ND.index_add_(0, edges.input_row_I, d_slot_SD[edges.input_slot_I].to(dx_ND.dtype))
        d_history_BWD = torch.zeros_like(history_BWD, memory_format=torch.contiguous_format)
        d_past_SD = d_slot_SD[edges.history_slot_J].to(d_history_BWD.dtype)
        d_history_BWD.flatten(0, 1).index_add_(0, edges.history_row_J, d_past_SD)
        return dx_ND.view(x_BTD.shape), d_weight_WD.T.to(weight_DW.dtype), d_history_BWD, None, None


def _taps_first(weight_DW: Tensor, x: Tensor) -> Tensor:
    return weight_DW.T.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _blocks(x_ND: Tensor, taps: int) -> list[tuple[int, int]]:
    n, width = x_ND.shape
    block = THREADS_BLOCK if torch.get_num_threads() > 1 else BLOCK
    size = max(block // width, taps) if x_ND.device.type == "cpu" else n
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _with_past(x_ND: Tensor, start: int, stop: int, weight_WD: Tensor) -> Tensor:
    """Rows [start - (W - 1), stop) in the weight's dtype, zeros before the first row."""
    reach = weight_WD.shape[0] - 1
    rows_SD = x_ND[max(0, start - reach) : stop].to(weight_WD.dtype)
    return rows_SD if start >= reach else F.pad(rows_SD, (0, 0, reach - start, 0))  # F.pad copies even for 0 rows


def _convolve(line_SD: Tensor, weight_WD: Tensor) -> Tensor:
    """Σ_i weight[i] line[n + i]: W − 1 rows fewer than the line."""
    taps, length = weight_WD.shape[0], line_SD.shape[0] - weight_WD.shape[0] + 1
    y_CD = line_SD[:length] * weight_WD[0]
    for tap in range(1, taps):
        y_CD.addcmul_(line_SD[tap : tap + length], weight_WD[tap])
    return y_CD


def _backward(
    dy_CD: Tensor, edge_M: Tensor, line_SD: Tensor, weight_WD: Tensor, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of line (S, D) and weight (W, D), given those of f(_convolve(line, weight)), without edge tokens."""
    taps, length = weight_WD.shape[0], dy_CD.shape[0]
    d_CD = _silu_backward(dy_CD, _convolve(line_SD, weight_WD)) if silu else dy_CD.to(weight_WD.dtype, copy=True)
    d_CD.index_fill_(0, edge_M, 0)  # 0 · NaN would carry a neighbouring document's NaN
    d_weight_WD = torch.stack([(d_CD * line_SD[tap : tap + length]).sum(0) for tap in range(taps)])
    return _convolve(F.pad(d_CD, (0, 0, taps - 1, taps - 1)), weight_WD.flip(0)), d_weight_WD


def _backward_of_images(
    dy_CD: Tensor,
    edge_M: Tensor,
    line_PD1S: Tensor,
    weight_WD: Tensor,
    after_WD: Tensor,
    dx_CD: Tensor,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """As `_backward`, for the line as images: writes the gradient of the block's own rows into `dx_CD`.

    after_WD: the next block's gradients of the block's last rows. Returns the gradients of the W − 1 rows before the
    block, and of the weight.
    """
    reach, (length, width) = weight_WD.shape[0] - 1, dy_CD.shape
    pieces, piece = line_PD1S.shape[0], line_PD1S.shape[-1] - reach
    d_CD = line_PD1S.new_empty(pieces * piece, width)
    d_CD[:length].copy_(dy_CD)
    d_CD[length:].zero_()
    d_PD1C = d_CD.view(pieces, 1, piece, width).permute(0, 3, 1, 2)
    if silu:
        y_PD1C = _convolve_images(line_PD1S, weight_WD)
        torch.ops.aten.silu_backward.grad_input(d_PD1C, y_PD1C, grad_input=d_PD1C)
    d_CD.index_fill_(0, edge_M, 0)
    d_line_PD1S, d_weight_D11W, _ = torch.ops.aten.convolution_backward(
        d_PD1C, line_PD1S, _kernels(weight_WD), None, [1, 1], [0, 0], [1, 1], False, [0, 0], width, [True, True, False]
    )
    d_line_PSD = d_line_PD1S.permute(0, 2, 3, 1).squeeze(1)
    last = length - (pieces - 1) * piece
    d_line_PSD[-1, last : last + reach].add_(after_WD)
    # The first W − 1 rows of an image are the last rows of the image before it.
    d_line_PSD[:-1, piece:].add_(d_line_PSD[1:, :reach])
    for index in range(pieces):
        rows_CD = dx_CD[index * piece : (index + 1) * piece]
        rows_CD.copy_(d_line_PSD[index, reach : reach + len(rows_CD)])
    return d_line_PSD[0, :reach], d_weight_D11W.reshape(width, reach + 1).T


def _suits_onednn(x_CD: Tensor, weight_WD: Tensor) -> bool:
    """Whether oneDNN has a kernel (without one PyTorch loops over channels) and there is work for several threads."""
    worthwhile = x_CD.numel() > BLOCK and torch.get_num_threads() > 1
    on_cpu = x_CD.device.type == "cpu" and weight_WD.dtype == torch.float32
    return worthwhile and on_cpu and torch.backends.mkldnn.is_available()


def _images(x_ND: Tensor, start: int, stop: int, weight_WD: Tensor) -> Tensor:
    """Rows [start - (W - 1), stop) as P images that overlap by W − 1 rows: (P, D, 1, S), channels last.

    In the weight's dtype; zeros before the first row and after the last.
    """
    reach, length = weight_WD.shape[0] - 1, stop - start
    piece = max(reach + 1, min(PIECE, length))
    line_PSD = weight_WD.new_empty(-(-length // piece), piece + reach, x_ND.shape[1])
    for index, image_SD in enumerate(line_PSD):
        first = start + index * piece - reach
        begin, end = max(0, first), min(first + piece + reach, stop)
        image_SD[: begin - first].zero_()
        image_SD[begin - first : end - first].copy_(x_ND[begin:end])
        image_SD[end - first :].zero_()
    return line_PSD[:, None].permute(0, 3, 1, 2)


def _convolve_images(line_PD1S: Tensor, weight_WD: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # autocast would compute conv2d in bf16
        return F.conv2d(line_PD1S, _kernels(weight_WD), groups=line_PD1S.shape[1])


def _kernels(weight_WD: Tensor) -> Tensor:
    return weight_WD.T.contiguous()[:, None, None]  # oneDNN is slow with other strides


def _rows(y_PD1C: Tensor) -> Tensor:
    return y_PD1C.permute(0, 2, 3, 1).flatten(0, 2)


def _silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(dy.to(x.dtype), x)


def _edge_windows(x_ND: Tensor, history_BWD: Tensor, weight_WD: Tensor, edges: _Edges) -> Tensor:
    """The window (M, W, D) of each edge token, 0 where it may not read."""
    taps, width = weight_WD.shape
    slot_SD = weight_WD.new_zeros(edges.token_M.shape[0] * taps, width)
    slot_SD[edges.input_slot_I] = x_ND[edges.input_row_I].to(weight_WD.dtype)
    slot_SD[edges.history_slot_J] = history_BWD.flatten(0, 1)[edges.history_row_J].to(weight_WD.dtype)
    return slot_SD.unflatten(0, (-1, taps))
