"""Experts that processes share out learn what they learn in one: no token is dropped, and none counts twice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swamla import distributed
from swamla.checkpoint import load, step_name
from swamla.data.packing import NO_LABEL
from swamla.errors import ConfigError
from swamla.inference.decoding import Decoder
from swamla.model.language_model import LanguageModelConfig
from swamla.ops.layout import PADDING
from swamla.train import TrainConfig
from swamla.train.optim import AdamWConfig
from swamla.train.step import training_step

from .ranks import on_ranks
from .test_parallel import MODELS, Case, alone, assert_near, fresh, my_rows, refusal, train
from .test_sharded_runs import STEPS, assert_close, config_of, train_on
from .test_sharded_runs import data as data  # the fixture

KINDS = tuple(MODELS)
ON_TWO = [
    *(Case(experts=kind, optimizer="adamw", expert_parallel=2) for kind in KINDS),
    *(Case(experts=kind, optimizer="muon", expert_parallel=2) for kind in KINDS),
    Case(optimizer="lion", expert_parallel=2, accumulation=2),
    Case(experts="moe", optimizer="adamw", parallel="fsdp", expert_parallel=2),
]
ON_FOUR = [
    *(Case(experts=kind, expert_parallel=2) for kind in KINDS),
    Case(experts="moe", optimizer="muon", expert_parallel=2),
    Case(optimizer="lion", expert_parallel=2),
    Case(experts="moe", expert_parallel=4),
    Case(optimizer="muon", parallel="fsdp", expert_parallel=2),
    Case(experts="moe", parallel="hsdp", shards=2, expert_parallel=4),
]
ROUNDED = [  # of two: the same steps, but that blocks are computed again in the backward pass
    Case(optimizer="lion", expert_parallel=2, precision="bf16", checkpointing=what) for what in ("none", "all")
]
POISONED = Case(optimizer="lion", expert_parallel=2, poisoned=True)
BACKENDS = ("torch", "reference")
FEW = range(3)  # experts, as many as a token goes to


def gradients(
    case: Case, model: LanguageModelConfig | None = None, *, lonely: bool = False, padded: bool = False
) -> dict[str, Tensor]:
    """The whole ones of a first step, unclipped. lonely: all tokens go to the same few experts.

    padded: a row ends in padding, and the last two, all that a fourth rank has, are nothing else.
    """
    state, batch = fresh(case, model), my_rows(0)
    if padded:
        document_BT = torch.zeros(8, batch.tokens_BT.shape[1], dtype=torch.int64)
        document_BT[5, 24:] = document_BT[6:] = PADDING
        document_BT = document_BT.chunk(distributed.world_size())[distributed.rank()]
        batch = replace(
            batch, document_BT=document_BT, labels_BT=batch.labels_BT.masked_fill(document_BT == PADDING, NO_LABEL)
        )
    if lonely:
        for name, buffer in state.model.named_buffers():
            if name.endswith("router.bias"):
                buffer[: len(FEW)] = 100.0
    result = training_step(state, batch, replace(case.train, grad_clip=None), 1e-9)
    found = {name: distributed.full(p.grad).clone() for name, p in state.model.named_parameters()}
    load = {name: value for name, value in result.statistics.items() if name.startswith("load/")}
    return found | load | {"loss": torch.tensor(result.loss), "norm": torch.tensor(result.grad_norm)}


def by_backend(backend: str) -> LanguageModelConfig:
    """The model whose grouped products are done by it."""
    model = MODELS["latent_moe"]
    block = model.blocks["mla"]
    return replace(model, blocks=model.blocks | {"mla": replace(block, ffn=replace(block.ffn, backend=backend))})


def without_experts() -> LanguageModelConfig:
    blocks = {name: block for name, block in MODELS["moe"].blocks.items() if name != "mla"}
    return replace(MODELS["moe"], blocks=blocks, pattern=("gdn", "swa"))


def work(folder: Path, cases: list[Case]) -> None:
    """What each of several ranks does; the main one keeps the outcomes."""
    found: dict[str, Any] = {"cases": {case: train(case) for case in cases}}
    found["gradients"] = {case: gradients(case) for case in cases if case.accumulation == 1}
    found["padded"] = {backend: gradients(cases[0], by_backend(backend), padded=True) for backend in BACKENDS}
    state = fresh(cases[0])
    found["started"] = {name: distributed.full(p.detach()).clone() for name, p in state.model.named_parameters()}
    found["held"] = {name: tuple(distributed.local(p).shape) for name, p in state.model.named_parameters()}
    if distributed.world_size() == 2:
        found["lonely"] = {backend: gradients(cases[0], by_backend(backend), lonely=True) for backend in BACKENDS}
        odd = replace(MODELS["moe"].blocks["mla"].ffn, n_experts=7, groups=1, groups_used=1)
        uneven = replace(MODELS["moe"], blocks={"mla": replace(MODELS["moe"].blocks["mla"], ffn=odd)}, pattern=("mla",))
        eight_bit = AdamWConfig(moments="8bit")
        found["refused"] = [
            refusal(lambda: fresh(Case(expert_parallel=3))),
            refusal(lambda: fresh(cases[0], uneven)),
            refusal(lambda: fresh(cases[0], without_experts())),
            refusal(lambda: eight_bit.build(state.model, lr=1.0, weight_decay=0.0)),
        ]
    if distributed.is_main():
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, Any]:
    """All that two ranks found."""
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, work, folder, [*ON_TWO, *ROUNDED, POISONED])
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[str, Any]:
    """All that four ranks found."""
    folder = tmp_path_factory.mktemp("four")
    on_ranks(4, work, folder, ON_FOUR)
    return torch.load(folder / "found.pt", weights_only=False)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).double().norm() <= 1e-5 * gradient.double().norm(), name


@pytest.mark.parametrize("case", ON_TWO, ids=str)
def test_two_ranks_that_share_experts_take_the_steps_of_one_process(two, case: Case) -> None:
    assert_near(two["cases"][case], alone(case, 2 * case.accumulation))


@pytest.mark.parametrize("case", ON_FOUR, ids=str)
def test_four_ranks_that_share_experts_take_the_steps_of_one_process(four, case: Case) -> None:
    assert_near(four["cases"][case], alone(case, 4))


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_and_the_norm_are_those_of_one_process(request, ranks: str, kind: str) -> None:
    expected = gradients(Case(experts=kind))
    cases = {c: found for c, found in request.getfixturevalue(ranks)["gradients"].items() if c.experts == kind}
    cases = {case: found for case, found in cases.items() if case.precision == "fp32" and not case.poisoned}
    assert len(cases) >= 2
    for found in cases.values():
        assert_same_gradients(found, expected)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_a_rank_holds_its_experts_alone_and_they_begin_as_in_the_whole_model(request, ranks: str) -> None:
    found = request.getfixturevalue(ranks)
    whole = dict(MODELS[KINDS[0]].build(seed=3).named_parameters())
    assert found["started"].keys() == whole.keys()
    for name, parameter in whole.items():
        assert torch.equal(found["started"][name], parameter), name
        shape = tuple(parameter.shape)
        assert found["held"][name] == ((shape[0] // 2, *shape[1:]) if ".experts." in name else shape)


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_goes_to_no_rank(request, ranks: str, backend: str) -> None:
    """On four ranks the last one has nothing else."""
    found = request.getfixturevalue(ranks)["padded"][backend]
    assert_same_gradients(found, gradients(Case(), by_backend(backend), padded=True))
    assert found["load/2"].sum().item() == (5 * 32 + 24) * len(FEW)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_to_which_no_token_goes_takes_part_and_learns_nothing(two, backend: str) -> None:
    found = two["lonely"][backend]
    assert_same_gradients(found, gradients(Case(), by_backend(backend), lonely=True))
    for name in ("blocks.2.ffn.experts.gate_up", "blocks.2.ffn.experts.down"):
        used = found[name].flatten(1).norm(dim=1) > 0
        assert used.tolist() == [expert in FEW for expert in range(8)]


def test_computing_blocks_again_travels_again_and_changes_no_number(two) -> None:
    kept, again = (two["cases"][case] for case in ROUNDED)
    assert kept["steps"] == again["steps"]
    for name, tensor in kept["tensors"].items():
        assert torch.equal(again["tensors"][name], tensor), name
    for (loss, _, _), (expected, _, _) in zip(kept["steps"], alone(ROUNDED[0], 2)["steps"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)


def test_a_gradient_that_is_not_finite_on_one_rank_spoils_no_expert(two) -> None:
    found = two["cases"][POISONED]
    assert [norm == norm for _, norm, _ in found["steps"]] == [True, False, True, True]
    assert all(tensor.isfinite().all() for tensor in found["tensors"].values())


def test_a_run_that_shares_experts_goes_on_in_one_process_and_shares_them_again(data, tmp_path) -> None:
    folder, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    train_on(undisturbed, data, config_of(), False, None)
    on_ranks(2, train_on, folder, data, config_of(expert_parallel=2, async_save=True), False, 2)
    first = folder / "checkpoints" / step_name(2)
    assert len(list((first / "model").iterdir())) == len(list((first / "ema").iterdir())) == 2
    train_on(folder, data, config_of(), True, 3)
    assert (folder / "checkpoints" / step_name(3) / "model.safetensors").exists()
    on_ranks(2, train_on, folder, data, config_of(expert_parallel=2), True, 4)
    on_ranks(4, train_on, folder, data, config_of(expert_parallel=2, parallel="fsdp"), True, None)
    assert_close(folder, undisturbed, STEPS)

    tokens = torch.arange(12)[None]
    models = [load(path, "latest")[0] for path in (folder, undisturbed)]
    with torch.no_grad():
        torch.testing.assert_close(models[0](tokens), models[1](tokens), rtol=1e-3, atol=1e-3)
        state = models[0].init_state(1, 12)
        torch.testing.assert_close(models[0].step(tokens, state), models[0](tokens), rtol=1e-4, atol=1e-4)
    assert len(Decoder(models[0]).generate([[1, 2, 3]], 5)[0]) == 5


def test_experts_that_cannot_be_shared_are_refused_in_a_line(two) -> None:
    ranks, uneven, none, moments = two["refused"]
    assert ranks == "ConfigError: train.expert_parallel = 3: must divide the number of processes, here 2"
    assert uneven == (
        "ConfigError: train.expert_parallel = 2: must divide the n_experts = 7 of every layer that has experts"
    )
    assert none == "ConfigError: train.expert_parallel = 2: must be 1: no layer of the model has experts"
    assert moments.startswith("ConfigError: moments = '8bit': needs every parameter whole")
    with pytest.raises(ConfigError, match="must divide the number of processes, here 1"):
        fresh(Case(expert_parallel=2))
    with pytest.raises(ConfigError, match="expert_parallel = 0: must be >= 1"):
        TrainConfig(steps=1, expert_parallel=0)
