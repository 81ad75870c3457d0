"""What weights of 8 bits compute and what they do not, and that whatever happens the model gets its own back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swamla.errors import UsageError
from swamla.model.decoding import FEW_ROWS, decodings_on, fast_linears, steps_for
from swamla.model.language_model import LanguageModel
from swamla.model.sampling import Sampling, prefill
from swamla.ops.int8 import Int8Matrix

from .helpers import MIXERS, build_model, hybrid_config

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


@torch.inference_mode()
def forced_logits(model: LanguageModel, prompts: list[list[int]], texts: list[list[int]], *, int8: bool) -> Tensor:
    """(1 + tokens, B, V): after the prompts and after each token of the texts, whatever would have been chosen."""
    state = model.init_state(len(prompts), max(map(len, prompts)) + len(texts[0]))
    step = steps_for("eager", model, state)
    with fast_linears(model):
        found = [prefill(model, prompts, state)]
    with fast_linears(model, int8=int8):
        found += [step(list(chosen)).clone() for chosen in zip(*texts, strict=True)]
    return torch.stack(found)


# With 8 bits a sum in another order can round an activation to the neighbouring bf16 number, 2^-8 off, here and there.
@pytest.mark.parametrize(("int8", "tolerance"), [(False, 2e-5), (True, 3e-2)])
@pytest.mark.parametrize("kind", MIXERS)
def test_the_logits_of_a_prompt_in_a_batch_are_within_rounding_those_it_has_alone(
    kind: str, int8: bool, tolerance: float
) -> None:
    model = build_model(hybrid_config(pattern=(kind, kind))).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(31, (length,), generator=generator).tolist() for length in (5, 12, 3, 20, 2)]
    texts = [torch.randint(31, (12,), generator=generator).tolist() for _ in prompts]
    together = forced_logits(model, prompts, texts, int8=int8)
    alone = [forced_logits(model, [p], [text], int8=int8) for p, text in zip(prompts, texts, strict=True)]
    expected = torch.cat(alone, dim=1)
    assert ((together - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("rows", range(1, FEW_ROWS + 1))
def test_a_row_of_a_product_in_8_bits_does_not_depend_on_its_neighbours(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = Int8Matrix.of(torch.randn(48, 32, generator=generator))
    x = torch.randn(rows, 32, generator=generator)
    neighbours = torch.randn(FEW_ROWS - rows, 32, generator=generator) * 100  # which a shared scale would follow
    together = matrix.times(torch.cat([x, neighbours]))[:rows]
    alone = torch.cat([matrix.times(row[None]) for row in x])
    assert ((together - alone).norm(dim=-1) <= 1e-2 * alone.norm(dim=-1)).all()
