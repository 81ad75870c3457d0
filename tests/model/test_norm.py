"""The norms are their formulae, and start as the identity of their gains."""

import pytest
import torch
from torch import Tensor

from swamla.model.norm import DynamicTanhConfig, LayerNormConfig, NormConfig, RMSNormConfig

from .helpers import WIDTH, random_input, scramble


def rmsnorm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * p["weight"]


def layernorm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * p["weight"] + p.get("bias", 0)


def dynamic_tanh(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return torch.tanh(p["alpha"] * x) * p["weight"] + p["bias"]


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        (RMSNormConfig(eps=1e-3), rmsnorm),
        (LayerNormConfig(eps=1e-3), layernorm),
        (LayerNormConfig(eps=1e-3, bias=False), layernorm),
        (DynamicTanhConfig(alpha=0.7), dynamic_tanh),
    ],
    ids=["RMSNorm", "LayerNorm", "LayerNorm without bias", "DynamicTanh"],
)
def test_a_norm_is_its_formula(config: NormConfig, formula) -> None:
    norm, x = config.build(WIDTH), random_input(2, 5) * 0.1
    scramble(norm)
    torch.testing.assert_close(norm(x), formula(x, dict(norm.named_parameters())), atol=1e-6, rtol=1e-5)
    assert sum(parameter.numel() for parameter in norm.parameters()) == config.n_parameters(WIDTH)


@pytest.mark.parametrize("config", [RMSNormConfig(), LayerNormConfig(), DynamicTanhConfig(alpha=0.7)])
def test_gains_start_at_one_and_biases_at_zero(config: NormConfig) -> None:
    starts = {"weight": 1.0, "bias": 0.0, "alpha": 0.7}
    for name, parameter in config.build(WIDTH).named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, starts[name]))


def test_rmsnorm_and_layernorm_do_not_see_the_scale_of_their_input_but_dynamic_tanh_does() -> None:
    x = random_input(1, 4) * 10
    for config, scale_free in ((RMSNormConfig(), True), (LayerNormConfig(), True), (DynamicTanhConfig(), False)):
        norm = config.build(WIDTH)
        assert torch.allclose(norm(x), norm(3 * x), atol=1e-5) == scale_free
