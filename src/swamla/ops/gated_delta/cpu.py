"""The gated delta rule in chunks, with a hand-written backward pass: the backend "torch", a CPU's fast path.

Inside a chunk, with G the running sum of log alpha and D_ts = exp(G_t - G_s) for s <= t, the recurrence is linear
attention whose values `u` solve a unit-triangular system (arXiv 2406.06484; with the gate, 2412.06464):

    u = beta (v - p),   p_t = sum_{s<t} D_ts (k_t.k_s) u_s + e^{G_t} k_t S      the state's prediction for key t
    o_t             = sum_{s<=t} D_ts (q_t.k_s) u_s + e^{G_t} q_t S             the output for query t
    S'              = e^{G_C} S + sum_s e^{G_C - G_s} k_s u_s

Queries and keys read the state by the same formula, so their gradients share code. Only S is sequential over chunks.

Weights of zero separate documents that share a chunk, but 0 * NaN is NaN. On a CPU, a NaN or infinity in packed rows
therefore leads to a second computation, one document at a time. On an accelerator the check would be a device
synchronisation, so there a NaN reaches the other documents of its row.

Shapes: N chunks, X = B*H, C tokens per chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.ops.autocast import without_autocast
from swamla.ops.gated_delta.chunks import ChunkMasks, backward, forward
from swamla.ops.gated_delta.reference import RuleInputs
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import PADDING, Layout

# Rows of q (tokens x heads) in a segment on a CPU: its tensors then fit the cache.
CPU_ROWS = 4096


@outside_graphs
def chunked_gated_delta_rule(
    inputs: RuleInputs, initial_state_BHKV: Tensor | None, seq: Layout | None, *, scale: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V) in fp32 (fp64 for fp64 inputs).

    State, gates and the triangular solve are in the state's dtype. With bf16 q, k, v the large batched matmuls are in
    bf16.
    """
    q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH = inputs
    rule = Rule(documents_of(seq, chunk), scale, chunk, forward, backward)
    return run_in_chunks(
        (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH[..., None], beta_BTH[..., None]), initial_state_BHKV, rule
    )


def run_in_chunks(inputs: Sequence[Tensor], initial_state_BHKV: Tensor | None, rule: "Rule") -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) and the final state (B, H, K, V) of a delta rule.

    inputs: q and k (B, T, H, K), v (B, T, H, V), log α (B, T, H, 1 or K) and β (B, T, H, 1).
    """
    documents, (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, beta_BTH1) = rule.documents, inputs
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    log_alpha_BTHK, beta_BTH1 = log_alpha_BTHK.to(dtype), beta_BTH1.to(dtype)
    if documents.padding_BT is not None:
        padding_BT11 = documents.padding_BT[..., None, None]
        q_BTHK, log_alpha_BTHK, beta_BTH1 = (
            x.masked_fill(padding_BT11, 0) for x in (q_BTHK, log_alpha_BTHK, beta_BTH1)
        )
    if documents.restart_BT is not None:
        log_alpha_BTHK = log_alpha_BTHK.masked_fill(documents.restart_BT[..., None, None], 0)
    if initial_state_BHKV is None:
        batch, _, heads, key_width = q_BTHK.shape
        initial_state_BHKV = beta_BTH1.new_zeros(batch, heads, key_width, v_BTHV.shape[-1])
    return _ChunkedRule.apply(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, beta_BTH1, initial_state_BHKV.to(dtype), rule)


@dataclass(frozen=True)
class Documents:
    """Document tables of the rule, built once per forward pass for all layers.

    padding_BT: None for rows without padding.  restart_BT and masks: None when each row is one document.
    """

    padding_BT: Tensor | None
    restart_BT: Tensor | None
    masks: ChunkMasks | None
    document_BT: Tensor | None

    def would_mix(self, result: Tensor) -> bool:
        """Whether a NaN or infinity of one document, or of padding, may have reached other documents of its row."""
        packed = self.masks is not None or self.padding_BT is not None
        return packed and result.device.type == "cpu" and not bool(result.sum().isfinite())

    def spans(self) -> list[tuple[slice, slice]]:
        """The row (as a slice of one) and the tokens of every document, without padding."""
        assert self.document_BT is not None
        found = []
        for row, ids in enumerate(self.document_BT.tolist()):
            begin = 0
            for document, same in groupby(ids):
                end = begin + len(list(same))
                if document != PADDING:
                    found.append((slice(row, row + 1), slice(begin, end)))
                begin = end
        return found


@dataclass(frozen=True)
class Rule:
    """The settings of a call: document tables, the factor of the outputs, tokens per chunk; and a chunk's computation.

    forward: (inputs, each (N, X, C, D); masks; the state before (X, K, V); scale) -> outputs (N, X, C, V), state after.
    backward: (inputs; masks; the state before; gradients of outputs and of the state after; scale) -> gradients of the
        inputs, and of the state before.
    """

    documents: Documents
    scale: float
    chunk: int
    forward: Callable[[list[Tensor], ChunkMasks | None, Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[
        [list[Tensor], ChunkMasks | None, Tensor, Tensor, Tensor, float], tuple[tuple[Tensor, ...], Tensor]
    ]


NO_DOCUMENTS = Documents(None, None, None, None)


def documents_of(seq: Layout | None, chunk: int) -> Documents:
    """The document tables of `seq` for one chunk length, shared by all layers."""
    if seq is None:
        return NO_DOCUMENTS
    return seq.table(("gated_delta", chunk), partial(_make, seq, chunk))


def _make(seq: Layout, chunk: int) -> Documents:
    padding_BT = seq.document_BT == PADDING
    padding = padding_BT if seq.padded else None
    if seq.whole_rows:
        return Documents(padding, None, None, seq.document_BT)
    restart_BT = torch.zeros_like(padding_BT)
    restart_BT[:, 1:] = (seq.document_BT[:, 1:] != seq.document_BT[:, :-1]) & ~padding_BT[:, 1:]
    # Padding counts as the end of the document before it: it neither decays nor writes, so the state is unchanged.
    return Documents(padding, restart_BT, _masks(restart_BT.cumsum(dim=1), chunk), seq.document_BT)


def _masks(ordinal_BT: Tensor, chunk: int) -> ChunkMasks:
    """Masks from each token's document number inside its row."""
    batch, time = ordinal_BT.shape
    padded_BT = F.pad(ordinal_BT[:, None].float(), (0, -time % chunk), mode="replicate")[:, 0]
    ordinal_NBC = padded_BT.view(batch, -1, chunk).transpose(0, 1)
    leaving_NB1 = ordinal_NBC[..., -1:]
    entering_NB1 = torch.cat([torch.zeros_like(leaving_NB1[:1]), leaving_NB1[:-1]])
    return ChunkMasks(
        same_NB1CC=(ordinal_NBC[..., :, None] == ordinal_NBC[..., None, :]).float().tril()[:, :, None],
        reads_NB1C1=(ordinal_NBC == entering_NB1)[:, :, None, :, None],
        writes_NB1C1=(ordinal_NBC == leaving_NB1)[:, :, None, :, None],
        keeps_NB111=(entering_NB1 == leaving_NB1)[:, :, None, :, None],
    )


