"""The backend "fla" as far as a CPU can tell: with a stand-in for the library that computes with this one's code."""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from swamla.errors import MissingBackendError, UsageError
from swamla.model.mixers.gdn import GDNConfig
from swamla.ops import fla, l2_normalize, libraries
from swamla.ops.gated_delta import chunks, cpu, cuda, describe_backend, gated_delta_rule, prepare_rule, resolve_backend
from swamla.ops.layout import Layout
from swamla.ops.short_conv import cuda as conv_cuda
from swamla.ops.short_conv import prepare_conv, short_conv
from swamla.ops.short_conv import resolve_backend as resolve_conv
from swamla.ops.short_conv.reference import reference_short_conv

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {"heads": 2, "key": 8, "value": 12}
PACKED = {
    "one document a row": [[(0, 70)], [(0, 70)]],
    "documents": [[(0, 5), (1, 30), (2, 35)], [(0, 69), (1, 1)]],
    "padding at the end": [[(0, 20), (1, 40), (-1, 10)], [(0, 70)]],
    "padding everywhere": [[(-1, 4), (0, 26), (-1, 10), (2, 30)], [(-1, 70)]],
}
each_packing = pytest.mark.parametrize("rows", PACKED.values(), ids=PACKED.keys())


def layout(rows) -> Layout:
    """Rows of (document id, length)."""
    return Layout.from_documents(torch.tensor([[i for i, n in row for _ in range(n)] for row in rows]))


class StandIn(torch.autograd.Function):
    """What flash-linear-attention computes, sequence by sequence, with a backward pass of its own as it has."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, bounds, scale):
        whole = bounds is None
        ctx.parts, outputs, finals = [], [], []
        for n, (row, part) in enumerate(sequences(q, bounds)):
            piece = [x[row : row + 1, part] for x in (q, k, v, g, beta)]
            start = q.new_zeros(1, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
            start = start if initial is None else initial[n : n + 1]
            inner = SimpleNamespace(needs_input_grad=(True,) * 9)
            inner.save_for_backward = lambda *saved, inner=inner: setattr(inner, "saved_tensors", saved)
            rule = cpu.Rule(cpu.NO_DOCUMENTS, scale, 16, chunks.forward, chunks.backward)
            gates = (gate[..., None] for gate in piece[3:])
            o, final = cpu._ChunkedRule.forward(inner, *piece[:3], *gates, start, rule)
            ctx.parts.append((row, part, inner))
            outputs.append(o)
            finals.append(final)
        ctx.has_initial = initial is not None
        return torch.cat(outputs, dim=0 if whole else 1), torch.cat(finals)

    @staticmethod
    def backward(ctx, d_o, d_finals):
        rows = {}
        d_initial = []
        for n, (row, part, inner) in enumerate(ctx.parts):
            d_piece = d_o[row : row + 1, part].contiguous()
            *d_qkv, d_g, d_beta, start, _ = cpu._ChunkedRule.backward(inner, d_piece, d_finals[n : n + 1])
            rows.setdefault(row, []).append([*d_qkv, d_g[..., 0], d_beta[..., 0]])
            d_initial.append(start)
        joined = [[torch.cat(parts, dim=1) for parts in zip(*found, strict=True)] for found in rows.values()]
        gradients = [torch.cat(x) for x in zip(*joined, strict=True)]
        return *gradients, torch.cat(d_initial) if ctx.has_initial else None, None, None


def sequences(q, bounds):
    if bounds is None:
        return [(row, slice(0, q.shape[1])) for row in range(q.shape[0])]
    assert q.shape[0] == 1
    return [(0, slice(a, b)) for a, b in zip(bounds.tolist()[:-1], bounds.tolist()[1:], strict=True)]


@pytest.fixture
def library(monkeypatch):
    """A `fla` that can be imported and records what it is called with, on a CPU that passes for a GPU."""
    calls = []

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens=None, cu_seqlens_cpu=None
    ):
        assert output_final_state
        assert all(x.is_contiguous() for x in (q, k, v, g, beta))
        assert q.dtype == k.dtype == v.dtype != g.dtype == beta.dtype == torch.float32
        assert (cu_seqlens is None) == (cu_seqlens_cpu is None)
        assert initial_state is None or len(initial_state) == (len(q) if cu_seqlens is None else len(cu_seqlens) - 1)
        calls.append(None if cu_seqlens is None else cu_seqlens.tolist())
        return StandIn.apply(q, k, v, g, beta, initial_state, cu_seqlens, scale)

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule", "fla.ops.common", "fla.ops.common.chunk_o"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule
    conv = ModuleType("fla.modules.causal_conv1d")
    conv.causal_conv1d_fwd, conv.causal_conv1d_bwd = conv_forward, conv_backward
    monkeypatch.setitem(sys.modules, "fla.modules.causal_conv1d", conv)
    monkeypatch.setattr(fla, "has_kernels", lambda device: True)
    monkeypatch.setattr(fla, "is_hopper", lambda device: False)
    monkeypatch.setattr(libraries, "_OBSTACLES", {})
    monkeypatch.setattr(fla, "version_of", {"fla-core": "0.6.0", "triton": "3.8.0"}.get)
    monkeypatch.setattr(fla, "PROBE_ROWS", 2)
    monkeypatch.setattr(fla, "PROBE_LENGTH", 100)
    return calls


def conv_forward(x, weight, bias, residual, activation, cu_seqlens=None, cu_seqlens_cpu=None):
    """The library's contract: contiguous rows, or one row and where its documents begin and end."""
    assert (bias, residual) == (None, None)
    named = {"silu": "silu", None: "none"}[activation]
    assert x.is_contiguous()
    assert (cu_seqlens is None) == (cu_seqlens_cpu is None)
    if cu_seqlens is None:
        return reference_short_conv(x, weight, None, activation=named), None
    assert x.shape[0] == 1
    bounds = cu_seqlens.tolist()
    assert bounds == cu_seqlens_cpu.tolist()
    parts = [reference_short_conv(x[:, a:b], weight, None, activation=named) for a, b in pairwise(bounds)]
    return torch.cat(parts, dim=1), None


