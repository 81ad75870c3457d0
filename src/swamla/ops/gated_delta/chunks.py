"""The gated delta rule on N consecutive chunks, forward and backward. Symbols and shapes: see cpu.py."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ChunkMasks(NamedTuple):
    """Document masks of each chunk: zeros and ones, shared by all heads.

    same_NB1CC: token t (row) and token s <= t (column) are in the same document.
    reads_NB1C1: a token is in the document of the state carried into its chunk.
    writes_NB1C1: a token is in the document of the state carried out of its chunk.
    keeps_NB111: the states carried in and out are of the same document.
    """

    same_NB1CC: Tensor
    reads_NB1C1: Tensor
    writes_NB1C1: Tensor
    keeps_NB111: Tensor


@dataclass(frozen=True)
class Chunks:
    """The chunks' inputs and all products of them that do not depend on the state."""

    q_NXCK: Tensor
    k_NXCK: Tensor
    v_NXCV: Tensor
    beta_NXC1: Tensor
    decay_NXCC: Tensor  # D
    read_NXC1: Tensor  # e^{G_t}: factor of the carried-in state when token t reads it
    write_NXC1: Tensor  # e^{G_C - G_s}: factor of token s's write in the carried-out state
    keep_NX11: Tensor  # e^{G_C}: factor of the carried-in state in the carried-out state
    qk_NXCC: Tensor  # Q K'
    kk_NXCC: Tensor  # K K'
    attend_NXCC: Tensor  # Q K' . D
    solve_NXCC: Tensor  # (I + diag(beta) tril(K K' . D, -1))^-1
    lost_NXCK: Tensor  # W: u = U - W S
    written_NXCK: Tensor  # S' = e^{G_C} S + (written keys)' u
    masks: ChunkMasks | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the large products."""
        return self.q_NXCK.dtype


def forward(
    inputs_NXCD: list[Tensor], masks: ChunkMasks | None, initial_XKV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (N, X, C, V) and the state after the last chunk (X, K, V)."""
    chunks = prepare(inputs_NXCD, masks)
    u_NXCV, state_NXKV = run_states(chunks, initial_XKV)
    return outputs(chunks, u_NXCV, state_NXKV, scale), state_NXKV[-1]


