"""Kimi Delta Attention in chunks, with a hand-written backward pass: the backend "torch", a CPU's fast path.

The same as the gated delta rule's (ops/gated_delta/cpu.py), except for what happens inside a chunk: chunks.py.
"""

from torch import Tensor

from swamla.ops.gated_delta.cpu import Rule, documents_of, run_in_chunks
from swamla.ops.graphs import outside_graphs
from swamla.ops.kda.chunks import backward, forward
from swamla.ops.kda.reference import KDAInputs
from swamla.ops.layout import Layout


@outside_graphs
def chunked_kda(
    inputs: KDAInputs, initial_state_BHKV: Tensor | None, seq: Layout | None, *, scale: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V) in fp32 (fp64 for fp64 inputs).

    chunk: a power of two. State, gates, scores and the triangular solve are in the state's dtype; with bf16 q, k, v the
    products with u and the state are in bf16.
    """
    *qkv_and_log_alpha, beta_BTH = inputs
    rule = Rule(documents_of(seq, chunk), scale, chunk, forward, backward)
    return run_in_chunks((*qkv_and_log_alpha, beta_BTH[..., None]), initial_state_BHKV, rule)
