"""The backend "flash" with a stand-in of the library's contract: its equations, its refusals, and who chooses it.

Nothing of it has run on a GPU. The stand-in knows what flash-attn 2.8 is given and returns: tokens of all documents in
one row, int32 bounds, log-sum-exps as (heads, tokens) in fp32, a backward pass that knows the softmax by `out` and
`lse` alone.
"""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from swamla.errors import MissingBackendError, UsageError
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.ops import attention, causal_attention, libraries, windowed_attention
from swamla.ops.attention import PATHS, Window, flash, prepare_attention, resolve_backend, takes_flash
from swamla.ops.attention.reference import attend_by_mask
from swamla.ops.layout import Layout

from .attention_checks import documents, random_inputs, random_layout, random_logits, with_gradients

CUDA = torch.device("cuda")
WINDOWS = [(None, 0), (1, 0), (1, 4), (16, 0), (16, 4), (16, 40), (100, 4), (130, 4), (1000, 4)]
LAYOUTS = {
    "whole rows": documents([300], [300]),
    "documents": documents([140, 1, 159], [17, 16, 267]),
    "documents of one token": documents([1] * 40, [1, 38, 1]),
    "padding": random_layout(6, time=300),
    "many": random_layout(0, time=640),
    "ids that come back": Layout.from_documents(torch.tensor([[0] * 150 + [1] * 100 + [0] * 150])),
}
each_layout = pytest.mark.parametrize("seq", LAYOUTS.values(), ids=LAYOUTS.keys())
each_window = pytest.mark.parametrize(("window", "sinks"), WINDOWS)


def scores(q, k, scale, window_size_left):
    """(H, T, T) of one document, and each key head's values' place among the query heads."""
    index = torch.arange(len(q))
    distance = index[:, None] - index
    seen = (distance >= 0) if window_size_left < 0 else (distance >= 0) & (distance <= window_size_left)
    shared = q.shape[1] // k.shape[1]
    found = scale * torch.einsum("thk,shk->hts", q.float(), k.float().repeat_interleave(shared, dim=1))
    return found.masked_fill(~seen, float("-inf"))


def checked(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, causal, window_size_right, softcap, alibi_slopes):
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256
    assert q.shape[2] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert cu_q is cu_k
    assert (cu_q.dtype, cu_q[0].item(), cu_q[-1].item()) == (torch.int32, 0, len(q))
    lengths = cu_q.diff()
    assert (lengths > 0).all()
    assert max_q == max_k == lengths.max()
    assert (dropout_p, causal, window_size_right, softcap, alibi_slopes) == (0.0, True, 0, 0.0, None)
    return [slice(*pair) for pair in zip(cu_q.tolist()[:-1], cu_q.tolist()[1:], strict=True)]


@pytest.fixture
def library(monkeypatch):
    """A `flash_attn` 2.8 that can be imported; takes fp32 as well; records its windows."""
    calls = []

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        arguments = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        rest = (dropout_p, causal, window_size_right, softcap, alibi_slopes)
        calls.append(window_size_left)
        out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], len(q)), torch.nan)
        for document in checked(q, k, v, *arguments, *rest):
            score = scores(q[document], k[document], softmax_scale, window_size_left)
            values = v[document].float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            out[document] = torch.einsum("hts,shk->thk", score.softmax(-1), values).to(q.dtype)
            lse[:, document] = score.logsumexp(-1)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        arguments = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        rest = (dropout_p, causal, window_size_right, softcap, alibi_slopes)
        assert softmax_lse.is_contiguous()
        assert (softmax_lse.shape, softmax_lse.dtype) == ((q.shape[1], len(q)), torch.float32)
        assert all(x.is_contiguous() for x in (dout, out, dq, dk, dv))
        groups, shared = k.shape[1], q.shape[1] // k.shape[1]
        for x in (dq, dk, dv):
            x.fill_(torch.nan)
        for document in checked(q, k, v, *arguments, *rest):
            mine, o, values = dout[document].float(), out[document].float(), v[document].float()
            keys, queries = k[document].float().repeat_interleave(shared, dim=1), q[document].float()
            score = scores(q[document], k[document], softmax_scale, window_size_left)
            weight = (score - softmax_lse[:, document, None]).exp()
            to_values = torch.einsum("thk,shk->hts", mine, values.repeat_interleave(shared, dim=1))
            inner = (mine * o).sum(-1).T[..., None]
            d_score = softmax_scale * weight * (to_values - inner)
            dq[document] = torch.einsum("hts,shk->thk", d_score, keys).to(q.dtype)
            for x, weights, vectors in ((dk, d_score, queries), (dv, weight, mine)):
                found = torch.einsum("hts,thk->shk", weights, vectors).unflatten(1, (groups, shared)).sum(2)
                x[document] = found.to(x.dtype)
        return torch.empty(0)

    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    interface = sys.modules["flash_attn.flash_attn_interface"]
    interface._wrapped_flash_attn_varlen_forward = forward
    interface._wrapped_flash_attn_varlen_backward = backward
    monkeypatch.setattr(flash, "DTYPES", (torch.bfloat16, torch.float16, torch.float32))
    monkeypatch.setattr(flash, "version_of", lambda _: "2.8.3")
    monkeypatch.setattr(libraries, "_OBSTACLES", {})
    return calls


