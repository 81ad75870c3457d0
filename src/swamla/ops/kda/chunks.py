"""Kimi Delta Attention on N consecutive chunks, forward and backward. Shapes: N chunks, X = B*H, C tokens per chunk.

Queries q_t and keys beta_t k_t, the *readers*, read the earlier writes u_s of their chunk with the scores

    sum over channels of  r_t k_s e^{G_t - G_s},   G: the running sum of log alpha, per channel

As a product of matrices, (r e^G)(k e^-G)', this overflows fp32 after 18 tokens of log alpha = -5. So chunks are halved
again and again: in a block of 2M tokens the second half reads the first, with the boundary between them as reference:

    e^{G_t - G_s} = e^{prefix_t} e^{suffix_s},   prefix_t, suffix_s: sums from the boundary to t, from s to the boundary

Both exponents are sums of log alpha <= 0, not differences of larger sums: neither factor overflows, and one underflows
only where the product does. The gradient of a token's log alpha is likewise a sum, of what later tokens read across it.
A token's read of its own write has no decay. The chunk's carried state is read by prefixes, and written by suffixes, of
the whole chunk.

P pairs of halves, M tokens of a half.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from swamla.ops.gated_delta.chunks import ChunkMasks, carry, carry_backward, inverse, matmul, within_document


class Level(NamedTuple):
    """Blocks of 2M tokens: factors of what second halves read, and of what first halves wrote (N, X, P, M, K)."""

    read_NXPMK: Tensor
    write_NXPMK: Tensor


@dataclass(frozen=True)
class Chunks:
    """The chunks' inputs and all products of them that do not depend on the state."""

    q_NXCK: Tensor
    k_NXCK: Tensor
    beta_k_NXCK: Tensor
    v_NXCV: Tensor
    beta_NXC1: Tensor
    levels: list[Level]  # smallest blocks first
    read_NXCK: Tensor  # e^{G_t}: factor of the carried-in state when token t reads it
    write_NXCK: Tensor  # e^{G_C - G_s}: factor of token s's write in the carried-out state
    keep_NXK1: Tensor  # e^{G_C}: factor of the carried-in state in the carried-out state
    attend_NXCC: Tensor  # the queries' scores
    solve_NXCC: Tensor  # (I + the keys' scores)^-1
    lost_NXCK: Tensor  # W: u = U - W S
    masks: ChunkMasks | None
    dtype: torch.dtype  # of the large products


def forward(
    inputs_NXCD: list[Tensor], masks: ChunkMasks | None, initial_XKV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (N, X, C, V) and the state after the last chunk (X, K, V)."""
    chunks = _prepare(inputs_NXCD, masks)
    u_NXCV, state_NXKV = _run_states(chunks, initial_XKV)
    from_state_NXCV = matmul(chunks.q_NXCK * chunks.read_NXCK, state_NXKV[:-1], chunks.dtype)
    return from_state_NXCV.add_(matmul(chunks.attend_NXCC, u_NXCV, chunks.dtype)).mul_(scale), state_NXKV[-1]


def _prepare(inputs_NXCD: list[Tensor], masks: ChunkMasks | None) -> Chunks:
    """The `Chunks` of q, k, v, log alpha and beta (in this order), each (N, X, C, D)."""
    q_NXCK, k_NXCK, v_NXCV, log_alpha_NXCK, beta_NXC1 = inputs_NXCD
    low, wide = q_NXCK.dtype, log_alpha_NXCK.dtype
    q_NXCK, k_NXCK = q_NXCK.to(wide), k_NXCK.to(wide)
    beta_k_NXCK = k_NXCK * beta_NXC1
    levels, prefix_NXCK, suffix_NXCK = _decays(log_alpha_NXCK)
    read_NXCK, write_NXCK = prefix_NXCK.exp_(), suffix_NXCK.exp_()
    keep_NXK1 = read_NXCK[:, :, -1:].mT
    attend_NXCC, system_NXCC = _scores(q_NXCK, beta_k_NXCK, k_NXCK, levels)
    if masks is not None:
        attend_NXCC = within_document(attend_NXCC, masks.same_NB1CC)
        system_NXCC = within_document(system_NXCC, masks.same_NB1CC)
        read_NXCK = within_document(read_NXCK, masks.reads_NB1C1)
        write_NXCK = within_document(write_NXCK, masks.writes_NB1C1)
        keep_NXK1 = within_document(keep_NXK1, masks.keeps_NB111)
    solve_NXCC = inverse(system_NXCC)
    lost_NXCK = matmul(solve_NXCC, beta_k_NXCK * read_NXCK, low).to(wide)
    return Chunks(
        q_NXCK,
        k_NXCK,
        beta_k_NXCK,
        v_NXCV,
        beta_NXC1,
        levels,
        read_NXCK,
        write_NXCK,
        keep_NXK1,
        attend_NXCC,
        solve_NXCC,
        lost_NXCK,
        masks,
        low,
    )


def _decays(log_alpha_NXCK: Tensor) -> tuple[list[Level], Tensor, Tensor]:
    """The factors inside blocks of each size, and the sums of log alpha up to each token and behind it in the chunk."""
    prefix_NXCK, suffix_NXCK, levels = log_alpha_NXCK.clone(), torch.zeros_like(log_alpha_NXCK), []
    for half in _halves_of(log_alpha_NXCK.shape[2]):
        first_prefix, second_prefix = _split(prefix_NXCK, half)
        first_suffix, _ = _split(suffix_NXCK, half)
        levels.append(Level(second_prefix.exp(), first_suffix.exp()))
        first_suffix += second_prefix[..., -1:, :]
        second_prefix += first_prefix[..., -1:, :]
    return levels, prefix_NXCK, suffix_NXCK


def _halves_of(chunk: int) -> list[int]:
    """1, 2, 4 … chunk / 2, for a chunk that is a power of two."""
    return [2**n for n in range(chunk.bit_length() - 1)]


def _split(x_NXCK: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves (N, X, P, M, K) of all blocks, as views."""
    first, second = x_NXCK.unflatten(2, (-1, 2, half)).unbind(3)
    return first, second


def _corners(x_NXCC: Tensor, half: int) -> Tensor:
    """The scores (N, X, P, M, M) of all blocks' second halves with their first halves, as a view."""
    blocks = x_NXCC.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., half:, :half]


