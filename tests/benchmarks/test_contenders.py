"""The models that are measured: of one size, built, trained and generating as their libraries do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import (
    DEEPSEEK_V3,
    GPT2,
    NANOCHAT,
    NANOGPT,
    QUICK,
    QWEN3_NEXT,
    TRANSFORMERS,
    Shape,
    contender,
)
from benchmarks.nanochat import hidden_width
from benchmarks.tables.training import FIVE_TO_ONE, OURS, training_step
from swamla.errors import UsageError
from swamla.model import count_parameters, training_flops_per_token

EVERYONE = (*OURS, FIVE_TO_ONE, *TRANSFORMERS, NANOCHAT)
STAND_IN = """
import torch.nn.functional as F
from dataclasses import dataclass
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: many")
        d = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, d), nn.Embedding(config.block_size, d)
        self.layers = nn.Sequential(*(nn.Linear(d, 12 * d, bias=False) for _ in range(config.n_layer)))

    def forward(self, tokens, targets):
        x = self.wte(tokens)
        for layer in self.layers:
            x = layer(x).unflatten(-1, (12, -1)).mean(-2)
        return None, F.cross_entropy((x @ self.wte.weight.T).flatten(0, 1), targets.view(-1))
"""


@pytest.mark.parametrize("name", EVERYONE)
def test_every_contender_takes_a_step_that_moves_its_weights(name: str) -> None:
    found = contender(name, QUICK, 32)
    before = [p.detach().clone() for p in found.model.parameters()]
    training_step(found, QUICK.vocabulary, 1, 32)()
    moved = [not torch.equal(p, old) for p, old in zip(found.model.parameters(), before, strict=True)]
    assert sum(moved) > 0.8 * len(moved)
    assert all(p.grad is None for p in found.model.parameters())


@pytest.mark.parametrize("name", EVERYONE)
def test_at_full_size_every_contender_has_12_million_parameters_within_2_percent(name: str) -> None:
    with torch.device("meta"):
        found = contender(name, Shape(), 16384)
    assert found.n_parameters == pytest.approx(12_190_000, rel=0.02)


def test_a_contender_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="GPT-2"):
        contender(GPT2, replace(QUICK, width=8), 32)  # where biases weigh more than 2 %


def test_learned_positions_do_not_count_as_parameters() -> None:
    assert contender(GPT2, QUICK, 32).n_parameters == contender(GPT2, QUICK, 64).n_parameters


def test_deepseek_v3_has_the_very_parameters_of_our_mla() -> None:
    theirs = {p.numel() for p in contender(DEEPSEEK_V3, QUICK, 32).model.parameters()}
    assert contender(DEEPSEEK_V3, QUICK, 32).n_parameters == contender("mla", QUICK, 32).n_parameters
    assert QUICK.vocabulary * QUICK.width in theirs


@pytest.mark.parametrize(("name", "twin"), [(GPT2, "mha"), (DEEPSEEK_V3, "mla"), (QWEN3_NEXT, "gdn gdn mha")])
def test_arithmetic_is_6_a_parameter_and_mixing_as_our_accounting_counts_it(name: str, twin: str) -> None:
    found, config = contender(name, QUICK, 32), QUICK.config(twin)
    ours = [training_flops_per_token(config, length) for length in (64, 4096)]
    theirs = [found.flops_per_token(length) for length in (64, 4096)]
    assert theirs[1] - theirs[0] == pytest.approx(ours[1] - ours[0])
    assert theirs[0] == pytest.approx(ours[0] + 6 * (found.n_parameters - count_parameters(config).total), rel=0.02)


@pytest.mark.parametrize("shape", [QUICK, Shape(), Shape(width=1024, heads=16, depth=12, vocabulary=50304)])
def test_nanochat_has_the_parameters_and_the_arithmetic_of_its_equations(shape: Shape) -> None:
    with torch.device("meta"):
        found = contender(NANOCHAT, shape, 256)
    d, f, depth, length = shape.width, hidden_width(shape), shape.depth, 256
    layer, vocabulary = d * 3 * d + d * d + d * f + f * d, shape.vocabulary * d
    assert found.n_parameters == depth * layer + 2 * vocabulary
    # Every weight but the embedding's multiplies and adds forward, and twice backward; each of T (T + 1) / 2 pairs of
    # query and key is a product of D for the score and one for the value.
    attention = 2 * 2 * d * (length * (length + 1) // 2) / length
    assert found.flops_per_token(length) == pytest.approx(3 * (2 * depth * layer + 2 * vocabulary + depth * attention))


def test_nanochat_sees_no_later_token_and_every_earlier_ones_place() -> None:
    model = contender(NANOCHAT, QUICK, 8).model.double()
    tokens = torch.randint(QUICK.vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))

    def nats_of(place: int, seen: torch.Tensor) -> float:
        labels = torch.full_like(tokens, -100)
        labels[0, place] = 7
        return model(seen, labels).item()

    later, swapped = tokens.clone(), tokens.clone()
    later[0, 5:] += 1
    later %= QUICK.vocabulary
    assert nats_of(4, later) == nats_of(4, tokens)
    assert nats_of(5, later) != nats_of(5, tokens)
    swapped[0, [0, 1]] = tokens[0, [1, 0]]
    assert nats_of(4, swapped) != pytest.approx(nats_of(4, tokens), rel=1e-9)


@pytest.mark.parametrize("name", [*OURS, *TRANSFORMERS])
def test_generating_tells_every_token_as_it_comes(name: str) -> None:
    told: list[int] = []
    found = contender(name, QUICK, 16)
    found.model.eval()
    assert found.generate([1] * 8, 4, lambda: told.append(1)) > 0
    assert len(told) == 4


@pytest.mark.parametrize("name", ["mha", GPT2])
def test_state_bytes_are_those_of_keys_and_values_of_all_tokens_but_the_last(name: str) -> None:
    found = contender(name, QUICK, 16)
    found.model.eval()
    assert found.generate([1] * 8, 4, lambda: None) == QUICK.depth * 2 * QUICK.width * 4 * (8 + 4 - 1)


def test_the_state_of_qwen3_next_includes_its_linear_layers() -> None:
    found = contender(QWEN3_NEXT, QUICK, 16)
    found.model.eval()
    full_layers = 2 * 2 * QUICK.width * 4 * (8 + 4 - 1)
    memories = 4 * QUICK.heads * QUICK.head**2 * 4
    assert found.generate([1] * 8, 4, lambda: None) >= full_layers + memories


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(STAND_IN)
    return tmp_path


def test_nanogpt_is_taken_from_its_folder_and_says_nothing(nanogpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = contender(NANOGPT, QUICK, 32, nanogpt)
    assert found.n_parameters == QUICK.parameters
    training_step(found, QUICK.vocabulary, 2, 32)()
    assert capsys.readouterr().out == ""


def test_a_folder_that_is_no_nanogpt_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no model\.py"):
        contender(NANOGPT, QUICK, 32, tmp_path)
