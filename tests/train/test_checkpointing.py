"""Activation checkpointing keeps less and computes, to the bit, the same."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from swamla.model.ffns.ffn import FFN
from swamla.ops.layout import Layout
from swamla.train.precision import autocast

from .helpers import MIXERS, losses, model_of, run, tiny_config, weights


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Most of a tiny run's time."""
    monkeypatch.setattr("swamla.train.loop.plot_losses", lambda *args, **options: None)


HYBRID = ("gdn", "swa", "mla", "mha")
CHOICES = ("attention", "ffn", "all")
DOCUMENTS_BT = torch.tensor([[0] * 11 + [1] * 13 + [2] * 8, [0] * 32])


class Routed(FFN):
    """Has statistics, one of which is a loss."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.calls = 0

    def forward(self, x_BTD, seq):
        self.calls += 1
        p_BTE = self.router(x_BTD).softmax(-1)
        load_E = p_BTE.sum((0, 1))
        return x_BTD * p_BTE.amax(-1, keepdim=True), {"loss": (load_E**2).sum(), "load": load_E}


def built(what, pattern=HYBRID, ffn=None, dropout=0.2):
    torch.manual_seed(0)
    model = replace(model_of(*pattern), vocab_size=50, dropout=dropout).build().train()
    if ffn is not None:
        model.blocks[0].ffn = ffn()
    model.checkpoint_activations(what)
    return model


def one_step(model, precision="fp32"):
    """Loss, statistics, gradients, and what the random generator gives next."""
    torch.manual_seed(1)
    tokens_BT = torch.arange(64).view(2, 32) % 50
    with autocast(precision, torch.device("cpu")):
        loss, statistics = model.loss(tokens_BT, tokens_BT.flip(1), Layout.from_documents(DOCUMENTS_BT))
    extra = sum(value for name, value in statistics.items() if name.startswith("loss/"))
    (loss + extra).backward()
    return loss, statistics, {name: p.grad for name, p in model.named_parameters()}, torch.rand(3)


def kept_bytes(model):
    """Bytes that a forward pass keeps for the backward pass, weights left out, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # alive, so that no other takes its address
        return tensor

    held = []
    tokens_BT = torch.arange(64).view(2, 32) % 50
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x_BTD, _ = model.hidden(tokens_BT, Layout.from_documents(DOCUMENTS_BT))
    del x_BTD
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", CHOICES)
def test_loss_gradients_and_random_numbers_are_the_same_to_the_bit_with_dropout_and_documents(what, precision):
    expected_loss, _, expected, expected_draw = one_step(built("none"), precision)
    loss, _, gradients, draw = one_step(built(what), precision)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())
    assert torch.equal(draw, expected_draw)


@pytest.mark.parametrize("what", CHOICES)
def test_statistics_come_through_once_and_their_losses_reach_the_router(what):
    reference, model = built("none", ffn=Routed), built(what, ffn=Routed)
    _, expected_statistics, expected, _ = one_step(reference)
    _, statistics, gradients, _ = one_step(model)
    assert statistics.keys() == expected_statistics.keys() == {"loss/0", "load/0"}
    assert all(torch.equal(value, expected_statistics[name]) for name, value in statistics.items())
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())
    assert model.blocks[0].ffn.calls == (1 if what == "attention" else 2)


@pytest.mark.parametrize("mixer", MIXERS)
def test_each_choice_keeps_less_than_none_and_all_keeps_least(mixer):
    kept = {what: kept_bytes(built(what, (mixer,) * 4)) for what in ("none", *CHOICES)}
    assert kept["all"] < min(kept["attention"], kept["ffn"])
    assert max(kept["attention"], kept["ffn"]) < kept["none"]
    one_activation = 2 * 32 * 16 * 4
    # besides what the embedding and the last norm keep, one tensor a block and the layout's tables
    assert kept["all"] <= (4 + 4) * one_activation


def test_an_evaluation_without_gradients_computes_nothing_twice():
    model = built("all", ffn=Routed)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert model.blocks[0].ffn.calls == 1


def test_a_run_is_the_same_with_it_and_may_change_it_when_resumed(tmp_path, dataset):
    config = tiny_config(model_of(*HYBRID), steps=4, accumulation=2)

    def with_it(what, steps):
        return replace(config, train=replace(config.train, checkpointing=what, steps=steps, schedule="constant"))

    expected = run(with_it("none", 4), tmp_path / "plain", dataset)
    run(with_it("all", 2), tmp_path / "again", dataset)
    state = run(with_it("ffn", 4), tmp_path / "again", dataset, resume=True)
    assert [block.checkpointing for block in state.model.blocks] == ["ffn"] * 4
    assert losses(tmp_path / "again") == losses(tmp_path / "plain")
    assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(state).items())
