"""Causal attention on CUDA: cuDNN's kernel where rows are documents, FlexAttention where they are packed.

Not measured on GPU.
"""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from swamla.ops.attention.flex import at_least, flex_attention, refuse_doubles
from swamla.ops.layout import Layout

KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # the second for fp32, one token, odd widths
MULTIPLE = 8  # of which both want the widths of heads to be one


def cudnn_causal_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, scale: float) -> Tensor:
    """Each token attends to its document up to itself: (B, T, H, V); widths of keys and values may differ.

    Where documents share a row, one kernel for all of them under a block mask costs less than a call for each length.
    """
    if not seq.whole_rows:
        return flex_attention(q_BTHK, k_BTGK, v_BTGV, seq, window=None, sinks=0, scale=scale)
    return fused_attention(q_BTHK, k_BTGK, v_BTGV, scale=scale)


def fused_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, scale: float) -> Tensor:
    """Causal attention of whole rows. Key heads shared by query heads are repeated, as not every kernel can share."""
    refuse_doubles("cudnn", q_BTHK)
    shared = q_BTHK.shape[2] // k_BTGK.shape[2]
    if shared > 1:
        k_BTGK, v_BTGV = (x.repeat_interleave(shared, dim=2) for x in (k_BTGK, v_BTGV))
    q, k, v = (at_least(-(-x.shape[-1] // MULTIPLE) * MULTIPLE, x.transpose(1, 2)) for x in (q_BTHK, k_BTGK, v_BTGV))
    with sdpa_kernel(KERNELS, set_priority=True):
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o[..., : v_BTGV.shape[-1]].transpose(1, 2)
