"""The gated delta rule in chunks, with a hand-written backward pass.

Inside a chunk, with G the running sum of log alpha and D_ts = exp(G_t - G_s) for s <= t, the recurrence is linear
attention whose values `u` solve a unit-triangular system (arXiv 2406.06484; with the gate, 2412.06464):

    u = beta (v - p),   p_t = sum_{s<t} D_ts (k_t.k_s) u_s + e^{G_t} k_t S      what the state predicts for key t
    o_t             = sum_{s<=t} D_ts (q_t.k_s) u_s + e^{G_t} q_t S             what it answers to query t
    S'              = e^{G_C} S + sum_s e^{G_C - G_s} k_s u_s

Queries and keys read in the same way, and so do their gradients. Only S runs sequentially over the chunks.

Shapes: N chunks, X = B*H, C tokens a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.ops.gated_delta.documents import ChunkMasks

# On a CPU a segment has about this many rows of q (tokens x heads), so that all its passes run in cache.
CPU_ROWS = 4096


def chunked_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state_BHKV: Tensor,
    masks: ChunkMasks | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V) in that of the initial state.

    State, gates and the triangular solve are in the initial state's dtype; with bf16 q, k, v the large batched
    matmuls are in bf16.
    """
    return _ChunkedGatedDeltaRule.apply(
        q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH, initial_state_BHKV, masks, scale, chunk
    )


