"""Attention of new tokens to keys and values held in a state."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_to_cache(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, allowed_BTS: Tensor, *, scale: float) -> Tensor:
    """Dense attention under an explicit mask; a query that may see nothing gives zeros.

    The query heads that share a key head are stacked as rows of it, so that the cache is never copied per head.
    """
    time = q_BTHK.shape[1]
    groups = k_BSGK.shape[2]
    q_BGMK = q_BTHK.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    shared = q_BGMK.shape[2] // time
    allowed_B1MS = allowed_BTS[:, None].expand(-1, shared, -1, -1).flatten(1, 2)[:, None]
    if k_BSGK.shape[-1] == v_BSGV.shape[-1]:
        k_BGSK, v_BGSV = k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2)
        o_BGMV = scaled_dot_product_attention(q_BGMK, k_BGSK, v_BGSV, attn_mask=allowed_B1MS, scale=scale)
    else:  # PyTorch's kernels would turn the whole cache to fp32 at every token
        score_BGMS = scale * torch.matmul(q_BGMK, k_BSGK.permute(0, 2, 3, 1)).to(
            torch.promote_types(q_BTHK.dtype, torch.float32)
        )
        weight_BGMS = score_BGMS.masked_fill(~allowed_B1MS, -torch.inf).softmax(dim=-1)
        weight_BGMS = weight_BGMS.masked_fill(~allowed_B1MS, 0.0)  # also where nothing is allowed: zeros, not NaN
        o_BGMV = torch.matmul(weight_BGMS.to(v_BSGV.dtype), v_BSGV.transpose(1, 2))
    return o_BGMV.unflatten(2, (shared, time)).permute(0, 3, 1, 2, 4).flatten(2, 3)