def attend(name, window, sinks, scale=None):
    """Causal or windowed attention by `flash_attention` or by the reference."""
    path = {"flash": flash.flash_attention, "reference": attend_by_mask}[name]

    def run(q, k, v, seq):
        return path(q, k, v, seq, Window(window, sinks), q.shape[-1] ** -0.5 if scale is None else scale)

    return run


def assert_equals_the_reference(inputs, seq, window, sinks, tolerance=1e-5):
    found, expected = (with_gradients(attend(name, window, sinks), inputs, seq) for name in ("flash", "reference"))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@each_layout
@each_window
def test_outputs_and_gradients_are_the_reference_s_with_sinks_merged(library, seq, window, sinks):
    assert_equals_the_reference(random_inputs(seq, heads=4, groups=2, key=8, value=8), seq, window, sinks)
    assert library == [-1 if window is None else window - 1]


@each_layout
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (16, 0), (16, 4)])
def test_a_learned_sink_logit_is_merged_too(library, seq, window, sinks):
    inputs = [*random_inputs(seq, heads=4, groups=2), random_logits(4)]

    def run(name):
        return lambda q, k, v, logit, seq: PATHS[name](q, k, v, seq, Window(window, sinks), 0.3, logit)

    found, expected = (with_gradients(run(name), inputs, seq) for name in ("flash", "reference"))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("key", "value"), [(96, 96), (24, 16), (12, 20), (5, 3)])
@pytest.mark.parametrize("groups", [1, 4])
def test_heads_of_any_width_and_key_heads_of_any_number(library, key, value, groups):
    seq = documents([70, 60], [130])
    assert_equals_the_reference(random_inputs(seq, heads=4, groups=groups, key=key, value=value), seq, 20, 4)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_however_queries_are_chunked_the_result_is_that_of_the_reference(library, monkeypatch, chunk):
    monkeypatch.setattr(flash, "CHUNK", chunk)
    seq = documents([150, 61], [90, 121])
    assert_equals_the_reference(random_inputs(seq, heads=2, groups=2), seq, 50, 6)


@pytest.mark.parametrize("seed", range(6))
def test_random_layouts_windows_and_sinks(library, seed):
    seq = random_layout(seed)
    generator = torch.Generator().manual_seed(seed)
    window, sinks = (int(torch.randint(low, 200, (1,), generator=generator)) for low in (1, 0))
    assert_equals_the_reference(random_inputs(seq, heads=4, groups=2), seq, window, sinks)


def test_sinks_that_take_nearly_all_of_the_attention_or_none_of_it(library):
    seq = documents([100, 50], [150])
    for factor in (7.0, -7.0):  # scores of ±20
        q, k, v = (x.detach() for x in random_inputs(seq))
        k[..., 0] = torch.where(seq.position_BT < 4, factor, 0)[..., None]
        q[..., 0] = 8.0
        inputs = [x.requires_grad_() for x in (q, k, v)]
        assert_equals_the_reference(inputs, seq, 16, 4, tolerance=2e-5)