class _ChunkedGatedDeltaRule(torch.autograd.Function):
    """Keeps its inputs and the states between segments; the backward pass recomputes the rest, segment by segment."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_alpha_BTH: Tensor,
        beta_BTH: Tensor,
        initial_state_BHKV: Tensor,
        masks: ChunkMasks | None,
        scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        inputs = (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH[..., None], beta_BTH[..., None])
        ctx.masks, ctx.scale, ctx.chunk = masks, scale, chunk
        o_BTHV = torch.empty_like(v_BTHV, dtype=q_BTHK.dtype, memory_format=torch.contiguous_format)
        carried_XKV, states = initial_state_BHKV.flatten(0, 1), []
        with torch.autocast(q_BTHK.device.type, enabled=False):
            for segment in _segments(q_BTHK, chunk):
                states.append(carried_XKV)
                chunks = _prepare(_part(inputs, segment, chunk), _part_masks(masks, segment), chunk)
                u_NXCV, state_NXKV = _run_states(chunks, carried_XKV)
                _from_chunks(_outputs(chunks, u_NXCV, state_NXKV) * scale, o_BTHV, segment)
                carried_XKV = state_NXKV[-1]
        ctx.save_for_backward(*inputs, torch.stack(states))
        return o_BTHV, carried_XKV.unflatten(0, initial_state_BHKV.shape[:2]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor, d_final_BHKV: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states_SXKV = ctx.saved_tensors
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        d_carried_XKV = d_final_BHKV.flatten(0, 1)
        segments = _segments(inputs[0], ctx.chunk)
        with torch.autocast(do_BTHV.device.type, enabled=False):
            for segment, carried_XKV in zip(reversed(segments), states_SXKV.flip(0), strict=True):
                masks = _part_masks(ctx.masks, segment)
                chunks = _prepare(_part(inputs, segment, ctx.chunk), masks, ctx.chunk)
                u_NXCV, state_NXKV = _run_states(chunks, carried_XKV)
                do_NXCV = _part([do_BTHV], segment, ctx.chunk)[0] * ctx.scale
                d_u_NXCV, d_state_NXKV = _run_states_backward(chunks, do_NXCV, d_carried_XKV)
                parts = _gradients(chunks, u_NXCV, state_NXKV, do_NXCV, d_u_NXCV, d_state_NXKV, masks)
                for gradient, part in zip(gradients, parts, strict=True):
                    _from_chunks(part, gradient, segment)
                d_carried_XKV = d_state_NXKV[0]
        d_q, d_k, d_v, d_log_alpha, d_beta = gradients
        d_initial_BHKV = d_carried_XKV.unflatten(0, d_final_BHKV.shape[:2])
        return d_q, d_k, d_v, d_log_alpha[..., 0], d_beta[..., 0], d_initial_BHKV, None, None, None


def _segments(q_BTHK: Tensor, chunk: int) -> list[slice]:
    """Runs of chunks that are computed at once: all on an accelerator, as many as fit into cache on a CPU."""
    batch, time, heads, _ = q_BTHK.shape
    n_chunks = -(-time // chunk)
    size = max(1, CPU_ROWS // (batch * heads * chunk)) if q_BTHK.device.type == "cpu" else n_chunks
    return [slice(n, min(n + size, n_chunks)) for n in range(0, n_chunks, size)]


def _part(inputs: Sequence[Tensor], segment: slice, chunk: int) -> list[Tensor]:
    """The segment's chunks of each (B, T, H, D): (N, B*H, C, D), contiguous.

    Zeros follow the end of the row: tokens that neither decay nor write.
    """
    parts = []
    for x_BTHD in inputs:
        part_BTHD = x_BTHD[:, segment.start * chunk : segment.stop * chunk]
        part_BTHD = F.pad(part_BTHD, (0, 0, 0, 0, 0, -part_BTHD.shape[1] % chunk))
        parts.append(part_BTHD.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous())
    return parts


def _part_masks(masks: ChunkMasks | None, segment: slice) -> ChunkMasks | None:
    return None if masks is None else ChunkMasks(*(mask[segment] for mask in masks))


def _from_chunks(x_NXCD: Tensor, target_BTHD: Tensor, segment: slice) -> None:
    """Write chunks (N, B*H, C, D) to where their segment lies in (B, T, H, D)."""
    batch, chunk = target_BTHD.shape[0], x_NXCD.shape[2]
    part_BTHD = target_BTHD[:, segment.start * chunk : segment.stop * chunk]
    x_BNCHD = x_NXCD.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4)
    part_BTHD.copy_(x_BNCHD.flatten(1, 2)[:, : part_BTHD.shape[1]])


@dataclass(frozen=True)
class _Chunks:
    """Everything about the chunks that does not depend on the state."""

    q_NXCK: Tensor
    k_NXCK: Tensor
    v_NXCV: Tensor
    beta_NXC1: Tensor
    decay_NXCC: Tensor  # D
    read_NXC1: Tensor  # weight of the carried state in what a token reads
    write_NXC1: Tensor  # weight of a token's write in the state carried out
    keep_NX11: Tensor  # weight of the state carried in, in the state carried out
    attend_NXCC: Tensor  # Q K' . D
    solve_NXCC: Tensor  # (I + diag(beta) tril(K K' . D, -1))^-1

    @property
    def dtype(self) -> torch.dtype:
        """In which the large products are computed."""
        return self.q_NXCK.dtype


def _prepare(inputs_NXCD: list[Tensor], masks: ChunkMasks | None, chunk: int) -> _Chunks:
    q_NXCK, k_NXCK, v_NXCV, log_alpha_NXC1, beta_NXC1 = inputs_NXCD
    decay_NXCC, read_NXC1, write_NXC1, keep_NX11 = _decays(log_alpha_NXC1, masks)
    system_NXCC = (k_NXCK @ k_NXCK.mT * decay_NXCC).mul_(beta_NXC1)
    identity_CC = torch.eye(chunk, dtype=system_NXCC.dtype, device=system_NXCC.device)
    solve_NXCC = torch.linalg.solve_triangular(
        system_NXCC, identity_CC.expand_as(system_NXCC), upper=False, unitriangular=True
    )
    attend_NXCC = q_NXCK @ k_NXCK.mT * decay_NXCC
    return _Chunks(
        q_NXCK,
        k_NXCK,
        v_NXCV,
        beta_NXC1,
        decay_NXCC,
        read_NXC1,
        write_NXC1,
        keep_NX11,
        attend_NXCC.to(q_NXCK.dtype),
        solve_NXCC,
    )


def _decays(log_alpha_NXC1: Tensor, masks: ChunkMasks | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D (N, X, C, C), the read and write weights (N, X, C, 1) and the keep weight (N, X, 1, 1)."""
    # In double: a difference of two large sums would lose the small gates that lie between two forgetful tokens.
    total_NXC1 = log_alpha_NXC1.double().cumsum(dim=2)
    dtype = log_alpha_NXC1.dtype
    decay_NXCC = (total_NXC1 - total_NXC1.mT).to(dtype).exp_().tril_()
    read_NXC1 = total_NXC1.exp().to(dtype)
    write_NXC1 = (total_NXC1[:, :, -1:] - total_NXC1).exp().to(dtype)
    keep_NX11 = read_NXC1[:, :, -1:]
    if masks is None:
        return decay_NXCC, read_NXC1, write_NXC1, keep_NX11

    return (
        _within_document(decay_NXCC, masks.same_NB1CC),
        _within_document(read_NXC1, masks.reads_NB1C1),
        _within_document(write_NXC1, masks.writes_NB1C1),
        _within_document(keep_NX11, masks.keeps_NB111),
    )


