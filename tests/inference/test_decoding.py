"""Steps as a graph records them: no question to the device, one shape a size, the same logits."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from swamla.errors import MissingBackendError, UsageError
from swamla.inference import decoding
from swamla.inference.decoding import (
    Decoder,
    EagerSteps,
    GraphSteps,
    Replay,
    compiled_step,
    graph_size,
    inference_copy,
    one_step,
    prefill,
)
from swamla.inference.sampling import Sampling
from swamla.model.ffns.experts import check_recordable
from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState
from swamla.ops.int8 import Int8Matrix
from swamla.ops.layout import Layout
from swamla.ops.linear import linear
from tests.model.helpers import FFNS, MIXERS, assert_close, build_model, hybrid_config, random_tokens

PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (5, 23, 11)]
UNIFORM = [random_tokens(1, 21, seed=seed)[0].tolist() for seed in (1, 2)]
every_mixer = pytest.mark.parametrize("kind", MIXERS)
every_ffn = pytest.mark.parametrize("ffn", FFNS)
# What an operation needs the values of its inputs for, on the host, or whose result has a shape that depends on them.
ASKS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "bincount",
    "is_nonzero",
    "equal",
}


class Forbidden(AssertionError):
    pass


class NoQuestions(TorchDispatchMode):
    """Raises where a graph could not be recorded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in pytree.tree_leaves(args[1:2])
        )
        if name in ASKS or boolean:
            raise Forbidden(f"{func} asks the device")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """A graph's stand-in: keeps the operations and their tensors, so that numbers of the host are those of the time.

    Recording has to leave everything as it was, which a GPU does by running nothing; here what ran is undone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            given = {storage(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            kept = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
            if kept and not any(storage(x) in given for x in kept):  # else it is a view, which is there already
                found = [x for x in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for old, new in zip(kept, found, strict=True):
                    old.copy_(new)


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Recorder:
    """Hands out tapes, and counts them and their replays."""

    def __init__(self, state: ModelState) -> None:
        self.state, self.recorded, self.replayed = state, 0, 0

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        self.recorded += 1
        live = [self.state.length_B, *self.state.tensors()]
        before = [x.clone() for x in live]
        with NoQuestions(), Tape() as tape:
            result = step()
        for x, old in zip(live, before, strict=True):
            x.copy_(old)

        def replay() -> Tensor:
            self.replayed += 1
            result.fill_(torch.nan)
            tape.replay()
            return result

        return replay


def prepared(model: LanguageModel, prompts: list[list[int]], room: int) -> tuple[Tensor, ModelState]:
    state = model.init_state(len(prompts), max(map(len, prompts)) + room)
    return prefill(model, prompts, state), state


def of_one_mixer(kind: str, ffn: str = "dense") -> LanguageModel:
    return build_model(hybrid_config(pattern=(kind, kind), ffn=ffn)).eval()


@pytest.mark.parametrize("prompts", [PROMPTS, UNIFORM], ids=["ragged", "uniform"])
@every_mixer
@torch.inference_mode()
def test_replayed_steps_give_the_logits_of_ordinary_ones(
    monkeypatch: pytest.MonkeyPatch, kind: str, prompts: list[list[int]]
) -> None:
    """Through rings that fill up and go round, and over four sizes; the last is what the state can hold at most."""
    monkeypatch.setattr(decoding, "SMALLEST_GRAPH", 8)
    model = of_one_mixer(kind)
    (_, ordinary), (_, static) = (prepared(model, prompts, 60) for _ in range(2))
    eager, recorder = EagerSteps(model, ordinary), Recorder(static)
    graph = GraphSteps(model, static, recorder)
    for step in range(60):
        chosen = random_tokens(len(prompts), 1, seed=step)[:, 0].tolist()
        assert_close(graph(chosen), eager(chosen), 1e-5, f"step {step}")
        assert static.longest == ordinary.longest
        assert static.uniform_length == ordinary.uniform_length
        assert torch.equal(static.length_B, ordinary.length_B)
    sizes = len(graph.replays)
    assert sizes == 3
    assert recorder.recorded == sizes
    assert recorder.replayed == 60 - sizes, "the first step of every size is no replay"


@every_ffn
@torch.inference_mode()
def test_replayed_steps_of_every_ffn_give_the_logits_of_ordinary_ones(ffn: str) -> None:
    model = build_model(hybrid_config(ffn=ffn)).eval()
    (_, ordinary), (_, static) = (prepared(model, PROMPTS, 12) for _ in range(2))
    eager, graph = EagerSteps(model, ordinary), GraphSteps(model, static, Recorder(static))
    for step in range(12):
        chosen = random_tokens(3, 1, seed=step)[:, 0].tolist()
        assert_close(graph(chosen), eager(chosen), 1e-5, f"step {step}")


@pytest.mark.parametrize("prompts", [PROMPTS[:1], UNIFORM], ids=["one row", "uniform"])
@pytest.mark.parametrize("kind", ["mha_gated", "swa_gated", "mla", "gdn", "kda", "latent", "toy"])  # it takes seconds
@torch.inference_mode()
def test_compiled_steps_give_the_logits_of_ordinary_ones(
    monkeypatch: pytest.MonkeyPatch, kind: str, prompts: list[list[int]]
) -> None:
    """One graph without a break, compiled for the first size, for others, and for a cache that is read whole.

    The steps that would be recorded compile nothing.
    """
    monkeypatch.setattr(decoding, "SMALLEST_GRAPH", 8)
    torch._dynamo.reset()
    counters.clear()
    model = of_one_mixer(kind)
    (_, ordinary), (_, static) = (prepared(model, prompts, 70) for _ in range(2))
    eager = EagerSteps(model, ordinary)
    graph = GraphSteps(model, static, lambda step: step, compiled_step("aot_eager"))
    for step in range(70):
        chosen = random_tokens(len(prompts), 1, seed=step)[:, 0].tolist()
        known, compiled = len(graph.replays), counters["stats"]["unique_graphs"]
        assert_close(graph(chosen), eager(chosen), 1e-5, f"step {step}")
        assert len(graph.replays) > known or counters["stats"]["unique_graphs"] == compiled
    assert len(graph.replays) >= 3
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


@torch.inference_mode()
def test_replayed_steps_take_learned_positions() -> None:
    model = build_model(replace(hybrid_config(), learned_positions=40)).eval()
    (_, ordinary), (_, static) = (prepared(model, PROMPTS, 17) for _ in range(2))
    eager, graph = EagerSteps(model, ordinary), GraphSteps(model, static, Recorder(static))
    for step in range(17):
        assert_close(graph([step] * 3), eager([step] * 3), 1e-5, f"step {step}")


@every_ffn
@every_mixer
@torch.inference_mode()
def test_a_step_of_one_token_asks_the_device_nothing(kind: str, ffn: str) -> None:
    """Neither the one that is recorded nor the ordinary one, which on a GPU would wait for it in every layer."""
    model = of_one_mixer(kind, ffn)
    _, state = prepared(model, PROMPTS, 4)
    _, uniform = prepared(model, UNIFORM, 4)
    with NoQuestions():
        model.step_hidden_at(torch.ones(3, 1, dtype=torch.int64), state, Layout.one_more(state.length_B, 27))
        model.step(torch.ones(3, 1, dtype=torch.int64), state)
        model.step(torch.ones(2, 1, dtype=torch.int64), uniform)


@every_ffn
@every_mixer
@torch.inference_mode()
def test_a_recorded_step_stays_on_its_device(monkeypatch: pytest.MonkeyPatch, kind: str, ffn: str) -> None:
    """The device "meta" has no numbers to ask for, takes no tensor of a CPU, and goes the ways of an accelerator."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know that device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    model = of_one_mixer(kind, ffn).to("meta", torch.bfloat16)
    state = model.init_state(2, 40)
    seq = Layout.one_more(state.length_B, 32)
    x = model.step_hidden_at(torch.zeros(2, 1, dtype=torch.int64, device="meta"), state, seq)
    state.length_B += 1
    assert model.head(x).shape == (2, 1, 31)


