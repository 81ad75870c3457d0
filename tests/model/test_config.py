"""Configs: each field changes something, and what cannot be is refused with its name, value and remedy."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from swamla.errors import ConfigError, UsageError
from swamla.model.block import BlockConfig, MixerConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import DynamicTanhConfig, LayerNormConfig, RMSNormConfig
from swamla.model.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

from .helpers import MIXERS, WIDTH, random_tokens

MHA, MLA, SWA, GDN, LATENT = (MIXERS[kind] for kind in ("mha", "mla", "swa", "gdn", "latent"))


def with_mixer(mixer: MixerConfig) -> LanguageModelConfig:
    return with_block(BlockConfig(mixer=mixer))


def with_block(block: BlockConfig) -> LanguageModelConfig:
    return LanguageModelConfig(vocab_size=31, width=WIDTH, blocks={"a": block}, pattern=("a",))


def with_rope(rope: RopeConfig) -> LanguageModelConfig:
    return with_mixer(replace(MLA, qk_rope_head_dim=16, rope=rope))


def with_norm(norm: Any) -> LanguageModelConfig:
    return replace(with_mixer(MHA), norm=norm)


PLACES: dict[type, Callable[[Any], LanguageModelConfig]] = {
    MHAConfig: with_mixer,
    SWAConfig: with_mixer,
    MLAConfig: with_mixer,
    GDNConfig: with_mixer,
    KDAConfig: with_mixer,
    LatentConfig: with_mixer,
    DenseConfig: lambda ffn: with_block(BlockConfig(mixer=MHA, ffn=ffn)),
    MoEConfig: lambda ffn: with_block(BlockConfig(mixer=MHA, ffn=ffn)),
    LatentMoEConfig: lambda ffn: with_block(BlockConfig(mixer=MHA, ffn=ffn)),
    NoFFNConfig: lambda ffn: with_block(BlockConfig(mixer=MHA, ffn=ffn)),
    BlockConfig: with_block,
    RMSNormConfig: with_norm,
    LayerNormConfig: with_norm,
    DynamicTanhConfig: with_norm,
    RopeConfig: with_rope,
    LinearScaling: lambda scaling: with_rope(RopeConfig(scaling=scaling)),
    YarnScaling: lambda scaling: with_rope(RopeConfig(scaling=scaling)),
    Llama3Scaling: lambda scaling: with_rope(RopeConfig(scaling=scaling)),
    LanguageModelConfig: lambda model: model,
}
OF_EXPERTS: dict[str, Any] = {
    "n_experts": 12,
    "n_activated": 2,
    "n_shared": 2,
    "expert_hidden": 8,
    "shared_hidden": 8,
    "shared_gate": "sigmoid",
    "score": "softmax",
    "normalise": False,
    "scale": 2.5,
    "groups": 2,
    "groups_used": 3,
    "group_score": "max",
    "bias_rate": 0.1,
    "aux_loss": 0.1,
    "z_loss": 0.1,
    "backend": "reference",
}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (
        MHAConfig(n_heads=4, qk_norm="whole"),
        {
            "n_heads": 2,
            "n_kv_heads": 2,
            "head_dim": 6,
            "rope": None,
            "rope_dim": 4,
            "bias": True,
            "gate": "sigmoid",
            "qk_norm": "head",
            "norm_eps": 1e-2,
            "softmax_scale": 0.1,
            "sink_logit": True,
            "backend": "reference",
        },
    ),
    (
        SWAConfig(n_heads=4, window=8, sinks=0, qk_norm="head"),
        {
            "n_heads": 2,
            "n_kv_heads": 2,
            "head_dim": 6,
            "rope": None,
            "rope_dim": 4,
            "bias": True,
            "gate": "sigmoid",
            "qk_norm": "whole",
            "norm_eps": 1e-2,
            "softmax_scale": 0.1,
            "sink_logit": True,
            "backend": "reference",
            "window": 7,
            "sinks": 3,
        },
    ),
    (
        MLA,
        {
            "n_heads": 3,
            "kv_lora_rank": 11,
            "q_lora_rank": 0,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 6,
            "v_head_dim": 5,
            "rope": None,
            "gate": "head",
            "norm_eps": 1e-2,
            "backend": "reference",
        },
    ),
    (
        GDN,
        {
            "n_heads": 2,
            "n_key_heads": 4,
            "head_k_dim": 7,
            "head_v_dim": 7,
            "conv": 3,
            "latent_dim": 5,
            "share_qk": True,
            "beta_max": 2.0,
            "gate": "sigmoid",
            "decay": "safe",
            "norm_eps": 1e-2,
            "backend": "reference",
        },
    ),
    (
        MIXERS["kda"],
        {
            "n_heads": 2,
            "n_key_heads": 2,
            "head_k_dim": 7,
            "head_v_dim": 7,
            "conv": 3,
            "latent_dim": 5,
            "share_qk": True,
            "beta_max": 2.0,
            "gate": "silu",
            "decay": "safe",
            "norm_eps": 1e-2,
            "decay_rank": 5,
            "backend": "reference",
        },
    ),
    (
        LATENT,
        {"n_heads": 2, "n_latent": None, "bias": False, "backend": "reference"},
    ),
    (DenseConfig(), {"hidden": 64, "activation": "gelu", "bias": True}),
    (MoEConfig(n_experts=8, groups=4, groups_used=2), OF_EXPERTS),
    (
        LatentMoEConfig(n_experts=8, n_activated=3, groups=4, groups_used=2),
        {**OF_EXPERTS, "ratio": 2, "preserve_expert_dim": False},
    ),
    (NoFFNConfig(), {}),
    (BlockConfig(mixer=MHA), {"mixer": SWA, "ffn": DenseConfig(hidden=5), "conv": 3, "norm_place": "post"}),
    (RMSNormConfig(), {"eps": 1e-2}),
    (LayerNormConfig(), {"eps": 1e-2, "bias": False}),
    (DynamicTanhConfig(), {"alpha": 0.6}),
    (RopeConfig(), {"base": 100.0, "layout": "interleaved", "scaling": LinearScaling(factor=2.0)}),
    (LinearScaling(factor=2.0), {"factor": 3.0}),
    (
        Llama3Scaling(factor=8.0, original_length=64),
        {"factor": 3.0, "original_length": 1024, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
    ),
    (
        YarnScaling(factor=4.0, original_length=4096, mscale_all_dim=1.0),
        {
            "factor": 5.0,
            "original_length": 640,
            "beta_fast": 8.0,
            "beta_slow": 4.0,
            "mscale": 0.5,
            "mscale_all_dim": 0.5,
        },
    ),
    (
        replace(with_mixer(MHA), pattern=("a", "a"), ngram_buckets=(5,)),
        {
            "vocab_size": 32,
            "width": 64,
            "blocks": {"a": BlockConfig(mixer=GDN)},
            "pattern": ("a",),
            "norm": LayerNormConfig(),
            "tied_head": False,
            "learned_positions": 40,
            "ngram_buckets": (7,),
            "ngram_layer": 0,
            "dropout": 0.1,
            "residual": "autocast",
            "logit_cap": 5.0,
            "init_std": 0.03,
            "mup_base_width": 64,
        },
    ),
]


def behaviour(config: Any) -> Any:
    """Everything that shows of a config: the weights of a fresh model, and what it does in training.

    That is its logits, or its error, its statistics, the balance after a step, and what computes it: two backends need
    not differ in a single bit, and on some machines do not.
    """
    torch.manual_seed(0)
    model = PLACES[type(config)](config).build()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():  # a table that begins at zero
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
            parameter.mul_(5)  # far enough from zero that attention is not uniform
        tokens = random_tokens(1, 40)
        try:
            logits, statistics = model(tokens), model.loss(tokens, tokens)[1]
        except UsageError as error:
            return weights, str(error)
    model.rebalance(statistics)
    place = model.device, model.config.width, torch.float32
    backends = {
        str(i): block.mixer.backends(*place) | block.ffn.backends(*place) for i, block in enumerate(model.config.layers)
    }
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        residual = model.hidden(tokens)[0].dtype
    told = {"logits": logits, "residual": residual, **statistics, **dict(model.named_buffers()), **backends}
    return weights, told


def differ(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() != second.keys() or any(differ(first[key], second[key]) for key in first)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return not torch.equal(first, second)
    return bool(first != second)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [(config, field, value) for config, changes in CASES for field, value in changes.items()],
    ids=[f"{type(config).__name__}.{field}" for config, changes in CASES for field in changes],
)
def test_changing_a_field_changes_the_model(config: Any, field: str, value: Any) -> None:
    before, after = behaviour(config), behaviour(replace(config, **{field: value}))
    assert differ(before[0], after[0]) or differ(before[1], after[1])
    again = behaviour(config)
    assert not differ(before[0], again[0])
    assert not differ(before[1], again[1])


def test_every_field_of_every_config_has_such_a_case() -> None:
    assert {type(config) for config, _ in CASES} == set(PLACES)
    for config, changes in CASES:
        assert {field.name for field in fields(config)} == changes.keys(), type(config).__name__


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: MHAConfig(n_heads=0), "n_heads = 0: must be > 0"),
    (
        lambda: MHAConfig(n_heads=4, backend="abacus"),
        "backend = 'abacus': must be one of auto, reference, torch, tiles, sdpa",
    ),
    (
        lambda: MLAConfig(n_heads=2, backend="abacus"),
        "backend = 'abacus': must be one of auto, reference, torch, tiles, sdpa",
    ),
    (lambda: GDNConfig(n_heads=2, backend="flex"), "backend = 'flex': must be one of auto, reference, torch"),
    (lambda: MHAConfig(n_heads=6, n_kv_heads=4), "n_kv_heads = 4: must divide n_heads = 6"),
    (lambda: MHAConfig(n_heads=6, n_kv_heads=0), "n_kv_heads = 0: must divide n_heads = 6"),
    (lambda: MHAConfig(n_heads=4, head_dim=0), "head_dim = 0: must be > 0"),
    (lambda: MHAConfig(n_heads=4, head_dim=7), "head_dim = 7: must be even with rotary positions"),
    (
        lambda: with_mixer(MHAConfig(n_heads=5)),
        f"blocks.a.mixer.n_heads = 5: must divide the width {WIDTH}, or give head_dim",
    ),
    (
        lambda: with_mixer(MHAConfig(n_heads=32)),
        "blocks.a.mixer.n_heads = 32: gives heads of odd width 1, rope needs even",
    ),
    (lambda: MHAConfig(n_heads=4, rope_dim=0), "rope_dim = 0: must be even and > 0, e.g. 32, or none"),
    (lambda: MHAConfig(n_heads=4, rope_dim=3), "rope_dim = 3: must be even and > 0, e.g. 32, or none"),
    (lambda: MHAConfig(n_heads=4, rope_dim=8, rope=None), "rope_dim = 8: must be none without rotary positions"),
    (lambda: MHAConfig(n_heads=4, head_dim=7, rope_dim=8), "rope_dim = 8: must be at most the width of a head, 7"),
    (
        lambda: with_mixer(SWAConfig(n_heads=4, rope_dim=10)),
        "blocks.a.mixer.rope_dim = 10: must be at most the width of a head, 8",
    ),
    (lambda: MHAConfig(n_heads=4, norm_eps=0.0), "norm_eps = 0.0: must be > 0, e.g. 1e-6"),
    (lambda: MHAConfig(n_heads=4, softmax_scale=0.0), "softmax_scale = 0.0: must be > 0, e.g. 0.125, or none"),
    (lambda: MLAConfig(n_heads=2, norm_eps=-1.0), "norm_eps = -1.0: must be > 0, e.g. 1e-6"),
    (lambda: SWAConfig(n_heads=4, window=0), "window = 0: must be > 0"),
    (lambda: SWAConfig(n_heads=4, window=-8), "window = -8: must be > 0"),
    (lambda: SWAConfig(n_heads=4, sinks=-1), "sinks = -1: must be >= 0"),
    (lambda: SWAConfig(n_heads=4, sink_logit=True), "sinks = 4: must be 0 with sink_logit, which takes the place of"),
    (lambda: SWAConfig(n_heads=4, n_kv_heads=3), "n_kv_heads = 3: must divide n_heads = 4"),
    (lambda: MLAConfig(n_heads=0), "n_heads = 0: must be > 0"),
    (lambda: MLAConfig(n_heads=2, kv_lora_rank=0), "kv_lora_rank = 0: must be > 0"),
    (lambda: MLAConfig(n_heads=2, q_lora_rank=-1), "q_lora_rank = -1: must be >= 0"),
    (lambda: MLAConfig(n_heads=2, qk_nope_head_dim=0), "qk_nope_head_dim = 0: must be > 0"),
    (lambda: MLAConfig(n_heads=2, qk_rope_head_dim=7), "qk_rope_head_dim = 7: must be even and > 0"),
    (lambda: MLAConfig(n_heads=2, qk_rope_head_dim=0, rope=None), "qk_rope_head_dim = 0: must be > 0, e.g. 64"),
    (lambda: MLAConfig(n_heads=2, v_head_dim=0), "v_head_dim = 0: must be > 0"),
    (
        lambda: with_mixer(MLAConfig(n_heads=2, kv_lora_rank=33)),
        "blocks.a.mixer.kv_lora_rank = 33: a rank larger than the width 32 compresses nothing",
    ),
    (
        lambda: with_mixer(MLAConfig(n_heads=2, kv_lora_rank=8, q_lora_rank=33)),
        "blocks.a.mixer.q_lora_rank = 33: a rank larger than the width 32 compresses nothing",
    ),
    (lambda: GDNConfig(n_heads=0), "n_heads = 0: must be > 0"),
    (lambda: GDNConfig(n_heads=4, latent_dim=-1), "latent_dim = -1: must be >= 0 (0: not compressed)"),
    (
        lambda: with_mixer(GDNConfig(n_heads=4, latent_dim=33)),
        "blocks.a.mixer.latent_dim = 33: a rank larger than the width 32 compresses nothing",
    ),
    (lambda: LatentConfig(n_heads=0), "n_heads = 0: must be > 0"),
    (lambda: LatentConfig(n_heads=4, n_latent=0), "n_latent = 0: must be a multiple of n_heads = 4"),
    (lambda: LatentConfig(n_heads=4, n_latent=10), "n_latent = 10: must be a multiple of n_heads = 4"),
    (
        lambda: LatentConfig(n_heads=4, backend="abacus"),
        "backend = 'abacus': must be one of auto, reference, torch, tiles, sdpa",
    ),
    (lambda: with_mixer(LatentConfig(n_heads=5)), "blocks.a.mixer.n_heads = 5: must divide the width 32"),
    (
        lambda: with_mixer(LatentConfig(n_heads=32)),
        "blocks.a.mixer.n_heads = 32: must divide half the width, 16, or give `n_latent`",
    ),
    (
        lambda: with_mixer(LatentConfig(n_heads=4, n_latent=36)),
        "blocks.a.mixer.n_latent = 36: a latent larger than the width 32 compresses nothing",
    ),
    (lambda: replace(MLA, gate="sigmoid"), "gate = 'sigmoid': must be one of none, head"),
    (lambda: GDNConfig(n_heads=4, n_key_heads=3), "n_key_heads = 3: must divide n_heads = 4"),
    (lambda: GDNConfig(n_heads=4, head_k_dim=0), "head_k_dim = 0: must be > 0"),
    (lambda: GDNConfig(n_heads=4, head_v_dim=-2), "head_v_dim = -2: must be > 0"),
    (lambda: GDNConfig(n_heads=4, conv=0), "conv = 0: must be > 0"),
    (lambda: KDAConfig(n_heads=4, decay_rank=-1), "decay_rank = -1: must be >= 0 (0: full rank)"),
    (lambda: KDAConfig(n_heads=4, backend="fla"), "backend = 'fla': must be one of auto, reference, torch"),
    (lambda: GDNConfig(n_heads=4, beta_max=0.0), "beta_max = 0.0: must be > 0 and <= 2"),
    (lambda: GDNConfig(n_heads=4, beta_max=2.5), "beta_max = 2.5: must be > 0 and <= 2"),
    (lambda: GDNConfig(n_heads=4, gate="tanh"), "gate = 'tanh': must be one of silu, sigmoid, lowrank"),  # type: ignore[arg-type]
    (lambda: GDNConfig(n_heads=4, decay="none"), "decay = 'none': must be one of softplus, safe"),  # type: ignore[arg-type]
    (lambda: GDNConfig(n_heads=4, norm_eps=0.0), "norm_eps = 0.0: must be > 0"),
    (
        lambda: with_mixer(GDNConfig(n_heads=5)),
        "blocks.a.mixer.n_heads = 5: must divide the width 32, or give `head_k_dim` and",
    ),
    (lambda: DenseConfig(hidden=0), "hidden = 0: must be > 0"),
    (lambda: MoEConfig(n_experts=0), "n_experts = 0: must be > 0"),
    (lambda: MoEConfig(n_activated=33), "n_activated = 33: must be 1 … n_experts = 32"),
    (lambda: MoEConfig(n_activated=0), "n_activated = 0: must be 1 … n_experts = 32"),
    (lambda: MoEConfig(n_shared=-1), "n_shared = -1: must be >= 0"),
    (lambda: MoEConfig(expert_hidden=0), "expert_hidden = 0: must be > 0"),
    (lambda: MoEConfig(shared_hidden=-3), "shared_hidden = -3: must be > 0"),
    (
        lambda: MoEConfig(n_shared=0, shared_gate="sigmoid"),
        "shared_gate = 'sigmoid': must be none where n_shared = 0",
    ),
    (lambda: MoEConfig(scale=0.0), "scale = 0.0: must be > 0, e.g. 2.5"),
    (lambda: MoEConfig(groups=5), "groups = 5: must divide n_experts = 32, e.g. 1 for no groups"),
    (lambda: MoEConfig(groups=0), "groups = 0: must divide n_experts = 32"),
    (lambda: MoEConfig(groups=4, groups_used=5), "groups_used = 5: must be 1 … groups = 4"),
    (lambda: MoEConfig(groups_used=0), "groups_used = 0: must be 1 … groups = 1"),
    (
        lambda: MoEConfig(groups=16),
        "groups_used = 1: must have n_activated = 3 experts: there are 2 in each group",
    ),
    (
        lambda: MoEConfig(groups=32, groups_used=3),
        "group_score = 'top2': must be \"max\" where each group has a single expert",
    ),
    (lambda: MoEConfig(bias_rate=-1e-3), "bias_rate = -0.001: must be >= 0"),
    (lambda: MoEConfig(aux_loss=float("inf")), "aux_loss = inf: must be >= 0"),
    (lambda: MoEConfig(z_loss=-1.0), "z_loss = -1.0: must be >= 0"),
    (lambda: MoEConfig(backend="flex"), "backend = 'flex': must be one of auto, reference, torch"),
    (
        lambda: with_block(BlockConfig(mixer=MHA, ffn=MoEConfig(expert_hidden=12))),
        "blocks.a.ffn.expert_hidden = 12: must give experts with widths that are multiples of 8, not 32 and 12; or",
    ),
    (lambda: LatentMoEConfig(ratio=0), "ratio = 0: must be > 0"),
    (
        lambda: with_block(BlockConfig(mixer=MHA, ffn=LatentMoEConfig(ratio=5))),
        "blocks.a.ffn.ratio = 5: must divide the width 32",
    ),
    (
        lambda: with_block(
            BlockConfig(mixer=MHA, ffn=LatentMoEConfig(ratio=4, expert_hidden=30, preserve_expert_dim=False))
        ),
        "blocks.a.ffn.ratio = 4: must divide expert_hidden = 30 unless `preserve_expert_dim`",
    ),
    (lambda: BlockConfig(mixer=MHA, conv=-1), "conv = -1: must be >= 0, e.g. 4 (0: none)"),
    (lambda: RMSNormConfig(eps=0.0), "eps = 0.0: must be > 0"),
    (lambda: LayerNormConfig(eps=-1.0), "eps = -1.0: must be > 0"),
    (lambda: DynamicTanhConfig(alpha=0.0), "alpha = 0.0: must be > 0"),
    (lambda: RopeConfig(base=1.0), "base = 1.0: must be > 1"),
    (lambda: LinearScaling(factor=0.5), "factor = 0.5: must be >= 1"),
    (lambda: YarnScaling(factor=0.5, original_length=64), "factor = 0.5: must be >= 1"),
    (lambda: Llama3Scaling(factor=0.5, original_length=64), "factor = 0.5: must be >= 1"),
    (lambda: Llama3Scaling(factor=8.0, original_length=0), "original_length = 0: must be > 0"),
    (
        lambda: Llama3Scaling(factor=8.0, original_length=64, low_freq_factor=4.0),
        "high_freq_factor = 4.0: must be > low_freq_factor > 0",
    ),
    (lambda: YarnScaling(factor=2.0, original_length=0), "original_length = 0: must be > 0"),
    (lambda: YarnScaling(factor=2.0, original_length=64, mscale=-1.0), "mscale = -1.0: must be >= 0"),
    (
        lambda: YarnScaling(factor=2.0, original_length=64, beta_fast=1.0, beta_slow=2.0),
        "beta_fast = 1.0: must be > beta_slow",
    ),
    (lambda: replace(with_mixer(MHA), vocab_size=-1), "vocab_size = -1: must be > 0"),
    (lambda: replace(with_mixer(MHA), vocab_size=0).build(), "vocab_size = 0: must be > 0 to build the model"),
    (lambda: replace(with_mixer(MHA), width=0), "width = 0: must be > 0"),
    (lambda: replace(with_mixer(MHA), pattern=()), "pattern = (): must name a block for every layer"),
    (lambda: replace(with_mixer(MHA), pattern=("a", "b")), "pattern = 'b': must be one of the blocks: a"),
    (
        lambda: replace(with_mixer(MHA), blocks={"a": BlockConfig(mixer=MHA), "b": BlockConfig(mixer=MLA)}),
        "blocks = 'b': is not used by the pattern: a",
    ),
    (lambda: replace(with_mixer(MHA), learned_positions=-1), "learned_positions = -1: must be >= 0"),
    (lambda: replace(with_mixer(MHA), ngram_buckets=(8, -1)), "ngram_buckets = (8, -1): must each be >= 0"),
    (lambda: replace(with_mixer(MHA), ngram_buckets=(8, 0)), "ngram_buckets = (8, 0): must not end in 0"),
    (lambda: replace(with_mixer(MHA), ngram_layer=1), "ngram_layer = 1: must be a layer from 0 to 0"),
    (lambda: replace(with_mixer(MHA), ngram_layer=-2), "ngram_layer = -2: must be a layer from 0 to 0"),
    (lambda: replace(with_mixer(MHA), logit_cap=-1.0), "logit_cap = -1.0: must be > 0"),
    (lambda: replace(with_mixer(MHA), logit_cap=float("nan")), "logit_cap = nan: must be > 0"),
    (lambda: replace(with_mixer(MHA), dropout=1.0), "dropout = 1.0: must be in [0, 1)"),
    (lambda: replace(with_mixer(MHA), dropout=-0.1), "dropout = -0.1: must be in [0, 1)"),
    (lambda: replace(with_mixer(MHA), init_std=0.0), "init_std = 0.0: must be > 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_what_cannot_be_is_refused_before_anything_is_built(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as caught:
        make()
    assert caught.value.exit_status == 2
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


NOT_A_NUMBER: list[tuple[Callable[[], Any], str]] = [
    (lambda: RMSNormConfig(eps=float("nan")), "eps"),
    (lambda: MoEConfig(bias_rate=float("nan")), "bias_rate"),
    (lambda: RopeConfig(base=float("nan")), "base"),
    (lambda: LinearScaling(factor=float("nan")), "factor"),
    (lambda: replace(with_mixer(MHA), dropout=float("nan")), "dropout"),
    (lambda: replace(with_mixer(MHA), init_std=float("nan")), "init_std"),
]


@pytest.mark.parametrize(("make", "field"), NOT_A_NUMBER, ids=[field for _, field in NOT_A_NUMBER])
def test_nan_is_no_setting(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} = nan"):
        make()


def test_the_patterns_length_is_the_depth() -> None:
    config = replace(with_mixer(MHA), pattern=("a",) * 7)
    assert config.depth == 7
    assert len(config.build().blocks) == 7
    assert [block.mixer for block in config.layers] == [MHA] * 7


@pytest.mark.parametrize(("width", "hidden"), [(64, 192), (256, 704), (384, 1024), (768, 2048), (2048, 5504)])
def test_swiglus_hidden_width_is_eight_thirds_rounded_up_to_64_and_gelus_is_fourfold(width: int, hidden: int) -> None:
    assert DenseConfig().hidden_dim(width) == hidden
    assert DenseConfig(activation="gelu").hidden_dim(width) == 4 * width
    assert DenseConfig(hidden=77).hidden_dim(width) == 77