def conv_backward(x, dy, dht, weight, bias, residual, activation, cu_seqlens=None, cu_seqlens_cpu=None):
    """By hand: inside an op, autograd records nothing."""
    assert (dht, bias, residual) == (None, None, None)
    assert activation in ("silu", None)
    assert dy.is_contiguous()
    taps, dx, dw = weight.shape[1], torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(weight.float())
    for row, part in sequences(x, cu_seqlens):
        piece, d, w = x[row, part].float(), dy[row, part].float(), weight.float()
        behind = [F.pad(piece, (0, 0, i, 0))[: len(piece)] for i in range(taps)]
        if activation == "silu":
            d = torch.ops.aten.silu_backward(d, sum(behind[i] * w[:, taps - 1 - i] for i in range(taps)))
        for i in range(taps):
            dx[row, part] += F.pad(d, (0, 0, 0, i))[i:] * w[:, taps - 1 - i]
            dw[:, taps - 1 - i] += (d * behind[i]).sum(0)
    return dx.to(x.dtype), dw, None, None, None  # the library adds weights' gradients up in fp32


def inputs(batch, time, initial):
    torch.manual_seed(0)
    heads, key, value = SIZES.values()
    q, k = (l2_normalize(torch.randn(batch, time, heads, key)).bfloat16() for _ in range(2))
    v = torch.randn(batch, time, heads, 2 * value).bfloat16()[..., :value]  # part of a wider tensor, as a mixer's is
    gates = [-0.3 * torch.rand(batch, time, heads), torch.rand(batch, time, heads)]
    states = [torch.randn(batch, heads, key, value)] if initial else []
    return [x.requires_grad_() for x in (q, k, v, *gates, *states)]


