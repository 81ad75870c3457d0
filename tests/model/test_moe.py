"""Mixtures of experts: routing, balance and computation are the equations, and DeepSeek-V3's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.latent_moe import LatentMoE, LatentMoEConfig
from swamla.model.ffns.moe import MoE, MoEConfig
from swamla.model.ffns.router import Router
from swamla.model.language_model import LanguageModelConfig

from .helpers import (
    MIXERS,
    WIDTH,
    Named,
    assert_close,
    assert_equal_to_oracle,
    build_model,
    feed,
    gradients_of,
    random_input,
    random_tokens,
    scramble,
)

MOE = MoEConfig(n_experts=8, n_activated=3, n_shared=1, expert_hidden=16, shared_hidden=24)
LATENT = LatentMoEConfig(n_experts=8, n_activated=3, n_shared=1, ratio=4, expert_hidden=16, shared_hidden=24)
both = pytest.mark.parametrize("config", [MOE, LATENT], ids=["moe", "latent_moe"])
every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])


def build_moe(config: MoEConfig, seed: int = 0) -> MoE:
    """The module at width `WIDTH` with scrambled weights and a bias that matters."""
    moe = config.build(WIDTH)
    scramble(moe, seed)
    moe.router.bias.copy_(0.3 * torch.randn(config.n_experts, generator=torch.Generator().manual_seed(seed + 7)))
    return moe


def choice_of(config: MoEConfig, biased: list[float]) -> list[int]:
    """The experts of highest biased score in the groups of highest score, one comparison at a time."""
    size = config.n_experts // config.groups

    def worth(group: int) -> float:
        best = sorted(biased[group * size : (group + 1) * size])
        return best[-1] if config.group_score == "max" else sum(best[-2:])

    used = sorted(range(config.groups), key=worth)[-config.groups_used :]
    return sorted((e for e in range(config.n_experts) if e // size in used), key=lambda e: biased[e])[
        -config.n_activated :
    ]


def token_by_token(moe: MoE, x_D: Tensor) -> Tensor:
    """NUMERICS' equation for one token, an expert at a time."""
    config, logits_E = moe.config, moe.router.weight @ x_D
    scores_E = logits_E.exp() / logits_E.exp().sum() if config.score == "softmax" else logits_E.sigmoid()
    chosen = choice_of(config, (scores_E.detach() + moe.router.bias).tolist())
    total = scores_E[chosen].sum() if config.normalise else 1.0
    latent = moe.latent_down_proj(x_D) if isinstance(moe, LatentMoE) else x_D
    routed = torch.zeros_like(latent)
    for e in chosen:
        gate, up = (latent @ moe.experts.gate_up[e]).chunk(2)
        routed = routed + config.scale * scores_E[e] / total * ((F.silu(gate) * up) @ moe.experts.down[e])
    routed = moe.latent_up_proj(routed) if isinstance(moe, LatentMoE) else routed
    if moe.shared is None:
        return routed
    shared = feed(moe.shared, x_D[None, None])[0][0, 0]
    return routed + (shared if moe.shared_gate is None else (moe.shared_gate @ x_D).sigmoid() * shared)


