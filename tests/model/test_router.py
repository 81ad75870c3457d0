"""Routers' options are those of DeepSeek-V3, DeepSeek-V2 and Qwen3-Next: outputs, gradients and who is chosen."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from swamla.model.ffns.moe import MoE, MoEConfig
from swamla.model.ffns.router import Router

from .helpers import WIDTH, Named, assert_close, assert_equal_to_oracle, feed, random_input, scramble

MOE = MoEConfig(n_experts=8, n_activated=3, expert_hidden=16)
every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])


def experts(theirs: Named) -> Named:
    return {
        "router.weight": theirs["gate.weight"],
        "experts.gate_up": theirs["experts.gate_up_proj"].mT,
        "experts.down": theirs["experts.down_proj"].mT,
    }


def from_deepseek(theirs: Named) -> Named:
    gate_up = [theirs[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up")]
    shared = {
        "shared.gate_up_proj.weight": torch.cat(gate_up),
        "shared.down_proj.weight": theirs["shared_experts.down_proj.weight"],
    }
    return experts(theirs) | shared


def from_qwen(theirs: Named) -> Named:
    gate_up = [theirs[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up")]
    shared = {
        "shared.gate_up_proj.weight": torch.cat(gate_up),
        "shared.down_proj.weight": theirs["shared_expert.down_proj.weight"],
        "shared_gate": theirs["shared_expert_gate.weight"],
    }
    return experts(theirs) | shared


def assert_same(ours: MoE, theirs: Any, translate: Any) -> None:
    """Outputs, gradients, and the experts of each token with their weights."""
    x = random_input(2, 40)
    assert_equal_to_oracle(ours, theirs, translate, lambda x: feed(ours, x)[0], theirs, x)
    with torch.no_grad():
        routing = ours.router(x.flatten(0, 1))
        _, weights, indices = theirs.gate(x)
    order, wanted = routing.expert_NK.argsort(dim=1), indices.argsort(dim=1)
    assert torch.equal(routing.expert_NK.gather(1, order), indices.gather(1, wanted))
    assert_close(routing.weight_NK.gather(1, order), weights.gather(1, wanted), 1e-6, "weights")


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4, "groups_used": 2},
        {"groups": 2, "groups_used": 1, "scale": 2.5},
        {"groups": 4, "groups_used": 4, "normalise": False},
        {"groups": 4, "groups_used": 3, "normalise": False, "scale": 0.7, "n_shared": 2},
    ],
    ids=str,
)
def test_deepseek_v3s_groups_scale_and_weights(options: dict[str, Any], backend: str) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = replace(MOE, backend=backend, **options)
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=WIDTH,
            moe_intermediate_size=16,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=config.n_shared,
            n_group=config.groups,
            topk_group=config.groups_used,
            norm_topk_prob=config.normalise,
            routed_scaling_factor=config.scale,
        )
    )
    ours = config.build(WIDTH)
    bias = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(3))
    ours.router.bias.copy_(bias)
    theirs.gate.e_score_correction_bias.copy_(bias)
    assert_same(ours, theirs, from_deepseek)


@every_backend
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("greedy", {}),
        ("greedy", {"scale": 16.0, "n_shared": 2}),
        ("group_limited_greedy", {"groups": 4, "groups_used": 2}),
        ("group_limited_greedy", {"groups": 2, "groups_used": 1, "scale": 4.0}),
    ],
    ids=str,
)
def test_deepseek_v2s_softmax_and_groups_by_their_best_expert(
    method: str, options: dict[str, Any], backend: str
) -> None:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = replace(MOE, score="softmax", normalise=False, group_score="max", backend=backend, **options)
    theirs = DeepseekV2Moe(
        DeepseekV2Config(
            hidden_size=WIDTH,
            moe_intermediate_size=16,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=config.n_shared,
            topk_method=method,
            n_group=config.groups,
            topk_group=config.groups_used,
            routed_scaling_factor=config.scale,
        )
    )
    assert_same(config.build(WIDTH), theirs, from_deepseek)


@every_backend
@pytest.mark.parametrize("normalise", [True, False])
def test_qwen3_nexts_softmax_and_gated_shared_expert_of_a_width_of_its_own(normalise: bool, backend: str) -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

    config = replace(MOE, score="softmax", normalise=normalise, shared_gate="sigmoid", shared_hidden=24)
    theirs = Qwen3NextSparseMoeBlock(
        Qwen3NextConfig(
            hidden_size=WIDTH,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=normalise,
        )
    )
    assert_same(replace(config, backend=backend).build(WIDTH), theirs, from_qwen)


def router_of(**options: Any) -> Router:
    router = Router(WIDTH, 8, 3, **options)
    scramble(router)
    return router


@torch.no_grad()
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_normalised_weights_sum_to_the_scale_and_others_are_the_scores_times_it(score: Any) -> None:
    x = random_input(1, 50)[0]
    found = router_of(score=score, scale=2.5)(x)
    assert_close(found.weight_NK.sum(1), torch.full((50,), 2.5), 1e-6)
    plain = router_of(score=score, normalise=False, scale=2.5)(x)
    scores = plain.logits_NE.sigmoid() if score == "sigmoid" else plain.logits_NE.softmax(1)
    assert_close(plain.weight_NK, 2.5 * scores.gather(1, plain.expert_NK), 1e-6)
    assert torch.equal(plain.expert_NK.sort().values, found.expert_NK.sort().values)


@torch.no_grad()
@pytest.mark.parametrize(("groups", "used"), [(2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_a_tokens_experts_are_of_no_more_groups_than_it_may_use(groups: int, used: int, group_score: Any) -> None:
    router, x = router_of(groups=groups, groups_used=used, group_score=group_score), random_input(1, 200)[0]
    chosen_by_group = [expert_K // (8 // groups) for expert_K in router(x).expert_NK]
    assert max(len(set(groups_K.tolist())) for groups_K in chosen_by_group) == used
    freely = router_of()(x).expert_NK
    assert max(len(set((expert_K // (8 // groups)).tolist())) for expert_K in freely) == min(groups, 3)


@torch.no_grad()
def test_a_group_of_two_good_experts_beats_one_of_the_best_only_by_their_sum() -> None:
    router = Router(4, 4, 1, groups=2, groups_used=1)
    for group_score, expert in (("top2", 2), ("max", 0)):
        router.group_score = group_score  # type: ignore[assignment]
        assert router.choose(torch.tensor([[0.9, 0.0, 0.6, 0.5]])).tolist() == [[expert]]
    router.group_score = "max"
    assert router.choose(torch.tensor([[-0.9, -0.8, -0.5, -0.7]])).tolist() == [[2]]  # negative by its bias


def balance_by_the_paper(router: Router, x_BTD: Tensor) -> float:
    """DeepSeek-V3's equations 17 to 20 word by word with softmax scores, which sum to 1; the mean over sequences."""
    experts, k, time = len(router.weight), router.n_activated, x_BTD.shape[1]
    total = 0.0
    for row in x_BTD:
        s = (row @ router.weight.T).softmax(-1)
        for i in range(experts):
            f = experts / (k * time) * sum(int(i in router.choose(s[t])) for t in range(time))
            total += f * s[:, i].sum().item() / time
    return total / len(x_BTD)


def test_the_auxiliary_loss_counts_softmax_scores_and_the_experts_of_the_best_groups() -> None:
    config = replace(MOE, score="softmax", groups=4, groups_used=2, group_score="max", aux_loss=0.25)
    moe, x = config.build(WIDTH), random_input(3, 7)
    scramble(moe)
    _, statistics = feed(moe, x)
    assert statistics["loss"].item() == pytest.approx(21 * 0.25 * balance_by_the_paper(moe.router, x), rel=1e-5)
    shares = (x @ moe.router.weight.T).softmax(-1)
    assert statistics["entropy"].item() == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-5)


def test_a_shared_gate_begins_at_one_half() -> None:
    gated, plain = (replace(MOE, shared_gate=gate).build(WIDTH) for gate in ("sigmoid", "none"))
    x = random_input(1, 9)
    scramble(plain)
    gated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        shared = feed(plain.shared, x)[0]
        assert_close(feed(plain, x)[0] - feed(gated, x)[0], 0.5 * shared, 1e-5)
