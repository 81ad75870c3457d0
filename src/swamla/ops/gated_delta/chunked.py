"""The gated delta rule in chunks, with a hand-written backward pass.

Inside a chunk, with G the running sum of log alpha and D_ts = exp(G_t - G_s) for s <= t, the recurrence is linear
attention whose values `u` solve a unit-triangular system (DeltaNet in parallel, arXiv 2406.06484; the gate, 2412.06464):

    u = beta (v - p),   p_t = sum_{s<t} D_ts (k_t.k_s) u_s + e^{G_t} k_t S      what the state predicts for key t
    o_t             = sum_{s<=t} D_ts (q_t.k_s) u_s + e^{G_t} q_t S             what it answers to query t
    S'              = e^{G_C} S + sum_s e^{G_C - G_s} k_s u_s

Queries and keys read the chunk in the same way, so both passes treat `[q; k]` as 2C readers. Only S runs sequentially.

Shapes: N chunks, X = B*H, C tokens a chunk; R = 2C readers; M = C + K memory rows, the chunk's u above the state S.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.ops.gated_delta.documents import ChunkMasks


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
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH, initial_state_BHKV)
        ctx.masks, ctx.scale, ctx.chunk = masks, scale, chunk
        with torch.autocast(q_BTHK.device.type, enabled=False):
            chunks = _prepare(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH, masks, chunk)
            memory_NXMV = _run_states(chunks, initial_state_BHKV)
            o_NXCV = _matmul(chunks.reads_NXRM[:, :, :chunk], memory_NXMV[:-1]) * scale
            final_BHKV = memory_NXMV[-1, :, chunk:].reshape(initial_state_BHKV.shape).clone()
            return _from_chunks(o_NXCV, v_BTHV), final_BHKV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor, d_final_BHKV: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH, initial_state_BHKV = ctx.saved_tensors
        with torch.autocast(q_BTHK.device.type, enabled=False):
            chunks = _prepare(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH, ctx.masks, ctx.chunk)
            memory_NXMV = _run_states(chunks, initial_state_BHKV)
            do_NXCV = _to_chunks(do_BTHV, ctx.chunk) * ctx.scale
            d_memory_NXMV = _run_states_backward(chunks, do_NXCV, d_final_BHKV)
            d_qk, d_v, d_log_alpha, d_beta = _chunk_gradients(chunks, memory_NXMV, d_memory_NXMV, do_NXCV)
            d_initial_BHKV = d_memory_NXMV[0, :, ctx.chunk :].reshape(initial_state_BHKV.shape).clone()
            return (
                _from_chunks(d_qk[:, :, : ctx.chunk], q_BTHK),
                _from_chunks(d_qk[:, :, ctx.chunk :], k_BTHK),
                _from_chunks(d_v, v_BTHV),
                _from_chunks(d_log_alpha[..., None], log_alpha_BTH[..., None])[..., 0],
                _from_chunks(d_beta[..., None], beta_BTH[..., None])[..., 0],
                d_initial_BHKV,
                None,
                None,
                None,
            )


@dataclass(frozen=True)
class _Chunks:
    """Everything about the chunks that does not depend on the state."""

    qk_NXRK: Tensor  # the readers: queries, then keys
    v_NXCV: Tensor
    beta_NXC: Tensor
    decay_NXCC: Tensor  # D
    read_NXC: Tensor  # weight of the carried state in what a token reads
    write_NXC: Tensor  # weight of a token's write in the state carried out
    keep_NX: Tensor  # weight of the state carried in, in the state carried out
    reads_NXRM: Tensor  # what multiplies the memory rows [u; S]: for queries the output, for keys the prediction
    solve_NXCC: Tensor  # (I + diag(beta) tril(K K' . D, -1))^-1

    @property
    def k_NXCK(self) -> Tensor:
        return self.qk_NXRK[:, :, self.v_NXCV.shape[2] :]


def _prepare(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTH: Tensor,
    beta_BTH: Tensor,
    masks: ChunkMasks | None,
    chunk: int,
) -> _Chunks:
    qk_NXRK = torch.cat([_to_chunks(q_BTHK, chunk), _to_chunks(k_BTHK, chunk)], dim=2)
    beta_NXC = _to_chunks(beta_BTH[..., None], chunk)[..., 0]
    log_alpha_NXC = _to_chunks(log_alpha_BTH[..., None], chunk)[..., 0]
    decay_NXCC, read_NXC, write_NXC, keep_NX = _decays(log_alpha_NXC, masks, k_BTHK.shape[2])
    scores_NXRC = _matmul(qk_NXRK, qk_NXRK[:, :, chunk:].mT)
    read_C_NXRC = scores_NXRC.unflatten(2, (2, chunk)) * decay_NXCC[:, :, None]
    read_S_NXRK = qk_NXRK.unflatten(2, (2, chunk)) * read_NXC[:, :, None, :, None]
    reads_NXRM = torch.cat([read_C_NXRC, read_S_NXRK], dim=-1).flatten(2, 3)
    system_NXCC = reads_NXRM[:, :, chunk:, :chunk] * beta_NXC[..., None]
    identity_CC = torch.eye(chunk, dtype=beta_NXC.dtype, device=beta_NXC.device)
    solve_NXCC = torch.linalg.solve_triangular(
        system_NXCC, identity_CC.expand_as(system_NXCC), upper=False, unitriangular=True
    )
    return _Chunks(
        qk_NXRK, _to_chunks(v_BTHV, chunk), beta_NXC, decay_NXCC, read_NXC, write_NXC, keep_NX, reads_NXRM, solve_NXCC
    )


def _decays(log_alpha_NXC: Tensor, masks: ChunkMasks | None, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D (N, X, C, C), the read and write weights (N, X, C) and the keep weight (N, X)."""
    # In double: a difference of two large sums would lose the small gates that lie between two forgetful tokens.
    total_NXC = log_alpha_NXC.double().cumsum(dim=-1)
    dtype = log_alpha_NXC.dtype
    decay_NXCC = (total_NXC[..., :, None] - total_NXC[..., None, :]).to(dtype).exp_().tril_()
    read_NXC = total_NXC.to(dtype).exp()
    write_NXC = (total_NXC[..., -1:] - total_NXC).to(dtype).exp()
    keep_NX = read_NXC[..., -1]
    if masks is None:
        return decay_NXCC, read_NXC, write_NXC, keep_NX
    by_head = (-1, heads)
    return (
        (decay_NXCC.unflatten(1, by_head) * masks.same_NB1CC).flatten(1, 2),
        (read_NXC.unflatten(1, by_head) * masks.reads_NB1C).flatten(1, 2),
        (write_NXC.unflatten(1, by_head) * masks.writes_NB1C).flatten(1, 2),
        (keep_NX.unflatten(1, by_head) * masks.keeps_NB1).flatten(1, 2),
    )


