"""Sampling draws from exactly the tokens it should, and generation does not depend on state or neighbours."""

from dataclasses import replace

import pytest
import torch

from swamla.errors import ConfigError, UsageError
from swamla.inference import decoding as module
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from tests.model.helpers import build_model, hybrid_config, random_tokens

LOGITS = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (1, 23, 8, 40)]
NEW = 20


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_model(hybrid_config()).eval()


def kept(sampling: Sampling, logits: torch.Tensor = LOGITS) -> list[int]:
    """The tokens of row 0 that can be drawn."""
    return sampling.probabilities(logits)[0].nonzero().flatten().tolist()


def test_temperature_zero_is_the_likeliest_token(model: LanguageModel) -> None:
    chosen = Sampling(temperature=0, top_k=3, top_p=0.5).choose(torch.tensor([[1.0, 9.0, 3.0], [2.0, 0.0, 1.0]]), [])
    assert chosen == [1, 0]
    prompt = PROMPTS[1]
    found = Decoder(model).generate([prompt], NEW, sampling=Sampling(temperature=0))[0]
    expected = list(prompt)
    for _ in range(NEW):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert found == expected[len(prompt) :]


@pytest.mark.parametrize(("top_k", "expected"), [(0, 5), (1, 1), (2, 2), (4, 4), (5, 5), (99, 5)])
def test_top_k_keeps_the_k_likeliest(top_k: int, expected: int) -> None:
    assert kept(Sampling(top_k=top_k)) == list(range(expected))
    shuffled = LOGITS[:, [3, 0, 4, 2, 1]]
    assert set(kept(Sampling(top_k=top_k), shuffled)) == {[1, 4, 3, 0, 2][i] for i in range(expected)}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1.0, 5), (0.99, 5), (0.94, 4), (0.86, 4), (0.84, 3), (0.69, 2), (0.51, 2), (0.49, 1), (1e-9, 1)],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(top_p: float, expected: int) -> None:
    assert kept(Sampling(temperature=1.0, top_p=top_p)) == list(range(expected))


def test_any_positive_top_p_keeps_the_likeliest_token() -> None:
    assert kept(Sampling(temperature=1.0, top_p=1e-320)) == [0]  # 0 as a number of fp32


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.25, [0]), (0.26, [0, 1]), (0.5, [0, 1]), (0.51, [0, 1, 2]), (0.75, [0, 1, 2])]
)
def test_of_equally_likely_tokens_the_lowest_ids_stay_and_no_more_than_reach_p(
    top_p: float, expected: list[int]
) -> None:
    quarters = torch.zeros(3, 4)  # whose probabilities and sums are exact
    found = Sampling(temperature=1.0, top_p=top_p).probabilities(quarters)
    for row in found:
        assert row.nonzero().flatten().tolist() == expected
        torch.testing.assert_close(row[expected], torch.full((len(expected),), 1 / len(expected)))
    among_others = torch.full((1, 5000), -1e9)
    among_others[0, 7::1250] = 0.0
    assert kept(Sampling(temperature=1.0, top_p=top_p), among_others) == [7 + 1250 * i for i in expected]


def test_what_is_kept_keeps_its_proportions_and_sums_to_one() -> None:
    found = Sampling(temperature=1.0, top_k=3, top_p=0.95).probabilities(LOGITS)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.2, 0.15, 0, 0]]) / 0.85)
    # top_p acts on what top_k left: 0.5/0.7 = 0.71 alone reaches 0.7.
    assert kept(Sampling(temperature=1.0, top_k=2, top_p=0.7)) == [0]


def test_temperature_sharpens_and_flattens() -> None:
    torch.testing.assert_close(Sampling(temperature=2.0).probabilities(LOGITS), (LOGITS / 2).softmax(-1))
    torch.testing.assert_close(Sampling(temperature=0.5).probabilities(LOGITS), (LOGITS / 0.5).softmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-38])
def test_a_tiny_temperature_is_greedy_and_not_a_nan(temperature: float) -> None:
    torch.testing.assert_close(
        Sampling(temperature=temperature).probabilities(LOGITS * 100), torch.tensor([[1.0, 0, 0, 0, 0]])
    )


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(temperature=1.0)
    generators = sampling.generators(4000)
    drawn = torch.tensor(sampling.choose(LOGITS.expand(4000, -1), generators))
    frequencies = torch.bincount(drawn, minlength=5) / 4000
    assert (frequencies - LOGITS[0].exp()).abs().max() < 0.03


