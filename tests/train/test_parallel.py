"""A step is one step however many ranks take it: the same loss, norm and weights on one rank, on two and on four.

Two ranks add up what one process adds up in two micro-batches, so there all is equal to the bit but for torch's fused
AdamW, whose last bit depends on where a tensor is cut. With four ranks the order of sums is another one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swamla import distributed
from swamla.data.packing import NO_LABEL, Batch
from swamla.errors import SwamlaError
from swamla.evaluate.held_out import evaluate
from swamla.model.block import BlockConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.train import TrainConfig
from swamla.train.ema import WeightAverage
from swamla.train.optim import AdamWConfig, LionConfig, MuonConfig, muon
from swamla.train.parallel.build import build_model
from swamla.train.parallel.strategy import seed_ranks
from swamla.train.state import TrainState
from swamla.train.step import StepResult, training_step

from .ranks import on_ranks

ROWS, TIME, STEPS, SEED = 8, 32, 3, 3
POISONED = 1  # the step that is not finite, on the last rank alone, where a case asks for one
CPU = torch.device("cpu")

MOE = LatentMoEConfig(n_experts=8, n_activated=3, ratio=4, expert_hidden=16, shared_hidden=24, aux_loss=1e-2)
MODEL = LanguageModelConfig(
    vocab_size=301,  # no side of it divides among ranks
    width=64,
    blocks={
        "gdn": BlockConfig(mixer=GDNConfig(n_heads=4)),
        "swa": BlockConfig(mixer=SWAConfig(n_heads=4, window=8)),
        "mla": BlockConfig(
            mixer=MLAConfig(n_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8), ffn=MOE
        ),
    },
    pattern=("gdn", "swa", "mla"),
)
GROUPED = MoEConfig(
    n_experts=8, n_activated=3, expert_hidden=16, shared_hidden=24, shared_gate="sigmoid", groups=4, groups_used=2,
    z_loss=1e-3,
)  # fmt: skip
MODELS = {"latent_moe": MODEL}
MODELS["moe"] = replace(  # parameters of a single row, or of fewer than there are ranks
    MODEL,
    blocks={
        "gdn": replace(MODEL.blocks["gdn"], conv=3, norm_place="post"),
        "swa": BlockConfig(mixer=SWAConfig(n_heads=2, window=8, sinks=0, sink_logit=True)),
        "mla": replace(MODEL.blocks["mla"], ffn=GROUPED),
    },
)
OPTIMIZERS = {"adamw": AdamWConfig(), "lion": LionConfig(), "muon": MuonConfig()}
MUONS = {
    "normuon": MuonConfig(normuon=0.9),
    "cautious muon": MuonConfig(decay="cautious", coefficients="polar_express"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A few steps. Gradients are clipped in all of them; bf16: autocast."""

    experts: str = "latent_moe"
    optimizer: str = "adamw"
    parallel: str = "auto"
    shards: int | None = None
    expert_parallel: int = 1
    accumulation: int = 1
    checkpointing: str = "none"
    precision: str = "fp32"
    poisoned: bool = False

    def alone(self, accumulation: int) -> "Case":
        """The same in one process."""
        return replace(self, parallel="auto", shards=None, expert_parallel=1, accumulation=accumulation)

    @property
    def train(self) -> TrainConfig:
        settings: dict[str, Any] = {
            name: value for name, value in vars(self).items() if name not in ("experts", "optimizer", "poisoned")
        }
        lengths = {"batch_size": ROWS, "block_size": TIME}
        return TrainConfig(
            steps=9, grad_clip=0.5, optimizer=(OPTIMIZERS | MUONS)[self.optimizer], **lengths, **settings
        )


