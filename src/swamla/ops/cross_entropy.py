"""Cross-entropy of a language model's head, computed in chunks: never all logits at once."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.errors import DataError, require
from swamla.ops.autocast import product_dtype, without_autocast
from swamla.ops.graphs import compiled

LOGITS = 20_000_000  # elements of a chunk: enough rows to amortise the addition into dW
CUDA_LOGITS = 256_000_000  # more on a GPU, whose FLOP/s are higher beside its bandwidth; other sizes were not measured
UNDERFLOW = 1e-30  # smaller probabilities have too few bits for their logarithm
CHUNKS, CUDA_CHUNKS = 8, 4  # at least: each reads and writes dW, which costs a GPU more
SLAB = 1_000_000  # fp32 logits at a time: their softmax fits the cache
WEIGHTS = 500_000  # elements of dW at a time on a CPU: the addition of a chunk's gradient fits the cache


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), which bounds them smoothly by ±cap (Gemma 2, arXiv 2408.00118); unchanged for cap 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    cap: float = 0.0,
    chunk: int | None = None,
    ignore: int = -100,
) -> Tensor:
    """Σ −log softmax(soft_cap(x Wᵀ, cap))[label] over the labels other than `ignore`: in nats, fp32 (fp64 for fp64).

    Logits are computed `chunk` rows at a time and overwritten by their gradients at once, so none is saved and none is
    recomputed. chunk: by default 20 million logits and at most an eighth of the rows, on CUDA 256 million and a
    quarter. Under autocast the products are in its dtype; softmax and the weight's gradient over chunks are in fp32.
    Without labels the loss and the gradients are 0. First derivatives only. Raises DataError for a label outside the
    vocabulary.
    """
    require(chunk is None or chunk >= 1, "chunk", chunk, "must be >= 1, e.g. 1024")
    require(0 <= cap < math.inf, "cap", cap, "must be > 0, e.g. 15, or 0 for none")
    _check_labels(labels_N, weight_VD.shape[0], ignore)
    most, chunks = (CUDA_LOGITS, CUDA_CHUNKS) if x_ND.is_cuda else (LOGITS, CHUNKS)
    rows = chunk or max(1, min(most // weight_VD.shape[0], -(-x_ND.shape[0] // chunks)))
    return _ChunkedCrossEntropy.apply(x_ND, weight_VD, labels_N, rows, ignore, cap, torch.is_grad_enabled())


def _check_labels(labels_N: Tensor, vocabulary: int, ignore: int) -> None:
    if labels_N.device.type != "cpu":  # a device synchronisation; CUDA's kernels assert the range themselves
        return
    wrong_N = ((labels_N < 0) | (labels_N >= vocabulary)) & (labels_N != ignore)
    if wrong_N.any():
        row = int(wrong_N.nonzero()[0])
        raise DataError(
            f"label {int(labels_N[row])} at row {row}: must be in [0, {vocabulary}), or {ignore} for no loss"
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        rows: int,
        ignore: int,
        cap: float,
        gradients: bool,
    ) -> Tensor:
        """gradients: whether autograd records, which `ctx.needs_input_grad` does not say."""
        dtype = product_dtype(x_ND)
        sums = torch.promote_types(dtype, torch.float32)
        w_VD = weight_VD.to(dtype)
        total = x_ND.new_zeros((), dtype=sums)
        need_x, need_weight = (gradients and needed for needed in ctx.needs_input_grad[:2])
        dx_ND = torch.empty_like(x_ND) if need_x else None
        dw_VD = torch.zeros_like(weight_VD, dtype=sums) if need_weight else None
        fused = compiled(_fused_losses_and_gradients) if x_ND.is_cuda else _fused_losses_and_gradients
        chunk_loss = fused if x_ND.is_cuda or x_ND.is_meta else _losses_and_gradients  # which reads the labels
        space_CV = x_ND.new_empty(min(rows, x_ND.shape[0]), weight_VD.shape[0], dtype=dtype)
        with without_autocast(x_ND.device.type):
            for start in range(0, x_ND.shape[0], rows):
                chunk = slice(start, start + rows)
                # A row without a label may hold a NaN, and its zero gradient times NaN would be NaN in dW.
                x_CD = x_ND[chunk].where(labels_N[chunk, None] != ignore, 0).to(dtype)
                logits_CV = torch.mm(x_CD, w_VD.mT, out=space_CV[: len(x_CD)])
                total += chunk_loss(logits_CV, labels_N[chunk], ignore, cap, need_x or need_weight)
                if dx_ND is not None:  # from here on logits_CV holds the logits' gradients
                    dx_ND[chunk] = logits_CV @ w_VD
                if dw_VD is not None:
                    _add_product(dw_VD, logits_CV, x_CD)
        ctx.save_for_backward(dx_ND, dw_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dw_VD = ctx.saved_tensors
        # In place, without a second tensor of the weight's size, unless `retain_graph` allows another backward pass.
        scale = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        dx_ND = None if dx_ND is None else scale(dx_ND, upstream.to(dx_ND.dtype))
        dw_VD = None if dw_VD is None else scale(dw_VD, upstream).to(ctx.weight_dtype)
        return dx_ND, dw_VD, None, None, None, None, None


def _add_product(dw_VD: Tensor, d_CV: Tensor, x_CD: Tensor) -> None:
    """dW += dᵀ x."""
    size = len(dw_VD) if dw_VD.is_cuda else max(1, WEIGHTS // dw_VD.shape[1])
    for start in range(0, len(dw_VD), size):
        rows = slice(start, start + size)
        dw_VD[rows] += d_CV[:, rows].mT @ x_CD


def _losses_and_gradients(logits_CV: Tensor, labels_C: Tensor, ignore: int, cap: float, need_gradients: bool) -> Tensor:
    """The sum of the losses; on request overwrites logits by gradients: softmax − one-hot, 0 without a label.

    With a cap the gradient is that times the cap's derivative, 1 − tanh².
    """
    counts_C = labels_C != ignore
    all_count = bool(counts_C.all())
    target_C1 = labels_C.where(counts_C, 0)[:, None]
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    total = logits_CV.new_zeros((), dtype=dtype)
    slab = max(1, SLAB // logits_CV.shape[1])
    space_CV = logits_CV.new_empty(min(slab, len(logits_CV)), logits_CV.shape[1], dtype=dtype)
    slope_CV = None
    for start in range(0, logits_CV.shape[0], slab):
        rows = slice(start, start + slab)
        wide_CV = space_CV[: len(target_C1[rows])].copy_(logits_CV[rows])
        if cap:
            tanh_CV = wide_CV.div_(cap).tanh_()
            slope_CV = 1 - tanh_CV.square() if need_gradients else None
            wide_CV = tanh_CV.mul_(cap)
        p_CV = torch.softmax(wide_CV, dim=1, out=wide_CV)
        p_C = p_CV.gather(1, target_C1[rows])[:, 0]  # softmax costs half as much as log_softmax
        loss_C = -p_C.log()
        if (far_C := p_C < UNDERFLOW).any():
            far_FV = soft_cap(logits_CV[rows][far_C].to(dtype), cap)
            loss_C[far_C] = -far_FV.log_softmax(dim=1).gather(1, target_C1[rows][far_C])[:, 0]
        total += loss_C.where(counts_C[rows], 0).sum()
        if need_gradients:
            p_CV.scatter_add_(1, target_C1[rows], p_CV.new_full((len(p_CV), 1), -1.0))
            if slope_CV is not None:
                p_CV.mul_(slope_CV)
            logits_CV[rows] = p_CV if all_count else p_CV.masked_fill_(~counts_C[rows, None], 0)
    return total


def _fused_losses_and_gradients(
    logits_CV: Tensor, labels_C: Tensor, ignore: int, cap: float, need_gradients: bool
) -> Tensor:
    """`_losses_and_gradients` for torch.compile, which fuses the intermediate tensors away."""
    counts_C = labels_C != ignore
    target_C1 = labels_C.where(counts_C, 0)[:, None]
    wide_CV = soft_cap(logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)), cap)
    log_sum_C1 = wide_CV.logsumexp(dim=1, keepdim=True)
    total = (log_sum_C1 - wide_CV.gather(1, target_C1))[:, 0].where(counts_C, 0).sum()
    if need_gradients:
        own_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == target_C1
        d_CV = (wide_CV - log_sum_C1).exp() - own_CV.to(wide_CV.dtype)
        if cap:
            d_CV = d_CV * (1 - (wide_CV / cap).square())
        logits_CV.copy_(d_CV.where(counts_C[:, None], 0))
    return total