class _ChunkedRule(torch.autograd.Function):
    """Saves the inputs and the states between segments. The backward pass recomputes everything else per segment."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_alpha_BTHK: Tensor,
        beta_BTH1: Tensor,
        initial_BHKV: Tensor,
        rule: Rule,
    ) -> tuple[Tensor, Tensor]:
        inputs = (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, beta_BTH1)
        ctx.rule = rule
        with without_autocast(q_BTHK.device.type):
            o_BTHV, final_BHKV, states = _forward(inputs, initial_BHKV, rule)
            if rule.documents.would_mix(o_BTHV):
                o_BTHV, final_BHKV = _forward_by_document(inputs, initial_BHKV, rule)
        ctx.save_for_backward(*inputs, initial_BHKV, torch.stack(states))
        return o_BTHV, final_BHKV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor, d_final_BHKV: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, initial_BHKV, states_SXKV = ctx.saved_tensors
        rule: Rule = ctx.rule
        with without_autocast(do_BTHV.device.type):
            found = _backward(inputs, states_SXKV, do_BTHV, d_final_BHKV, rule)
            if rule.documents.would_mix(found[1]):
                found = _backward_by_document(inputs, initial_BHKV, do_BTHV, d_final_BHKV, rule)
        return *found, None


def _forward(inputs: Sequence[Tensor], initial_BHKV: Tensor, rule: Rule) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs, the final state, and the states (B*H, K, V) before each segment."""
    q_BTHK, _, v_BTHV, *_ = inputs
    o_BTHV = torch.empty_like(v_BTHV, dtype=q_BTHK.dtype, memory_format=torch.contiguous_format)
    carried_XKV, states = initial_BHKV.flatten(0, 1), []
    for segment in _segments(q_BTHK, rule.chunk):
        states.append(carried_XKV)
        chunked = _to_chunks(inputs, segment, rule.chunk)
        o_NXCV, carried_XKV = rule.forward(chunked, _masks_of(rule, segment), carried_XKV, rule.scale)
        _from_chunks(o_NXCV, o_BTHV, segment)
    return o_BTHV, carried_XKV.unflatten(0, initial_BHKV.shape[:2]).clone(), states