def backward(
    inputs_NXCD: list[Tensor],
    masks: ChunkMasks | None,
    initial_XKV: Tensor,
    do_NXCV: Tensor,
    d_final_XKV: Tensor,
    scale: float,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of the inputs and of the state before the first chunk, given those of what `forward` returns."""
    chunks = prepare(inputs_NXCD, masks)
    u_NXCV, state_NXKV = run_states(chunks, initial_XKV)
    do_NXCV = do_NXCV * scale
    d_u_NXCV, d_state_NXKV = run_states_backward(chunks, do_NXCV, d_final_XKV)
    return gradients(chunks, u_NXCV, state_NXKV, do_NXCV, d_u_NXCV, d_state_NXKV), d_state_NXKV[0]


def prepare(inputs_NXCD: list[Tensor], masks: ChunkMasks | None) -> Chunks:
    """The `Chunks` of q, k, v, log alpha and beta (in this order), each (N, X, C, D)."""
    q_NXCK, k_NXCK, v_NXCV, log_alpha_NXC1, beta_NXC1 = inputs_NXCD
    decay_NXCC, read_NXC1, write_NXC1, keep_NX11 = _decays(log_alpha_NXC1, masks)
    qk_NXCC, kk_NXCC = q_NXCK @ k_NXCK.mT, k_NXCK @ k_NXCK.mT
    solve_NXCC = inverse((kk_NXCC * decay_NXCC).mul_(beta_NXC1))
    solve_read_NXCC = solve_NXCC * (beta_NXC1 * read_NXC1).mT
    return Chunks(
        q_NXCK,
        k_NXCK,
        v_NXCV,
        beta_NXC1,
        decay_NXCC,
        read_NXC1,
        write_NXC1,
        keep_NX11,
        qk_NXCC,
        kk_NXCC,
        (qk_NXCC * decay_NXCC).to(q_NXCK.dtype),
        solve_NXCC,
        matmul(solve_read_NXCC, k_NXCK, k_NXCK.dtype).to(solve_NXCC.dtype),
        k_NXCK * write_NXC1,
        masks,
    )


def inverse(system_NXCC: Tensor) -> Tensor:
    """(I + the strictly lower triangle of `system`)^-1."""
    identity_CC = torch.eye(system_NXCC.shape[-1], dtype=system_NXCC.dtype, device=system_NXCC.device)
    return torch.linalg.solve_triangular(
        system_NXCC, identity_CC.expand_as(system_NXCC), upper=False, unitriangular=True
    )


def _decays(log_alpha_NXC1: Tensor, masks: ChunkMasks | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D (N, X, C, C), the factors of reads and writes (N, X, C, 1) and of the kept state (N, X, 1, 1)."""
    # In fp64: the difference of two large sums in fp32 would lose small gates between two strongly decaying tokens.
    total_NXC1 = log_alpha_NXC1.double().cumsum(dim=2)
    dtype = log_alpha_NXC1.dtype
    decay_NXCC = (total_NXC1 - total_NXC1.mT).to(dtype).exp_().tril_()
    read_NXC1 = total_NXC1.exp().to(dtype)
    write_NXC1 = (total_NXC1[:, :, -1:] - total_NXC1).exp().to(dtype)
    keep_NX11 = read_NXC1[:, :, -1:]
    if masks is None:
        return decay_NXCC, read_NXC1, write_NXC1, keep_NX11

    return (
        within_document(decay_NXCC, masks.same_NB1CC),
        within_document(read_NXC1, masks.reads_NB1C1),
        within_document(write_NXC1, masks.writes_NB1C1),
        within_document(keep_NX11, masks.keeps_NB111),
    )


def within_document(weight: Tensor, same: Tensor) -> Tensor:
    """Factors (N, X, …) times a mask (N, B, 1, …)."""
    return (weight.unflatten(1, (same.shape[1], -1)) * same).flatten(1, 2)


def run_states(chunks: Chunks, initial_XKV: Tensor) -> tuple[Tensor, Tensor]:
    """u of every chunk (N, X, C, V), and the states (N + 1, X, K, V) before each chunk and after the last."""
    solve_beta_NXCC = chunks.solve_NXCC * chunks.beta_NXC1.mT
    u_NXCV = matmul(solve_beta_NXCC, chunks.v_NXCV, chunks.dtype).to(initial_XKV.dtype)
    return u_NXCV, carry(u_NXCV, chunks.lost_NXCK, chunks.written_NXCK, chunks.keep_NX11, initial_XKV)


def carry(u_NXCV: Tensor, lost_NXCK: Tensor, written_NXCK: Tensor, keep_NXK1: Tensor, initial_XKV: Tensor) -> Tensor:
    """States (N + 1, X, K, V) before each chunk and after the last; completes u = U - W S of each chunk in place."""
    state_NXKV = initial_XKV.new_empty(u_NXCV.shape[0] + 1, *initial_XKV.shape)
    state_NXKV[0] = initial_XKV
    for n, u_XCV in enumerate(u_NXCV):
        u_XCV.baddbmm_(lost_NXCK[n], state_NXKV[n], alpha=-1)
        torch.mul(state_NXKV[n], keep_NXK1[n], out=state_NXKV[n + 1])
        state_NXKV[n + 1].baddbmm_(written_NXCK[n].mT, u_XCV)
    return state_NXKV


def outputs(chunks: Chunks, u_NXCV: Tensor, state_NXKV: Tensor, scale: float) -> Tensor:
    """Outputs (N, X, C, V)."""
    from_state_NXCV = matmul(chunks.q_NXCK, state_NXKV[:-1], chunks.dtype) * (chunks.read_NXC1 * scale)
    return from_state_NXCV.add_(matmul(chunks.attend_NXCC, u_NXCV, chunks.dtype), alpha=scale)


def run_states_backward(chunks: Chunks, do_NXCV: Tensor, d_final_XKV: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u (N, X, C, V) and of the states (N + 1, X, K, V), given those of outputs and final state."""
    d_u_NXCV = matmul(chunks.attend_NXCC.mT, do_NXCV, chunks.dtype).to(d_final_XKV.dtype)
    d_state_NXKV = d_final_XKV.new_empty(d_u_NXCV.shape[0] + 1, *d_final_XKV.shape)
    d_state_NXKV[:-1] = matmul(chunks.q_NXCK.mT, do_NXCV * chunks.read_NXC1, chunks.dtype)
    d_state_NXKV[-1] = d_final_XKV
    carry_backward(d_u_NXCV, d_state_NXKV, chunks.lost_NXCK, chunks.written_NXCK, chunks.keep_NX11)
    return d_u_NXCV, d_state_NXKV


def carry_backward(
    d_u_NXCV: Tensor, d_state_NXKV: Tensor, lost_NXCK: Tensor, written_NXCK: Tensor, keep_NXK1: Tensor
) -> None:
    """Add to the gradients of u and of the states, in place, what reaches them through later states."""
    for n in range(d_u_NXCV.shape[0] - 1, -1, -1):
        d_u_NXCV[n].baddbmm_(written_NXCK[n], d_state_NXKV[n + 1])
        d_state_NXKV[n].baddbmm_(lost_NXCK[n].mT, d_u_NXCV[n], alpha=-1)
        d_state_NXKV[n].addcmul_(d_state_NXKV[n + 1], keep_NXK1[n])


def gradients(
    chunks: Chunks, u_NXCV: Tensor, state_NXKV: Tensor, do_NXCV: Tensor, d_u_NXCV: Tensor, d_state_NXKV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k (N, X, C, K), v (N, X, C, V), log alpha and beta (N, X, C, 1), for all chunks at once."""
    dtype, q_NXCK, k_NXCK = chunks.dtype, chunks.q_NXCK, chunks.k_NXCK
    d_error_NXCV = matmul(chunks.solve_NXCC.mT, d_u_NXCV, dtype)
    low_u, low_state = u_NXCV.to(dtype), state_NXKV[:-1].to(dtype)
    wide_k = k_NXCK.to(u_NXCV.dtype)  # once, not at each of its elementwise products

    def d_reader(d_read_NXCV: Tensor, diagonal: int) -> tuple[Tensor, Tensor]:
        """From the gradient of what queries or keys read: gradients of their scores, and of them through the state."""
        d_read_NXCV = d_read_NXCV.to(dtype)
        d_scores_NXCC = (d_read_NXCV @ low_u.mT * chunks.decay_NXCC).tril_(diagonal)
        return d_scores_NXCC, d_read_NXCV @ low_state.mT * chunks.read_NXC1

    d_attend_NXCC, d_q_NXCK = d_reader(do_NXCV, 0)
    d_predict_NXCC, d_key_NXCK = d_reader(-d_error_NXCV, -1)
    read_NXC = (d_q_NXCK * q_NXCK).sum(-1).addcmul_((d_key_NXCK * wide_k).sum(-1), chunks.beta_NXC1[..., 0])
    d_q_NXCK += matmul(d_attend_NXCC, k_NXCK, dtype)
    d_key_NXCK += matmul(d_predict_NXCC, k_NXCK, dtype)
    d_beta_NXC = (d_error_NXCV * chunks.v_NXCV).sum(-1) + (d_key_NXCK * wide_k).sum(-1)
    d_predict_NXCC.mul_(chunks.beta_NXC1)
    d_key_NXCK.mul_(chunks.beta_NXC1)

    d_written_NXCK = matmul(u_NXCV, d_state_NXKV[1:].mT, dtype) * chunks.write_NXC1
    written_NXC = (d_written_NXCK * wide_k).sum(-1)
    d_written_NXCK += matmul(d_attend_NXCC.mT, q_NXCK, dtype)
    d_written_NXCK += matmul(d_predict_NXCC.mT, k_NXCK, dtype)

    # e^{G_t} is a factor of what token t reads, e^{-G_s} of what token s writes, so dG = reads - writes. A score D_ts
    # contributes to both; both contributions are sums of one matrix, because two separately rounded products would
    # differ by more than the gradient where a head decays fast. D_tt = 1 does not depend on G: no diagonal.
    pair_NXCC = torch.addcmul(d_attend_NXCC * chunks.qk_NXCC, d_predict_NXCC, chunks.kk_NXCC)
    pair_NXCC.diagonal(dim1=-2, dim2=-1).zero_()
    d_total_NXC = (read_NXC - written_NXC).add_(pair_NXCC.sum(-1)).sub_(pair_NXCC.sum(-2))
    d_kept_NX = (state_NXKV[:-1] * d_state_NXKV[1:]).sum((-2, -1)) * chunks.keep_NX11[..., 0, 0]
    d_total_NXC[..., -1] += written_NXC.sum(-1) + d_kept_NX
    d_log_alpha_NXC = _sum_of_later(d_total_NXC, chunks.masks)
    d_k_NXCK, d_v_NXCV = d_key_NXCK.add_(d_written_NXCK), d_error_NXCV * chunks.beta_NXC1
    return d_q_NXCK, d_k_NXCK, d_v_NXCV, d_log_alpha_NXC[..., None], d_beta_NXC[..., None]


def _sum_of_later(x_NXC: Tensor, masks: ChunkMasks | None) -> Tensor:
    """For each token, the sum of x over itself and later tokens of the same chunk and document."""
    if masks is None:
        return x_NXC.flip(-1).cumsum(-1).flip(-1)
    # A cumulative sum would carry the rounding errors of one document into those before it.
    x_NBHC = x_NXC.unflatten(1, (masks.same_NB1CC.shape[1], -1))
    return (x_NBHC @ masks.same_NB1CC[:, :, 0].to(x_NXC.dtype)).flatten(1, 2)


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, computed and returned in `dtype`."""
    return a.to(dtype) @ b.to(dtype)
