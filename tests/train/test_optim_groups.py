"""What each optimizer does with which parameter, and what that takes: by names and shapes, on models of all kinds."""

from dataclasses import replace

import pytest
import torch

from swamla.model import ParameterSpec
from swamla.model.accounting import parameter_specs
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.train.optim import AdamWConfig, LionConfig, MuonConfig
from swamla.train.optim.muon import is_hidden
from tests.toys import TOYS

from .helpers import model_of

CONFIGS = [
    MuonConfig(),
    TOYS["toy_sgd"](),
    *(make(moments=moments) for make in (AdamWConfig, LionConfig) for moments in ("fp32", "bf16", "8bit")),
]
EXEMPT = ("norm.weight", "norm_weight", "layernorm.weight", "bias", "A_log", "dt_bias")


def every_kind() -> LanguageModel:
    """A model with each of the mixers, experts at full width and in a latent space."""
    blocks = model_of("gdn", "swa", "mla", "mha").blocks
    blocks = blocks | {
        "mla": replace(blocks["mla"], ffn=LatentMoEConfig(n_experts=40, n_activated=4, ratio=2, expert_hidden=24)),
        "mha": replace(blocks["mha"], ffn=MoEConfig(n_experts=16, expert_hidden=24)),
    }
    config = LanguageModelConfig(width=32, blocks=blocks, pattern=("gdn", "swa", "mla", "mha"), vocab_size=512)
    return replace(config, learned_positions=64, tied_head=False).build()


def step_with(model, optimizer, gradient):
    for p in model.parameters():
        p.grad = gradient(p)
    optimizer.step()


def expected_to_decay(name):
    return name not in ("embedding.weight", "positions.weight") and not name.endswith(EXEMPT)


def test_the_model_of_these_tests_has_every_kind_of_parameter():
    names = [name for name, _ in every_kind().named_parameters()]
    kinds = ("A_log", "dt_bias", "conv_weight", "norm.weight", "norm_weight", "layernorm.weight", "o_proj.weight")
    assert all(any(name.endswith(kind) for name in names) for kind in kinds)
    assert {"embedding.weight", "positions.weight", "head.weight", "blocks.3.ffn.experts.gate_up"} <= set(names)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weight_decay_pulls_on_what_multiplies_activations_and_on_nothing_else(config):
    model = every_kind()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step_with(model, config.build(model, lr=1e-2, weight_decay=0.5), torch.zeros_like)
    for name, p in model.named_parameters():
        factor = 1 - 1e-2 * 0.5 if expected_to_decay(name) else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=lambda text, name=name: f"{name}: {text}")


def test_muon_takes_projections_and_experts_and_adamw_the_rest():
    """kv_b_proj is the projection from a latent of 8 here, and ba_proj has 4 rows: too small to orthogonalise."""
    matrices = {name for name, p in every_kind().named_parameters() if p.ndim >= 2}
    taken = {spec.name for spec in parameter_specs(every_kind().config) if is_hidden(spec)}
    projections = {"q_proj", "qkv_proj", "qkvz_proj", "kv_a_proj_with_mqa", "o_proj", "gate_up_proj", "down_proj"}
    projections |= {"latent_down_proj", "latent_up_proj"}
    suffixes = {name.split(".", 2)[2] for name in taken}
    experts = {"ffn.experts.gate_up", "ffn.experts.down"}
    assert {name.rsplit(".", 2)[-2] for name in suffixes - experts} == projections
    assert experts < suffixes
    small = {"blocks.0.mixer.ba_proj.weight", "blocks.2.mixer.kv_b_proj.weight"}
    other = {"blocks.2.ffn.router.weight", "blocks.3.ffn.router.weight", "blocks.0.mixer.conv_weight"}
    assert matrices - taken == {"embedding.weight", "positions.weight", "head.weight", *small, *other}


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [
        ("blocks.0.mixer.o_proj.weight", (16, 16), True),
        ("blocks.0.mixer.ba_proj.weight", (8, 64), False),
        ("blocks.0.ffn.latent_down_proj.weight", (16, 64), True),
        ("blocks.0.ffn.experts.down", (4, 16, 16), True),
        ("blocks.0.ffn.experts.down", (4, 8, 16), False),
        ("blocks.0.odd", (2, 4, 16, 16), False),
        ("blocks.0.norm.weight", (64,), False),
        ("head.weight", (512, 64), False),
    ],
)
def test_what_is_a_hidden_matrix_is_said_by_name_and_shape_and_no_set_of_vectors_is_one(name, shape, hidden):
    assert is_hidden(ParameterSpec(name, shape)) is hidden
    assert not is_hidden(ParameterSpec(name, shape, vectors=True))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_bytes_of_the_state_are_known_before_a_weight_exists(config):
    with torch.device("meta"):
        specs = parameter_specs(every_kind().config)
    model = every_kind()
    optimizer = config.build(model, lr=1e-2, weight_decay=0.1)
    step_with(model, optimizer, torch.ones_like)
    live = optimizer.state_tensors()
    assert config.state_bytes(specs) == sum(t.untyped_storage().nbytes() for t in live.values())
    for spec in specs:
        expected = {key: (h.shape, h.dtype) for key, h in config.state_specs(spec).items()}
        found = {key: (tuple(t.shape), t.dtype) for key, t in remembered(live, spec.name)}
        assert found == expected


def remembered(live, name):
    return [(full.rsplit("/", 1)[1], t) for full, t in live.items() if full.rsplit("/", 1)[0] == name]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AdamWConfig(), 8.0),
        (AdamWConfig(moments="bf16"), 4.0),
        (AdamWConfig(moments="8bit"), 2 + 2 * 4 / 256),
        (LionConfig(), 4.0),
        (LionConfig(moments="bf16"), 2.0),
        (LionConfig(moments="8bit"), 1 + 4 / 256),
        (MuonConfig(), 4.0),
    ],
    ids=str,
)
def test_bytes_a_parameter(config, expected):
    spec = ParameterSpec("blocks.0.w", (1024, 1024))
    counter = sum(h.nbytes for key, h in config.state_specs(spec).items() if key == "step")
    assert counter in (0, 4)
    assert (config.state_bytes([spec]) - counter) / 1024**2 == expected


def test_muon_takes_eight_bytes_a_parameter_outside_the_blocks():
    assert (
        MuonConfig().state_bytes([ParameterSpec("embedding.weight", (512, 64)), ParameterSpec("norm.weight", (64,))])
        == 8 * (512 * 64 + 64) + 8
    )