@torch.inference_mode()
def test_what_a_graph_cannot_record_is_noticed() -> None:
    x = torch.arange(3)
    for question in (lambda: int(x.max()), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool((x == x).all())):
        with pytest.raises(Forbidden), NoQuestions():
            question()


@torch.inference_mode()
def test_a_number_of_the_host_that_changes_would_be_noticed() -> None:
    """The stand-in replays what was recorded: a position from the host would stay what it was."""
    model = of_one_mixer("mha")
    (_, ordinary), (_, static) = (prepared(model, UNIFORM, 5) for _ in range(2))

    def step() -> Tensor:
        return model.step(torch.full((2, 1), 3), static)[:, -1]

    tape = Recorder(static)(step)
    static.uniform_length = static.longest = 21  # recording counted as if it had run
    eager = EagerSteps(model, ordinary)
    assert_close(tape(), eager([3, 3]), 1e-5)
    assert (tape() - eager([3, 3])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("needed", "max_len", "size"),
    [(1, 5000, 256), (256, 5000, 256), (257, 5000, 512), (513, 5000, 1024), (4097, 5000, 5000), (3, 100, 100)],
)
def test_a_graph_reads_the_next_power_of_two_or_all(needed: int, max_len: int, size: int) -> None:
    assert graph_size(needed, max_len) == size


