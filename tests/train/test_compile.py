"""Compiled training computes what uncompiled training does, and is compiled once."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

import swamla
from swamla.data.packing import NO_LABEL
from swamla.errors import ConfigError, Interrupted, MissingBackendError, UsageError
from swamla.inference.decoding import Decoder
from swamla.model import compiling
from swamla.model.block import BlockConfig
from swamla.model.compiling import compile_blocks, resolve_compile, vector_bits
from swamla.model.ffns.moe import MoEConfig
from swamla.ops.layout import PADDING, Layout

from .helpers import MIXERS, held_out, losses, model_of, run, tiny_config, weights
from .test_resume import digests, stop_after


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Most of a tiny run's time."""
    monkeypatch.setattr("swamla.train.loop.plot_losses", lambda *args, **options: None)


CPU = torch.device("cpu")


def obstacle():
    """Why torch.compile cannot work on this CPU; "" where it can."""
    try:
        return "" if cpp_builder.get_cpp_compiler() else "torch.compile on a CPU needs a C++ compiler"
    except InvalidCxxCompiler:
        return "torch.compile on a CPU needs a C++ compiler"


needs_compiler = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


def hybrid():
    """Every kind of mixer but mha, and a mixture of experts with its losses."""
    moe = MoEConfig(n_experts=4, n_activated=2, expert_hidden=16, aux_loss=0.01, z_loss=0.01)
    config = model_of("gdn", "mla")
    blocks = {**config.blocks, "swa": BlockConfig(mixer=MIXERS["swa"], ffn=moe)}
    return replace(config, vocab_size=64, blocks=blocks, pattern=("gdn", "swa", "mla"))


def step(model, seed, padding=0):
    """Loss and gradients of a batch whose documents, like the dropout, depend on the seed; rows end in padding."""
    generator = torch.Generator().manual_seed(seed)
    document_BT = (torch.rand(4, 32, generator=generator) < 0.15).cumsum(1)
    tokens_BT = torch.randint(64, (4, 32), generator=generator)
    document_BT[1:, 32 - padding :] = PADDING
    labels_BT = tokens_BT.flip(1).masked_fill(document_BT == PADDING, NO_LABEL)
    torch.manual_seed(seed)
    model.zero_grad()
    loss, statistics = model.loss(tokens_BT, labels_BT, Layout.from_documents(document_BT))
    (loss + sum(value for name, value in statistics.items() if name.startswith("loss/"))).backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@needs_compiler
def test_losses_and_gradients_are_the_uncompiled_ones_and_other_documents_compile_nothing_anew():
    torch.manual_seed(0)
    reference, model = hybrid().build().train(), hybrid().build().train()
    model.load_state_dict(reference.state_dict())
    names = list(model.state_dict())
    compile_blocks(model, "default", CPU)
    assert list(model.state_dict()) == names
    counters.clear()
    graphs = []
    for seed, checkpointing in enumerate(["none", "none", "none", "all", "all"]):
        model.checkpoint_activations(checkpointing)
        expected_loss, expected = step(reference, seed)
        loss, gradients = step(model, seed)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == graphs[:-1]


@needs_compiler
def test_with_padding_it_is_the_uncompiled_one_and_any_amount_of_it_is_compiled_once():
    torch._dynamo.reset()  # what other tests have compiled
    torch.manual_seed(0)
    reference, model = hybrid().build().train(), hybrid().build().train()
    model.load_state_dict(reference.state_dict())
    compile_blocks(model, "default", CPU)
    counters.clear()
    graphs = []
    for seed, padding in enumerate([0, 3, 0, 20, 1, 0]):
        expected_loss, expected = step(reference, seed, padding)
        loss, gradients = step(model, seed, padding)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[2:] == [graphs[1]] * 4