LAYOUTS = ("ddp", "fsdp")
ON_TWO = [
    *(Case(optimizer=name, parallel=layout) for name in OPTIMIZERS for layout in LAYOUTS),
    *(Case(optimizer="lion", parallel=layout, checkpointing="all", precision="bf16") for layout in LAYOUTS),
    *(Case(optimizer="lion", parallel=layout, poisoned=True) for layout in LAYOUTS),
    *(Case(optimizer="cautious muon", parallel=layout) for layout in LAYOUTS),
]
ACCUMULATING = [Case(optimizer="lion", parallel=layout, accumulation=2) for layout in LAYOUTS]
# In bf16, where micro-batches share the casts of weights.
ACCUMULATING += [replace(case, checkpointing="all", precision="bf16") for case in ACCUMULATING]
ACCUMULATING.append(Case(optimizer="normuon", parallel="ddp", accumulation=2))  # it sums rows, in the order of memory
ON_FOUR = [
    *(Case(optimizer=name, parallel=layout) for name in OPTIMIZERS for layout in LAYOUTS),
    *(Case(optimizer=name, parallel="hsdp", shards=2) for name in OPTIMIZERS),
]


def fresh(case: Case, model: LanguageModelConfig | None = None) -> TrainState:
    """The state before the first step."""
    config = case.train
    strategy = build_model(
        model or MODELS[case.experts],
        replace(config, seed=SEED),
        CPU,
        prepare=lambda model: model.checkpoint_activations(config.checkpointing),
    )
    optimizer = config.optimizer.build(strategy.model, lr=1e-2, weight_decay=0.1)
    state = TrainState(
        strategy=strategy, optimizer=optimizer, precision=case.precision, backends={}, data_fingerprint="", device=CPU
    )
    state.average = WeightAverage(strategy.model, 0.9)
    return state


def rows(step: int) -> Batch:
    """Rows of two documents; most of the first rows' labels carry no loss, so that ranks have unequally many."""
    ids = torch.randint(301, (ROWS, TIME + 1), generator=torch.Generator().manual_seed(step))
    labels, documents = ids[:, 1:].clone(), torch.zeros(ROWS, TIME, dtype=torch.int64)
    labels[:3, 5:] = NO_LABEL
    documents[:, 20:] = 1
    return Batch(ids[:, :-1].contiguous(), labels, documents)


def my_rows(step: int) -> Batch:
    """This rank's."""
    whole, ranks = rows(step), distributed.world_size()
    return Batch(*(t.chunk(ranks)[distributed.rank()] for t in (whole.tokens_BT, whole.labels_BT, whole.document_BT)))


Outcome = dict[str, Any]


def train(case: Case) -> Outcome:
    """What the steps found, and all that they left behind, gathered."""
    state = fresh(case)
    found: list[StepResult] = []
    counted = count_orthogonalised() if case.optimizer == "muon" else []
    last = distributed.rank() == distributed.world_size() - 1
    state.model.norm.register_forward_hook(
        lambda module, given, out: out * float("nan") if case.poisoned and last and state.step == POISONED else out
    )
    for step in range(STEPS):
        found.append(training_step(state, my_rows(step), case.train, 1e-2))
        state.step += 1
        state.skipped += not found[-1].finite
    assert state.average is not None
    with state.average.in_place():
        held_out = evaluate(state.model, [rows(step) for step in (50, 51, 52)], bytes_per_label=1.0)
        state.strategy.reshard()
    found.append(training_step(state, my_rows(STEPS), case.train, 1e-2))  # on its own weights, not the averages
    tensors = {**state.model.state_dict(), **state.optimizer.state_tensors()}
    tensors |= {f"average/{name}": tensor for name, tensor in state.average.tensors().items()}
    return {
        "steps": [(r.loss, r.grad_norm, r.tokens) for r in found],
        "gradient_storages": len({grad.untyped_storage().data_ptr() for grad in state.strategy.gradients()}),
        "load": [r.statistics["load/2"].tolist() for r in found if r.finite],
        "held_out": held_out.loss,
        "tensors": {name: distributed.full(tensor.detach()).clone() for name, tensor in tensors.items()},
        "orthogonalised": round(distributed.sum_of(sum(counted))),
    }


def count_orthogonalised() -> list[int]:
    """A list that gets the matrices this process orthogonalises from now on."""
    counts: list[int] = []
    real: Callable[[Tensor, muon.Polynomials], Tensor] = ORTHOGONALISE

    def counting(stack_NAB: Tensor, polynomials: muon.Polynomials) -> Tensor:
        counts.append(len(stack_NAB))
        return real(stack_NAB, polynomials)

    muon.orthogonalise = counting
    return counts


ORTHOGONALISE = muon.orthogonalise