def results(leaves, seq, *, backend, use):
    """Outputs, and gradients of what `use` makes of them."""
    with_state = leaves[5] if len(leaves) > 5 else None
    o, final = gated_delta_rule(*leaves[:5], seq=seq, initial_state_BHKV=with_state, backend=backend, scale=0.3)
    return [o, final, *gradients_of(use(o.float(), final.float()), leaves)]


def gradients_of(total, leaves):
    """Zeros for what has no influence."""
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found, strict=True)]


def assert_alike(found, expected, tolerance=0.02):
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert (mine.float() - theirs.float()).norm() <= tolerance * theirs.float().norm() + 1e-6


def both(o, final):
    weight = torch.linspace(-1, 1, o.numel()).view(o.shape)
    return (o * weight).sum() + final.square().sum()


@each_packing
@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
def test_outputs_states_and_gradients_are_the_reference_s_wherever_documents_lie(library, rows, initial):
    seq = layout(rows)
    leaves = inputs(*seq.shape, initial)
    found = results(leaves, seq, backend="fla", use=both)
    assert_alike(found, results(leaves, seq, backend="reference", use=both))
    lengths = [length for row in rows for _, length in row]
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert set(map(str, library[-2:])) == {str(None if seq.whole_rows else bounds)}


@pytest.mark.parametrize("use", [lambda o, final: o.square().sum(), lambda o, final: final.square().sum()])
def test_either_result_alone_has_gradients(library, use):
    for rows in PACKED.values():
        seq = layout(rows)
        leaves = inputs(*seq.shape, True)
        found = results(leaves, seq, backend="fla", use=use)
        assert_alike(found, results(leaves, seq, backend="reference", use=use))


def test_rows_without_a_layout_and_a_scale_left_out(library):
    leaves = inputs(2, 33, False)
    o, final = gated_delta_rule(*leaves[:5], backend="fla")
    expected, expected_final = gated_delta_rule(*leaves[:5], backend="reference")
    assert_alike([o, final], [expected, expected_final])


def test_the_op_obeys_the_rules_of_ops_that_a_graph_may_hold(library):
    assert cuda.obstacle(CPU, *SIZES.values()) is None
    for rows in (PACKED["one document a row"], PACKED["documents"]):
        seq = layout(rows)
        for initial in (False, True):
            leaves = inputs(*seq.shape, initial)
            packing = (None,) * 4 if seq.whole_rows else fla.packing_of(seq)
            arguments = (*leaves[:5], leaves[5] if initial else None, *packing, 0.3)
            checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
            torch.library.opcheck(
                torch.ops.swamla.fla_gated_delta_rule.default, arguments, test_utils=checks, atol=1e-2, rtol=1e-2
            )


def test_a_graph_holds_it_whole_and_serves_any_number_of_documents(library):
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    rule = torch.compile(partial(gated_delta_rule, backend="fla"), fullgraph=True, dynamic=False, backend=counted)
    for rows in ([[(0, 5), (1, 30)]], [[(0, 5), (1, 5), (2, 25)]], [[(n, 5) for n in range(7)]]):
        seq = layout(rows)
        leaves = inputs(*seq.shape, False)
        prepare_rule(seq, "fla", **SIZES)
        o, final = rule(*leaves[:5], seq=seq, scale=0.3)
        found = [o, final, *gradients_of(both(o.float(), final), leaves)]
        assert_alike(found, results(leaves, seq, backend="reference", use=both))
    assert len(graphs) == 1


# --- whether it is there


def test_without_the_library_asking_for_it_says_how_to_get_it_and_auto_is_torch():
    with pytest.raises(MissingBackendError, match=r"needs flash-linear-attention: pip install 'swamla\[gpu\]'"):
        resolve_backend("fla", CUDA, **SIZES)
    assert describe_backend("auto", CUDA, **SIZES) == "torch"