def _rows(q_NXCK: Tensor, beta_k_NXCK: Tensor, level: Level, half: int) -> Tensor:
    """Decayed queries and then keys of second halves (N, X, P, 2 M, K)."""
    pairs = level.read_NXPMK.shape
    rows = level.read_NXPMK.new_empty(*pairs[:3], 2, *pairs[3:])
    for n, reader_NXCK in enumerate((q_NXCK, beta_k_NXCK)):
        torch.mul(_split(reader_NXCK, half)[1], level.read_NXPMK, out=rows[:, :, :, n])
    return rows.flatten(3, 4)


def _scores(q_NXCK: Tensor, beta_k_NXCK: Tensor, k_NXCK: Tensor, levels: list[Level]) -> tuple[Tensor, Tensor]:
    """Scores (N, X, C, C) of queries with keys up to their own, and of keys (times beta) with those before them."""
    chunk = k_NXCK.shape[2]
    attend_NXCC = k_NXCK.new_zeros(*k_NXCK.shape[:3], chunk)
    system_NXCC = torch.zeros_like(attend_NXCC)
    attend_NXCC.diagonal(dim1=-2, dim2=-1).copy_((q_NXCK * k_NXCK).sum(-1))
    for half, level in zip(_halves_of(chunk), levels, strict=True):
        columns_NXPMK = _split(k_NXCK, half)[0] * level.write_NXPMK
        found = _rows(q_NXCK, beta_k_NXCK, level, half) @ columns_NXPMK.mT
        _corners(attend_NXCC, half).copy_(found[..., :half, :])
        _corners(system_NXCC, half).copy_(found[..., half:, :])
    return attend_NXCC, system_NXCC


def _run_states(chunks: Chunks, initial_XKV: Tensor) -> tuple[Tensor, Tensor]:
    """u of every chunk (N, X, C, V), and the states (N + 1, X, K, V) before each chunk and after the last."""
    solve_beta_NXCC = chunks.solve_NXCC * chunks.beta_NXC1.mT
    u_NXCV = matmul(solve_beta_NXCC, chunks.v_NXCV, chunks.dtype).to(initial_XKV.dtype)
    written_NXCK = chunks.k_NXCK * chunks.write_NXCK
    return u_NXCV, carry(u_NXCV, chunks.lost_NXCK, written_NXCK, chunks.keep_NXK1, initial_XKV)