def _state_operators(chunks: _Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """u for a zero state (N, X, C, V), what u loses per unit of state (N, X, C, K), and the weighted keys written."""
    chunk, key_width = chunks.v_NXCV.shape[2], chunks.qk_NXRK.shape[-1]
    solve_beta_NXCC = chunks.solve_NXCC * chunks.beta_NXC[:, :, None]
    key_reads_NXCK = chunks.reads_NXRM[:, :, chunk:, chunk:].to(chunks.v_NXCV.dtype)
    both = _matmul(solve_beta_NXCC.to(chunks.v_NXCV.dtype), torch.cat([key_reads_NXCK, chunks.v_NXCV], dim=-1))
    both = both.to(chunks.beta_NXC.dtype)
    return both[..., key_width:], both[..., :key_width], chunks.k_NXCK * chunks.write_NXC[..., None]


def _run_states(chunks: _Chunks, initial_state_BHKV: Tensor) -> Tensor:
    """The memory [u; S] of every chunk, S being the state carried in; one more slot ends with the final state."""
    u_NXCV, loss_NXCK, written_NXCK = _state_operators(chunks)
    n_chunks, rows, chunk, value_width = u_NXCV.shape
    memory_NXMV = u_NXCV.new_zeros(n_chunks + 1, rows, chunk + loss_NXCK.shape[-1], value_width)
    memory_NXMV[0, :, chunk:] = initial_state_BHKV.flatten(0, 1)
    for n in range(n_chunks):
        u_XCV, state_XKV = memory_NXMV[n].split([chunk, loss_NXCK.shape[-1]], dim=1)
        torch.baddbmm(u_NXCV[n], loss_NXCK[n], state_XKV, alpha=-1, out=u_XCV)
        next_XKV = memory_NXMV[n + 1, :, chunk:]
        torch.mul(state_XKV, chunks.keep_NX[n, :, None, None], out=next_XKV)
        next_XKV.baddbmm_(written_NXCK[n].mT, u_XCV)
    return memory_NXMV


def _run_states_backward(chunks: _Chunks, do_NXCV: Tensor, d_final_BHKV: Tensor) -> Tensor:
    """The gradient of the memory [u; S] of every chunk; one more slot ends with that of the final state."""
    _, loss_NXCK, written_NXCK = _state_operators(chunks)
    chunk = do_NXCV.shape[2]
    direct_NXMV = _matmul(chunks.reads_NXRM[:, :, :chunk].mT, do_NXCV)
    d_memory_NXMV = F.pad(direct_NXMV.to(loss_NXCK.dtype), (0, 0, 0, 0, 0, 0, 0, 1))
    d_memory_NXMV[-1, :, chunk:] = d_final_BHKV.flatten(0, 1)
    for n in range(do_NXCV.shape[0] - 1, -1, -1):
        d_u_XCV, d_state_XKV = d_memory_NXMV[n].split([chunk, loss_NXCK.shape[-1]], dim=1)
        d_next_XKV = d_memory_NXMV[n + 1, :, chunk:]
        d_u_XCV.baddbmm_(written_NXCK[n], d_next_XKV)
        d_state_XKV.baddbmm_(loss_NXCK[n].mT, d_u_XCV, alpha=-1)
        d_state_XKV.addcmul_(d_next_XKV, chunks.keep_NX[n, :, None, None])
    return d_memory_NXMV


def _chunk_gradients(
    chunks: _Chunks, memory_NXMV: Tensor, d_memory_NXMV: Tensor, do_NXCV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of [q; k] (N, X, 2C, K), v (N, X, C, V), log alpha and beta (N, X, C), all chunks at once."""
    chunk = do_NXCV.shape[2]
    beta_NXC1 = chunks.beta_NXC[..., None]
    d_error_NXCV = _matmul(chunks.solve_NXCC.mT, d_memory_NXMV[:-1, :, :chunk])
    # The gradient of what each reader read: the output's for queries; for keys beta times that of the error, negated.
    d_read_NXRV = torch.cat([do_NXCV, -d_error_NXCV], dim=2)
    d_reads_NXRM = _matmul(d_read_NXRV, memory_NXMV[:-1].mT)
    d_scores_NXRC = (d_reads_NXRM[..., :chunk].unflatten(2, (2, chunk)) * chunks.decay_NXCC[:, :, None]).flatten(2, 3)
    d_scores_NXRC[:, :, chunk:].diagonal(dim1=-2, dim2=-1).zero_()
    d_state_reads_NXRK = d_reads_NXRM[..., chunk:] * chunks.read_NXC.repeat(1, 1, 2)[..., None]
    d_reader_NXRK = _matmul(d_scores_NXRC, chunks.k_NXCK) + d_state_reads_NXRK

    d_beta_NXC = (d_error_NXCV * chunks.v_NXCV).sum(-1) + (d_reader_NXRK[:, :, chunk:] * chunks.k_NXCK).sum(-1)
    d_scores_NXRC[:, :, chunk:] *= beta_NXC1
    d_reader_NXRK[:, :, chunk:] *= beta_NXC1

    d_state_write_NXCK = _matmul(memory_NXMV[:-1, :, :chunk], d_memory_NXMV[1:, :, chunk:].mT)
    d_state_write_NXCK = d_state_write_NXCK * chunks.write_NXC[..., None]
    d_written_NXCK = _matmul(d_scores_NXRC.mT, chunks.qk_NXRK) + d_state_write_NXCK

    # Every e^{G_t} multiplies something a reader reads, every e^{-G_s} something a key wrote.
    d_total_NXR = (d_reader_NXRK * chunks.qk_NXRK).sum(-1)
    d_total_NXC = d_total_NXR.unflatten(2, (2, chunk)).sum(2) - (d_written_NXCK * chunks.k_NXCK).sum(-1)
    d_keep_NX = (memory_NXMV[:-1, :, chunk:] * d_memory_NXMV[1:, :, chunk:]).sum((-2, -1)) * chunks.keep_NX
    d_total_NXC[..., -1] += (d_state_write_NXCK * chunks.k_NXCK).sum((-2, -1)) + d_keep_NX
    d_log_alpha_NXC = d_total_NXC.flip(-1).cumsum(-1).flip(-1)

    d_reader_NXRK[:, :, chunk:] += d_written_NXCK
    return d_reader_NXRK, d_error_NXCV * beta_NXC1, d_log_alpha_NXC, d_beta_NXC


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _to_chunks(x_BTHD: Tensor, chunk: int) -> Tensor:
    """(B, T, H, D) → (N, B*H, C, D), zeros after the end: such tokens neither decay nor write."""
    x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, -x_BTHD.shape[1] % chunk))
    return x_BTHD.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _from_chunks(x_NXCD: Tensor, like_BTHD: Tensor) -> Tensor:
    """(N, B*H, C, D) → (B, T, H, D), in the dtype of `like_BTHD`."""
    batch, time, heads, _ = like_BTHD.shape
    x_BNCHD = x_NXCD.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4)
    return x_BNCHD.flatten(1, 2)[:, :time].to(like_BTHD.dtype, memory_format=torch.contiguous_format)