@pytest.fixture(autouse=True)
def _nothing_is_counted_for_ever():
    yield
    muon.orthogonalise = ORTHOGONALISE


def muon_step(parallel: str, shards: int | None = None) -> dict[str, Tensor]:
    """What an optimizer step makes of the initial weights, given the same gradients on every rank."""
    state = fresh(Case(optimizer="muon", parallel=parallel, shards=shards))
    generator = torch.Generator().manual_seed(0)
    for p in state.model.parameters():
        gradient = torch.randn(p.shape, generator=generator)
        part = distributed.shard_like(gradient, p)
        p.grad = distributed.as_sharded(part, p) if distributed.sharded(p) else gradient
    state.optimizer.step()
    return {name: distributed.full(p.detach()).clone() for name, p in state.model.named_parameters()}


def work(folder: Path, cases: list[Case]) -> None:
    """What each of several ranks does; the main one keeps the outcomes."""
    found = {case: train(case) for case in cases}
    state = fresh(Case(parallel="fsdp"))
    started = {name: distributed.full(p.detach()).clone() for name, p in state.model.named_parameters()}
    held = sum(distributed.local(p).numel() for p in state.model.parameters())
    refused = [refusal(lambda: distributed.require_rows(6, 2)), refusal(lambda: fresh(Case(parallel="hsdp", shards=3)))]
    eight_bit = AdamWConfig(moments="8bit")
    refused.append(refusal(lambda: eight_bit.build(state.model, lr=1.0, weight_decay=0.0)))
    refused.append(refusal(lambda: MuonConfig(normuon=0.9).build(state.model, lr=1.0, weight_decay=0.0)))
    seed_ranks(0, 5)
    drawn = torch.rand(4)
    every = [torch.empty(4) for _ in range(distributed.world_size())]
    torch.distributed.all_gather(every, drawn)
    agreed = (distributed.from_main(float(distributed.rank())), distributed.highest(float(distributed.rank())))
    heard: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(heard, refusal(lambda: distributed.on_main(lambda: int("none"))))
    layouts = [("ddp", None), ("fsdp", None), *([("hsdp", 2)] if distributed.world_size() == 4 else [])]
    stepped = {layout: muon_step(*layout) for layout in layouts}
    if distributed.is_main():
        torch.save(
            {"cases": found, "started": started, "held": held, "drawn": every, "agreed": agreed}
            | {"refused": refused, "heard": heard, "muon": stepped},
            folder / "found.pt",
        )


def refusal(action: Callable[[], object]) -> str:
    """The error's kind and words."""
    try:
        action()
    except (SwamlaError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, Any]:
    """All that two ranks found."""
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, work, folder, [*ON_TWO, *ACCUMULATING])
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[str, Any]:
    """All that four ranks found."""
    folder = tmp_path_factory.mktemp("four")
    on_ranks(4, work, folder, ON_FOUR)
    return torch.load(folder / "found.pt", weights_only=False)


_alone: dict[Case, Outcome] = {}


def alone(case: Case, accumulation: int) -> Outcome:
    """The same steps in this process, with one thread as each rank has: sums of several have another order."""
    single, threads = case.alone(accumulation), torch.get_num_threads()
    if single not in _alone:
        torch.set_num_threads(1)
        try:
            _alone[single] = train(single)
        finally:
            torch.set_num_threads(threads)
    return _alone[single]


@pytest.mark.parametrize("case", [case for case in ON_TWO if not case.poisoned], ids=str)
def test_two_ranks_take_the_steps_of_two_micro_batches_to_the_bit(two, case: Case) -> None:
    found, expected = two["cases"][case], alone(case, 2)
    for what in ("steps", "load", "orthogonalised"):
        assert found[what] == expected[what]
    assert found["held_out"] == pytest.approx(expected["held_out"], rel=1e-12)
    for name, tensor in expected["tensors"].items():
        if case.parallel == "fsdp" and case.optimizer != "lion":  # torch's fused AdamW ends a shard in other lanes
            torch.testing.assert_close(found["tensors"][name], tensor, rtol=0, atol=1e-12)
        else:
            assert torch.equal(found["tensors"][name], tensor), name