def test_without_a_device_for_it_it_is_refused(library, monkeypatch):
    monkeypatch.setattr(fla, "has_kernels", lambda device: False)
    with pytest.raises(MissingBackendError, match='"fla" needs a CUDA device, these tensors are on cpu: use "torch"'):
        resolve_backend("fla", CPU, **SIZES)
    assert resolve_backend("auto", CPU, **SIZES) == "torch"


@pytest.mark.parametrize(
    ("triton", "key", "refused"),
    [("3.6.0", 64, True), ("3.4.0+git1", 64, True), ("3.7.0", 48, True), ("3.7.1", 64, False), ("3.3.1", 64, False),
     ("3.6.0", 128, False), ("3.6.0", 32, False)],
)  # fmt: skip
def test_hopper_refuses_its_backward_at_64_under_a_triton_that_gets_it_wrong(
    library, monkeypatch, triton, key, refused
):
    monkeypatch.setattr(fla, "is_hopper", lambda device: True)
    monkeypatch.setattr(fla, "version_of", {"fla-core": "0.6.0", "triton": triton}.get)
    monkeypatch.setattr(cuda, "_probe", lambda *arguments: None)
    monkeypatch.setattr(conv_cuda, "_probe", lambda *arguments, **sizes: None)
    chunk_o = sys.modules["fla.ops.common.chunk_o"]
    monkeypatch.setattr(chunk_o, "TRITON_ABOVE_3_7_1", triton >= "3.7.1", raising=False)
    sizes = {"heads": 2, "key": key, "value": 64}
    assert resolve_backend("auto", CUDA, **sizes) == ("torch" if refused else "fla")
    if refused:
        with pytest.raises(MissingBackendError, match=rf"is wrong at keys of width {key} on Hopper under Triton 3"):
            resolve_backend("fla", CUDA, **sizes)
        config = GDNConfig(n_heads=2, head_k_dim=key, head_v_dim=64)
        said = config.backends(CUDA, 128, torch.bfloat16)["delta rule"]
        version = triton.partition("+")[0]
        assert said == f"torch (fla is wrong at keys of width {key} on Hopper under Triton {version} (mended in 3.7.1))"
    else:  # the library's own refusal of all widths is lifted where it would stand in the way, and nowhere else
        assert chunk_o.TRITON_ABOVE_3_7_1 is (triton != "3.3.1")


@pytest.mark.parametrize(("packages", "refused"), [
    ({"fla-core": "0.5.2", "flash-linear-attention": "0.5.2"}, "0.5.2"),
    ({"flash-linear-attention": "0.3.0"}, "0.3.0"),
    ({"fla-core": "0.6.0"}, ""),
    ({"fla-core": "1.0"}, ""),
])  # fmt: skip
def test_an_old_version_is_refused_before_it_is_imported(library, monkeypatch, packages, refused):
    monkeypatch.setattr(
        fla, "version_of", lambda package: packages.get(package, "3.8.0" if package == "triton" else "")
    )
    if not refused:
        assert resolve_backend("fla", CPU, **SIZES) == "fla"
        return
    monkeypatch.setattr(cuda, "import_module", lambda name: pytest.fail(f"imports {name}"))
    with pytest.raises(MissingBackendError, match=rf"needs flash-linear-attention >= 0\.6, {refused} is installed"):
        resolve_backend("fla", CPU, **SIZES)


def test_it_is_tried_with_whole_rows_and_with_packed_ones(library):
    assert resolve_backend("fla", CPU, **SIZES) == "fla"
    packed = [0, 40, 80, 100, 140, 180, 200]
    assert library == [None, None, packed, packed]  # each forward, and the forward that the backward repeats


def test_what_is_wrong_for_packed_rows_alone_is_found(library, monkeypatch):
    module = sys.modules["fla.ops.gated_delta_rule"]
    right = module.chunk_gated_delta_rule

    def wrong_if_packed(q, k, v, *, scale, cu_seqlens=None, **options):
        return right(q, k, v, scale=scale * (1 if cu_seqlens is None else 2), cu_seqlens=cu_seqlens, **options)

    monkeypatch.setattr(module, "chunk_gated_delta_rule", wrong_if_packed)
    with pytest.raises(MissingBackendError, match="is wrong on this device"):
        resolve_backend("fla", CPU, **SIZES)