def backward(
    inputs_NXCD: list[Tensor],
    masks: ChunkMasks | None,
    initial_XKV: Tensor,
    do_NXCV: Tensor,
    d_final_XKV: Tensor,
    scale: float,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of the inputs and of the state before the first chunk, given those of what `forward` returns."""
    chunks = _prepare(inputs_NXCD, masks)
    wide, low = d_final_XKV.dtype, chunks.dtype
    u_NXCV, state_NXKV = _run_states(chunks, initial_XKV)
    do_NXCV = do_NXCV * scale

    d_u_NXCV = matmul(chunks.attend_NXCC.mT, do_NXCV, low).to(wide)
    d_state_NXKV = torch.empty_like(state_NXKV)
    d_state_NXKV[:-1] = matmul((chunks.q_NXCK * chunks.read_NXCK).mT, do_NXCV, low)
    d_state_NXKV[-1] = d_final_XKV
    carry_backward(d_u_NXCV, d_state_NXKV, chunks.lost_NXCK, chunks.k_NXCK * chunks.write_NXCK, chunks.keep_NXK1)
    return _gradients(chunks, u_NXCV, state_NXKV, do_NXCV, d_u_NXCV, d_state_NXKV), d_state_NXKV[0]


def _gradients(
    chunks: Chunks, u_NXCV: Tensor, state_NXKV: Tensor, do_NXCV: Tensor, d_u_NXCV: Tensor, d_state_NXKV: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k (N, X, C, K), v (N, X, C, V), log alpha (N, X, C, K) and beta (N, X, C, 1)."""
    wide, low, q_NXCK, k_NXCK = u_NXCV.dtype, chunks.dtype, chunks.q_NXCK, chunks.k_NXCK
    # u = solve (beta v - (beta k) S): what the keys read is subtracted.
    d_error_NXCV = matmul(chunks.solve_NXCC.mT, d_u_NXCV, low).to(wide)
    low_u, low_state = u_NXCV.to(low), state_NXKV[:-1].to(low)

    def d_reader(d_read_NXCV: Tensor, diagonal: int) -> tuple[Tensor, Tensor]:
        """From the gradient of what queries or keys read: gradients of their scores, and of them through the state."""
        d_scores_NXCC = matmul(d_read_NXCV, low_u.mT, low).to(wide).tril_(diagonal)
        if chunks.masks is not None:
            d_scores_NXCC = within_document(d_scores_NXCC, chunks.masks.same_NB1CC)
        return d_scores_NXCC, matmul(d_read_NXCV, low_state.mT, low) * chunks.read_NXCK

    d_attend_NXCC, d_q_NXCK = d_reader(do_NXCV, 0)
    d_system_NXCC, d_beta_k_NXCK = d_reader(-d_error_NXCV, -1)
    d_prefix_NXCK = (d_q_NXCK * q_NXCK).addcmul_(d_beta_k_NXCK, chunks.beta_k_NXCK)
    kept_NXK = (state_NXKV[:-1] * d_state_NXKV[1:]).sum(-1).mul_(chunks.keep_NXK1[..., 0])
    d_prefix_NXCK[:, :, -1] += kept_NXK
    d_k_NXCK = matmul(u_NXCV, d_state_NXKV[1:].mT, low) * chunks.write_NXCK
    d_suffix_NXCK = d_k_NXCK * k_NXCK

    own_NXC1 = d_attend_NXCC.diagonal(dim1=-2, dim2=-1)[..., None]
    d_q_NXCK.addcmul_(own_NXC1, k_NXCK)
    d_k_NXCK.addcmul_(own_NXC1, q_NXCK)
    halves = _halves_of(k_NXCK.shape[2])
    for half, level in zip(reversed(halves), reversed(chunks.levels), strict=True):
        # First what the sums over blocks of 2M say of the sums over their halves: see `_decays`.
        (d_first_prefix, d_second_prefix), (d_first_suffix, _) = (
            _split(x, half) for x in (d_prefix_NXCK, d_suffix_NXCK)
        )
        d_first_prefix[..., -1, :] += d_second_prefix.sum(-2)
        d_second_prefix[..., -1, :] += d_first_suffix.sum(-2)

        d_scores = torch.cat([_corners(d_attend_NXCC, half), _corners(d_system_NXCC, half)], dim=-2)
        first_k, (_, second_q), (_, second_k) = (
            _split(k_NXCK, half)[0],
            _split(q_NXCK, half),
            _split(chunks.beta_k_NXCK, half),
        )
        d_rows = (d_scores @ (first_k * level.write_NXPMK)).unflatten(-2, (2, half)) * level.read_NXPMK.unsqueeze(3)
        d_second_q, d_second_k = d_rows.unbind(3)
        _split(d_q_NXCK, half)[1].add_(d_second_q)
        _split(d_beta_k_NXCK, half)[1].add_(d_second_k)
        d_second_prefix.addcmul_(d_second_q, second_q).addcmul_(d_second_k, second_k)

        d_first_k = (d_scores.mT @ _rows(q_NXCK, chunks.beta_k_NXCK, level, half)).mul_(level.write_NXPMK)
        _split(d_k_NXCK, half)[0].add_(d_first_k)
        d_first_suffix.addcmul_(d_first_k, first_k)

    d_beta_NXC1 = (d_error_NXCV * chunks.v_NXCV).sum(-1, keepdim=True)
    d_beta_NXC1 += (d_beta_k_NXCK * k_NXCK).sum(-1, keepdim=True)
    d_k_NXCK.addcmul_(d_beta_k_NXCK, chunks.beta_NXC1)
    return d_q_NXCK, d_k_NXCK, d_error_NXCV.mul_(chunks.beta_NXC1), d_prefix_NXCK, d_beta_NXC1
