"""On torch's meta device a model computes shapes and no numbers: its design is tried before memory is spent."""

from dataclasses import replace

import pytest
import torch

from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout

from .helpers import FFNS, MIXERS, NORMS, hybrid_config, random_tokens

CASES = [(mixer, "dense") for mixer in MIXERS] + [("mha", ffn) for ffn in FFNS if ffn != "dense"]
TOKENS = random_tokens(2, 40).to("meta")


def on_meta(mixer: str, ffn: str, norm: str = "rmsnorm") -> LanguageModel:
    config = replace(hybrid_config(pattern=(mixer, mixer), ffn=ffn), norm=NORMS[norm], dropout=0.1)
    with torch.device("meta"):
        return config.build()


@pytest.mark.parametrize(("mixer", "ffn"), CASES)
def test_forward_step_and_backward_give_shapes(mixer: str, ffn: str) -> None:
    model = on_meta(mixer, ffn)
    for mode in (model.train(), model.eval()):
        assert (mode(TOKENS).shape, mode(TOKENS).device.type) == ((2, 40, 31), "meta")
        with torch.no_grad():
            assert mode(TOKENS).shape == (2, 40, 31)
    state = model.init_state(2, 50)
    assert model.step(TOKENS, state).shape == (2, 40, 31)
    assert model.step(TOKENS[:, :1], state).shape == (2, 1, 31)
    loss = model(TOKENS, labels=TOKENS)
    assert loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_device_may_be_the_default_in_forward_too(mixer: str) -> None:
    model = on_meta(mixer, "dense")
    with torch.device("meta"):
        assert model(TOKENS).shape == (2, 40, 31)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_gives_shapes(norm: str) -> None:
    assert on_meta("swa", "dense", norm)(TOKENS).shape == (2, 40, 31)


@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_documents_give_shapes(mixer: str) -> None:
    seq = Layout.from_documents(torch.tensor([[0] * 17 + [1] * 23, [0] * 40])).to("meta")
    assert on_meta(mixer, "dense")(TOKENS, seq).shape == (2, 40, 31)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_of_16_bits_gives_shapes(autocast: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert on_meta("mha", "moe").bfloat16()(TOKENS).dtype == torch.bfloat16