def _within_document(weight: Tensor, same: Tensor) -> Tensor:
    """Weights (N, X, …) times a mask (N, B, 1, …)."""
    return (weight.unflatten(1, (same.shape[1], -1)) * same).flatten(1, 2)


def _run_states(chunks: _Chunks, initial_XKV: Tensor) -> tuple[Tensor, Tensor]:
    """u of every chunk (N, X, C, V), and the states (N + 1, X, K, V) between them, the final one last."""
    solve_beta_NXCC = chunks.solve_NXCC * chunks.beta_NXC1.mT
    u_NXCV = _matmul(solve_beta_NXCC, chunks.v_NXCV, chunks.dtype).to(initial_XKV.dtype)
    lost_NXCK, written_NXCK = _state_operators(chunks)
    state_NXKV = initial_XKV.new_empty(u_NXCV.shape[0] + 1, *initial_XKV.shape)
    state_NXKV[0] = initial_XKV
    for n, u_XCV in enumerate(u_NXCV):
        u_XCV.baddbmm_(lost_NXCK[n], state_NXKV[n], alpha=-1)
        torch.mul(state_NXKV[n], chunks.keep_NX11[n], out=state_NXKV[n + 1])
        state_NXKV[n + 1].baddbmm_(written_NXCK[n].mT, u_XCV)
    return u_NXCV, state_NXKV


