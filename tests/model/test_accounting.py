"""Counts from the config alone against the built module and against the matrix products that really run."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swamla.model.accounting import count_parameters, forward_flops, training_flops_per_token
from swamla.model.block import BlockConfig, FFNConfig, MixerConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import CHUNK, GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import DynamicTanhConfig, LayerNormConfig, NormConfig, RMSNormConfig
from tests.toys import TOYS

from .helpers import MIXERS, WIDTH, feed, hybrid_config, random_input, whole

MORE_MIXERS: dict[str, MixerConfig] = {
    **MIXERS,
    "mha with biases": MHAConfig(n_heads=4, bias=True),
    "mqa with wide heads": MHAConfig(n_heads=4, n_kv_heads=1, head_dim=24, bias=True),
    "mha with a gate": MHAConfig(n_heads=4, n_kv_heads=2, gate="sigmoid", qk_norm="whole"),
    "swa with a learned sink": SWAConfig(n_heads=4, window=8, sinks=0, sink_logit=True),
    "swa of 1 head": SWAConfig(n_heads=1, bias=True),
    "mla with plain queries": MLAConfig(n_heads=3, kv_lora_rank=8),
    "gdn with default heads": GDNConfig(n_heads=2),
    "gdn with wide values": GDNConfig(n_heads=6, n_key_heads=3, head_k_dim=4, head_v_dim=20, conv=2),
    "gdn with shared keys": GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, share_qk=True),
    "gdn with latents": GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, latent_dim=5),
    "gdn with a narrow gate": GDNConfig(n_heads=4, head_k_dim=8, head_v_dim=6, gate="lowrank"),
    "kda with decays of full rank": KDAConfig(n_heads=4, head_k_dim=8, head_v_dim=6, decay_rank=0, gate="silu"),
    "kda with shared heads": KDAConfig(n_heads=6, n_key_heads=3, head_k_dim=4, head_v_dim=20, conv=2, decay_rank=5),
    "kda with latents": KDAConfig(n_heads=2, head_k_dim=8, head_v_dim=6, latent_dim=5, share_qk=True),
    "latent of half the width": LatentConfig(n_heads=2),
    "toy of the model's width": TOYS["toy"](),
}
ROUTED: list[FFNConfig] = [
    MoEConfig(n_experts=6, backend="reference"),
    MoEConfig(n_experts=6, n_activated=2, n_shared=0, expert_hidden=8, backend="reference"),
    LatentMoEConfig(n_experts=10, n_activated=5, n_shared=2, shared_hidden=7, backend="reference"),
    MoEConfig(n_experts=6, shared_gate="sigmoid", groups=2, groups_used=2, backend="reference"),
    LatentMoEConfig(n_experts=12, ratio=2, expert_hidden=32, preserve_expert_dim=False, backend="reference"),
]
FFNS: list[FFNConfig] = [
    DenseConfig(),
    DenseConfig(hidden=10, bias=True),
    DenseConfig(activation="gelu"),
    DenseConfig(activation="gelu", bias=True, hidden=17),
    NoFFNConfig(),
    TOYS["toy_ffn"](),
    *ROUTED,
]
NORMS: list[NormConfig] = [
    *(RMSNormConfig(), LayerNormConfig(), LayerNormConfig(bias=False), DynamicTanhConfig(), TOYS["toy_norm"]()),
]
GPT2 = LanguageModelConfig(
    vocab_size=50257,
    width=768,
    blocks={
        "gpt2": BlockConfig(
            mixer=MHAConfig(n_heads=12, rope=None, bias=True), ffn=DenseConfig(activation="gelu", bias=True)
        )
    },
    pattern=("gpt2",) * 12,
    norm=LayerNormConfig(),
    learned_positions=1024,
)


def assert_counts_are_the_modules(config: LanguageModelConfig) -> None:
    with torch.device("meta"):
        model = config.build()
    counted = count_parameters(config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    idle = 0  # of the experts, a token's own share is used
    for block, built in zip(config.layers, model.blocks, strict=True):
        sizes = {name: p.numel() for name, p in built.ffn.named_parameters() if name.startswith("experts.")}
        if sizes:
            idle += sum(sizes.values()) // block.ffn.n_experts * (block.ffn.n_experts - block.ffn.n_activated)
    assert counted.active == counted.total - idle
    assert sum(counted.by_component.values()) == counted.total
    embeddings = {id(p): p.numel() for n, p in model.named_parameters() if not n.startswith(("blocks.", "norm."))}
    assert counted.non_embedding == counted.total - sum(embeddings.values())


@pytest.mark.parametrize("mixer", MORE_MIXERS.values(), ids=MORE_MIXERS)
def test_parameters_of_every_mixer_ffn_and_norm_are_counted(mixer: MixerConfig) -> None:
    for ffn, norm in product(FFNS, NORMS):
        block = BlockConfig(mixer=mixer, ffn=ffn)
        assert_counts_are_the_modules(
            LanguageModelConfig(
                vocab_size=13,
                width=48,
                blocks={"a": block},
                pattern=("a", "a"),
                norm=norm,
            )
        )


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("learned_positions", [0, 20])
def test_parameters_of_heads_and_positions_are_counted(tied_head: bool, learned_positions: int) -> None:
    config = replace(hybrid_config(), tied_head=tied_head, learned_positions=learned_positions)
    assert_counts_are_the_modules(config)
    counted = count_parameters(config)
    assert counted.by_component["embedding"] == 31 * WIDTH
    assert counted.by_component.get("positions", 0) == learned_positions * WIDTH
    assert counted.by_component.get("head", 0) == (0 if tied_head else 31 * WIDTH)


def test_components_are_those_of_the_blocks_in_the_pattern() -> None:
    model = hybrid_config(pattern=("swa", "gdn", "swa")).build()
    counted = count_parameters(model.config).by_component
    sizes = [sum(p.numel() for p in block.mixer.parameters()) for block in model.blocks]
    assert counted["swa"] == sizes[0] + sizes[2]
    assert counted["gdn"] == sizes[1]
    assert counted["dense"] == 3 * sum(p.numel() for p in model.blocks[0].ffn.parameters())
    assert counted["norms"] == 7 * WIDTH


@pytest.mark.parametrize("ffn", ROUTED, ids=str)
def test_experts_router_shared_experts_and_latent_projections_are_told_apart(ffn: MoEConfig) -> None:
    block = BlockConfig(mixer=MHAConfig(n_heads=4), ffn=ffn)
    config = LanguageModelConfig(vocab_size=13, width=WIDTH, blocks={"a": block}, pattern=("a", "a"))
    counted = count_parameters(config).by_component
    named = dict(config.build().blocks[0].ffn.named_parameters())
    for component, prefix in [
        ("experts", "experts."),
        ("router", "router."),
        ("shared experts", "shared."),
        ("shared gate", "shared_gate"),
        ("latent projections", "latent_"),
    ]:
        assert counted.get(component, 0) == 2 * sum(p.numel() for n, p in named.items() if n.startswith(prefix))


def test_gpt2_has_its_known_124_million_parameters() -> None:
    counted = count_parameters(GPT2)
    assert counted.total == 124_439_808
    assert counted.non_embedding == 124_439_808 - 50257 * 768 - 1024 * 768


def pairs_seen(mixer: MixerConfig, length: int) -> int:
    """Query-key pairs under the mask, counted one by one."""
    t, s = torch.arange(length)[:, None], torch.arange(length)[None]
    allowed = s <= t
    if isinstance(mixer, SWAConfig):
        allowed &= (t - s < mixer.window) | (s < mixer.sinks)
    return int(allowed.sum())


def masked_flops(mixer: MixerConfig, length: int) -> int:
    """What the reference path spends on pairs that the mask then hides: it multiplies all T × T of them."""
    if mixer.kind == "toy":  # a sum, no product
        return 0
    match mixer:
        case MLAConfig():
            widths = mixer.n_heads * (mixer.qk_head_dim + mixer.v_head_dim)
        case LatentConfig():
            widths = mixer.latent_dim(WIDTH) + WIDTH
        case _:
            widths = 2 * mixer.n_heads * mixer.key_dim(WIDTH)
    return 2 * widths * (length * length - pairs_seen(mixer, length))


@pytest.mark.parametrize("length", [2, 7, 8, 9, 20, 70])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "mha",
            "swa",
            "mla",
            "mha with a gate",
            "mha_gated",
            "mla_unrotated",
            "mla_gated",
            "swa_gated",
            "swa with a learned sink",
            "mqa with wide heads",
            "mla with plain queries",
            "swa of 1 head",
        ),
        *("latent", "latent of half the width"),
        *("toy", "toy of the model's width"),
    ],
)
def test_flops_of_attention_are_the_counters_less_the_masked_pairs(name: str, length: int) -> None:
    mixer = MORE_MIXERS[name].with_backend("reference")
    x = random_input(1, length)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer.build(WIDTH)(x, whole(x))
    assert mixer.forward_flops(WIDTH, length) == counter.get_total_flops() - masked_flops(mixer, length)


@pytest.mark.parametrize("name", [name for name in MORE_MIXERS if name.startswith(("gdn", "kda"))])
def test_flops_of_the_delta_rule_are_near_the_counters(name: str) -> None:
    """Projections are exact. Of the chunks the counter sees no triangular solve but its use, a dense product."""
    config, length = MORE_MIXERS[name], 256
    mixer, x = config.build(WIDTH), random_input(1, length)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer.output(torch.zeros(1, length, config.n_heads, mixer.head_v), mixer.project(x, whole(x))[1])
    projections = counter.get_total_flops()
    convolution = 2 * length * mixer.conv_weight.numel()
    q, k, v = mixer.heads(mixer.project(x, whole(x))[0])
    beta = torch.zeros(1, length, config.n_heads)
    log_alpha = torch.zeros_like(mixer.project(x, whole(x))[2])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer.rule(q, k, v, log_alpha, beta, chunk=CHUNK)
    rule = config.forward_flops(WIDTH, length) - projections - convolution
    assert 0.7 * rule <= counter.get_total_flops() <= 1.5 * rule


def test_flops_of_the_model_are_its_layers_and_its_head() -> None:
    config = hybrid_config("reference", pattern=("mha", "mla", "swa"))
    model = config.build()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.int64))
    masked = sum(masked_flops(block.mixer, 20) for block in config.layers)
    assert forward_flops(config, 20) == counter.get_total_flops() - masked


@pytest.mark.parametrize("ffn", FFNS)
def test_flops_of_an_ffn_are_the_counters(ffn: FFNConfig) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        feed(ffn.build(WIDTH), random_input(2, 9))
    assert ffn.forward_flops(WIDTH, 18) == counter.get_total_flops()


def test_backward_costs_twice_forward() -> None:
    config = hybrid_config("reference", pattern=("mha", "mla"))
    model = config.build()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 20, dtype=torch.int64)).sum().backward()
    masked = sum(masked_flops(block.mixer, 20) for block in config.layers)
    assert training_flops_per_token(config, 20) == pytest.approx((counter.get_total_flops() - 3 * masked) / 20)
    assert training_flops_per_token(config, 64) == 3 * forward_flops(config, 64) / 64


def test_gpt2_costs_six_flops_a_parameter_and_token_plus_attention() -> None:
    matrices = count_parameters(GPT2).total - 1024 * 768  # positions are looked up, the tied head is multiplied
    attention = 6 * 12 * 768 * 1025  # per token and layer: 2 products of width 768 with (T + 1) / 2 keys, times 3
    assert training_flops_per_token(GPT2, 1024) == pytest.approx(6 * matrices + attention, rel=2e-3)


def test_a_wider_window_more_sinks_and_more_tokens_cost_more_until_everything_is_seen() -> None:
    def cost(window: int, sinks: int, length: int = 100) -> int:
        return SWAConfig(n_heads=4, window=window, sinks=sinks).forward_flops(WIDTH, length)

    assert cost(1, 0) < cost(2, 0) < cost(50, 0) < cost(100, 0) == cost(500, 0)
    assert cost(10, 0) < cost(10, 1) < cost(10, 30) < cost(10, 90) == cost(10, 300) == cost(100, 0)
    assert cost(100, 0) == MHAConfig(n_heads=4).forward_flops(WIDTH, 100)
    beyond = [cost(10, 4, length + 1) - cost(10, 4, length) for length in (50, 1000)]
    assert beyond[0] == beyond[1]  # linear once the window is full


def test_the_delta_rule_costs_the_same_for_every_token() -> None:
    gdn = GDNConfig(n_heads=4)
    assert gdn.forward_flops(WIDTH, 1280) == 10 * gdn.forward_flops(WIDTH, 128)
