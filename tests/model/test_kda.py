"""Kimi Delta Attention against transformers' layers of Kimi Linear and Ling 3.0, weights mapped."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.ops.layout import Layout

from .helpers import (
    WIDTH,
    Named,
    assert_close,
    assert_equal_to_oracle,
    build_mixer,
    gradients_of,
    packed,
    random_input,
    scramble,
    whole,
)
from .test_gdn import kimi, kimi_config, ling

HEADS = KDAConfig(n_heads=4, head_k_dim=8, head_v_dim=8)
FULL = replace(HEADS, gate="sigmoid", decay_rank=0, norm_eps=1e-6)


def from_transformers(named: Named) -> Named:
    """The names of Kimi Linear's or Ling 3.0's layer to ours, with projections of the same input joined."""
    low_rank = "g_a_proj.weight" in named
    z, a = ("g_a_proj", "forget_gate.f_a_proj") if low_rank else ("g_proj", "forget_gate.f_proj")
    translated = {
        "qkvz_proj.weight": torch.cat([named[f"{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", z)]),
        "ba_proj.weight": torch.cat([named["b_proj.weight"], named[f"{a}.weight"]]),
        "conv_weight": named["conv1d.weight"].squeeze(1),
        "A_log": named["forget_gate.A_log"].flatten(),
        "dt_bias": named["forget_gate.dt_bias"],
        "norm_weight": named["o_norm.weight"],
        "o_proj.weight": named["o_proj.weight"],
    }
    if low_rank:
        translated["expand_z.weight"] = named["g_b_proj.weight"]
        translated["expand_a.weight"] = named["forget_gate.f_b_proj.weight"]
    return translated


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("time", [5, 64, 150])
def test_kda_is_kimi_linears_delta_attention(time: int, backend: str) -> None:
    ours, theirs, x = replace(HEADS, backend=backend).build(WIDTH), kimi(), random_input(2, time)
    assert_equal_to_oracle(ours, theirs, from_transformers, lambda x: ours(x, whole(x)), theirs, x)


@pytest.mark.parametrize("time", [5, 150])
@pytest.mark.parametrize("decay", ["softplus", "safe"])
def test_with_gates_of_full_rank_kda_is_ling_3s_delta_attention(decay: Any, time: int) -> None:
    ours, theirs, x = replace(FULL, decay=decay).build(WIDTH), ling(safe=decay == "safe"), random_input(2, time)
    assert_equal_to_oracle(ours, theirs, from_transformers, lambda x: ours(x, whole(x)), theirs, x)


@torch.no_grad()
def test_step_by_step_kda_is_kimi_linears_with_its_cache() -> None:
    from transformers import DynamicCache

    theirs, ours, x = kimi(), HEADS.build(WIDTH), random_input(1, 20)
    scramble(theirs)
    ours.load_state_dict(from_transformers(dict(theirs.named_parameters())))
    cache = DynamicCache(config=kimi_config())
    state = ours.init_state(1, 20, dtype=torch.float32, device="cpu")
    for begin, end in ((0, 12), *((t, t + 1) for t in range(12, 20))):
        expected = theirs(x[:, begin:end], cache_params=cache)
        found = ours.step(x[:, begin:end], state, Layout.continuing_uniform(begin, 1, end - begin))
        assert_close(found, expected, 1e-5, f"tokens {begin} to {end}")


@pytest.mark.parametrize(
    "options", [{}, {"gate": "silu", "decay": "safe", "beta_max": 2.0, "norm_eps": 0.1, "decay_rank": 0}], ids=str
)
@torch.no_grad()
def test_the_layer_is_its_equations(options: dict[str, Any]) -> None:
    """Convolution, gates, recurrence and gated norm written out one token at a time."""
    config = KDAConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, **options)
    mixer = build_mixer(config).double()
    x = random_input(1, 20).double()
    weights = dict(mixer.named_parameters())
    channels, z = (x[0] @ weights["qkvz_proj.weight"].T).split([16 + 16 + 24, 24 if options else 6], dim=-1)
    b, a = (x[0] @ weights["ba_proj.weight"].T).split([4, 4 * 8 if options else 6], dim=-1)
    if not options:
        z, a = z @ weights["expand_z.weight"].T, a @ weights["expand_a.weight"].T
    a, gate = (a + weights["dt_bias"]).view(20, 4, 8), z * z.sigmoid() if options else z.sigmoid()
    state, out = torch.zeros(4, 8, 6, dtype=torch.float64), []
    for t in range(20):
        seen = [channels[t - back] * weights["conv_weight"][:, 3 - back] for back in range(4) if t >= back]
        mixed = F.silu(torch.stack(seen).sum(0))
        q, k, v = mixed[:16].view(2, 8), mixed[16:32].view(2, 8), mixed[32:].view(4, 6)
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        normed = []
        for head in range(4):
            rate, key = weights["A_log"][head].exp(), k[head // 2]
            alpha = torch.exp(-5 / (1 + torch.exp(-rate * a[t, head]))) if options else (1 + a[t, head].exp()) ** -rate
            beta = (2 if options else 1) * b[t, head].sigmoid()
            forgotten = (torch.eye(8) - beta * torch.outer(key, key)) @ torch.diag(alpha)
            state[head] = forgotten @ state[head] + beta * torch.outer(key, v[head])
            o = state[head].T @ q[head // 2] / math.sqrt(8)
            eps = 0.1 if options else 1e-5
            normed.append(o / (o.square().mean() + eps).sqrt() * weights["norm_weight"])
        out.append(torch.cat(normed) * gate[t] @ weights["o_proj.weight"].T)
    assert (mixer(x, whole(x))[0] - torch.stack(out)).abs().max() < 1e-12


def test_with_decays_that_are_the_same_for_all_channels_it_is_gated_deltanet() -> None:
    """Outputs and gradients: a decay's row of GDN's projection, written for each channel of its head."""
    plain = GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6)
    theirs = build_mixer(plain)
    named = dict(theirs.named_parameters())
    ours = KDAConfig(**vars(plain) | {"decay_rank": 0}).build(WIDTH)
    b, a = named["ba_proj.weight"].chunk(2)
    spread = {
        "ba_proj.weight": torch.cat([b, a.repeat_interleave(8, dim=0)]),
        "dt_bias": named["dt_bias"].repeat_interleave(8),
    }
    x, upstream = random_input(2, 70), random_input(2, 70, seed=2)
    expected = theirs(x, whole(x))
    expected.backward(upstream)
    wanted = {name: gradient.clone() for name, gradient in gradients_of(theirs).items()}
    theirs.zero_grad()
    found = torch.func.functional_call(ours, named | spread, (x, whole(x)))
    assert_close(found, expected, 1e-5)
    found.backward(upstream)
    for name, gradient in gradients_of(theirs).items():
        assert_close(gradient, wanted[name], 1e-4, name)


def test_each_form_has_the_weights_and_the_state_that_its_arithmetic_says() -> None:
    """Written out for one shape: D = 32, 2 key heads of 8 (16 channels), 4 value heads of 6 (24), conv 4."""
    plain = KDAConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6)
    rest = 32 * (16 + 16 + 24) + 24 * 32 + 4 * 56 + 32 * 4 + 4 + 4 * 8 + 6  # with b, A_log, dt_bias and the norm
    narrow_gate, narrow_decay = 32 * 6 + 6 * 24, 32 * 6 + 6 * 32
    weights = {
        "plain": (plain, rest + narrow_gate + narrow_decay),
        "full gate": (replace(plain, gate="silu"), rest + 32 * 24 + narrow_decay),
        "full decay": (replace(plain, decay_rank=0), rest + narrow_gate + 32 * 32),
        "decay of rank 3": (replace(plain, decay_rank=3), rest + narrow_gate + 3 * (32 + 32)),
        "shared keys": (replace(plain, share_qk=True), rest - 32 * 16 - 4 * 16 + narrow_gate + narrow_decay),
    }
    for name, (config, expected) in weights.items():
        assert config.n_parameters(WIDTH) == expected, name
        assert sum(p.numel() for p in config.build(WIDTH).parameters()) == expected, name
        channels = 40 if config.share_qk else 56
        assert config.state_bytes(WIDTH, 1000, 2) == 4 * 8 * 6 * 4 + 3 * channels * 2, name


@pytest.mark.parametrize("form", [{"latent_dim": 10}, {"share_qk": True}, {"decay_rank": 0}, {"gate": "silu"}], ids=str)
@torch.no_grad()
def test_every_form_keeps_documents_apart(form: dict[str, Any]) -> None:
    mixer = build_mixer(KDAConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, **form))
    x = random_input(1, 70)
    together = mixer(x, packed(3, 62, 5))
    alone = [mixer(part, whole(part)) for part in x.split((3, 62, 5), dim=1)]
    assert_close(together, torch.cat(alone, dim=1), 1e-5)


def test_bounded_decays_start_where_they_can_be_learned() -> None:
    """log α from −0.5 to −0.005, as time steps from 0.1 to 0.001 say, at unit rates."""
    torch.manual_seed(0)
    mixer = KDAConfig(n_heads=8, head_k_dim=64, head_v_dim=4, decay="safe").build(8)
    log_alpha = mixer.log_decay(mixer.dt_bias, mixer.A_log.exp().repeat_interleave(64))
    assert -0.5 < log_alpha.min() < -0.3
    assert -0.01 < log_alpha.max() < -0.004