def test_bf16_is_as_close_to_the_fp32_reference_as_rounding_allows(library):
    seq = documents([140, 160], [300])
    inputs = random_inputs(seq, heads=4, groups=2, key=32, value=32, dtype=torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    found = with_gradients(attend("flash", 64, 4), inputs, seq)
    for mine, theirs in zip(found, with_gradients(attend("reference", 64, 4), exact, seq), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()


def test_no_document_sees_another_s_sinks_though_they_are_not_numbers(library):
    seq = documents([60, 40])
    q, k, v = (x.detach() for x in random_inputs(seq))
    for x in (k, v):
        x[:, :60] = torch.nan
    o = windowed_attention(q, k, v, seq, window=16, sinks=4, backend="reference")
    found = attend("flash", 16, 4)(q, k, v, seq)
    torch.testing.assert_close(found[:, 60:], o[:, 60:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(16, 0), (16, 4), (16, 40), (2, 8)])
def test_a_nan_stays_in_its_document_with_all_its_gradients(library, window, sinks):
    """A chunk of queries has some of other documents, and more sinks than a short document has tokens."""
    seq = documents([20, 20, 15, 5])
    inputs = random_inputs(seq)
    with torch.no_grad():
        for x in inputs:
            x[:, 20:40] = torch.nan
    others = torch.tensor([*range(20), *range(40, 60)])
    found, expected = (
        with_gradients(lambda q, k, v, seq, path=path: path(q, k, v, seq)[:, others], inputs, seq)
        for path in (attend("flash", window, sinks), attend("reference", window, sinks))
    )
    for mine, theirs in zip(found, expected, strict=True):
        rows = others if mine.shape[1] > len(others) else slice(None)
        assert mine[:, rows].isfinite().all()
        torch.testing.assert_close(mine[:, rows], theirs[:, rows], atol=1e-5, rtol=1e-5)


def test_a_graph_holds_it_whole_and_serves_any_number_of_documents(library):
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    run = torch.compile(attend("flash", 16, 4), fullgraph=True, dynamic=False, backend=counted)
    for rows in ([[5, 55], [60]], [[20, 20, 20], [60]], [[10] * 6, [1, 59]]):
        seq = documents(*rows)
        flash.bounds_of(seq)
        flash.sinks_of(seq, Window(16, 4))
        inputs = random_inputs(seq)
        expected = with_gradients(attend("reference", 16, 4), inputs, seq)
        for mine, theirs in zip(with_gradients(run, inputs, seq), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


def test_the_ops_obey_the_rules_of_ops_that_a_graph_may_hold(library):
    seq = documents([20, 40])
    q, k, v = (x.detach().flatten(0, 1) for x in random_inputs(seq))
    bounds = flash.bounds_of(seq)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.swamla.flash_window.default, (q, k, v, *bounds, 15, 0.3), test_utils=checks)
    o, lse = torch.ops.swamla.flash_window(q, k, v, *bounds, 15, 0.3)
    arguments = (torch.ones_like(o), q, k, v, o, lse, *bounds, 15, 0.3)
    torch.library.opcheck(torch.ops.swamla.flash_window_backward.default, arguments, test_utils=checks)


def test_layers_of_one_window_share_tables_and_other_windows_share_the_bounds(library):
    seq = documents([100, 100])
    assert flash.sinks_of(seq, Window(64, 4)) is flash.sinks_of(seq, Window(64, 4))
    assert flash.sinks_of(seq, Window(32, 4)) is not flash.sinks_of(seq, Window(64, 4))
    assert flash.bounds_of(seq).bounds_M.tolist() == [0, 100, 200]


# --- whether it is there, and who takes it


def test_without_the_library_asking_for_it_says_how_to_get_it_and_auto_does_without():
    for windowed in (False, True):
        with pytest.raises(
            MissingBackendError, match=r'^backend = "flash" needs flash-attn: pip install flash-attn --no'
        ):
            resolve_backend("flash", CUDA, windowed=windowed)
    assert not takes_flash("auto", CUDA, torch.bfloat16, 96, 96)
    config = SWAConfig(n_heads=2, head_dim=96)
    assert config.backends(CUDA, 192, torch.bfloat16) == {"attention": "flex"}
    assert SWAConfig(n_heads=2, backend="reference").backends(CUDA, 64, torch.bfloat16) == {"attention": "reference"}


@pytest.mark.parametrize("said", ["2.7.4.post1", "3.0.0b1", "", "1.0"])
def test_another_version_is_refused_before_it_is_imported(library, monkeypatch, said):
    monkeypatch.setattr(flash, "version_of", lambda _: said)
    monkeypatch.setattr(flash, "import_module", lambda name: pytest.fail(f"imports {name}"))
    with pytest.raises(MissingBackendError, match=rf"needs flash-attn >= 2\.8, < 3, {said or 'another'} is installed"):
        resolve_backend("flash", CUDA)


def test_without_a_device_for_it_it_is_refused(library):
    with pytest.raises(MissingBackendError, match='"flash" needs a CUDA device, these tensors are on cpu: use "torch"'):
        resolve_backend("flash", "cpu")
    assert resolve_backend("flash", CUDA) == "flash"


def test_a_library_that_fails_or_computes_something_else_is_found_before_it_is_used(library, monkeypatch):
    interface = sys.modules["flash_attn.flash_attn_interface"]
    assert flash._probe("cpu", 96) is None
    backward = interface._wrapped_flash_attn_varlen_backward

    def wrong(*arguments, softmax_scale, **options):
        return backward(*arguments, softmax_scale=2 * softmax_scale, **options)

    def raises(*arguments, **options):
        raise RuntimeError("no such kernel\nand a long story")

    for broken, reason in (
        (wrong, "is wrong on this device by"),
        (raises, "fails on this device: RuntimeError: no such"),
    ):
        monkeypatch.setattr(interface, "_wrapped_flash_attn_varlen_backward", broken)
        assert flash._probe("cpu", 96).startswith(reason)


def test_auto_takes_it_for_heads_that_flex_would_widen_and_for_no_others(library, monkeypatch):
    bf16 = torch.bfloat16
    monkeypatch.setattr(flash, "DTYPES", (bf16, torch.float16))
    assert takes_flash("auto", CUDA, bf16, 96, 96)
    assert not takes_flash("auto", CUDA, torch.float32, 96, 96)
    assert not takes_flash("flex", CUDA, bf16, 96, 96)
    assert not takes_flash("auto", "cpu", bf16, 96, 96)
    for key, value in ((64, 64), (128, 128), (192, 128), (100, 100), (272, 272)):
        assert not takes_flash("auto", CUDA, bf16, key, value)
    config = SWAConfig(n_heads=2, head_dim=96)
    assert config.backends(CUDA, 192, bf16) == {"attention": "flash"}
    assert config.backends(CUDA, 192, torch.float32) == {"attention": "flex"}
    wide = MHAConfig(n_heads=2, head_dim=96).backends(CUDA, 192, bf16)
    assert wide == {"attention": "cudnn (packed rows: flash)"}
    assert MLAConfig(n_heads=2).backends(CUDA, 192, bf16) == {"attention": "cudnn (packed rows: flex)"}


def test_windows_and_packed_rows_go_to_it_and_whole_causal_rows_do_not(library, monkeypatch):
    taken = []
    for name in ("flash", "flex", "cudnn"):
        record = partial(lambda name, q, k, v, *_: taken.append(name) or v, name)
        monkeypatch.setitem(attention.PATHS, name, record)
    monkeypatch.setattr(attention, "takes_flash", lambda backend, *_: backend == "auto")
    resolve = attention.resolve_backend
    monkeypatch.setattr(attention, "resolve_backend", lambda backend, device, **rest: resolve(backend, CUDA, **rest))
    whole, packed = documents([20]), documents([5, 15])
    for seq in (whole, packed):
        inputs = random_inputs(seq)
        windowed_attention(*inputs, seq, window=4, sinks=1)
        causal_attention(*inputs, seq)
        windowed_attention(*inputs, seq, window=4, sinks=1, backend="flex")
    assert taken == ["flash", "cudnn", "flex", "flash", "flash", "flex"]


def test_masks_are_made_for_what_will_compute(library, monkeypatch):
    monkeypatch.setattr(attention, "takes_flash", lambda *_: True)
    resolve = attention.resolve_backend
    monkeypatch.setattr(attention, "resolve_backend", lambda backend, device, **rest: resolve(backend, CUDA, **rest))
    for cast in (True, False):
        seq = documents([5, 15])
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            prepare_attention(seq, "auto", Window(4, 1), key=96, value=96)
        assert seq.made("flash") is not None
        assert seq.made(("flash", 4, 1)) is not None
        assert (seq.made(("flex", 4, 1)) is None) == cast
    whole = documents([20])
    prepare_attention(whole, "auto", key=96, value=96)
    assert whole.made("flash") is None
    prepare_attention(whole, "flash", key=96, value=96)
    assert whole.made("flash") is not None


def test_what_it_cannot_take_is_refused_with_what_can(monkeypatch):
    seq = documents([5])
    with pytest.raises(UsageError, match=r'"flash": takes bf16 or fp16, not torch.float32: use "flex"'):
        attend("flash", None, 0)(*random_inputs(seq), seq)
    inputs = random_inputs(seq, key=264, value=8, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r'"flash": takes heads of width 256 at most, not 264: use "flex"'):
        attend("flash", None, 0)(*inputs, seq)