def _backward(
    inputs: Sequence[Tensor], states: Sequence[Tensor] | Tensor, do_BTHV: Tensor, d_final_BHKV: Tensor, rule: Rule
) -> list[Tensor]:
    """Gradients of the inputs and of the initial state."""
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    d_carried_XKV = d_final_BHKV.flatten(0, 1)
    segments = _segments(inputs[0], rule.chunk)
    for segment, carried_XKV in zip(reversed(segments), reversed([*states]), strict=True):
        chunked, (do_NXCV,) = (_to_chunks(x, segment, rule.chunk) for x in (inputs, [do_BTHV]))
        chunk_gradients, d_carried_XKV = rule.backward(
            chunked, _masks_of(rule, segment), carried_XKV, do_NXCV, d_carried_XKV, rule.scale
        )
        for gradient, of_chunks in zip(found, chunk_gradients, strict=True):
            _from_chunks(of_chunks, gradient, segment)
    return [*found, d_carried_XKV.unflatten(0, d_final_BHKV.shape[:2])]


def _forward_by_document(inputs: Sequence[Tensor], initial_BHKV: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """`_forward` of each document separately."""
    alone = replace(rule, documents=NO_DOCUMENTS)
    o_BTHV, final_BHKV = torch.zeros_like(inputs[2], dtype=inputs[0].dtype), initial_BHKV.clone()
    for row, tokens in rule.documents.spans():
        before_BHKV = initial_BHKV[row] if tokens.start == 0 else torch.zeros_like(initial_BHKV[row])
        document = [x[row, tokens] for x in inputs]
        o_BTHV[row, tokens], final_BHKV[row], _ = _forward(document, before_BHKV, alone)
    return o_BTHV, final_BHKV


def _backward_by_document(
    inputs: Sequence[Tensor], initial_BHKV: Tensor, do_BTHV: Tensor, d_final_BHKV: Tensor, rule: Rule
) -> list[Tensor]:
    """`_backward` of each document separately, a row's last document first: only it reaches the final state."""
    alone = replace(rule, documents=NO_DOCUMENTS)
    found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    d_carried_BHKV = d_final_BHKV.clone()
    for row, tokens in reversed(rule.documents.spans()):
        before_BHKV = initial_BHKV[row] if tokens.start == 0 else torch.zeros_like(initial_BHKV[row])
        document = [x[row, tokens] for x in inputs]
        *_, states = _forward(document, before_BHKV, alone)
        *d_document, d_before_BHKV = _backward(document, states, do_BTHV[row, tokens], d_carried_BHKV[row], alone)
        for gradient, of_document in zip(found, d_document, strict=True):
            gradient[row, tokens] = of_document
        d_carried_BHKV[row] = d_before_BHKV if tokens.start == 0 else 0
    return [*found, d_carried_BHKV]


def _segments(q_BTHK: Tensor, chunk: int) -> list[slice]:
    """Ranges of chunks that are computed together: all chunks on an accelerator, as many as fit the cache on a CPU."""
    batch, time, heads, _ = q_BTHK.shape
    n_chunks = -(-time // chunk)
    size = max(1, CPU_ROWS // (batch * heads * chunk)) if q_BTHK.device.type == "cpu" else n_chunks
    return [slice(n, min(n + size, n_chunks)) for n in range(0, n_chunks, size)]


def _to_chunks(inputs: Sequence[Tensor], segment: slice, chunk: int) -> list[Tensor]:
    """The segment's chunks (N, B*H, C, D), contiguous, of each input (B, T, H, D).

    The last chunk is padded with zeros, which are tokens that neither decay nor write.
    """
    chunked = []
    for x_BTHD in inputs:
        x_BTHD = x_BTHD[:, segment.start * chunk : segment.stop * chunk]
        if missing := -x_BTHD.shape[1] % chunk:  # F.pad copies even for 0 tokens
            x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, missing))
        chunked.append(x_BTHD.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous())
    return chunked


def _masks_of(rule: Rule, segment: slice) -> ChunkMasks | None:
    masks = rule.documents.masks
    return None if masks is None else ChunkMasks(*(mask[segment] for mask in masks))


def _from_chunks(x_NXCD: Tensor, target_BTHD: Tensor, segment: slice) -> None:
    """Write the segment's chunks (N, B*H, C, D) into (B, T, H, D): the inverse of `_to_chunks`."""
    batch, chunk = target_BTHD.shape[0], x_NXCD.shape[2]
    target_BTHD = target_BTHD[:, segment.start * chunk : segment.stop * chunk]
    x_BNCHD = x_NXCD.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4)
    whole, rest = divmod(target_BTHD.shape[1], chunk)
    target_BTHD[:, : whole * chunk].unflatten(1, (whole, chunk)).copy_(x_BNCHD[:, :whole])
    if rest:
        target_BTHD[:, whole * chunk :].copy_(x_BNCHD[:, whole, :rest])
