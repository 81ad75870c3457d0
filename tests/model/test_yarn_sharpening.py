"""YaRN sharpens attention in every mixer that turns queries and keys, however the sharpening is split."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from swamla.model.mixers.mixer import Mixer
from swamla.model.rope import RopeConfig, YarnScaling
from swamla.ops.layout import Layout

from .helpers import MIXERS, assert_close, build_mixer, packed, random_input

FACTOR = 16.0
WITH_ROPE = [kind for kind, config in MIXERS.items() if getattr(config, "rope", None)]
every_rope = pytest.mark.parametrize("kind", WITH_ROPE)
every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])


def sharpened(kind: str, backend: str, mscale: float, mscale_all_dim: float) -> Mixer:
    scaling = YarnScaling(factor=FACTOR, original_length=64, mscale=mscale, mscale_all_dim=mscale_all_dim)
    config: Any = MIXERS[kind]
    return build_mixer(replace(config, rope=RopeConfig(scaling=scaling), backend=backend))


def outputs(mixer: Mixer) -> list[Tensor]:
    """Of packed rows, and of steps: many tokens, one, some."""
    x = random_input(1, 40)
    found = [mixer(x, packed(17, 23))]
    state = mixer.init_state(1, 40, dtype=torch.float32, device="cpu")
    for begin, end in pairwise([0, 25, 26, 40]):
        found.append(mixer.step(x[:, begin:end], state, Layout.continuing_uniform(begin, 1, end - begin)))
    state = mixer.init_state(1, 40, dtype=torch.float32, device="cpu")
    for begin, end in pairwise([0, 25, 26, 40]):  # as where rows differ in length
        seq = Layout.continuing(torch.tensor([begin]), torch.ones(1, end - begin, dtype=torch.bool))
        found.append(mixer.step(x[:, begin:end], state, seq))
    return found


def multiply_queries(mixer: Any, kind: str, factor: float) -> None:
    """Every score then is `factor` times what it was."""
    config = mixer.config
    with torch.no_grad():
        if kind == "mla":
            mixer.q_b_proj.weight *= factor
        elif kind == "mla_gated":
            mixer.q_proj.weight *= factor
        elif config.qk_norm != "none":  # the norm undoes a factor of the projection, its gain does not
            mixer.q_norm.weight *= factor
        else:
            mixer.qkv_proj.weight[: config.n_heads * mixer.key_dim] *= factor


@every_backend
@every_rope
@torch.no_grad()
def test_mscale_all_dim_multiplies_all_scores_as_deepseek_does(kind: str, backend: str) -> None:
    """The tables keep mscale / mscale_all_dim, 1 here; scores get (0.1 mscale_all_dim ln factor + 1)²."""
    found = outputs(sharpened(kind, backend, 0.7, 0.7))
    plain = sharpened(kind, backend, 0.0, 0.0)
    unsharpened = outputs(plain)
    multiply_queries(plain, kind, (0.1 * 0.7 * math.log(FACTOR) + 1) ** 2)
    for mine, expected, without in zip(found, outputs(plain), unsharpened, strict=True):
        assert_close(mine, expected, 1e-5)
        assert (mine - without).abs().max() > 1e-3


@every_backend
@pytest.mark.parametrize("kind", [kind for kind in WITH_ROPE if getattr(MIXERS[kind], "turns_whole_heads", False)])
@torch.no_grad()
def test_where_whole_heads_turn_it_is_one_whether_tables_or_the_softmax_sharpen(kind: str, backend: str) -> None:
    by_tables, by_softmax = sharpened(kind, backend, 0.7, 0.0), sharpened(kind, backend, 0.7, 0.7)
    for mine, expected in zip(outputs(by_tables), outputs(by_softmax), strict=True):
        assert_close(mine, expected, 1e-5)
