"""A model in double is computed in double: no number that carries information passes through a shorter format."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swamla.model.accounting import state_bytes
from swamla.model.norm import NormConfig
from swamla.model.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from swamla.ops.layout import Layout

from .helpers import FFNS, MIXERS, NORMS, build_mixer, build_model, hybrid_config, packed, random_input, random_tokens

SCALINGS = [
    None,
    LinearScaling(factor=3.0),
    YarnScaling(factor=7.0, original_length=64),
    Llama3Scaling(factor=8.0, original_length=512),
]
BACKENDS = ["reference", "torch"]


class OnlyDouble(TorchDispatchMode):
    """Fails where a floating-point tensor below double is made, unless it holds whole numbers, such as a mask's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch.utils._python_dispatch._disable_current_modes():
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
                    fresh = "empty" in func.__name__ or leaf.isinf().all()
                    assert fresh or leaf.eq(leaf.round()).all(), f"{func.__name__} made {leaf.dtype}"
        return result


def with_scaling(kind: str, scaling: Any) -> Any:
    config: Any = MIXERS[kind]
    return replace(config, rope=RopeConfig(scaling=scaling)) if getattr(config, "rope", None) else config


def test_the_guard_sees_a_detour_through_fp32() -> None:
    x = torch.rand(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"made torch\.float32"), OnlyDouble():
        x.float().double()
    with OnlyDouble():
        x.mul(2)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["none", "linear", "yarn", "llama3"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_in_double_makes_only_doubles(kind: str, backend: str, scaling: Any) -> None:
    mixer = build_mixer(with_scaling(kind, scaling).with_backend(backend)).double()
    x = random_input(1, 90).double().requires_grad_()
    seq = packed(70, 14, padding=6)
    with OnlyDouble():
        mixer(x, seq).square().sum().backward()
        with torch.no_grad():
            state = mixer.init_state(1, 90, dtype=torch.float64, device="cpu")
            for begin, end in pairwise([0, 70, 71, 90]):
                mixer.step(x[:, begin:end], state, Layout.continuing_uniform(begin, 1, end - begin))
            state = mixer.init_state(1, 90, dtype=torch.float64, device="cpu")
            for begin, end in pairwise([0, 30, 31, 90]):
                valid_BT = torch.arange(end - begin)[None] < end - begin - (end == 90)
                mixer.step(x[:, begin:end], state, Layout.continuing(torch.tensor([begin]), valid_BT))
    assert all(tensor.dtype == torch.float64 for tensor in state.tensors())


@pytest.mark.parametrize("norm", NORMS.values(), ids=lambda norm: norm.kind)
@pytest.mark.parametrize("ffn", FFNS)
def test_a_model_in_double_makes_only_doubles_down_to_its_loss_and_gradients(ffn: str, norm: NormConfig) -> None:
    config = hybrid_config("auto", ("gdn", "kda", "swa", "mla", "mha", "latent"), ffn)
    model = build_model(replace(config, norm=norm)).double()
    tokens, labels = random_tokens(2, 20), random_tokens(2, 20, seed=2)
    with OnlyDouble():
        loss, statistics = model.loss(tokens, labels, Layout.one_document_per_row(2, 20))
        loss.backward()
        with torch.no_grad():
            model.step(tokens, model.init_state(2, 20))
    assert loss.dtype == torch.float64
    assert all(value.dtype == torch.float64 for value in statistics.values() if value.is_floating_point())


@pytest.mark.parametrize("kind", MIXERS)
def test_a_state_in_double_has_the_bytes_that_were_counted(kind: str) -> None:
    config = hybrid_config(pattern=(kind,))
    state = build_model(config).double().init_state(1, 50)
    assert state.nbytes == state_bytes(config, 50, element_bytes=8)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["none", "linear", "yarn", "llama3"])
def test_tables_in_double_are_sines_and_cosines_of_angles_computed_by_hand(scaling: Any) -> None:
    base, width, positions = 10000.0, 16, [0, 1, 77, 4095, 131071]
    seq = Layout(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([positions]), ((1, 5),), continues=True)
    cos, sin = RopeConfig(base=base, scaling=scaling).tables(seq, width, torch.float64)
    sharpened = 0.1 * math.log(7.0) + 1.0 if isinstance(scaling, YarnScaling) else 1.0
    for place, position in enumerate(positions):
        for pair in range(width // 2):
            frequency = base ** (-2 * pair / width)
            if isinstance(scaling, LinearScaling):
                frequency /= 3.0
            elif isinstance(scaling, YarnScaling):
                low, high = (width / 2 * math.log(64 / (turns * 2 * math.pi)) / math.log(base) for turns in (32.0, 1.0))
                low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
                ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
                frequency = frequency / 7.0 * ramp + frequency * (1 - ramp)
            elif isinstance(scaling, Llama3Scaling):
                kept = min(max((512 * frequency / (2 * math.pi) - 1) / 3, 0.0), 1.0)
                frequency = frequency / 8.0 * (1 - kept) + frequency * kept
            angle = position * frequency
            assert cos[0, place, 0, pair].item() == pytest.approx(sharpened * math.cos(angle), abs=1e-10)
            assert sin[0, place, 0, pair].item() == pytest.approx(sharpened * math.sin(angle), abs=1e-10)


@pytest.mark.parametrize("kind", MIXERS)
def test_backends_in_double_agree_to_double(kind: str) -> None:
    """Outputs and all gradients: of two computations that share no sum, one in fp32 would be 1e-7 off."""
    seq, results = packed(70, 14), []
    for backend in BACKENDS:
        mixer: nn.Module = build_mixer(MIXERS[kind].with_backend(backend)).double()
        x = random_input(1, 84).double().requires_grad_()
        y = mixer(x, seq)
        y.backward(random_input(1, 84, seed=2).double())
        assert x.grad is not None
        results.append([y.detach(), x.grad, *(p.grad for p in mixer.parameters())])
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).norm() <= 1e-12 * expected.norm()
