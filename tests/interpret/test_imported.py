"""Models of transformers' folders are explained exactly: its attention maps, and interventions on its models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.interop import load_pretrained
from swamla.interpret import ablated, behavioural_context, cut_effects, edges_between, induction, logit_lens, trace
from swamla.interpret.patterns import shares
from swamla.interpret.repeats import repeated_rows
from swamla.ops.layout import Layout
from tests.interop.cases import CASES, VOCABULARY, relative, tokens

HYBRIDS = ("qwen3_5", "qwen3_next", "kimi_linear", "bailing_hybrid", "olmo_hybrid")
SOFTMAX = ("gpt2", "llama", "llama, YaRN", "granite_swa", "olmo2", "olmo3", "deepseek_v3")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Callable[[str], tuple[Any, Any]]:
    """A case's model here, imported from its folder, and in transformers; both in fp64."""
    made: dict[str, tuple[Any, Any]] = {}

    def build(name: str) -> tuple[Any, Any]:
        if name not in made:
            theirs, folder = CASES[name].model(), tmp_path_factory.mktemp("theirs")
            theirs.save_pretrained(folder)
            made[name] = load_pretrained(folder, dtype=torch.float64).eval(), theirs.double()
        return made[name]

    return build


@pytest.mark.parametrize("name", [*HYBRIDS, *SOFTMAX])
@torch.no_grad()
def test_the_contract_holds_for_every_layer_of_an_imported_model(both, name: str) -> None:
    ours, theirs = both(name)
    ids = tokens(2, 24)
    document = torch.tensor([[0] * 24, [1] * 10 + [2] * 9 + [-1] * 5])
    for seq in (Layout.one_document_per_row(2, 24), Layout.from_documents(document)):
        found, real = trace(ours, ids, seq), seq.real_BT
        for index, layer in enumerate(found.layers):
            block = ours.blocks[index]
            expected = block.mixer(block.mixer_input(layer.before_BTD, seq), seq)
            output = layer.mixer.contributions().sum(dim=2)
            output = output if layer.mixer.bias_D is None else output + layer.mixer.bias_D
            assert relative(output[real], expected[real]) <= 1e-12
            mixed = layer.before_BTD + (output if layer.norm is None else layer.norm.linear(output))
            assert relative(mixed[real], block.mix(layer.before_BTD, seq)[real]) <= 1e-12
        assert relative(found.logits_BTV[real], ours(ids, seq)[real]) <= 1e-12
    assert relative(trace(ours, ids).logits_BTV, theirs(ids).logits) <= 1e-5


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_contributions_in_fp32_add_up_to_what_transformers_own_mixer_gives(both, name: str) -> None:
    """What its layers' attention or linear attention returns, caught by a hook: no code of ours is in the oracle."""
    ours, theirs = copy.deepcopy(both(name)[0]).float(), copy.deepcopy(both(name)[1]).float()
    ids, caught = tokens(2, 24), []

    def catch(module, given, output) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    for layer in theirs.model.layers:
        named = dict(layer.named_children())
        mixer = next(named[each] for each in ("self_attn", "linear_attn", "attention") if each in named)
        mixer.register_forward_hook(catch)
    theirs(ids)
    assert len(caught) == len(ours.blocks) == 3
    for index, (layer, expected) in enumerate(zip(trace(ours, ids).layers, caught, strict=True)):
        block = ours.blocks[index]
        own = block.mixer(block.mixer_input(layer.before_BTD, layout := Layout.one_document_per_row(2, 24)), layout)
        assert relative(layer.mixer.output(), own) <= 1e-6
        assert relative(layer.mixer.output(), expected) <= 1e-5


@pytest.mark.parametrize("name", [*SOFTMAX, "qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear"])
@torch.no_grad()
def test_weights_are_transformers_attention_maps(both, name: str) -> None:
    ours, theirs = both(name)
    ids = tokens(2, 24)
    maps = [each for each in theirs(ids, output_attentions=True).attentions if each is not None]
    softmax = [
        layer.mixer.weight_BHTS
        for layer, block in zip(trace(ours, ids).layers, ours.config.layers, strict=True)
        if block.mixer.kind in ("mha", "swa", "mla")
    ]
    assert len(maps) == len(softmax) > 0
    for found, expected in zip(softmax, maps, strict=True):
        if name == "granite_swa":  # its maps are those before the sink takes its share
            assert (found.sum(dim=-1) < 1).all()
            found = shares(found)
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-6)