def _state_operators(chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """What u loses per unit of carried state, and the keys under which u is written: both (N, X, C, K)."""
    solve_read_NXCC = chunks.solve_NXCC * (chunks.beta_NXC1 * chunks.read_NXC1).mT
    lost_NXCK = _matmul(solve_read_NXCC, chunks.k_NXCK, chunks.dtype)
    return lost_NXCK.to(solve_read_NXCC.dtype), chunks.k_NXCK * chunks.write_NXC1


def _outputs(chunks: _Chunks, u_NXCV: Tensor, state_NXKV: Tensor) -> Tensor:
    from_state_NXCV = _matmul(chunks.q_NXCK, state_NXKV[:-1], chunks.dtype) * chunks.read_NXC1
    return from_state_NXCV.add_(_matmul(chunks.attend_NXCC, u_NXCV, chunks.dtype))


def _run_states_backward(chunks: _Chunks, do_NXCV: Tensor, d_final_XKV: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u (N, X, C, V) and of the states between the chunks (N + 1, X, K, V)."""
    lost_NXCK, written_NXCK = _state_operators(chunks)
    d_u_NXCV = _matmul(chunks.attend_NXCC.mT, do_NXCV, chunks.dtype).to(d_final_XKV.dtype)
    d_state_NXKV = d_final_XKV.new_empty(d_u_NXCV.shape[0] + 1, *d_final_XKV.shape)
    d_state_NXKV[:-1] = _matmul(chunks.q_NXCK.mT, do_NXCV * chunks.read_NXC1, chunks.dtype)
    d_state_NXKV[-1] = d_final_XKV
    for n in range(d_u_NXCV.shape[0] - 1, -1, -1):
        d_u_NXCV[n].baddbmm_(written_NXCK[n], d_state_NXKV[n + 1])
        d_state_NXKV[n].baddbmm_(lost_NXCK[n].mT, d_u_NXCV[n], alpha=-1)
        d_state_NXKV[n].addcmul_(d_state_NXKV[n + 1], chunks.keep_NX11[n])
    return d_u_NXCV, d_state_NXKV


def _gradients(
    chunks: _Chunks,
    u_NXCV: Tensor,
    state_NXKV: Tensor,
    do_NXCV: Tensor,
    d_u_NXCV: Tensor,
    d_state_NXKV: Tensor,
    masks: ChunkMasks | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k (N, X, C, K), v (N, X, C, V), log alpha and beta (N, X, C, 1), all chunks at once."""
    dtype, q_NXCK, k_NXCK = chunks.dtype, chunks.q_NXCK, chunks.k_NXCK
    d_error_NXCV = _matmul(chunks.solve_NXCC.mT, d_u_NXCV, dtype)
    low_u, low_state = u_NXCV.to(dtype), state_NXKV[:-1].to(dtype)

    def d_reader(d_read_NXCV: Tensor, diagonal: int) -> tuple[Tensor, Tensor]:
        """From the gradient of what was read, those of the scores and of the reading queries or keys."""
        d_read_NXCV = d_read_NXCV.to(dtype)
        d_scores_NXCC = (d_read_NXCV @ low_u.mT * chunks.decay_NXCC).tril_(diagonal)
        from_state_NXCK = d_read_NXCV @ low_state.mT * chunks.read_NXC1
        return d_scores_NXCC, from_state_NXCK.add_(_matmul(d_scores_NXCC, k_NXCK, dtype))

    d_attend_NXCC, d_q_NXCK = d_reader(do_NXCV, 0)
    d_predict_NXCC, d_key_NXCK = d_reader(-d_error_NXCV, -1)
    d_beta_NXC = (d_error_NXCV * chunks.v_NXCV).sum(-1) + (d_key_NXCK * k_NXCK).sum(-1)
    d_predict_NXCC.mul_(chunks.beta_NXC1)
    d_key_NXCK.mul_(chunks.beta_NXC1)

    d_written_NXCK = _matmul(u_NXCV, d_state_NXKV[1:].mT, dtype) * chunks.write_NXC1
    d_carried_NX = (d_written_NXCK * k_NXCK).sum((-2, -1))
    d_written_NXCK += _matmul(d_attend_NXCC.mT, q_NXCK, dtype)
    d_written_NXCK += _matmul(d_predict_NXCC.mT, k_NXCK, dtype)

    # Every e^{G_t} multiplies what a query or a key reads, every e^{-G_s} what a key writes.
    d_total_NXC = (d_q_NXCK * q_NXCK).sum(-1) + ((d_key_NXCK - d_written_NXCK) * k_NXCK).sum(-1)
    d_kept_NX = (state_NXKV[:-1] * d_state_NXKV[1:]).sum((-2, -1)) * chunks.keep_NX11[..., 0, 0]
    d_total_NXC[..., -1] += d_carried_NX + d_kept_NX
    d_log_alpha_NXC = _sum_of_later(d_total_NXC, masks)
    d_k_NXCK, d_v_NXCV = d_key_NXCK.add_(d_written_NXCK), d_error_NXCV * chunks.beta_NXC1
    return d_q_NXCK, d_k_NXCK, d_v_NXCV, d_log_alpha_NXC[..., None], d_beta_NXC[..., None]


def _sum_of_later(x_NXC: Tensor, masks: ChunkMasks | None) -> Tensor:
    """For each token, the sum of x over itself and the later tokens of its chunk and document."""
    if masks is None:
        return x_NXC.flip(-1).cumsum(-1).flip(-1)
    # A cumulative sum would carry the rounding errors of one document into those before it.
    x_NBHC = x_NXC.unflatten(1, (masks.same_NB1CC.shape[1], -1))
    return (x_NBHC @ masks.same_NB1CC[:, :, 0].to(x_NXC.dtype)).flatten(1, 2)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, computed and returned in `dtype`."""
    return a.to(dtype) @ b.to(dtype)