@torch.inference_mode()
def test_a_graphs_step_into_a_full_state_is_refused_and_leaves_it() -> None:
    model = of_one_mixer("mha")
    _, state = prepared(model, UNIFORM, 0)
    with pytest.raises(UsageError, match="22 tokens do not fit a state made for 21"):
        GraphSteps(model, state, Recorder(state))([1, 2])
    assert state.length_B.tolist() == [21, 21]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_by_graphs_draws_the_same_tokens(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    model = build_model(hybrid_config()).eval()
    settings = {"sampling": Sampling(temperature=temperature, seed=2), "stop_id": 3}
    expected = Decoder(model).generate(PROMPTS, 15, **settings)
    monkeypatch.setattr("swamla.inference.decoding.decodings_on", lambda device: ("graph",))
    recorders = []

    class Recorders(Recorder):
        def __init__(self) -> None:
            recorders.append(self)
            super().__init__(states[0])

    states = []
    of_model = LanguageModel.init_state
    monkeypatch.setattr(LanguageModel, "init_state", lambda *args: states.append(of_model(*args)) or states[-1])
    monkeypatch.setattr("swamla.inference.decoding.CudaGraphs", Recorders)
    assert Decoder(model, "graph").generate(PROMPTS, 15, **settings) == expected
    assert len(recorders) == len(states) == 1


@pytest.mark.parametrize("ffn", ["moe", "latent_moe"])
def test_graphs_with_experts_in_fp32_are_refused(ffn: str) -> None:
    model = of_one_mixer("mha", ffn)
    with pytest.raises(UsageError, match=r"experts are in torch\.float32, .* the model in bfloat16"):
        check_recordable(model)
    check_recordable(model.bfloat16())
    check_recordable(of_one_mixer("mha"))


def test_graphs_without_a_gpu_and_unknown_names_are_refused() -> None:
    model = of_one_mixer("mha")
    assert isinstance(Decoder(model).steps(model.init_state(1, 4)), EagerSteps)
    with pytest.raises(MissingBackendError, match='decoding = "graph" is for CUDA, the model is on cpu: use "eager"'):
        Decoder(model, "graph").generate([[1]], 2)
    with pytest.raises(UsageError, match="decoding = 'grpah': must be one of 'eager', 'graph', 'int8'"):
        Decoder(model, "grpah").generate([[1]], 2)


@pytest.mark.parametrize(
    ("triton", "description"),
    [(True, "graph, compiled"), (False, "graph, uncompiled: no triton for this GPU")],
)
def test_graphs_are_of_compiled_steps_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch, triton: bool, description: str
) -> None:
    monkeypatch.setattr(decoding, "decodings_on", lambda device: ("eager", "graph"))
    monkeypatch.setattr(decoding, "has_compiler", lambda: triton)
    monkeypatch.setattr(decoding, "CudaGraphs", lambda: None)
    model = of_one_mixer("mha")
    decoder = Decoder(model, "graph")
    steps = decoder.steps(model.init_state(1, 4))
    assert isinstance(steps, GraphSteps)
    assert steps.step is (compiled_step() if triton else one_step)
    assert decoder.description == description
    assert Decoder(model).description == "eager"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 40)])
@pytest.mark.parametrize(("into", "out"), [(32, 48), (384, 512)])
@pytest.mark.parametrize("intel", [False, True])
def test_linear_is_torchs_whoever_made_the_processor(
    monkeypatch: pytest.MonkeyPatch, intel: bool, into: int, out: int, rows: tuple[int, int], bias: bool
) -> None:
    monkeypatch.setattr("swamla.ops.linear._made_by_intel", lambda: intel)
    torch.manual_seed(0)
    layer, x = nn.Linear(into, out, bias=bias), torch.randn(*rows, into)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear(x, layer.weight, layer.bias), expected, atol=0, rtol=0)
    linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_linear_leaves_other_formats_to_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("swamla.ops.linear._made_by_intel", lambda: False)
    weight, x = torch.randn(512, 384, dtype=dtype), torch.randn(20, 384, dtype=dtype)
    assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))
    strided = weight.float()[:, ::2]
    assert torch.equal(linear(x.float()[:, ::2], strided), nn.functional.linear(x.float()[:, ::2], strided))


