"""`model.generate`: a tensor of ids in, one out, by the decoder."""

import pytest
import torch
from torch import Tensor

from swamla.errors import ConfigError, UsageError
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from tests.model.helpers import build_model, hybrid_config, random_tokens


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_model(hybrid_config())


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "seed": 5}], ids=str
)
def test_it_gives_what_the_decoder_gives(model: LanguageModel, settings: dict) -> None:
    tokens = random_tokens(3, 9)
    expected = Decoder(model).generate(tokens.tolist(), 6, sampling=Sampling(**settings))
    assert model.generate(tokens, 6, **settings).tolist() == expected
    one = model.generate(tokens[0], 6, **settings)
    assert (one.shape, one.dtype, one.tolist()) == ((6,), torch.int64, expected[0])


def test_the_model_keeps_its_mode_and_the_ids_join_the_prompt(model: LanguageModel) -> None:
    tokens = random_tokens(2, 5)
    for training in (True, False):
        new = model.train(training).generate(tokens, 4)
        assert model.training is training
    assert torch.cat((tokens, new), dim=-1).shape == (2, 9)


def test_a_row_that_ended_is_filled_and_ends_the_others_if_all_have(model: LanguageModel) -> None:
    tokens = random_tokens(2, 5)
    free = model.generate(tokens, 8, temperature=0)
    stop = int(free[0, 2])
    ended = [row.index(stop) if stop in row else 8 for row in free.tolist()]
    found = model.generate(tokens, 8, temperature=0, stop_id=stop)
    assert found.shape == (2, max(ended))
    for row, end in enumerate(ended):
        assert torch.equal(found[row, :end], free[row, :end])
        assert (found[row, end:] == stop).all()
    first = int(free[0, 0])
    assert model.generate(tokens[0], 8, temperature=0, stop_id=first).shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], r"tokens are a list: must be a tensor of ids, \(time,\) or \(batch, time\): torch.tensor"),
        ("text", r"tokens are a str: .*generate_text takes texts"),
        (torch.zeros(2), r"tokens are of torch.float32: must be of torch.int64"),
        (torch.zeros(2, 0, dtype=torch.int64), r"tokens have the shape \(2, 0\): must be .*, one token at least"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"tokens have the shape \(1, 2, 3\): must be"),
        (torch.tensor(3), r"tokens have the shape \(\): must be"),
        (torch.tensor([1, 31]), r"token 31 in prompt 0 is outside the vocabulary of 31"),
        (torch.tensor([[1], [-1]]), r"token -1 in prompt 1 is outside the vocabulary of 31"),
    ],
    ids=lambda value: str(value).replace("\n", " ")[:30],
)
def test_what_is_no_tensor_of_ids_is_refused_in_a_line(model: LanguageModel, tokens: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        model.generate(tokens)
    assert "\n" not in str(caught.value)


def test_its_settings_are_checked_as_those_of_sampling(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="temperature = -1: must be >= 0"):
        model.generate(random_tokens(1, 3), temperature=-1)
    with pytest.raises(UsageError, match="max_new_tokens = 0: must be >= 1"):
        model.generate(random_tokens(1, 3), 0)
