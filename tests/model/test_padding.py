"""What is padding counts nowhere: any amount of it, anywhere it may stand, holding anything, changes no figure."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swamla.data.packing import NO_LABEL, Batch
from swamla.model.block import BlockConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.ops.layout import PADDING, Layout
from swamla.train import TrainConfig
from swamla.train.optim import AdamWConfig
from swamla.train.parallel.strategy import Strategy
from swamla.train.state import TrainState
from swamla.train.step import StepResult, training_step

from .helpers import MIXERS, WIDTH, assert_close, build_model, gradients_of, random_tokens

LOSSES = {"aux_loss": 0.1, "z_loss": 0.01, "bias_rate": 0.1}
ROUTED = {
    "moe": MoEConfig(n_experts=8, n_activated=3, expert_hidden=16, shared_hidden=24, **LOSSES),
    "latent_moe": LatentMoEConfig(n_experts=8, n_activated=3, ratio=4, expert_hidden=16, shared_hidden=24, **LOSSES),
    "without shared experts": MoEConfig(n_experts=8, n_activated=2, n_shared=0, expert_hidden=16, **LOSSES),
    "softmax in groups": MoEConfig(
        n_experts=8,
        n_activated=3,
        expert_hidden=16,
        shared_gate="sigmoid",
        score="softmax",
        normalise=False,
        scale=3.0,
        groups=4,
        groups_used=2,
        group_score="max",
        **LOSSES,
    ),
    "crowded": MoEConfig(n_experts=8, n_activated=8, expert_hidden=16, **LOSSES),
}
ROWS, TIME = 3, 14
every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])


def config_of(ffn: MoEConfig) -> LanguageModelConfig:
    blocks = {name: BlockConfig(mixer=MIXERS[name], ffn=ffn) for name in ("swa", "gdn", "mla")}
    return LanguageModelConfig(vocab_size=31, width=WIDTH, blocks=blocks, pattern=("gdn", "swa", "mla"))


def plain() -> Batch:
    """Rows of two documents, all of them text."""
    tokens, documents = random_tokens(ROWS, TIME), torch.zeros(ROWS, TIME, dtype=torch.int64)
    documents[:, 5:] = 1
    return Batch(tokens, tokens.flip(1), documents)


def padded(ends: int, rows: int, garbage: int) -> Batch:
    """The same with padding: `ends` more positions in each row and `rows` more rows, holding ids by `garbage`."""
    shape = (ROWS + rows, TIME + ends)
    tokens = random_tokens(*shape, seed=garbage) if garbage else torch.zeros(shape, dtype=torch.int64)
    labels, documents = torch.full(shape, NO_LABEL), torch.full(shape, PADDING)
    text = plain()
    for target, source in ((tokens, text.tokens_BT), (labels, text.labels_BT), (documents, text.document_BT)):
        target[:ROWS, :TIME] = source
    return Batch(tokens, labels, documents)


PADDED = {
    "one position": padded(1, 0, 0),
    "many positions": padded(50, 0, 0),
    "a row": padded(0, 1, 0),
    "rows": padded(3, 5, 0),
    "other ids": padded(9, 2, 5),
    "other ids again": padded(9, 2, 6),
}


def pass_of(model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
    """Loss, statistics, gradients, and the routers' biases after the step, by name."""
    model.zero_grad()
    loss, statistics = model.loss(batch.tokens_BT, batch.labels_BT, Layout.from_documents(batch.document_BT))
    (loss + sum(value for name, value in statistics.items() if name.startswith("loss/"))).backward()
    model.rebalance(statistics)
    biases = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"nats": loss.detach(), **{n: v.detach() for n, v in statistics.items()}, **gradients_of(model), **biases}


@every_backend
@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("how", PADDED)
def test_loss_statistics_gradients_and_biases_are_those_of_the_text_alone(how: str, kind: str, backend: str) -> None:
    config = config_of(replace(ROUTED[kind], backend=backend))
    expected = pass_of(build_model(config), plain())
    found = pass_of(build_model(config), PADDED[how])
    assert found.keys() == expected.keys()
    assert sum(name.startswith(("load", "entropy", "tokens", "loss")) for name in expected) == 4 * 3
    for name, value in expected.items():
        if name.startswith(("load", "tokens")) or name.endswith("router.bias"):
            assert torch.equal(found[name], value), name
        else:
            assert_close(found[name], value, 2e-5, name)
    assert expected["tokens/0"].item() == ROWS * TIME
    assert expected["load/0"].sum().item() == ROWS * TIME * ROUTED[kind].n_activated


@pytest.mark.parametrize("kind", ROUTED)
def test_an_expert_that_text_shuns_learns_nothing_from_padding(kind: str) -> None:
    """Padding is routed to nobody: were it computed, an expert of its own would have a gradient."""
    if kind == "crowded":
        return  # there all experts see all
    ffn = ROUTED[kind].build(WIDTH)
    ffn.router.weight.data[3] = -ffn.router.weight.data.sum(0)
    x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    x[:, 4:] = 50 * ffn.router.weight.data[3]
    documents = torch.tensor([[0, 0, 0, 0, PADDING, PADDING]])
    ffn.router.bias[3] = -0.5
    ffn.router.bias[:3] = 100.0
    y, statistics = ffn(x, Layout.from_documents(documents))
    y.sum().backward()
    assert statistics["load"][3] == 0
    assert statistics["load"].sum() == 4 * ROUTED[kind].n_activated
    assert ffn.experts.down.grad[3].abs().max() == 0


@pytest.mark.parametrize("how", PADDED)
def test_a_training_step_reports_and_learns_what_it_does_of_the_text_alone(how: str) -> None:
    def step(batch: Batch) -> tuple[StepResult, dict[str, Tensor]]:
        model = build_model(config_of(ROUTED["latent_moe"]))
        state = TrainState(
            strategy=Strategy(model),
            optimizer=AdamWConfig().build(model, lr=1e-2, weight_decay=0.1),
            precision="fp32",
            backends={},
            data_fingerprint="",
            device=torch.device("cpu"),
        )
        config = TrainConfig(steps=9, batch_size=len(batch.tokens_BT), block_size=batch.tokens_BT.shape[1])
        result = training_step(state, batch, config, 1e-2)
        return result, {name: p.detach() for name, p in state.model.named_parameters()}

    (expected, learned), (found, weights) = step(plain()), step(PADDED[how])
    assert found.tokens == expected.tokens == ROWS * TIME
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, weight in learned.items():
        assert_close(weights[name], weight, 1e-4, name)


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUTED)
def test_a_prompt_beside_longer_ones_is_read_as_alone(kind: str) -> None:
    model = build_model(config_of(ROUTED[kind]))
    tokens = random_tokens(2, 9)
    valid = torch.tensor([[True] * 4 + [False] * 5, [True] * 9])
    together = model.step(tokens, model.init_state(2, 9), valid)
    assert_close(together[:1, :4], model(tokens[:1, :4]), 1e-5)
    assert_close(together[1:], model(tokens[1:]), 1e-5)
