"""Sliding-window attention with a window of all tokens is multi-head attention, to the digit, in every measure."""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swamla import interpret
from swamla.data.tokenizer import IdTokenizer
from swamla.interpret import Subject, edges_between, repeated_rows
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.ops.layout import Layout
from tests.interpret.models import VOCABULARY, numbers
from tests.model.helpers import FFNS, MIXERS, NORMS, WIDTH, build_model, random_tokens

DOCS = Path(__file__).parents[2] / "docs" / "explain.md"
TIME = 24
TOKENS, ROWS = random_tokens(3, TIME), repeated_rows(range(1, 31), 0, length=10, rows=4)
QUERY = torch.arange(12, 20)
EDGES, OTHERS = edges_between(TIME, QUERY, QUERY - 9), edges_between(TIME, QUERY, QUERY - 3)
PACKED = Layout.from_documents(torch.tensor([[0] * 20 + [1] * 4, [0] * 9 + [1] * 13 + [-1] * 2, [0] * 24]))
TEXT = Subject(
    name="a model", ids=range(VOCABULARY - 1), rows_BT=TOKENS, text=TOKENS[0].tolist(), source="a text", longest=TIME
)


MEASURES: dict[str, Callable[[LanguageModel], Any]] = {
    "ablated": lambda model: interpret.ablated(model, TOKENS, seq=PACKED),
    "attribution": lambda model: interpret.attribution(model, TOKENS, EDGES),
    "behavioural_context": lambda model: interpret.behavioural_context(model, TOKENS, queries=4),
    "copying": lambda model: interpret.copying(model),
    "cut_effects": lambda model: interpret.cut_effects(model, TOKENS, {"edges": EDGES, "others": OTHERS}),
    "edge_scores": lambda model: interpret.edge_scores(model, TOKENS, {"some": EDGES}),
    "explained": lambda model: interpret.explained(model, IdTokenizer(VOCABULARY - 1), TEXT),
    "head_patterns": lambda model: interpret.head_patterns(model, TOKENS, PACKED),
    "in_context": lambda model: interpret.in_context(model, TOKENS, early=5),
    "induction": lambda model: interpret.induction(model, ROWS),
    "load_by_class": lambda model: interpret.load_by_class(model, TOKENS, torch.arange(VOCABULARY) % 2),
    "logit_lens": lambda model: interpret.logit_lens(model, TOKENS, top=2),
    "logits_without": lambda model: interpret.logits_without(model, TOKENS, {0: EDGES, 1: OTHERS}),
    "loss_by_position": lambda model: interpret.loss_by_position(model, TOKENS),
    "trace": lambda model: interpret.trace(model, TOKENS),
    "walk": lambda model: list(interpret.walk(model, TOKENS, PACKED)),
}


def functions() -> dict[str, Any]:
    """All that the package offers."""
    found = {name: getattr(interpret, name) for name in interpret.__all__}
    return {name: each for name, each in found.items() if inspect.isfunction(each)}


def test_every_function_of_a_model_that_the_package_offers_is_compared_here() -> None:
    measures = {name for name, each in functions().items() if next(iter(inspect.signature(each).parameters)) == "model"}
    assert set(MEASURES) == measures


def test_every_function_that_the_package_offers_is_on_its_page_of_the_docs() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert [name for name in functions() if f"`{name}`" not in page] == []


def test_a_window_of_all_tokens_changes_no_digit_of_any_measure() -> None:
    mha = replace(MIXERS["mha_gated"], backend="reference")
    swa = SWAConfig(**{field.name: getattr(mha, field.name) for field in fields(mha)}, window=TIME, sinks=0)
    one, other, narrow = (build(mixer) for mixer in (mha, swa, replace(swa, window=8)))
    changed = []
    for name, measure in MEASURES.items():
        # Twelve of sixteen digits: in which order a product adds may depend on where its operands lie in memory.
        expected = pytest.approx(numbers(measure(one)), rel=1e-12, abs=1e-13, nan_ok=True)
        assert numbers(measure(other)) == expected, name
        if numbers(measure(narrow)) != expected:
            changed.append(name)
    assert changed == [name for name in MEASURES if name != "copying"]  # which looks at single tokens


def build(mixer: MixerConfig) -> LanguageModel:
    """A layer of this mixer with a convolution and a norm behind it, and one of latent attention with experts."""
    blocks = {
        "one": BlockConfig(mixer=mixer, ffn=FFNS["dense"], conv=3, norm_place="post"),
        "mla": BlockConfig(mixer=MIXERS["mla"], ffn=FFNS["moe"]),
    }
    settings = {"vocab_size": VOCABULARY, "width": WIDTH, "norm": NORMS["rmsnorm"]}
    return build_model(LanguageModelConfig(blocks=blocks, pattern=("one", "mla"), **settings)).double().eval()
