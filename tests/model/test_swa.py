"""Sliding-window attention against transformers' Mistral, and with sinks and documents against the mask written out."""

import pytest
import torch
from torch import Tensor

from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.ops.layout import Layout

from .helpers import (
    WIDTH,
    assert_close,
    assert_equal_to_oracle,
    build_mixer,
    packed,
    random_input,
    random_tokens,
    whole,
)
from .test_mha import BACKENDS, DEPTH, from_llama


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 5, 16, 100])
def test_a_model_with_windows_and_no_sinks_is_mistral(window: int, backend: str) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    theirs = MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=window,
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )
    )
    mixer = SWAConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=window, sinks=0, backend=backend)
    ours = LanguageModelConfig(
        vocab_size=50,
        width=32,
        blocks={"mistral": BlockConfig(mixer=mixer, ffn=DenseConfig(hidden=40))},
        pattern=("mistral",) * DEPTH,
        tied_head=False,
    ).build()
    tokens = random_tokens(2, 37, 50)
    assert_equal_to_oracle(ours, theirs, from_llama, ours, lambda ids: theirs(ids).logits, tokens)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, allowed_BTS: Tensor) -> Tensor:
    """SDPA under the explicit mask, (B, T, H, K) in and out."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mask = allowed_BTS[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def allowed(seq: Layout, window: int, sinks: int) -> Tensor:
    """NUMERICS.md, "Masks and documents", word by word."""
    time = seq.shape[1]
    t, s = torch.arange(time)[:, None], torch.arange(time)[None, :]
    same_document = seq.document_BT[:, :, None] == seq.document_BT[:, None, :]
    near_or_sink = (t - s < window) | (seq.position_BT[:, None, :] < sinks)
    return same_document & (s <= t) & near_or_sink


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(50,), (8, 9, 7, 26), (1, 1, 30, 18), (3, 47)])
@pytest.mark.parametrize(("window", "sinks"), [(8, 0), (8, 3), (1, 1), (5, 20), (64, 4)])
def test_windows_sinks_and_documents_are_the_dense_mask(
    window: int, sinks: int, lengths: tuple[int, ...], backend: str
) -> None:
    mixer = build_mixer(SWAConfig(n_heads=4, n_kv_heads=2, window=window, sinks=sinks, backend=backend))
    seq = packed(*lengths)
    inputs = [random_input(1, 50).requires_grad_() for _ in range(2)]
    found = mixer(inputs[0], seq)
    q, k, v, _ = mixer.project(inputs[1], seq)
    expected = mixer.o_proj(dense_attention(q, k, v, allowed(seq, window, sinks)).flatten(2))
    assert_close(found, expected, 1e-5, "output")
    upstream = random_input(1, 50, seed=3)
    found.backward(upstream)
    expected.backward(upstream)
    assert_close(inputs[0].grad, inputs[1].grad, 1e-4, "input gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_as_long_as_the_sequence_is_full_attention(backend: str) -> None:
    x = random_input(2, 40)
    windowed = build_mixer(SWAConfig(n_heads=4, window=40, sinks=0, backend=backend))
    full = build_mixer(MHAConfig(n_heads=4, backend=backend))
    assert_close(windowed(x, whole(x)), full(x, whole(x)), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_sees_exactly_its_window_and_the_sinks(backend: str) -> None:
    """The gradient of one output is zero at every token it must not see, and nowhere else."""
    window, sinks, at = 8, 3, 29
    mixer = build_mixer(SWAConfig(n_heads=4, window=window, sinks=sinks, backend=backend))
    x = random_input(1, 40).requires_grad_()
    mixer(x, whole(x))[0, at].sum().backward()
    assert x.grad is not None
    seen = {index for index in range(40) if x.grad[0, index].abs().max() > 0}
    assert seen == {*range(sinks), *range(at - window + 1, at + 1)}
    assert x.shape[-1] == WIDTH
