"""Gated DeltaNet against transformers' Qwen3-Next layer (its PyTorch path), weights mapped."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.model.mixers.gdn import GDNConfig

from .helpers import WIDTH, Named, assert_equal_to_oracle, random_input, whole


def from_qwen(theirs: Named, config: GDNConfig) -> Named:
    """Qwen3-Next's names and row order to ours.

    Its fused projections go key head by key head, each with its q, k, v, z (or b, a) side by side; ours hold all of
    q, then all of k, and so on.
    """
    head_k, head_v = config.head_dims(WIDTH)
    repeats = config.n_heads // config.key_heads
    qkvz = theirs["in_proj_qkvz.weight"].unflatten(0, (config.key_heads, -1))
    parts = qkvz.split((head_k, head_k, repeats * head_v, repeats * head_v), dim=1)
    ba = theirs["in_proj_ba.weight"].unflatten(0, (config.key_heads, -1)).split(repeats, dim=1)
    return {
        "qkvz_proj.weight": torch.cat([part.flatten(0, 1) for part in parts]),
        "ba_proj.weight": torch.cat([part.flatten(0, 1) for part in ba]),
        "conv_weight": theirs["conv1d.weight"].squeeze(1),
        "A_log": theirs["A_log"],
        "dt_bias": theirs["dt_bias"],
        "norm_weight": theirs["norm.weight"],
        "o_proj.weight": theirs["out_proj.weight"],
    }


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("time", [5, 64, 150])
@pytest.mark.parametrize(
    "config",
    [
        GDNConfig(n_heads=2, head_k_dim=8, head_v_dim=12),
        GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, conv=3),
        GDNConfig(n_heads=3, n_key_heads=1, head_k_dim=8, head_v_dim=8),
    ],
    ids=["heads 2", "value heads 4, key heads 2", "value heads 3, key heads 1"],
)
def test_gdn_is_qwen3_nexts_gated_deltanet(config: GDNConfig, time: int, backend: str) -> None:
    from dataclasses import replace

    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    head_k, head_v = config.head_dims(WIDTH)
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=WIDTH,
            linear_num_value_heads=config.n_heads,
            linear_num_key_heads=config.key_heads,
            linear_key_head_dim=head_k,
            linear_value_head_dim=head_v,
            linear_conv_kernel_dim=config.conv,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        layer_idx=0,
    )
    ours = replace(config, backend=backend).build(WIDTH)
    assert_equal_to_oracle(
        ours,
        theirs,
        lambda named: from_qwen(named, config),
        lambda x: ours(x, whole(x)),
        theirs,
        random_input(2, time),
    )


@torch.no_grad()
def test_the_layer_is_its_equations() -> None:
    """Convolution, gates, recurrence and gated norm written out one token at a time, as NUMERICS.md has them."""
    config = GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6)
    mixer = config.build(WIDTH).double()
    x = random_input(1, 20).double()
    weights = dict(mixer.named_parameters())
    q_rows, k_rows, v_rows = 16, 16, 24
    projected = x[0] @ weights["qkvz_proj.weight"].T
    channels, z = projected[:, : q_rows + k_rows + v_rows], projected[:, q_rows + k_rows + v_rows :]
    b, a = (x[0] @ weights["ba_proj.weight"].T).chunk(2, dim=-1)
    state, out = torch.zeros(4, 8, 6, dtype=torch.float64), []
    for t in range(20):
        seen = [channels[t - back] * weights["conv_weight"][:, 3 - back] for back in range(4) if t >= back]
        mixed: Tensor = F.silu(torch.stack(seen).sum(0))
        q, k, v = mixed[:16].view(2, 8), mixed[16:32].view(2, 8), mixed[32:].view(4, 6)
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        normed = []
        for head in range(4):
            alpha = torch.exp(-weights["A_log"][head].exp() * F.softplus(a[t, head] + weights["dt_bias"][head]))
            memory = alpha * state[head]
            error = b[t, head].sigmoid() * (v[head] - memory.T @ k[head // 2])
            state[head] = memory + torch.outer(k[head // 2], error)
            o = state[head].T @ q[head // 2] / math.sqrt(8)
            normed.append(o / (o.square().mean() + 1e-6).sqrt() * weights["norm_weight"])
        out.append(torch.cat(normed) * F.silu(z[t]) @ weights["o_proj.weight"].T)
    found = mixer(x, whole(x))[0]
    assert (found - torch.stack(out)).abs().max() < 1e-6