def test_a_twin_has_other_arithmetic_in_plain_linear_layers_alone() -> None:
    class OtherLinear(nn.Linear):
        pass

    class OtherTensor(torch.Tensor):
        pass

    shared, elsewhere = nn.Linear(4, 4), nn.Linear(4, 4, device="meta")
    shared.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(OtherTensor))
    model = nn.Sequential(OtherLinear(4, 4), shared, elsewhere, nn.Linear(4, 4))
    same = [type(mine) is type(its) for mine, its in zip(model, inference_copy(model), strict=True)]
    assert same == [True, True, True, False]


def test_a_twin_shares_parameters_hooks_and_modules_that_occur_twice_and_leaves_the_model_as_it_is() -> None:
    model, seen = of_one_mixer("mha").train(), []
    model.again = model.head
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    hook = model.head.register_forward_hook(lambda *_: seen.append(1))
    other = inference_copy(model)
    assert other.again is other.head
    assert other.head is not model.head
    other.head(torch.zeros(1, 32))
    hook.remove()
    other.head(torch.zeros(1, 32))
    assert seen == [1]
    assert not any(module.training for module in other.modules())
    assert all(module.training for module in model.modules())
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        model.head.weight.zero_()
    assert not other.head(torch.ones(1, 32)).any()


@pytest.mark.parametrize(("out", "into"), [(1, 16), (13, 384), (300, 48)])
@torch.no_grad()
def test_a_weight_of_8_bits_is_within_half_a_step_of_its_own(out: int, into: int) -> None:
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(0))
    rounded = Int8Matrix.of(weight)
    restored = rounded.integers_FD.float() * rounded.scale_F.float()[:, None]
    assert ((restored - weight).abs() <= 0.51 * rounded.scale_F.float()[:, None] + 0.005 * weight.abs()).all()
    assert rounded.integers_FD.abs().max() <= 127
    for rows in ((1,), (2, 5)):
        x = torch.randn(*rows, into)
        expected = x.bfloat16().float() @ restored.T
        assert (rounded.times(x) - expected).norm() <= 4e-3 * expected.norm()


@torch.no_grad()
def test_a_row_of_zeros_stays_one_and_rows_of_other_lengths_do_not_fit() -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 1e-30
    assert not Int8Matrix.of(weight).times(torch.ones(1, 32)).isnan().any()
    assert not Int8Matrix.fits(torch.zeros(16, 33))
    assert not Int8Matrix.fits(torch.zeros(16, 32, device="meta"))


@torch.no_grad()
def test_decoding_with_8_bits_stays_close_reads_prompts_in_full_and_leaves_the_weights() -> None:
    model = build_model(hybrid_config()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = inference_copy(model, int8=True)
    first, state = prepared(rounded, [PROMPTS[1]], 6)
    found = [EagerSteps(rounded, state)([token]) for token in range(6)]
    exact, state = prepared(model, [PROMPTS[1]], 6)
    expected = torch.cat([EagerSteps(model, state)([token]) for token in range(6)])
    error = (torch.cat(found) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05, "rounded weights show, and not by much"
    assert_close(exact, first, 0.05 * exact.abs().max().item())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    asked = Sampling(temperature=0)
    assert len(Decoder(model, "int8").generate([PROMPTS[1]], 5, sampling=asked)[0]) == 5


@torch.no_grad()
def test_only_few_rows_meet_the_weights_of_8_bits() -> None:
    layer, x = nn.Linear(32, 48), torch.randn(1, 17, 32)
    expected, rounded = layer(x), inference_copy(layer, int8=True)
    assert_close(rounded(x), expected, 1e-5)
    few = rounded(x[:, :16])
    assert 1e-4 < (few - expected[:, :16]).abs().max() < 0.1


@torch.no_grad()
def test_linear_follows_autocast() -> None:
    weight, x = torch.randn(512, 384), torch.randn(20, 384)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
