"""The estimate of what a training step keeps, against what autograd is really given to keep."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from swamla.model.accounting import activation_bytes, all_mha_state_bytes, state_bytes
from swamla.model.block import BlockConfig, Checkpointing, FFNConfig, MixerConfig
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
from swamla.ops.layout import Layout
from tests.toys import TOYS

TOKENS = 512
MIXERS: dict[str, MixerConfig] = {
    "mha": MHAConfig(n_heads=4),
    "swa": SWAConfig(n_heads=4, window=128),
    "mla": MLAConfig(n_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48),
    "gdn": GDNConfig(n_heads=4),
    "kda": KDAConfig(n_heads=4),
    "latent": LatentConfig(n_heads=4),
    "toy": TOYS["toy"](),
}
FFNS: dict[str, FFNConfig] = {
    "dense": DenseConfig(),
    "gelu": DenseConfig(activation="gelu"),
    "moe": MoEConfig(n_experts=8, n_activated=2),
    "latent_moe": LatentMoEConfig(n_experts=16, n_activated=4),
    "none": NoFFNConfig(),
    "toy_ffn": TOYS["toy_ffn"](hidden=700),
}


def model_of(mixer: str, ffn: str, depth: int = 2) -> LanguageModelConfig:
    block = BlockConfig(mixer=MIXERS[mixer], ffn=FFNS[ffn])
    return LanguageModelConfig(vocab_size=64, width=256, blocks={"a": block}, pattern=("a",) * depth)


def kept_bytes(config: LanguageModelConfig, *, bf16: bool = False, checkpointing: Checkpointing = "none") -> int:
    """Bytes of the storages, parameters' left out, that a forward pass in training hands to autograd."""
    torch.manual_seed(0)
    model = config.build().train()
    model.checkpoint_activations(checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []  # held, so that no two share an address
    tokens = torch.randint(config.vocab_size, (1, TOKENS))
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        model.loss(tokens, tokens, Layout.one_document_per_row(1, TOKENS))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in weights)


AROUND: dict[str, dict[str, Any]] = {"conv": {"conv": 4}, "post": {"norm_place": "post"}}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("mixer", MIXERS)
def test_so_does_a_step_through_blocks_with_more_around_their_mixers(mixer: str, around: str, bf16: bool) -> None:
    config = model_of(mixer, "dense")
    config = replace(config, blocks={"a": replace(config.blocks["a"], **AROUND[around])})
    estimate = activation_bytes(config, TOKENS, element_bytes=2 if bf16 else 4)
    assert 0.9 * estimate <= kept_bytes(config, bf16=bf16) <= 1.4 * estimate


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mixer", "ffn"), [*((name, "dense") for name in MIXERS), *(("mla", name) for name in FFNS if name != "dense")]
)
def test_a_step_keeps_between_nine_tenths_and_seven_fifths_of_the_estimate(mixer: str, ffn: str, bf16: bool) -> None:
    config = model_of(mixer, ffn)
    estimate = activation_bytes(config, TOKENS, element_bytes=2 if bf16 else 4)
    assert 0.9 * estimate <= kept_bytes(config, bf16=bf16) <= 1.4 * estimate


def test_checkpointing_everything_keeps_one_tensor_a_layer_and_the_layer_computed_again() -> None:
    per_layer = [activation_bytes(model_of("swa", "dense", depth), TOKENS, checkpointing="all") for depth in (1, 2, 3)]
    assert per_layer[1] - per_layer[0] == per_layer[2] - per_layer[1] == 4 * 256 * TOKENS
    kept = [kept_bytes(model_of("swa", "dense", depth), checkpointing="all") for depth in (2, 3)]
    assert kept[1] - kept[0] == 4 * 256 * TOKENS


def test_a_residual_stream_in_bf16_is_kept_and_counted_by_half() -> None:
    rounded = [replace(model_of("swa", "dense", depth), residual="autocast") for depth in (2, 3)]
    kept = [kept_bytes(config, bf16=True, checkpointing="all") for config in rounded]
    assert kept[1] - kept[0] == 2 * 256 * TOKENS
    estimate = activation_bytes(rounded[0], TOKENS, element_bytes=2)
    assert 0.9 * estimate <= kept_bytes(rounded[0], bf16=True) <= 1.4 * estimate
    saved = activation_bytes(model_of("swa", "dense"), TOKENS, element_bytes=2) - estimate
    assert saved == 2 * 2 * 2 * 256 * TOKENS  # bytes less, before two norms, in two layers
    assert activation_bytes(rounded[0], TOKENS) == activation_bytes(model_of("swa", "dense"), TOKENS)


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_checkpointing_a_part_is_estimated_as_saving_that_part_of_every_layer_but_one(part: Checkpointing) -> None:
    def grows(checkpointing: Checkpointing) -> tuple[int, int]:
        two, three = (model_of("mla", "dense", depth) for depth in (2, 3))
        estimates = [activation_bytes(config, TOKENS, checkpointing=checkpointing) for config in (two, three)]
        measured = [kept_bytes(config, checkpointing=checkpointing) for config in (two, three)]
        return estimates[1] - estimates[0], measured[1] - measured[0]

    estimate, measured = grows(part)
    assert 0.8 * estimate <= measured <= 1.4 * estimate
    assert measured < 0.8 * grows("none")[1]


def test_a_model_that_keeps_all_keys_and_values_is_its_own_all_mha_twin() -> None:
    config = model_of("mha", "dense")
    assert all_mha_state_bytes(config, 100, batch=3) == state_bytes(config, 100, batch=3)