def test_a_library_that_fails_or_computes_something_else_is_found_before_it_is_used(library, monkeypatch):
    module = sys.modules["fla.ops.gated_delta_rule"]
    right = module.chunk_gated_delta_rule

    def raises(*arguments, **options):
        raise RuntimeError("no such kernel\nand a long story")

    def doubled(q, k, v, *, scale, **options):
        return right(q, k, v, scale=2 * scale, **options)

    for wrong, reason in (
        (raises, "fails on this device: RuntimeError: no such kernel: use"),
        (doubled, "is wrong on"),
    ):
        monkeypatch.setattr(module, "chunk_gated_delta_rule", wrong)
        libraries._OBSTACLES.clear()
        with pytest.raises(MissingBackendError, match=f'^backend = "fla" {reason}'):
            resolve_backend("fla", CPU, **SIZES)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_is_wrong_wherever_it_is(place):
    expected = [torch.ones(3) for _ in range(3)]
    found = [torch.full((3,), torch.nan) if i == place else x for i, x in enumerate(expected)]
    assert libraries.judged(lambda: (expected, expected), "torch") is None
    said = libraries.judged(lambda: (found, expected), "torch")
    assert said == 'is wrong on this device by nan of the expected: use "torch"'


def test_it_is_tried_again_where_there_was_no_memory_to_try_it(library, monkeypatch):
    def starves(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fla.ops.gated_delta_rule"], "chunk_gated_delta_rule", starves)
        with pytest.raises(MissingBackendError, match=r'^backend = "fla" finds no memory on this device'):
            resolve_backend("fla", CPU, **SIZES)
    assert resolve_backend("fla", CPU, **SIZES) == "fla"


def test_it_can_be_tried_where_nothing_has_gradients(library):
    with torch.inference_mode():
        assert resolve_backend("fla", CPU, **SIZES) == "fla"


def test_it_takes_no_keys_wider_than_its_kernels_and_no_fp32(library):
    with pytest.raises(MissingBackendError, match="takes keys of width 256 at most, not 300"):
        resolve_backend("fla", CPU, heads=2, key=300, value=64)
    leaves = [x.float() for x in inputs(1, 5, False)]
    with pytest.raises(MissingBackendError, match=r'takes bf16 or fp16, not torch.float32: use "torch"'):
        gated_delta_rule(*leaves, backend="fla")
    assert resolve_backend("auto", CUDA, **SIZES, dtype=torch.float32) == "torch"


def test_an_unknown_backend_is_refused_with_the_names_there_are():
    with pytest.raises(UsageError, match="'fast': the gated delta rule has 'auto', 'reference', 'torch', 'fla'"):
        resolve_backend("fast", CPU, **SIZES)


def test_a_mixer_asks_it_for_the_delta_rule_alone_where_the_convolution_has_a_path_of_its_own(library):
    torch.manual_seed(0)
    config = GDNConfig(n_heads=2, backend="fla")
    mixer = config.build(32)
    assert config.backends(CPU, 32, torch.bfloat16) == {"delta rule": "fla"}
    x_BTD = torch.randn(2, 70, 32)
    seq = layout(PACKED["documents"])
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer(x_BTD, seq)
        library_calls = len(library)
        mixer.config = GDNConfig(n_heads=2)
        expected = mixer(x_BTD, seq)
    assert library_calls == 5  # the first trial's forward and backward, twice, and this
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_a_mixer_trains_by_it_as_by_the_reference(library):
    torch.manual_seed(0)
    mixer = GDNConfig(n_heads=2).build(32)
    x_BTD = torch.randn(2, 70, 32, requires_grad=True)
    seq = layout(PACKED["documents"])
    found = {}
    for backend in ("fla", "reference"):
        mixer.config = GDNConfig(n_heads=2, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            o_BTD = mixer(x_BTD, seq)
        found[backend] = [o_BTD, *torch.autograd.grad(o_BTD.float().square().sum(), [x_BTD, *mixer.parameters()])]
    assert_alike(found["fla"], found["reference"], tolerance=0.04)  # bf16 rounds the rest of the mixer, too


# --- its convolution


def conv_results(x, weight, seq, backend, activation):
    y = short_conv(x, weight, seq=seq, activation=activation, backend=backend)
    return [y, *torch.autograd.grad((y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), (x, weight))]


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", "none"])
@each_packing
def test_its_convolution_equals_the_reference_wherever_documents_lie(library, rows, taps, activation):
    torch.manual_seed(0)
    wide = torch.randn(2, 70, 12).bfloat16().requires_grad_()
    weight = torch.randn(8, taps, requires_grad=True)
    seq = layout(rows)
    found, expected = (
        conv_results(wide[..., :8], weight, seq, backend, activation) for backend in ("fla", "reference")
    )
    real = (seq.document_BT >= 0)[..., None]
    assert_alike([found[0] * real, *found[1:]], [expected[0] * real, *expected[1:]])


def test_a_graph_holds_its_convolution_whole_and_serves_any_number_of_documents(library):
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    conv = torch.compile(partial(short_conv, backend="fla"), fullgraph=True, dynamic=False, backend=counted)
    x, weight = torch.randn(1, 35, 8).bfloat16().requires_grad_(), torch.randn(8, 4, requires_grad=True)
    for rows in ([[(0, 5), (1, 30)]], [[(0, 5), (1, 5), (2, 25)]], [[(n, 5) for n in range(7)]]):
        seq = layout(rows)
        prepare_conv(seq, "fla", taps=4)
        y = conv(x, weight, seq=seq)
        found = [y, *torch.autograd.grad(y.float().square().sum(), (x, weight))]
        y = short_conv(x, weight, seq=seq, backend="reference")
        assert_alike(found, [y, *torch.autograd.grad(y.float().square().sum(), (x, weight))])
    assert len(graphs) == 1


def test_its_convolution_is_tried_before_it_is_used_and_refused_in_fp32_and_where_it_is_wrong(library, monkeypatch):
    assert resolve_conv("fla", CPU, taps=4, dtype=torch.bfloat16) == "fla"
    assert resolve_conv("auto", CPU, taps=4, dtype=torch.bfloat16) == "torch"
    assert resolve_conv("auto", CUDA, taps=4, dtype=torch.float32) == "torch"
    with pytest.raises(MissingBackendError, match=r"takes bf16 or fp16, not torch\.float32"):
        resolve_conv("fla", CPU, taps=4, dtype=torch.float32)
    with pytest.raises(UsageError, match="'fast': short_conv has 'auto', 'reference', 'torch', 'fla'"):
        resolve_conv("fast", CPU, taps=4, dtype=torch.bfloat16)
    module = sys.modules["fla.modules.causal_conv1d"]
    libraries._OBSTACLES.clear()

    def deaf_to_documents(x, weight, bias, residual, activation, cu_seqlens=None, cu_seqlens_cpu=None):
        return conv_forward(x, weight, bias, residual, activation)

    monkeypatch.setattr(module, "causal_conv1d_fwd", deaf_to_documents)
    assert conv_cuda.obstacle(CPU, 4).startswith("is wrong on this device by")
    with pytest.raises(MissingBackendError, match=r'^backend = "fla" is wrong on this device'):
        resolve_conv("fla", CPU, taps=4, dtype=torch.bfloat16)


def test_tokens_after_others_are_convolved_without_it(library):
    torch.manual_seed(0)
    x, weight, history = torch.randn(1, 9, 8).bfloat16(), torch.randn(8, 4), torch.randn(1, 3, 8).bfloat16()
    found = short_conv(x, weight, history_BWD=history, backend="fla")
    torch.testing.assert_close(found, short_conv(x, weight, history_BWD=history, backend="reference"))
