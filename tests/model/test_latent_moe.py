"""LatentMoE's routing and its way through the latent are those of transformers' Nemotron-H."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swamla.model.ffns.latent_moe import LatentMoE, LatentMoEConfig
from swamla.ops.dispatch import Dispatch
from swamla.ops.grouped_mm import grouped_mm

from .helpers import WIDTH, Named, assert_close, assert_equal_to_oracle, feed, random_input, scramble

CONFIG = LatentMoEConfig(n_experts=8, n_activated=3, n_shared=1, ratio=4, expert_hidden=16, shared_hidden=24)
LATENT = WIDTH // CONFIG.ratio


def nemotron() -> Any:
    """Nemotron-H's LatentMoE of the same shape, one group of experts."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    return NemotronHMoE(
        NemotronHConfig(
            hidden_size=WIDTH,
            moe_latent_size=LATENT,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=24,
            n_routed_experts=CONFIG.n_experts,
            num_experts_per_tok=CONFIG.n_activated,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        )
    )


class Ungated(nn.Module):
    """Experts like Nemotron-H's, W_down relu(W_up x)², over our dispatch and our grouped products."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(CONFIG.n_experts, LATENT, 16))
        self.down = nn.Parameter(torch.empty(CONFIG.n_experts, 16, LATENT))

    def forward(self, x_ND: Tensor, dispatch: Dispatch, weight_NK: Tensor) -> Tensor:
        h = grouped_mm(dispatch.scatter(x_ND), self.up, dispatch.ends_E).relu().square()
        return dispatch.gather(grouped_mm(h, self.down, dispatch.ends_E), weight_NK)


def ungated() -> LatentMoE:
    """Our module, all of it, with nothing but the experts exchanged; without the shared ones, which are gated too."""
    ours = replace(CONFIG, n_shared=0).build(WIDTH)
    ours.experts = Ungated()
    return ours


def from_nemotron(theirs: Named) -> Named:
    return {
        "router.weight": theirs["gate.weight"],
        "experts.up": theirs["experts.up_proj"].mT,
        "experts.down": theirs["experts.down_proj"].mT,
        "latent_down_proj.weight": theirs["fc1_latent_proj.weight"],
        "latent_up_proj.weight": theirs["fc2_latent_proj.weight"],
    }


def test_routing_dispatch_and_latent_are_nemotron_hs() -> None:
    """Same output and gradients once Nemotron-H's ungated experts stand in our module, its shared expert silenced."""
    theirs, ours = nemotron(), ungated()
    bias = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(3))
    ours.router.bias.copy_(bias)
    theirs.gate.e_score_correction_bias.copy_(bias)
    shared = theirs.shared_experts
    theirs.shared_experts = nn.Module()
    theirs.shared_experts.forward = torch.zeros_like
    assert_equal_to_oracle(ours, theirs, from_nemotron, lambda x: feed(ours, x)[0], theirs, random_input(2, 40))

    theirs.shared_experts, x = shared, random_input(2, 5)  # with it, the module is the sum of both
    scramble(shared)
    assert_close(theirs(x), feed(ours, x)[0] + shared(x), 1e-5)


@torch.no_grad()
def test_the_same_experts_with_the_same_weights_are_chosen_as_in_nemotron_h() -> None:
    theirs, ours = nemotron(), CONFIG.build(WIDTH)
    scramble(theirs)
    bias = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(3))
    ours.router.weight.copy_(theirs.gate.weight)
    ours.router.bias.copy_(bias)
    theirs.gate.e_score_correction_bias.copy_(bias)
    x = random_input(1, 200)[0]
    routing, (logits, weights, indices) = ours.router(x), theirs.gate(x)
    assert_close(routing.logits_NE, logits, 1e-6)
    by_expert = [
        torch.zeros(200, 8).scatter_(1, i, w) for i, w in ((routing.expert_NK, routing.weight_NK), (indices, weights))
    ]
    assert torch.equal(by_expert[0] > 0, by_expert[1] > 0)
    assert_close(by_expert[0], by_expert[1], 1e-6)


@pytest.mark.parametrize(
    ("change", "experts"),
    [
        ({}, (8, LATENT, 32)),
        ({"ratio": 2}, (8, 2 * LATENT, 32)),
        ({"ratio": 2, "preserve_expert_dim": False}, (8, 2 * LATENT, 16)),
    ],
    ids=str,
)
def test_experts_live_in_the_latent_and_router_and_shared_experts_at_full_width(
    change: dict[str, Any], experts: tuple[int, ...]
) -> None:
    moe = replace(CONFIG, **change).build(WIDTH)
    latent = experts[1]
    assert moe.experts.gate_up.shape == experts
    assert moe.experts.down.shape == (8, experts[2] // 2, latent)
    assert moe.router.weight.shape == (8, WIDTH)
    assert moe.shared.gate_up_proj.weight.shape == (48, WIDTH)
    assert moe.latent_down_proj.weight.shape == (latent, WIDTH)
    assert moe.latent_up_proj.weight.shape == (WIDTH, latent)


def test_the_router_sees_what_the_latent_does_not() -> None:
    moe = CONFIG.build(WIDTH)
    scramble(moe)
    x = random_input(1, 30)
    blind = x.clone()
    basis = torch.linalg.svd(moe.latent_down_proj.weight.detach()).Vh[LATENT:]  # directions the projection forgets
    blind += 3 * basis[0]
    assert_close(moe.latent_down_proj(blind), moe.latent_down_proj(x), 1e-5)
    assert not torch.equal(moe.router(blind[0]).expert_NK, moe.router(x[0]).expert_NK)