@every_backend
@pytest.mark.parametrize(
    "config",
    [
        MOE,
        LATENT,
        replace(MOE, n_shared=0),
        replace(MOE, n_shared=2),
        replace(MOE, n_activated=8),
        replace(MOE, n_activated=1, n_experts=1),
        replace(LATENT, ratio=2, preserve_expert_dim=False),
        replace(LATENT, n_experts=40, n_activated=2),  # many experts without a token
        replace(MOE, score="softmax"),
        replace(MOE, score="softmax", normalise=False, scale=3.0, shared_gate="sigmoid"),
        replace(MOE, normalise=False, groups=4, groups_used=2),
        replace(LATENT, n_activated=2, scale=2.5, groups=2, shared_gate="sigmoid"),
        replace(LATENT, score="softmax", groups=8, groups_used=5, group_score="max"),
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_each_token_alone(config: MoEConfig, backend: str) -> None:
    x = random_input(2, 5)
    results = []
    for grouped in (True, False):
        moe, leaf = build_moe(replace(config, backend=backend)), x.clone().requires_grad_()
        if grouped:
            y = feed(moe, leaf)[0]
        else:
            y = torch.stack([token_by_token(moe, t) for t in leaf.flatten(0, 1)]).view_as(x)
        assert y.abs().max() > 0.1
        y.backward(random_input(2, 5, seed=2))
        for parameter in moe.parameters():  # a lone expert that no token chose, or a router without a choice
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        results.append({"output": y.detach(), "input gradient": leaf.grad, **gradients_of(moe)})
    for name, expected in results[1].items():
        assert_close(results[0][name], expected, 2e-5, name)


def deepseek(config: MoEConfig) -> Any:
    """DeepSeek-V3's MoE of the same shape, one group of experts."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    return DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=WIDTH,
            moe_intermediate_size=config.expert_dim(WIDTH),
            n_routed_experts=config.n_experts,
            num_experts_per_tok=config.n_activated,
            n_shared_experts=config.n_shared,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        )
    )


def from_deepseek(theirs: Named) -> Named:
    return {
        "router.weight": theirs["gate.weight"],
        "experts.gate_up": theirs["experts.gate_up_proj"].mT,
        "experts.down": theirs["experts.down_proj"].mT,
        "shared.gate_up_proj.weight": torch.cat(
            (theirs["shared_experts.gate_proj.weight"], theirs["shared_experts.up_proj.weight"])
        ),
        "shared.down_proj.weight": theirs["shared_experts.down_proj.weight"],
    }


@every_backend
@pytest.mark.parametrize("n_shared", [1, 2])
def test_moe_is_deepseek_v3s(n_shared: int, backend: str) -> None:
    config = replace(MOE, n_shared=n_shared, shared_hidden=None, backend=backend)
    ours, theirs = config.build(WIDTH), deepseek(config)
    bias = 0.3 * torch.randn(config.n_experts, generator=torch.Generator().manual_seed(3))
    ours.router.bias.copy_(bias)
    theirs.gate.e_score_correction_bias.copy_(bias)
    assert_equal_to_oracle(ours, theirs, from_deepseek, lambda x: feed(ours, x)[0], theirs, random_input(2, 40))


@both
def test_every_expert_the_router_and_both_projections_receive_gradient(config: MoEConfig) -> None:
    moe = build_moe(config)
    moe.router.bias.zero_()
    y, statistics = feed(moe, random_input(4, 50))
    assert (statistics["load"] > 0).all()
    y.square().sum().backward()
    for name, gradient in gradients_of(moe).items():
        matrices = gradient if gradient.ndim == 3 else gradient[None]
        assert (matrices.abs().flatten(1).amax(1) > 1e-4).all(), name


@both
def test_experts_without_a_token_get_zeros(config: MoEConfig) -> None:
    moe = build_moe(config)
    moe.router.bias[3] = -10
    y, statistics = feed(moe, random_input(2, 20))
    y.square().sum().backward()
    assert statistics["load"][3] == 0
    for name in ("experts.gate_up", "experts.down"):
        gradient = gradients_of(moe)[name]
        assert torch.equal(gradient[3], torch.zeros_like(gradient[3]))
        assert gradient[4].abs().max() > 1e-4


@both
@torch.no_grad()
def test_permuting_tokens_permutes_outputs_and_no_token_sees_another(config: MoEConfig) -> None:
    moe, x = build_moe(config), random_input(1, 30)
    y, _ = feed(moe, x)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert_close(feed(moe, x[:, order])[0], y[:, order], 1e-6)
    for t in (0, 17, 29):
        assert_close(feed(moe, x[:, t : t + 1])[0], y[:, t : t + 1], 1e-6, f"token {t} alone")
    crowd = torch.cat((x[:, :1], 5 * random_input(1, 29, seed=3)), dim=1)
    assert_close(feed(moe, crowd)[0][:, :1], y[:, :1], 1e-6, "in other company")


@torch.no_grad()
def test_the_bias_changes_who_is_chosen_and_not_what_the_chosen_weigh() -> None:
    router, x = Router(WIDTH, 8, 3), random_input(1, 50)[0]
    scramble(router)
    before = router(x)
    router.bias.fill_(0.7)  # the same for all: the same choice, the same weights
    same = router(x)
    assert torch.equal(same.expert_NK.sort().values, before.expert_NK.sort().values)
    router.bias.zero_()
    router.bias[2] = 5.0
    after = router(x)
    assert (after.expert_NK == 2).any(dim=1).all()
    assert not (before.expert_NK == 2).any(dim=1).all()
    scores = (x @ router.weight.T).sigmoid()
    for routing in (before, same, after):
        chosen = scores.gather(1, routing.expert_NK)
        assert_close(routing.weight_NK, chosen / chosen.sum(1, keepdim=True), 1e-6)


@torch.no_grad()
def test_weights_sum_to_one_even_where_every_score_underflows() -> None:
    router = Router(WIDTH, 8, 3)
    x = random_input(1, 20)[0]
    router.weight.copy_(-1000 * x.mean(0).expand(8, WIDTH) * torch.arange(1, 9)[:, None])
    weights = router(x.mean(0, keepdim=True)).weight_NK
    assert torch.isfinite(weights).all()
    assert_close(weights.sum(1), torch.ones(1), 1e-6)


@torch.no_grad()
def test_autocast_leaves_routing_in_fp32_and_computes_the_rest_within_a_hundredth() -> None:
    for config in (MOE, LATENT):
        moe, x = build_moe(config), random_input(2, 100)
        exact, wanted = feed(moe, x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, found = feed(moe, x)
            routing = moe.router(x.flatten(0, 1))
        assert rounded.dtype == torch.bfloat16
        assert routing.logits_NE.dtype == routing.weight_NK.dtype == torch.float32
        assert torch.equal(routing.logits_NE, moe.router(x.flatten(0, 1)).logits_NE)
        assert torch.equal(found["load"], wanted["load"])
        assert (rounded.float() - exact).norm() <= 1e-2 * exact.norm()


def test_bf16_gradients_are_within_their_rounding_of_fp32() -> None:
    results = []
    for enabled in (False, True):
        moe = build_moe(MOE)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _ = feed(moe, random_input(2, 100))
        y.float().backward(random_input(2, 100, seed=2))
        results.append(gradients_of(moe))
    for name, exact in results[0].items():
        assert (results[1][name] - exact).norm() <= 1.5e-2 * exact.norm(), name


def balance_by_the_paper(router: Router, x_BTD: Tensor) -> float:
    """DeepSeek-V3's equations 17 to 20 word by word, the mean over sequences."""
    experts, k, time = len(router.weight), router.n_activated, x_BTD.shape[1]
    total = 0.0
    for row in x_BTD:
        s = (row @ router.weight.T).sigmoid()
        for i in range(experts):
            f = experts / (k * time) * sum(int(i in s[t].argsort()[-k:]) for t in range(time))
            total += f * sum((s[t, i] / s[t].sum()).item() for t in range(time)) / time
    return total / len(x_BTD)


def test_the_auxiliary_loss_is_the_papers_whatever_the_bias_and_a_sum_over_tokens() -> None:
    moe, x = build_moe(replace(MOE, aux_loss=0.25)), random_input(3, 7)
    _, statistics = feed(moe, x)
    assert statistics["loss"].item() == pytest.approx(21 * 0.25 * balance_by_the_paper(moe.router, x), rel=1e-5)
    statistics["loss"].backward()
    assert moe.router.weight.grad is not None
    assert moe.router.weight.grad.abs().max() > 1e-3
    assert moe.experts.down.grad is None


def test_the_auxiliary_loss_is_one_a_token_at_perfect_balance_and_more_where_all_crowd_into_a_few() -> None:
    router = Router(8, 8, 1)
    router.weight.data.copy_(torch.eye(8))
    x = 4 * torch.eye(8)[None]  # every token likes another expert best
    logits = router(x[0]).logits_NE[None]
    assert router.auxiliary_loss(logits, torch.ones(1, 8, dtype=torch.bool)).item() == pytest.approx(8, rel=1e-6)
    crowd = router(x[0, :1].expand(8, 8)).logits_NE[None]
    assert router.auxiliary_loss(crowd, torch.ones(1, 8, dtype=torch.bool)).item() > 12


def test_the_z_loss_is_the_squared_log_of_the_sum_of_exponentials_over_tokens() -> None:
    moe, x = build_moe(replace(MOE, z_loss=0.5)), random_input(2, 9)
    _, statistics = feed(moe, x)
    logits = x.double() @ moe.router.weight.double().T
    assert statistics["loss"].item() == pytest.approx(0.5 * logits.exp().sum(-1).log().square().sum().item(), rel=1e-5)
    alone = feed(build_moe(replace(MOE, z_loss=0.5, aux_loss=0.25)), x)[1]["loss"]
    balance = feed(build_moe(replace(MOE, aux_loss=0.25)), x)[1]["loss"]
    assert alone.item() == pytest.approx((statistics["loss"] + balance).item(), rel=1e-5)
    assert "loss" not in feed(build_moe(MOE), x)[1]


@both
def test_micro_batches_add_up_to_the_whole_batch(config: MoEConfig) -> None:
    moe, x = build_moe(replace(config, aux_loss=0.1, z_loss=0.01)), random_input(6, 11)
    _, whole = feed(moe, x)
    parts = [feed(moe, rows)[1] for rows in x.split((1, 3, 2))]
    assert whole.keys() == {"loss", "load", "entropy", "tokens"}
    for name, value in whole.items():
        total = sum(part[name] for part in parts)
        if name in ("load", "tokens"):
            assert torch.equal(total, value), name
        else:
            assert total.item() == pytest.approx(value.item(), rel=1e-5), name
    assert whole["tokens"].item() == 66
    assert whole["load"].sum().item() == 66 * config.n_activated


@torch.no_grad()
def test_entropy_is_log_experts_where_scores_are_equal_and_little_where_one_stands_out() -> None:
    moe, x = build_moe(MOE), random_input(2, 5)
    moe.router.weight.zero_()
    assert feed(moe, x)[1]["entropy"].item() == pytest.approx(10 * torch.tensor(8.0).log().item(), rel=1e-6)
    moe.router.weight[1:] = -100 * x[0, 0] / x[0, 0].norm()
    assert feed(moe, x[:1, :1])[1]["entropy"].item() < 0.1


@torch.no_grad()
def test_rebalancing_moves_the_bias_up_for_the_idle_and_down_for_the_busy() -> None:
    moe = build_moe(replace(MOE, bias_rate=0.5))
    moe.router.bias.zero_()
    moe.rebalance({"load": torch.tensor([9, 5, 5, 5, 5, 5, 5, 1])})
    assert moe.router.bias.tolist() == [-0.5, 0, 0, 0, 0, 0, 0, 0.5]
    assert moe.router.bias.dtype == torch.float32
    assert "router.bias" in moe.state_dict()
    assert "router.bias" not in dict(moe.named_parameters())


@torch.no_grad()
def test_rebalancing_step_after_step_equalises_a_skewed_load() -> None:
    moe, x = build_moe(replace(MOE, bias_rate=0.02)), random_input(4, 100)
    moe.router.weight[0] += 0.5 * x.mean((0, 1)) / x.mean((0, 1)).norm()
    moe.router.bias.copy_(torch.linspace(-0.5, 0.5, 8))

    def imbalance() -> float:
        load = feed(moe, x)[1]["load"].double()
        return (load.max() / load.mean()).item()

    before = imbalance()
    for _ in range(100):
        moe.rebalance(feed(moe, x)[1])
    assert before > 2
    assert imbalance() < 1.2


def one_layer(ffn: MoEConfig) -> LanguageModelConfig:
    block = BlockConfig(mixer=MIXERS["mha"], ffn=ffn)
    return LanguageModelConfig(vocab_size=31, width=WIDTH, blocks={"a": block}, pattern=("a", "a"))


@both
def test_the_model_names_statistics_by_layer_and_hands_them_back_to_the_router(config: MoEConfig) -> None:
    model, tokens = build_model(one_layer(replace(config, bias_rate=0.25))), random_tokens(2, 20)
    _, statistics = model.loss(tokens, tokens)
    assert statistics.keys() == {f"{name}/{layer}" for name in ("load", "entropy", "tokens") for layer in (0, 1)}
    model.rebalance(statistics)
    for layer, block in enumerate(model.blocks):
        load = statistics[f"load/{layer}"].double()
        assert torch.equal(block.ffn.router.bias.double(), 0.25 * (load.mean() - load).sign())


def test_a_fresh_model_draws_experts_as_dense_ffns_and_the_way_out_of_the_latent_undoes_their_averaging() -> None:
    torch.manual_seed(0)
    latent = LatentMoEConfig(n_experts=16, n_activated=4, ratio=2)
    config = replace(one_layer(latent), width=128, pattern=("a",) * 8, init_std=0.05)
    ffn = config.build().blocks[3].ffn
    inner = ffn.experts.gate_up.shape[1]
    for weight, std in [
        (ffn.router.weight, 0.05),
        (ffn.experts.gate_up, 0.05),
        (ffn.experts.down, 0.05 / 4),
        (ffn.shared.gate_up_proj.weight, 0.05),
        (ffn.shared.down_proj.weight, 0.05 / 4),
        (ffn.latent_down_proj.weight, 128**-0.5),
        (ffn.latent_up_proj.weight, 4 * inner**-0.5),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.mean().item()) < 4 * std * weight.numel() ** -0.5
    assert torch.equal(ffn.router.bias, torch.zeros(16))
    stds = ffn.experts.down.flatten(1).std(dim=1)
    assert stds.min() > 0.9 * stds.mean()


def test_by_default_a_token_meets_as_many_expert_weights_as_a_dense_ffn_has() -> None:
    for width in (6144, 12288):
        dense = DenseConfig().n_parameters(width)
        for config in (MoEConfig(), MoEConfig(n_activated=6, n_shared=2), LatentMoEConfig(), LatentMoEConfig(ratio=2)):
            inner, hidden = config.routed_dims(width)
            met = config.n_activated * 3 * inner * hidden + config.components(width)["shared experts"]
            assert dense <= met <= 1.03 * dense  # hidden widths are rounded up to 64


def test_a_latent_four_times_narrower_pays_for_four_times_the_experts() -> None:
    moe, latent = MoEConfig(expert_hidden=256), LatentMoEConfig(expert_hidden=256)
    assert latent.components(1024)["experts"] == moe.components(1024)["experts"]
    assert latent.components(1024)["latent projections"] == 2 * 1024 * 256
    narrow = replace(latent, preserve_expert_dim=False)
    assert narrow.components(1024)["experts"] * 4 == latent.components(1024)["experts"]
    assert narrow.routed_dims(1024) == (256, 64)