@needs_compiler
def test_a_compiled_run_resumes_to_the_bit_and_is_the_uncompiled_one_within_rounding(tmp_path, monkeypatch, dataset):
    stages = {"curriculum": "16:200,32:inf", "eval_interval": 2, "steps": 4, "ema": 0.5, "accumulation": 2}
    config = tiny_config(compile="default", **stages)
    score = held_out(dataset)
    state = run(config, tmp_path / "whole", dataset, evaluate=score)
    run(tiny_config(**stages), tmp_path / "eager", dataset, evaluate=score)
    assert dict(losses(tmp_path / "whole")) == pytest.approx(dict(losses(tmp_path / "eager")), rel=1e-5)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run", dataset, evaluate=score)
    torch._dynamo.reset()  # as in a new process, whose first shapes are others
    run(config, tmp_path / "run", dataset, evaluate=score, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert digests(tmp_path / "run", 4) == digests(tmp_path / "whole", 4)
    assert len(Decoder(state.model).generate([[1, 2, 3]], 5)[0]) == 5
    loaded, _ = swamla.load(tmp_path / "whole", "latest", raw=True)
    assert all(torch.equal(p, weights(state)[name]) for name, p in loaded.named_parameters())
    assert swamla.load(tmp_path / "whole")  # the best


def feed_gradients(block, x):
    """Of the router's losses, which never leave fp32, under autocast: at the block's input and its weights."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, statistics = block.functions.feed(x, Layout.one_document_per_row(*x.shape[:2]))
    statistics["loss"].backward()
    return {"x": x.grad, "router": block.ffn.router.weight.grad.clone(), "norm": block.ffn_norm.weight.grad.clone()}


@needs_compiler
def test_compiled_under_autocast_the_router_and_its_norm_have_their_gradients_in_fp32():
    config = hybrid()
    model = replace(config, blocks={"swa": config.blocks["swa"]}, pattern=("swa",)).build().train()
    x = torch.randn(2, 16, config.width, generator=torch.Generator().manual_seed(0))
    expected = feed_gradients(model.blocks[0], x)
    compile_blocks(model, "default", CPU)
    for name, gradient in feed_gradients(model.blocks[0], x).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def compiled_with(monkeypatch, mode):
    """The options with which every part of the blocks is compiled."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda part, *, dynamic, options: given.append(options) or part)
    compile_blocks(hybrid().build(), mode, CPU)
    return given


@needs_compiler
def test_the_mode_reaches_the_compiler(monkeypatch):
    options = {mode: compiled_with(monkeypatch, mode) for mode in ("default", "reduce-overhead", "max-autotune")}
    assert all(len(given) == 3 * 3 for given in options.values())
    assert all(each["fallback_random"] for given in options.values() for each in given)
    assert not options["default"][0].get("triton.cudagraphs")
    assert options["reduce-overhead"][0]["triton.cudagraphs"]
    assert not options["reduce-overhead"][0].get("max_autotune")
    assert options["max-autotune"][0]["max_autotune"]


@needs_compiler
def test_a_run_is_compiled_exactly_if_it_is_asked_to_be(tmp_path, monkeypatch, dataset):
    called = []

    def counted(part, **options):
        def call(*args):
            called.append(part.__name__)
            return part(*args)

        return call

    monkeypatch.setattr(torch, "compile", counted)
    run(tiny_config(steps=1), tmp_path / "none", dataset)
    assert called == []
    run(tiny_config(steps=1, compile="default", checkpointing="ffn"), tmp_path / "default", dataset)
    assert called == ["mix", "feed", "feed"]


def test_compiling_the_whole_model_is_refused_in_a_line_that_names_the_way(recwarn):
    model, tokens = hybrid().build(), torch.randint(64, (2, 16))
    whole, its_loss = torch.compile(model, backend="eager"), torch.compile(model.loss, backend="eager")
    for call in (lambda: whole(tokens), lambda: whole(tokens, labels=tokens), lambda: its_loss(tokens, tokens)):
        with pytest.raises(UsageError, match=r"torch.compile\(model\) .*: call model.compile\(\)") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not recwarn.list
    assert model(tokens).shape == (2, 16, 64)


def fake_compile(monkeypatch, called):
    """Instead of torch.compile: notes what is compiled, and computes with it."""

    def compiled(function, **options):
        return lambda *inputs: [called.append(function.__name__), function(*inputs)][1]

    monkeypatch.setattr(compiling, "_require_compiler", lambda *_: None)
    monkeypatch.setattr(torch, "compile", compiled)


def test_a_model_compiles_itself_by_blocks(monkeypatch):
    called = []
    fake_compile(monkeypatch, called)
    model, tokens = hybrid().build(), torch.randint(64, (2, 16))
    model.compile("auto")  # nothing on a CPU
    model(tokens)
    assert called == []
    model.compile()
    model.compile(mode="default")  # again changes nothing
    model(tokens)
    assert called == ["whole"] * len(model.blocks)
    with pytest.raises(ConfigError, match="mode = 'fast': must be one of auto, none, default"):
        model.compile("fast")


def test_a_copy_of_a_compiled_model_is_not_compiled_and_has_its_own_weights(monkeypatch):
    called = []
    fake_compile(monkeypatch, called)
    model, tokens = hybrid().build().eval(), torch.randint(64, (2, 16))
    model.compile()
    expected = model(tokens)
    called.clear()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(tokens), expected)
        assert called == []
        with torch.no_grad():
            for parameter in copied.blocks.parameters():
                parameter.zero_()
        assert not torch.equal(copied(tokens), expected)
        assert torch.equal(model(tokens), expected)
        assert called
        called.clear()


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    def none_found():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(MissingBackendError, match=r"compile = default needs a C\+\+ compiler on a CPU: apt install g"):
        compile_blocks(hybrid().build(), "default", CPU)


