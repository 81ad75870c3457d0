"""What the tests of the model share: small configs, weights that matter, and one way to compare with an oracle."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from swamla.model.block import BlockConfig, FFNConfig, MixerConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.ffn import FFN, Statistics
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mixer import Mixer
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import DynamicTanhConfig, LayerNormConfig, NormConfig, RMSNormConfig
from swamla.ops.layout import Layout
from tests.toys import TOYS, plugged

WIDTH = 32
WINDOW = 8
Named = dict[str, Tensor]

MIXERS: dict[str, MixerConfig] = {
    "mha": MHAConfig(n_heads=4, n_kv_heads=2),
    "swa": SWAConfig(n_heads=4, n_kv_heads=2, window=WINDOW, sinks=3),
    "mha_normed": MHAConfig(n_heads=4, n_kv_heads=2, qk_norm="head"),
    "swa_normed": SWAConfig(n_heads=4, n_kv_heads=2, window=WINDOW, sinks=3, qk_norm="whole"),
    "mha_gated": MHAConfig(
        n_heads=4,
        n_kv_heads=2,
        head_dim=10,
        rope_dim=6,
        bias=True,
        gate="sigmoid",
        qk_norm="head",
        softmax_scale=0.4,
        sink_logit=True,
    ),
    "swa_gated": SWAConfig(
        n_heads=4, n_kv_heads=2, window=WINDOW, sinks=0, rope_dim=2, gate="sigmoid", sink_logit=True
    ),
    "mla": MLAConfig(n_heads=2, kv_lora_rank=12, q_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
    "mla_unrotated": MLAConfig(
        n_heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=3, v_head_dim=6, rope=None
    ),
    "mla_gated": MLAConfig(
        n_heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, gate="head"
    ),
    "gdn": GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6),
    "gdn_latent": GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, latent_dim=10, share_qk=True),
    "gdn_bounded": GDNConfig(
        n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, beta_max=2.0, gate="lowrank", decay="safe"
    ),
    "kda": KDAConfig(n_heads=4, head_k_dim=8, head_v_dim=6),
    "kda_bounded": KDAConfig(
        n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, beta_max=2.0, gate="sigmoid", decay="safe", decay_rank=0
    ),
    "latent": LatentConfig(n_heads=4, n_latent=12, bias=True),
    "toy": TOYS["toy"](inner=24),
    **plugged(MixerConfig),
}


FFNS: dict[str, FFNConfig] = {
    "dense": DenseConfig(hidden=24),
    "moe": MoEConfig(n_experts=8, n_activated=3, expert_hidden=16, shared_hidden=24),
    "latent_moe": LatentMoEConfig(n_experts=8, n_activated=3, ratio=4, expert_hidden=16, shared_hidden=24),
    "moe_softmax": MoEConfig(
        n_experts=8,
        n_activated=3,
        expert_hidden=16,
        shared_gate="sigmoid",
        score="softmax",
        normalise=False,
        scale=3.0,
        groups=4,
        groups_used=2,
        group_score="max",
    ),
    "latent_moe_groups": LatentMoEConfig(
        n_experts=8, n_activated=2, ratio=4, expert_hidden=16, scale=2.5, groups=2, shared_gate="sigmoid"
    ),
    "none": NoFFNConfig(),
    "toy_ffn": TOYS["toy_ffn"](hidden=24),
    **plugged(FFNConfig),
}


NORMS: dict[str, NormConfig] = {
    "rmsnorm": RMSNormConfig(),
    "layernorm": LayerNormConfig(),
    "dyt": DynamicTanhConfig(),
    "toy_norm": TOYS["toy_norm"](),
    **plugged(NormConfig),
}


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Weights in which every parameter shows: matrices that keep the scale of what they map, gains and biases off 1, 0.

    Gates of the delta rule keep a decay that remembers some ten tokens, so that the state matters.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(noise * 0.3)
            elif name.endswith("dt_bias"):
                parameter.copy_(noise * 0.3 - 2.5)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * (1.0 if "embed" in name or "wte" in name else parameter.shape[-1] ** -0.5))
            else:
                parameter.copy_(parameter.detach() + noise * 0.2)


def build_mixer(config: MixerConfig, seed: int = 0) -> Mixer:
    """The mixer at width `WIDTH` with scrambled weights."""
    torch.manual_seed(seed)  # scrambling a bias starts from the one that was drawn
    mixer = config.build(WIDTH)
    scramble(mixer, seed)
    return mixer


def hybrid_config(
    backend: str = "auto", pattern: tuple[str, ...] = ("gdn", "swa", "mla", "mha"), ffn: str = "dense"
) -> LanguageModelConfig:
    """A tiny model with every mixer, embeddings of tokens and triples before its second layer, bounded logits."""
    blocks = {
        name: BlockConfig(mixer=MIXERS[name].with_backend(backend), ffn=FFNS[ffn]) for name in dict.fromkeys(pattern)
    }
    return LanguageModelConfig(
        vocab_size=31,
        width=WIDTH,
        blocks=blocks,
        pattern=pattern,
        ngram_buckets=(31, 0, 13),
        ngram_layer=1 % len(pattern),
        logit_cap=20.0,
    )


def build_model(config: LanguageModelConfig, seed: int = 0) -> LanguageModel:
    """The model with scrambled weights."""
    model = config.build()
    scramble(model, seed)
    return model


def random_input(batch: int, time: int, seed: int = 1) -> Tensor:
    """(B, T, WIDTH), of unit variance."""
    return torch.randn(batch, time, WIDTH, generator=torch.Generator().manual_seed(seed))


def random_tokens(batch: int, time: int, vocab_size: int = 31, seed: int = 1) -> Tensor:
    """(B, T) ids."""
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def packed(*lengths: int, padding: int = 0) -> Layout:
    """The layout of one row that holds documents of these lengths and ends in padding."""
    document = [index for index, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    return Layout.from_documents(torch.tensor([document]))


def whole(x_BTD: Tensor) -> Layout:
    """Each row is one document."""
    return Layout.one_document_per_row(x_BTD.shape[0], x_BTD.shape[1])


def feed(ffn: FFN, x_BTD: Tensor) -> tuple[Tensor, Statistics]:
    """What an FFN makes of rows without padding."""
    return ffn(x_BTD, whole(x_BTD))


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference at most `tolerance`, absolute, or relative to the largest expected value if that exceeds 1."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} is not {tuple(expected.shape)}"
    assert torch.isfinite(found).all(), f"{what}: not finite"
    error = (found - expected).abs().max().item() if found.numel() else 0.0
    allowed = tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    assert error <= allowed, f"{what}: off by {error:.2e}, allowed {allowed:.2e}"


def parameters_of(module: nn.Module) -> Named:
    """Parameters by name."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def gradients_of(module: nn.Module) -> Named:
    """Gradients by parameter name; every parameter must have one."""
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_equal_to_oracle(
    ours: nn.Module,
    theirs: nn.Module,
    translate: Callable[[Named], Named],
    run_ours: Callable[[Tensor], Tensor],
    run_theirs: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-4,
    zero_centred: Collection[str] = (),
) -> None:
    """Same weights, same input: same output, and same gradients of every weight and (if it can have one) of the input.

    `translate` takes the other implementation's named tensors to ours. It is linear, so it serves gradients too.
    zero_centred: our gains that are theirs plus one.
    """
    scramble(theirs)
    translated = translate(parameters_of(theirs))
    mine = dict(ours.named_parameters())
    assert translated.keys() == mine.keys(), translated.keys() ^ mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            assert parameter.shape == translated[name].shape, name
            parameter.copy_(translated[name] + (name in zero_centred))

    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    found, expected = run_ours(inputs[0]), run_theirs(inputs[1])
    assert expected.abs().max() > 0.1, "the oracle's output is too small for the comparison to mean much"
    assert_close(found, expected, tolerance, "output")

    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    found.backward(upstream)
    expected.backward(upstream)
    if x.is_floating_point():
        assert inputs[0].grad is not None
        assert inputs[1].grad is not None
        assert_close(inputs[0].grad, inputs[1].grad, gradient_tolerance, "input gradient")
    wanted = translate(gradients_of(theirs))
    for name, gradient in gradients_of(ours).items():
        assert_close(gradient, wanted[name], gradient_tolerance, f"gradient of {name}")
