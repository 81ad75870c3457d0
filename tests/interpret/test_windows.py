"""Sliding-window attention with a window of all tokens is multi-head attention, to the digit, in every measure."""

from dataclasses import fields, replace
from typing import Any

import torch

from swamla.interpret import (
    ablated,
    behavioural_context,
    copying,
    cut_effects,
    edge_scores,
    edges_between,
    head_patterns,
    in_context,
    induction,
    load_by_class,
    logit_lens,
    loss_by_position,
    trace,
)
from swamla.interpret.attribution import attribution
from swamla.interpret.repeats import repeated_rows
from swamla.model.mixers.swa import SWAConfig
from tests.interpret.models import build
from tests.model.helpers import MIXERS, random_tokens


def measures(model) -> dict[str, Any]:
    """All of them, on random tokens and on repeated rows."""
    tokens, rows = random_tokens(3, 24), repeated_rows(range(1, 31), 0, length=10, rows=4)
    query = torch.arange(12, 20)
    edges, others = edges_between(24, query, query - 9), edges_between(24, query, query - 3)
    lens = logit_lens(model, tokens, top=2)
    return {
        "patterns": head_patterns(model, tokens),
        "edges": edge_scores(model, tokens, {"some": edges}),
        "attribution": attribution(model, tokens, edges),
        "cuts": cut_effects(model, tokens, {"edges": edges, "others": others}),
        "ablated": ablated(model, tokens),
        "copying": copying(model),
        "positions": loss_by_position(model, tokens),
        "in context": in_context(model, tokens, early=5),
        "behavioural context": behavioural_context(model, tokens, queries=4),
        "lens": (lens.loss, lens.losses_LBT.tolist(), lens.top_LBTK.tolist(), lens.probability_LBTK.tolist()),
        "load": load_by_class(model, tokens, torch.arange(31) % 2),
        "induction": induction(model, rows),
        "logits": trace(model, tokens).logits_BTV.tolist(),
    }


def test_a_window_of_all_tokens_changes_no_digit_of_any_measure() -> None:
    mha = replace(MIXERS["mha_gated"], backend="reference")
    swa = SWAConfig(**{field.name: getattr(mha, field.name) for field in fields(mha)}, window=24, sinks=0)
    settings: dict[str, Any] = {"around": "post, convolution"}
    found = []
    for mixer in (mha, swa):
        model = build("one", "mla", mixers={"one": mixer, "mla": MIXERS["mla"]}, **settings)
        found.append(measures(model))
    for name, expected in found[0].items():
        assert found[1][name] == expected, name
    narrow = build("one", "mla", mixers={"one": replace(swa, window=8), "mla": MIXERS["mla"]}, **settings)
    same = [name for name, expected in measures(narrow).items() if expected == found[0][name]]
    assert set(same) <= {"copying", "load"}  # of single tokens, and of no router