def loss_of(theirs, ids: Tensor) -> float:
    logits = theirs(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def projection(layer: nn.Module) -> nn.Module:
    """What a layer of transformers projects its heads' outputs with."""
    names = ("attn.c_proj", "self_attn.o_proj", "linear_attn.out_proj", "linear_attn.o_proj", "self_attn.out_proj")
    found = dict(layer.named_modules())
    return next(found[name] for name in names if name in found)


@pytest.mark.parametrize("name", ["gpt2", "llama", "olmo2", "deepseek_v3", "qwen3_5", "kimi_linear", "olmo_hybrid"])
@torch.no_grad()
def test_effects_of_ablated_heads_are_those_of_hooks_that_zero_them_in_transformers(both, name: str) -> None:
    ours, theirs = both(name)
    ids = tokens(2, 20)
    found, base = ablated(ours, ids), loss_of(theirs, ids)
    assert found.loss == pytest.approx(base, rel=1e-5)
    layers = theirs.transformer.h if name == "gpt2" else theirs.model.layers
    for index, layer in enumerate(layers):
        heads = ours.config.layers[index].mixer.explained_heads
        for head in (0, heads - 1):

            def zero(module, given, head=head, heads=heads):
                z = given[0].clone()
                z.unflatten(-1, (heads, -1))[..., head, :] = 0
                return (z, *given[1:])

            hook = projection(layer).register_forward_pre_hook(zero)
            rise = loss_of(theirs, ids) - base
            hook.remove()
            assert found.layers[index].heads[head] == pytest.approx(rise, abs=2e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_5", "olmo2"])
@torch.no_grad()
def test_the_logit_lens_reads_transformers_hidden_states(both, name: str) -> None:
    ours, theirs = both(name)
    ids = tokens(2, 20)
    states = theirs(ids, output_hidden_states=True).hidden_states
    norm = theirs.transformer.ln_f if name == "gpt2" else theirs.model.norm
    found = logit_lens(ours, ids)
    for index, state in enumerate(states):
        logits = theirs.lm_head(state if index == len(states) - 1 else norm(state))  # the last one is normed
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        assert found.loss[index] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
@torch.no_grad()
def test_the_behavioural_context_is_what_transformers_needs_of_truncated_rows(both, name: str) -> None:
    ours, theirs = both(name)
    ids = tokens(2, 24)
    found = behavioural_context(ours, ids, queries=3)
    ends = (12, 17, 22)
    for context, loss in found.losses.items():
        expected = []
        for row in ids:
            for end in ends:
                logits = theirs(row[None, max(0, end + 1 - context) : end + 1]).logits[0, -1]
                expected.append(-logits.log_softmax(-1)[row[end + 1]].item())
        assert loss == pytest.approx(sum(expected) / 6, rel=1e-5)


@torch.no_grad()
def test_effects_of_cuts_are_those_of_weights_that_are_zeroed_behind_transformers_softmax(both) -> None:
    from transformers import AttentionInterface

    ours, theirs = both("llama")
    length = 8
    ids = repeated_rows(range(1, VOCABULARY), 0, length=length, rows=3)
    query = torch.arange(length + 1, 2 * length)
    time = ids.shape[1]
    edges, others = edges_between(time, query, query - length + 1), edges_between(time, query, (query - length) // 2)
    cut: dict[int, Tensor] = {}

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        causal = torch.ones(time, time, dtype=torch.bool).tril()
        weight = (query @ key.mT * scaling).masked_fill(~causal, -torch.inf).softmax(-1)
        if module.layer_idx in cut:
            weight = weight.masked_fill(cut[module.layer_idx], 0.0)
        return (weight @ value).transpose(1, 2).contiguous(), weight

    AttentionInterface.register("cut", attend)
    theirs.set_attn_implementation("cut")
    try:

        def loss() -> float:
            log_p = theirs(ids).logits[:, query].log_softmax(-1)
            return -log_p.gather(2, ids[:, query + 1][..., None]).mean().item()

        base = loss()
        sets = {"edges": edges, "others": others}
        for index, rises in cut_effects(ours, ids, sets).items():
            for name, rise in rises.items():
                cut[index] = sets[name]
                assert rise == pytest.approx(loss() - base, abs=2e-6)
                assert abs(rise) > 1e-5
                del cut[index]
        assert induction(ours, ids).second_loss == pytest.approx(base, rel=1e-6)
    finally:
        theirs.set_attn_implementation("eager")
