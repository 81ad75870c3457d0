"""Memory is bounded: what takes more than the limit is worked on in blocks of heads and of tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swamla import interpret
from swamla.interpret import edges_between, repeated_rows
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.ops.layout import Layout
from tests.interpret.models import numbers
from tests.model.helpers import FFNS, NORMS, build_model, random_tokens

HEADS, TIME, VOCABULARY = 8, 96, 31
MIXERS = {
    "mha": MHAConfig(n_heads=HEADS, n_kv_heads=2, backend="sdpa"),
    "gdn": GDNConfig(n_heads=HEADS, backend="reference"),
    "kda": KDAConfig(n_heads=HEADS, backend="reference"),
    "mla": MLAConfig(
        n_heads=HEADS, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, backend="sdpa"
    ),
    "latent": LatentConfig(n_heads=HEADS, backend="sdpa"),
}
WITH_SINKS = {"mha, learned sinks": MHAConfig(n_heads=HEADS, n_kv_heads=2, sink_logit=True, backend="reference")}
TOKENS, ROWS = random_tokens(2, TIME), repeated_rows(range(1, VOCABULARY), 0, length=30, rows=2)
QUERY = torch.arange(50, 95)
EDGES = edges_between(TIME, QUERY, QUERY - 40)
PACKED = Layout.from_documents(torch.tensor([[0] * 60 + [1] * 36, [0] * 90 + [-1] * 6]))
MEASURES: dict[str, Callable[[LanguageModel], Any]] = {
    "head_patterns": lambda model: interpret.head_patterns(model, TOKENS, PACKED),
    "edge_scores": lambda model: interpret.edge_scores(model, TOKENS, {"some": EDGES}, PACKED),
    "attribution": lambda model: interpret.attribution(model, TOKENS, EDGES),
    "cut_effects": lambda model: interpret.cut_effects(model, TOKENS, {"some": EDGES}),
    "ablated": lambda model: interpret.ablated(model, TOKENS[:1, :30]),
    "logit_lens": lambda model: interpret.logit_lens(model, TOKENS, top=2),
    "loss_by_position": lambda model: interpret.loss_by_position(model, TOKENS, PACKED),
    "induction": lambda model: interpret.induction(model, ROWS),
}


def build(name: str) -> LanguageModel:
    block = BlockConfig(mixer=(MIXERS | WITH_SINKS)[name], ffn=FFNS["dense"])
    config = LanguageModelConfig(
        vocab_size=VOCABULARY, width=32, blocks={name: block}, pattern=(name,), norm=NORMS["rmsnorm"]
    )
    return build_model(config).double().eval()


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):  # a view that is expanded takes less, one of a larger buffer is not all of it
                held = each.untyped_storage().nbytes() // each.element_size()
                self.numbers = max(self.numbers, min(held, each.numel()))
        return made


def limit(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Rows one at a time, and blocks of heads and of tokens that take so many numbers."""
    rows = interpret.tracing.in_rows
    monkeypatch.setattr("swamla.model.mixers.explanation.PART_BYTES", 8 * numbers)
    monkeypatch.setattr("swamla.interpret.tracing.PART_BYTES", 8 * numbers)
    for module in ("ablation", "attributing", "context", "lens", "patterns", "repeats"):
        monkeypatch.setattr(f"swamla.interpret.{module}.in_rows", lambda *given: rows(*given, max_bytes=1))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", [*MIXERS, *WITH_SINKS])
def test_blocks_of_heads_and_of_tokens_give_what_all_at_once_give(name, measure, monkeypatch) -> None:
    model = build(name)
    expected = numbers(MEASURES[measure](model))
    limit(monkeypatch, 3 * TIME**2)  # of eight heads
    assert numbers(MEASURES[measure](model)) == pytest.approx(expected, rel=1e-9, abs=1e-11, nan_ok=True)


@pytest.mark.parametrize("measure", ["head_patterns", "edge_scores", "attribution", "cut_effects"])
@pytest.mark.parametrize("name", MIXERS)
def test_nothing_that_is_computed_holds_the_weights_of_more_heads_than_the_limit_allows(
    name, measure, monkeypatch
) -> None:
    model = build(name)
    with Largest() as unbounded:
        MEASURES[measure](model)
    assert unbounded.numbers >= 2 * HEADS * TIME**2  # of two rows
    limit(monkeypatch, 2 * TIME**2)
    with Largest() as bounded:
        MEASURES[measure](model)
    assert bounded.numbers < 3 * TIME**2


def test_no_more_logits_are_computed_at_once_than_the_limit_allows(monkeypatch) -> None:
    model = build("mha")
    limit(monkeypatch, 5 * VOCABULARY)
    seen = []
    model.head.register_forward_hook(lambda module, given, logits: seen.append(logits.numel()))
    interpret.loss_by_position(model, TOKENS)
    interpret.logit_lens(model, TOKENS)
    assert max(seen) <= 5 * VOCABULARY
    assert sum(seen) >= 3 * 2 * (TIME - 1) * VOCABULARY


def test_weights_are_kept_where_all_of_them_fit_and_only_there(monkeypatch) -> None:
    found = build("gdn").blocks[0].mixer.explain(torch.randn(1, 20, 32).double(), Layout.one_document_per_row(1, 20))
    assert found.weight_BHTS is found.weight_BHTS
    ((part, weight),) = found.weights.parts()
    assert (part, weight) == (slice(0, HEADS), found.weight_BHTS)
