"""What weights of 8 bits compute and what they do not, and that whatever happens the model gets its own back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swamla.errors import UsageError
from swamla.model.decoding import FEW_ROWS, decodings_on, fast_linears
from swamla.model.language_model import LanguageModel
from swamla.model.sampling import Sampling
from swamla.ops.int8 import Int8Matrix

from .helpers import build_model, hybrid_config

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model() -> LanguageModel:
    return build_model(hybrid_config()).eval()


def changed(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if "forward" in vars(layer)]


def test_every_device_has_its_own_ways_to_decode() -> None:
    assert decodings_on("cuda") == ("eager", "graph")
    assert decodings_on("cpu") == ("eager", "int8")
    assert decodings_on("mps") == ("eager",)


@pytest.mark.parametrize("length", [1, 3, FEW_ROWS, 40])
def test_of_any_prompt_the_first_token_is_of_the_weights_themselves(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    rows: list[int] = []
    times = Int8Matrix.times

    def counted(self: Int8Matrix, x: Tensor) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return times(self, x)

    monkeypatch.setattr(Int8Matrix, "times", counted)
    prompts = [[1] * length, [2] * length]
    model.generate(prompts, 1, sampling=GREEDY, decoding="int8")
    assert not rows
    model.generate(prompts, 2, sampling=GREEDY, decoding="int8")
    assert set(rows) == {2}


def test_more_prompts_than_8_bits_are_for_are_refused(model: LanguageModel) -> None:
    prompts = [[row] for row in range(FEW_ROWS + 1)]
    assert len(model.generate(prompts[1:], 2, sampling=GREEDY, decoding="int8")) == FEW_ROWS
    with pytest.raises(UsageError, match='decoding = "int8" is for at most 16 prompts at once, not 17: use "eager"'):
        model.generate(prompts, 2, sampling=GREEDY, decoding="int8")
    assert changed(model) == []


def test_an_interrupt_while_weights_are_rounded_leaves_no_layer_changed(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded, of = [], Int8Matrix.of

    def second_raises(weight: Tensor) -> Int8Matrix:
        if rounded:
            raise KeyboardInterrupt
        rounded.append(weight)
        return of(weight)

    monkeypatch.setattr(Int8Matrix, "of", staticmethod(second_raises))
    with pytest.raises(KeyboardInterrupt), fast_linears(model, int8=True):
        pass
    assert rounded
    assert changed(model) == []


def test_an_interrupt_while_layers_are_changed_leaves_none_changed(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def third_raises(layer: nn.Module, name: str, value: Any) -> None:
        if len(changed(model)) == 2:
            seen.append(changed(model))
            raise KeyboardInterrupt
        nn.Module.__setattr__(layer, name, value)

    monkeypatch.setattr(nn.Linear, "__setattr__", third_raises)
    with pytest.raises(KeyboardInterrupt), fast_linears(model):
        pass
    assert len(seen) == 1
    assert changed(model) == []


@pytest.mark.parametrize(("outer", "inner"), [(False, True), (True, False), (True, True)])
def test_nobody_gets_the_arithmetic_of_another(model: LanguageModel, outer: bool, inner: bool) -> None:
    with fast_linears(model, int8=outer):
        before = changed(model)
        with pytest.raises(UsageError, match="is generating already"), fast_linears(model, int8=inner):
            pass
        assert changed(model) == before != []
    assert changed(model) == []


@torch.no_grad()
def test_a_use_that_ends_leaves_one_that_goes_on_with_the_same_function(model: LanguageModel) -> None:
    first, second = fast_linears(model), fast_linears(model)
    tokens = torch.arange(12).view(2, 6)
    expected = model(tokens)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    second.__exit__(None, None, None)
    assert changed(model) == []
