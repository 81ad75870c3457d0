"""A class's load is where the router sends each of its tokens, one at a time."""

import pytest
import torch

from swamla.interpret import load_by_class
from tests.interpret.models import VOCABULARY, hybrid, two_rows
from tests.model.helpers import random_tokens


@pytest.mark.parametrize("ffn", ["moe", "latent_moe", "moe_softmax", "latent_moe_groups"])
@torch.no_grad()
def test_the_load_of_a_class_is_that_of_a_loop_over_its_tokens(ffn: str) -> None:
    model, tokens = hybrid(ffn=ffn, logit_cap=0.0), random_tokens(2, 20)
    seq, _ = two_rows()
    class_V = torch.arange(VOCABULARY) % 3
    class_V[class_V == 2] = 3  # class 2 has no tokens
    found = load_by_class(model, tokens, class_V, seq)
    assert [layer.layer for layer in found] == [0, 1, 2, 3]
    x = model.embed(tokens)
    for index, block in enumerate(model.blocks):
        mixed = block.mix(model.layer_input(index, x, seq, tokens), seq)
        chosen = block.ffn.router(block.ffn_norm(mixed).flatten(0, 1)).expert_NK.unflatten(0, (2, 20))
        counts = torch.zeros(4, 8, dtype=torch.float64)
        for row in range(2):
            for t in range(20):
                if seq.document_BT[row, t] >= 0:
                    for expert in chosen[row, t].tolist():
                        counts[class_V[tokens[row, t]], expert] += 1
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(torch.tensor(found[index].share, dtype=torch.float64), shares)
        assert found[index].tokens == tuple((counts.sum(1) / block.ffn.config.n_activated).int().tolist())
        x, _ = block.feed(mixed, seq)
    assert found[0].share[2] == (0.0,) * 8
    assert found[0].tokens[2] == 0


def test_layers_without_a_router_have_no_load() -> None:
    assert load_by_class(hybrid(), random_tokens(2, 9), torch.zeros(VOCABULARY, dtype=torch.int64)) == ()