def test_a_seed_gives_its_tokens_again_and_another_seed_others(model: LanguageModel) -> None:
    first, again, other = (
        Decoder(model).generate(PROMPTS, NEW, sampling=Sampling(temperature=1.0, seed=seed)) for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    state = torch.random.get_rng_state()
    Decoder(model).generate(PROMPTS, 3, sampling=Sampling(temperature=1.0))
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was used"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(model: LanguageModel, temperature: float) -> None:
    together = Decoder(model).generate(PROMPTS, NEW, sampling=Sampling(temperature=temperature, seed=11))
    for row, prompt in enumerate(PROMPTS):
        alone = Decoder(model).generate([prompt], NEW, sampling=Sampling(temperature=temperature, seed=11 + row))
        assert together[row] == alone[0], f"row {row}"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_with_state_is_without(model: LanguageModel, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=12, top_p=0.9, seed=3)
    for prompt in PROMPTS:
        generators, tokens = sampling.generators(1), list(prompt)
        for _ in range(NEW):
            tokens += sampling.choose(model(torch.tensor([tokens]))[:, -1], generators)
        assert Decoder(model).generate([prompt], NEW, sampling=sampling)[0] == tokens[len(prompt) :]


@pytest.mark.parametrize("piece", [1, 7, 8, 40])
def test_prompts_read_in_pieces_are_prompts_read_at_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    expected = Decoder(model).generate(PROMPTS, NEW, sampling=Sampling(temperature=0))
    monkeypatch.setattr(module, "PREFILL_CHUNK", piece)
    assert Decoder(model).generate(PROMPTS, NEW, sampling=Sampling(temperature=0)) == expected


def test_a_row_ends_at_the_stop_token_and_the_others_go_on(model: LanguageModel) -> None:
    free = Decoder(model).generate(PROMPTS, NEW, sampling=Sampling(temperature=0))
    stop = free[0][2]
    stopped = Decoder(model).generate(PROMPTS, NEW, sampling=Sampling(temperature=0), stop_id=stop)
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert stopped == expected
    assert len(stopped[0]) <= 2
    assert any(len(tokens) == NEW for tokens in stopped)


def test_a_row_ends_after_the_token_at_which_the_caller_ends_it(model: LanguageModel) -> None:
    free = Decoder(model).generate(PROMPTS, 5)
    heard: list[int] = []

    def at_the_second(row: int, token: int) -> bool:
        heard.append(row)
        return row == 1 and heard.count(1) == 2

    assert Decoder(model).generate(PROMPTS, 5, on_token=at_the_second) == [
        tokens[: 2 if row == 1 else 5] for row, tokens in enumerate(free)
    ]


def test_tokens_are_announced_in_order_as_they_are_known(model: LanguageModel) -> None:
    heard: list[tuple[int, int]] = []
    produced = Decoder(model).generate(PROMPTS, 5, stop_id=3, on_token=lambda row, token: heard.append((row, token)))
    for row, tokens in enumerate(produced):
        assert [token for where, token in heard if where == row] == tokens
    first_round = [row for row, _ in heard[: sum(1 for tokens in produced if tokens)]]
    assert first_round == sorted(first_round)


def test_generation_neither_tracks_gradients_nor_leaves_the_model_in_another_mode(model: LanguageModel) -> None:
    for training in (True, False):
        model.train(training)
        Decoder(model).generate([[1, 2]], 2)
        assert model.training is training
    with pytest.raises(UsageError):
        Decoder(model.train()).generate([[99]], 2)
    assert model.training
    model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 5, "a prompt is empty"),
        ([[1], []], 5, "a prompt is empty"),
        ([[1, 31]], 5, "token 31 in prompt 0 is outside the vocabulary of 31"),
        ([[1], [-1]], 5, "token -1 in prompt 1 is outside the vocabulary of 31"),
        ([[1]], 0, "max_new_tokens = 0: must be >= 1"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(
    model: LanguageModel, prompts: list[list[int]], max_new_tokens: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Decoder(model).generate(prompts, max_new_tokens)


def test_more_tokens_than_learned_positions_are_refused_before_anything_is_drawn() -> None:
    model = build_model(replace(hybrid_config(), learned_positions=10))
    assert len(Decoder(model).generate([[1, 2, 3]], 8)[0]) == 8  # the last one is drawn, never read back
    with pytest.raises(UsageError, match="11 tokens are more than the model's 10 learned positions"):
        Decoder(model).generate([[1, 2, 3]], 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be >= 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1: must be >= 0"),
        ({"top_p": 0.0}, "top_p = 0.0: must be in"),
        ({"top_p": 1.1}, "top_p = 1.1: must be in"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"seed": -1}, "seed = -1: must be in"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
