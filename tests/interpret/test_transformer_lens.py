"""On a GPT-2-shaped model TransformerLens has the same patterns, scores, attributions, lens and effects of ablations.

Its `detect_head` with "mul" divides by the weights of all tokens, the first copy's too: perfect induction has .5 there.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: pip install 'swamla[lens]'")

from transformer_lens.head_detector import (
    detect_head,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)
from transformer_lens.model_bridge import TransformerBridge

from swamla.interop import load_pretrained
from swamla.interpret import ablated, edge_scores, edges_between, induction, logit_lens, trace
from swamla.interpret.attributing import attribution
from swamla.interpret.repeats import repeated_rows
from tests.interop.cases import CASES, VOCABULARY

LENGTH = 12
PATTERNS = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


class Given:
    """What `detect_head` asks a model for when it is given a cache: the tokens, and sizes."""

    def __init__(self, bridge: TransformerBridge, tokens_BT: torch.Tensor) -> None:
        self.cfg, self.tokens_BT = bridge.cfg, tokens_BT

    def to_tokens(self, text: str) -> torch.Tensor:
        return self.tokens_BT


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights here and there, and rows of which each half repeats the other."""
    theirs, folder = CASES["gpt2"].model(), tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    tokens = repeated_rows(range(1, VOCABULARY), 0, length=LENGTH, rows=3)
    return (
        load_pretrained(folder).eval(),
        lambda: TransformerBridge.boot_transformers(str(folder), hf_model=CASES["gpt2"].model(), device="cpu"),
        tokens,
    )


@torch.no_grad()
def test_attention_patterns_are_the_same(models) -> None:
    ours, boot, tokens = models
    logits, cache = boot().run_with_cache(tokens)
    found = trace(ours, tokens)
    torch.testing.assert_close(found.logits_BTV, logits, rtol=1e-5, atol=1e-5)
    for index, layer in enumerate(found.layers):
        torch.testing.assert_close(layer.mixer.weight_BHTS, cache["pattern", index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_scores_of_edges_are_those_of_its_detector_of_heads(models, name: str) -> None:
    ours, boot, tokens = models
    bridge, row = boot(), tokens[:1]
    _, cache = bridge.run_with_cache(row, remove_batch_dim=True)
    theirs = detect_head(Given(bridge, row), "", name, cache=cache)
    edges = PATTERNS[name](row).bool()
    queries = int(edges.any(dim=-1).sum())
    for index, layer in enumerate(edge_scores(ours, row, {name: edges})):
        mine = torch.tensor(layer[name].share) * queries / row.shape[1]
        torch.testing.assert_close(mine, theirs[index].float(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_scores_of_induction_are_its_detectors_less_the_row_that_has_no_next_token(models) -> None:
    ours, boot, tokens = models
    bridge, row = boot(), tokens[:1]
    _, cache = bridge.run_with_cache(row, remove_batch_dim=True)
    queries = LENGTH - 1
    for name, field in (("induction_head", "induction"), ("duplicate_token_head", "duplicate")):
        edges = PATTERNS[name](row)
        edges[2 * LENGTH] = 0
        theirs = detect_head(Given(bridge, row), "", edges, cache=cache)
        for index, layer in enumerate(induction(ours, row).layers):
            mine = torch.tensor(getattr(layer, field)) * queries / row.shape[1]
            torch.testing.assert_close(mine, theirs[index].float(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_what_heads_add_to_logits_is_its_direct_attribution(models) -> None:
    ours, boot, tokens = models
    bridge = boot()
    # Folds the norms' gains into the weights and centres those; values keep their biases.
    bridge.enable_compatibility_mode(fold_value_biases=False)
    _, cache = bridge.run_with_cache(tokens)
    time, query = tokens.shape[1], torch.arange(LENGTH + 1, 2 * LENGTH)
    labels = tokens[:, query + 1]
    results = cache.stack_head_results(layer=-1, pos_slice=(LENGTH + 1, 2 * LENGTH))
    theirs = cache.logit_attrs(results, tokens=labels, pos_slice=(LENGTH + 1, 2 * LENGTH), batch_slice=None)
    theirs = theirs[: 3 * 4].mean(dim=(1, 2)).unflatten(0, (3, 4))
    found = attribution(ours, tokens, edges_between(time, query, query - LENGTH + 1))
    mine = torch.tensor([layer.total for layer in found])
    assert mine.abs().max() > 1e-3
    torch.testing.assert_close(mine, theirs.float(), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_logit_lens_is_its_accumulated_stream_read_by_the_head(models) -> None:
    ours, boot, tokens = models
    bridge = boot()
    bridge.enable_compatibility_mode()
    _, cache = bridge.run_with_cache(tokens)
    streams = cache.accumulated_resid(layer=-1, incl_mid=False, apply_ln=True)
    found = logit_lens(ours, tokens)
    assert len(streams) == len(found.loss) == 4
    for index, stream in enumerate(streams):
        logits = stream @ bridge.W_U + bridge.b_U
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert found.loss[index] == pytest.approx(loss, rel=1e-5)


@torch.no_grad()
def test_effects_of_ablated_heads_are_those_of_its_hooks(models) -> None:
    ours, boot, tokens = models
    bridge = boot()
    found = ablated(ours, tokens)

    def loss(hooks) -> float:
        logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    base = loss([])
    assert found.loss == pytest.approx(base, rel=1e-5)
    for index, layer in enumerate(found.layers):
        for head in range(4):

            def without(z, hook, head=head):
                z[:, :, head] = 0
                return z

            rise = loss([(f"blocks.{index}.attn.hook_z", without)]) - base
            assert layer.heads[head] == pytest.approx(rise, abs=1e-5)
        silent = loss([(f"blocks.{index}.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]) - base
        assert layer.ffn == pytest.approx(silent, abs=1e-5)
        silent = loss([(f"blocks.{index}.hook_attn_out", lambda x, hook: torch.zeros_like(x))]) - base
        assert layer.mixer == pytest.approx(silent, abs=1e-5)
