"""What each optimizer does with which parameter, and what that takes: by names and shapes, on models of all kinds."""

from dataclasses import replace

import pytest
import torch

from swamla.errors import ConfigError
from swamla.model import ParameterSpec
from swamla.model.accounting import parameter_specs
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.train import TrainConfig
from swamla.train.optim import AdamWConfig, GroupRates, LionConfig, MuonConfig
from swamla.train.optim.muon import is_hidden
from tests.toys import TOYS

from .helpers import model_of, tiny_config

CONFIGS = [
    MuonConfig(),
    MuonConfig(normuon=0.9),
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


ROLES = {
    "embedding": ("embedding.weight", "positions.weight"),
    "head": ("head.weight",),
    "scalar": (*EXEMPT, "conv_weight", "router.weight"),
}


def expected_role(name):
    """By the names alone."""
    return next((role for role, ends in ROLES.items() if name.endswith(ends)), "matrix")


# Rounding noise is drawn in the order of the groups: moments in bf16 are rounded otherwise in the run of the oracle.
NOISELESS = [config for config in CONFIGS if "bf16" not in str(config)]


def moved(config, lr, weight_decay, rates=None):
    """Where two steps take the parameters."""
    model, generator = every_kind(), torch.Generator().manual_seed(0)
    model.reset_parameters(0)
    optimizer = config.build(model, lr=9.0, weight_decay=weight_decay)
    if rates is not None:
        optimizer.set_rates(rates)
    for _ in range(2):
        optimizer.set_lr(lr)
        step_with(model, optimizer, lambda p: torch.randn(p.shape, generator=generator))
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", NOISELESS, ids=str)
def test_each_role_moves_as_if_the_whole_model_had_its_learning_rate_and_its_weight_decay(config):
    multiples = {"embedding": 3.0, "head": 0.25, "scalar": 0.0}
    found = moved(config, 1e-2, 0.5, GroupRates(lr=multiples, weight_decay={"head": 0.1, "embedding": 0.7}))
    for role in (*multiples, "matrix"):
        alone = moved(config, 1e-2 * multiples.get(role, 1.0), 0.1 if role == "head" else 0.5)
        for name in (name for name in found if expected_role(name) == role and role != "embedding"):
            torch.testing.assert_close(
                found[name], alone[name], atol=1e-6, rtol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
            )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weight_decay_by_role_pulls_by_it_and_by_the_roles_learning_rate(config):
    model = every_kind()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = config.build(model, lr=1e-2, weight_decay=0.5)
    optimizer.set_rates(GroupRates(lr={"embedding": 2.0}, weight_decay={"embedding": 0.3, "head": 0.1}))
    step_with(model, optimizer, torch.zeros_like)
    for name, p in model.named_parameters():
        factor = {"embedding": 1 - 2e-2 * 0.3, "head": 1 - 1e-2 * 0.1}.get(expected_role(name))
        factor = factor or (1 - 1e-2 * 0.5 if expected_to_decay(name) else 1.0)
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rates_that_are_all_the_same_leave_the_groups_whole(config):
    plain, set_to_one = (config.build(every_kind(), lr=1e-2, weight_decay=0.5) for _ in range(2))
    set_to_one.set_rates(TrainConfig(steps=1).group_rates)
    sizes = [
        [len(group["params"]) for part in each.optimizers for group in part.param_groups]
        for each in (plain, set_to_one)
    ]
    assert sizes[0] == sizes[1]


def test_a_decay_that_an_optimizer_cannot_have_is_refused():
    optimizer = AdamWConfig().build(every_kind(), lr=1e-2, weight_decay=0.5)
    for group in optimizer.optimizers[0].param_groups:
        del group["weight_decay"]
    with pytest.raises(ConfigError, match=r"weight_decay_head = 0.3: this optimizer has no weight decay"):
        optimizer.set_rates(GroupRates(lr={}, weight_decay={"head": 0.3}))


@pytest.mark.parametrize(("name", "value"), [("lr_head", 2.0), ("weight_decay_head", 0.0)])
def test_a_rate_of_a_head_that_is_tied_is_refused(name, value):
    with pytest.raises(
        ConfigError, match=rf"train\.{name} = {value}: the head is tied: give (lr|weight_decay)_embedding"
    ):
        tiny_config(**{name: value})


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