def test_who_compiles_nothing_does_not_load_the_compiler():
    code = "import sys, swamla.model, swamla.train; assert 'torch._inductor.compile_fx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_auto_compiles_on_a_gpu_with_triton_and_nowhere_else(monkeypatch):
    cuda = torch.device("cuda")
    for triton in (object(), None):
        monkeypatch.setattr(compiling, "find_spec", lambda name, triton=triton: {"triton": triton}[name])
        assert resolve_compile("auto", cuda) == ("default" if triton else "none")
        assert resolve_compile("auto", CPU) == "none"
        for mode in ("none", "default", "reduce-overhead", "max-autotune"):
            assert resolve_compile(mode, cuda) == resolve_compile(mode, CPU) == mode


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_evaluation_runs_compiled_on_a_gpu_alone(monkeypatch, device):
    called = []
    fake_compile(monkeypatch, called)
    model = hybrid().build().train()
    compile_blocks(model, "default", torch.device(device))
    tokens_BT = torch.randint(model.config.vocab_size, (2, 16))
    with torch.no_grad():
        model(tokens_BT)
    assert called == (["whole"] * len(model.blocks) if device == "cuda" else [])
    called.clear()
    model(tokens_BT)
    assert called == ["whole"] * len(model.blocks)


SCRIPT = """
import torch
from swamla.model.compiling import vector_bits
x = torch.linspace(-4, 4, 37 * 1003).view(37, 1003)
f = lambda x: torch.nn.functional.gelu(x) * x.sin() + 1
found = torch.compile(f, options={"cpp.simdlen": vector_bits()})(x)
print(vector_bits(), float((found - f(x)).abs().max()) < 1e-5)
"""


@needs_compiler
@pytest.mark.skipif(vector_bits() not in (256, 512), reason="this CPU's vectors cannot be made narrower")
def test_a_graph_that_is_kept_for_wide_vectors_is_not_taken_for_narrow_ones(tmp_path):
    """Torch's own default does that: a maximal error of 2.8 on a CPU with AVX512."""
    for limit, width in ((None, vector_bits()), ("avx2", 256), ("default", 1)):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        environment |= {"ATEN_CPU_CAPABILITY": limit} if limit else {}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.stdout == f"{width} True\n", done.stderr


@pytest.mark.parametrize(("machine", "bits"), [("x86_64", 1), ("aarch64", None), ("arm64", None)])
def test_vectors_that_torch_calls_default_are_switched_off_on_x86_only(machine, bits, monkeypatch):
    """An ARM processor with NEON is "DEFAULT" too: with a width of 1 its graphs would have no vectors at all."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert vector_bits() == bits
