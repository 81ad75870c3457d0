"""What weights of 8 bits compute and what they do not, and that whatever happens the model gets its own back."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.inference.decoding import INT8_MAX_ROWS, Decoder, EagerSteps, decodings_on, inference_copy, prefill
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.ops.int8 import Int8Matrix
from tests.model.helpers import MIXERS, build_model, hybrid_config

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model() -> LanguageModel:
    return build_model(hybrid_config()).eval()


def test_every_device_has_its_own_ways_to_decode() -> None:
    assert decodings_on("cuda") == ("eager", "graph")
    assert decodings_on("cpu") == ("eager", "int8")
    assert decodings_on("mps") == ("eager",)


@pytest.mark.parametrize("length", [1, 3, INT8_MAX_ROWS, 40])
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
    Decoder(model, "int8").generate(prompts, 1, sampling=GREEDY)
    assert not rows
    Decoder(model, "int8").generate(prompts, 2, sampling=GREEDY)
    assert set(rows) == {2}


def test_more_prompts_than_8_bits_are_for_are_refused(model: LanguageModel) -> None:
    prompts = [[row] for row in range(INT8_MAX_ROWS + 1)]
    assert len(Decoder(model, "int8").generate(prompts[1:], 2, sampling=GREEDY)) == INT8_MAX_ROWS
    with pytest.raises(UsageError, match='decoding = "int8" is for at most 16 prompts at once, not 17: use "eager"'):
        Decoder(model, "int8").generate(prompts, 2, sampling=GREEDY)


@torch.no_grad()
def test_decoders_of_one_model_serve_side_by_side_each_with_its_own_arithmetic(model: LanguageModel) -> None:
    tokens = torch.arange(6).view(1, 6)
    expected = model(tokens)
    exact, rounded, again = Decoder(model), Decoder(model, "int8"), Decoder(model, "int8")
    alone = rounded.stepping(tokens)
    assert torch.equal(model(tokens), expected)
    torch.testing.assert_close(exact.stepping(tokens), expected, atol=1e-4, rtol=1e-4)
    assert (alone - expected).norm() > 1e-4 * expected.norm()
    assert torch.equal(again.stepping(tokens), alone)


@pytest.mark.parametrize("decodings", [("eager", "int8"), ("int8", "int8")])
def test_decoders_in_threads_find_what_they_find_alone(model: LanguageModel, decodings: tuple[str, str]) -> None:
    prompts = [[1, 2, 3], [4]]
    expected = [Decoder(model, decoding).generate(prompts, 8, sampling=GREEDY) for decoding in decodings]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(Decoder(model, name).generate, prompts, 8, sampling=GREEDY) for name in decodings]
        assert [each.result() for each in both] == expected


@torch.inference_mode()
def forced_logits(model: LanguageModel, prompts: list[list[int]], texts: list[list[int]], *, int8: bool) -> Tensor:
    """(1 + tokens, B, V): after the prompts and after each token of the texts, whatever would have been chosen."""
    state = model.init_state(len(prompts), max(map(len, prompts)) + len(texts[0]))
    decoder = Decoder(model)
    step = EagerSteps(inference_copy(model, int8=int8), state)
    found = [prefill(decoder.model, prompts, state)]
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


@pytest.mark.parametrize("rows", range(1, INT8_MAX_ROWS + 1))
def test_a_row_of_a_product_in_8_bits_does_not_depend_on_its_neighbours(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = Int8Matrix.of(torch.randn(48, 32, generator=generator))
    x = torch.randn(rows, 32, generator=generator)
    neighbours = torch.randn(INT8_MAX_ROWS - rows, 32, generator=generator) * 100  # which a shared scale would follow
    together = matrix.times(torch.cat([x, neighbours]))[:rows]
    alone = torch.cat([matrix.times(row[None]) for row in x])
    assert ((together - alone).norm(dim=-1) <= 1e-2 * alone.norm(dim=-1)).all()