@pytest.mark.parametrize("case", [case for case in ON_TWO if case.poisoned], ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(two, case: Case) -> None:
    found = two["cases"][case]
    norms = [norm for _, norm, _ in found["steps"]]
    assert [norm == norm for norm in norms] == [step != POISONED for step in range(STEPS + 1)]
    assert all(tensor.isfinite().all() for tensor in found["tensors"].values())
    clean = two["cases"][replace(case, poisoned=False)]
    assert found["steps"][0] == clean["steps"][0]
    assert found["steps"][-1] != clean["steps"][-1]


def test_copies_hold_their_gradients_in_the_buckets_alone(two) -> None:
    cases = [case for case in [*ON_TWO, *ACCUMULATING] if case.parallel == "ddp"]
    assert {two["cases"][case]["gradient_storages"] for case in cases} == {1}  # a bucket is larger than the model
    assert alone(ON_TWO[0], 2)["gradient_storages"] > 9


def assert_near(found: Outcome, expected: Outcome) -> None:
    """Losses, norms and weights after a few steps in fp32, in which Muon's Newton–Schulz lifts no rounding noise."""
    for step, ((loss, norm, tokens), wanted) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        assert loss == pytest.approx(wanted[0], rel=1e-5), step
        assert norm == pytest.approx(wanted[1], rel=1e-4), step
        assert tokens == wanted[2]
    assert found["held_out"] == pytest.approx(expected["held_out"], rel=1e-5)
    assert found["load"][0] == expected["load"][0]
    assert found["orthogonalised"] == expected["orthogonalised"]
    for name, tensor in expected["tensors"].items():
        if not name.endswith("step"):
            distance = (found["tensors"][name] - tensor).norm() / tensor.norm().clamp(min=1e-3)
            assert distance < 1e-4, name


@pytest.mark.parametrize("case", ON_FOUR, ids=str)
def test_four_ranks_differ_by_the_order_of_sums_alone(four, case: Case) -> None:
    assert_near(four["cases"][case], alone(case, 4))


@pytest.mark.parametrize("case", ACCUMULATING, ids=str)
def test_ranks_that_accumulate_take_the_same_steps(two, case: Case) -> None:
    assert_near(two["cases"][case], alone(case, 4))


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_parts_begin_as_the_whole_model_does_and_each_rank_holds_its_share(request, ranks: str) -> None:
    found = request.getfixturevalue(ranks)
    whole = dict(MODEL.build(seed=SEED).named_parameters())
    assert found["started"].keys() == whole.keys()
    for name, parameter in whole.items():
        assert torch.equal(found["started"][name], parameter), name
    count = sum(p.numel() for p in whole.values())
    assert found["held"] == pytest.approx(count / {"two": 2, "four": 4}[ranks], rel=0.02)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_matrices_that_several_ranks_orthogonalise_are_those_of_one(request, ranks: str) -> None:
    expected = muon_step("auto")
    for layout, found in request.getfixturevalue(ranks)["muon"].items():
        for name, weights in expected.items():
            torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n} {t}")
        assert found.keys() == expected.keys(), layout


def test_every_rank_draws_its_own_dropout(four) -> None:
    assert len({tuple(drawn.tolist()) for drawn in four["drawn"]}) == 4


def test_ranks_agree_on_the_main_ones_clock_and_on_a_flag_that_any_of_them_raises(four) -> None:
    assert four["agreed"] == (0.0, 3.0)


def test_what_fails_on_the_main_rank_fails_on_all_with_its_words(two) -> None:
    words = "invalid literal for int() with base 10: 'none'"
    assert two["heard"] == [f"ValueError: {words}", f"FailedElsewhere: {words}"]


def test_what_cannot_be_spread_is_refused_in_words(two) -> None:
    rows_, shards, moments, normuon = two["refused"]
    assert rows_ == (
        "UsageError: train.batch_size = 6: must be a multiple of 2 processes · accumulation = 2; it counts the rows of "
        "all processes"
    )
    assert shards == "ConfigError: train.shards = 3: must divide the 2 processes"
    assert moments.startswith("ConfigError: moments = '8bit': needs every parameter whole")
    assert normuon.startswith("ConfigError: normuon = 0.9: needs every matrix whole")
