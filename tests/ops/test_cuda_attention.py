"""What CUDA's attention is made of, as far as a CPU can tell: masks by blocks, widths, the kernels that are allowed."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions
from torch.nn.attention.flex_attention import flex_attention as uncompiled
from torch.utils._python_dispatch import TorchDispatchMode

from swamla.errors import ConfigError, MissingBackendError, UsageError
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.ops import attention, causal_attention, windowed_attention
from swamla.ops.attention import cuda, flash, resolve_backend
from swamla.ops.attention.reference import CAUSAL, Window, allowed_mask, reference_attention
from swamla.ops.layout import Layout

from .attention_checks import documents, random_inputs, random_layout, random_logits, with_gradients

WINDOWS = [(None, 0), (64, 0), (64, 4), (200, 130), (1, 1)]
LAYOUTS = {
    "one short row": documents([2]),
    "a block": documents([128]),
    "a block and a token": documents([129]),
    "documents that end with blocks": documents([128, 128, 256], [512]),
    "many": random_layout(0, time=640),
    "padding": random_layout(6, time=300),
    "ids that come back": Layout.from_documents(torch.tensor([[0] * 150 + [1] * 100 + [0] * 150])),
}
each_layout = pytest.mark.parametrize("seq", LAYOUTS.values(), ids=LAYOUTS.keys())
each_window = pytest.mark.parametrize(("window", "sinks"), WINDOWS)


@each_layout
@each_window
def test_a_block_mask_has_the_blocks_in_which_something_is_allowed_and_its_rule_is_the_mask(seq, window, sinks):
    mask = cuda.block_mask(seq, Window(window, sinks))
    exact_BTS = allowed_mask(seq, Window(window, sinks))
    time = seq.shape[1]
    rest = -time % cuda.BLOCK
    blocks = F.pad(exact_BTS, (0, rest, 0, rest)).unflatten(2, (-1, cuda.BLOCK)).unflatten(1, (-1, cuda.BLOCK))
    assert torch.equal(mask.to_dense()[:, 0].bool(), blocks.any(4).any(2))
    index_T = torch.arange(time)
    for row in range(seq.shape[0]):
        rule_TS = mask.mask_mod(torch.tensor(row), torch.tensor(0), index_T[:, None], index_T)
        assert torch.equal(rule_TS, exact_BTS[row])


@each_layout
@each_window
def test_a_block_that_skips_the_rule_is_allowed_altogether(seq, window, sinks):
    mask = cuda.block_mask(seq, Window(window, sinks))
    exact_BTS = allowed_mask(seq, Window(window, sinks))
    for row in range(seq.shape[0]):
        for block, count in enumerate(mask.full_kv_num_blocks[row, 0].tolist()):
            for column in mask.full_kv_indices[row, 0, block, :count].tolist():
                queries, keys = (slice(n * cuda.BLOCK, (n + 1) * cuda.BLOCK) for n in (block, column))
                assert exact_BTS[row, queries, keys].all()


@each_layout
@each_window
def test_the_backward_pass_reads_the_same_blocks_the_other_way_round(seq, window, sinks):
    mask = cuda.block_mask(seq, Window(window, sinks))
    parts = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    theirs = BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=cuda.BLOCK, seq_lengths=(seq.shape[1],) * 2)
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        mine, expected = getattr(mask, name), getattr(theirs, name)
        assert torch.equal(mine, expected)
        assert (mine.dtype, mine.stride()) == (expected.dtype, expected.stride())
    assert mask.seq_lengths == theirs.seq_lengths
    assert mask.BLOCK_SIZE == theirs.BLOCK_SIZE


VIEWS = {
    "view",
    "expand",
    "permute",
    "transpose",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "unbind",
    "alias",
    "detach",
}


class Launches(TorchDispatchMode):
    """Counts ops that a device computes; those that only look at a tensor otherwise cost it nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("window", "sinks", "most"), [(256, 4, 29), (256, 0, 25), (None, 0, 23)])
@pytest.mark.parametrize("time", [2048, 2000])
def test_a_block_mask_takes_few_launches_whatever_the_documents(window, sinks, most, time):
    for rows in ([[time], [time]], [[time // 8] * 8, [1, time - 1]]):
        seq = documents(*rows).to("meta")
        with Launches() as launches:
            cuda.block_mask(seq, Window(window, sinks))
        assert len(launches.names) <= most + bool(time % cuda.BLOCK), (
            launches.names
        )  # the last block, where it is short


def test_a_batch_s_layout_is_two_copies_and_the_tables_of_flash_ten_launches():
    seq = documents([1000, 1048], [2048])
    with Launches() as launches:
        moved = seq.to("meta")
    assert launches.names == ["_to_copy"] * 2
    with Launches() as launches:
        flash.sinks_of(moved, Window(256, 4))
    assert len(launches.names) <= 11, launches.names


def test_the_middle_of_a_wide_window_skips_the_rule():
    counts = cuda.block_mask(documents([1024]), Window(512, 4)).full_kv_num_blocks[0, 0]
    assert counts.tolist() == [0, 1, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(("key", "value"), [(24, 16), (8, 4)])
def test_flex_attention_under_the_block_mask_is_the_reference(monkeypatch, key, value):
    monkeypatch.setattr(cuda, "_flex", lambda: uncompiled)
    seq = random_layout(3, time=300)
    q, k, v = (x.detach() for x in random_inputs(seq, heads=4, groups=2, key=key, value=value))
    for window, sinks in WINDOWS[:3]:
        o = cuda.flex_attention(q, k, v, seq, Window(window, sinks), scale=0.3)
        expected = reference_attention(q, k, v, allowed_mask(seq, Window(window, sinks)), scale=0.3)
        torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", [8, 24])
def test_flex_attention_with_a_sink_logit_is_the_reference(monkeypatch, key):
    """Outputs: on a CPU FlexAttention has no backward pass."""
    monkeypatch.setattr(cuda, "_flex", lambda: uncompiled)
    seq, logit = random_layout(3, time=300), random_logits(4).detach()
    q, k, v = (x.detach() for x in random_inputs(seq, heads=4, groups=2, key=key))
    for window in (CAUSAL, Window(64, 0)):
        expected = reference_attention(q, k, v, allowed_mask(seq, window), scale=0.3, sink_logit_H=logit)
        for attend in (cuda.flex_attention, cuda.cudnn_attention):
            o = attend(q, k, v, seq, window, 0.3, logit)
            torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)


def test_kernels_are_compiled_for_a_length_then_for_all_and_windows_compile_nothing(monkeypatch):
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    function = torch.compile(uncompiled, fullgraph=True, backend=counted)
    monkeypatch.setattr(cuda, "_flex", lambda: function)
    for time, window in ((140, 64), (140, 32), (300, 64), (200, 16), (130, 64), (700, 100)):
        seq = documents([time - 50, 50], [time])
        q, k, v = (x.detach() for x in random_inputs(seq, key=16, value=16))
        o = cuda.flex_attention(q, k, v, seq, Window(window, 4), scale=0.3)
        expected = reference_attention(q, k, v, allowed_mask(seq, Window(window, 4)), scale=0.3)
        torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 2


def test_kernel_options_are_those_that_do_not_spill_and_torch_knows_their_names(monkeypatch):
    known = {*FlexKernelOptions.__annotations__}
    known |= {f"{way}_{name}" for way in ("fwd", "bwd") for name in known}
    for key in (16, 64, 96, 128, 192, 256):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            options = cuda.kernel_options(key, dtype)
            assert options.keys() <= known
            assert options["FORCE_USE_FLEX_ATTENTION"]
            tuned = {64: {"fwd_num_warps": 8}, 192: {"bwd_num_warps": 8}}.get(key, {}) if dtype.itemsize == 2 else {}
            assert options == cuda.KERNEL | tuned
    given = []
    monkeypatch.setattr(cuda, "_flex", lambda: lambda q, k, v, **options: given.append(options) or v)
    seq = documents([5])
    for key, dtype in ((64, torch.bfloat16), (64, torch.float32)):
        q, k, v = random_inputs(seq, key=key, value=16, dtype=dtype)
        cuda.flex_attention(q, k, v, seq, Window(4, 1), 0.1)
        assert given[-1]["kernel_options"] == cuda.kernel_options(key, dtype)


def test_layers_of_one_window_share_one_block_mask():
    seq = documents([100, 100])
    assert cuda.block_mask_of(seq, Window(64, 4)) is cuda.block_mask_of(seq, Window(64, 4))
    assert cuda.block_mask_of(seq, Window(64, 4)) is not cuda.block_mask_of(seq, Window(32, 4))


@pytest.mark.parametrize(("key", "value"), [(192, 128), (64, 64), (36, 20), (4, 8)])
@pytest.mark.parametrize("groups", [4, 2])
def test_fused_attention_of_any_widths_and_groups_is_the_reference(monkeypatch, key, value, groups):
    monkeypatch.setattr(cuda, "FUSED", [SDPBackend.MATH])  # the CPU's
    seq = documents([33], [33])
    inputs = random_inputs(seq, heads=4, groups=groups, key=key, value=value)

    def fused(q, k, v, seq):
        return cuda.cudnn_attention(q, k, v, seq, CAUSAL, scale=key**-0.5)

    def reference(q, k, v, seq):
        return causal_attention(q, k, v, seq, backend="reference")

    for found, expected in zip(with_gradients(fused, inputs, seq), with_gradients(reference, inputs, seq), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_whole_rows_go_to_cudnn_or_the_efficient_kernel_and_to_no_other(monkeypatch):
    enabled = []

    def recorded(q, k, v, **options):
        backends = torch.backends.cuda
        enabled.append((backends.cudnn_sdp_enabled(), backends.mem_efficient_sdp_enabled()))
        enabled.append((backends.flash_sdp_enabled(), backends.math_sdp_enabled()))
        assert options == {"is_causal": True, "scale": 0.5}
        assert (q.shape[-1], v.shape[-1]) == (24, 16)
        return v

    monkeypatch.setattr(cuda, "scaled_dot_product_attention", recorded)
    seq = documents([5])
    q, k, v = random_inputs(seq, key=20, value=10)
    assert cuda.cudnn_attention(q, k, v, seq, CAUSAL, scale=0.5).shape == v.shape
    assert enabled == [(True, True), (False, False)]
    assert torch.backends.cuda.math_sdp_enabled()


def test_packed_rows_go_to_flex(monkeypatch):
    monkeypatch.setattr(cuda, "flex_attention", lambda q, k, v, seq, *options: options)
    seq = documents([5, 4])
    assert cuda.cudnn_attention(*random_inputs(seq), seq, CAUSAL, 0.5) == (CAUSAL, 0.5, None)


def test_rows_with_a_sink_logit_go_to_flex_whether_packed_or_not_and_it_is_said(monkeypatch):
    monkeypatch.setattr(cuda, "flex_attention", lambda q, k, v, seq, *options: options)
    logit = torch.zeros(2)
    for seq in (documents([9]), documents([5, 4])):
        assert cuda.cudnn_attention(*random_inputs(seq), seq, CAUSAL, 0.5, logit) == (CAUSAL, 0.5, logit)
    told = MHAConfig(n_heads=2, sink_logit=True).backends(torch.device("cuda"), 64, torch.bfloat16)
    assert told == {"attention": "flex"}


def test_auto_on_cuda_is_cudnn_for_causal_and_flex_for_windowed_attention():
    assert resolve_backend("auto", "cuda") == "cudnn"
    assert resolve_backend("auto", "cuda", windowed=True) == "flex"
    for config, backend in ((MHAConfig(n_heads=2), "cudnn (packed rows: flex)"), (SWAConfig(n_heads=2), "flex")):
        assert config.backends(torch.device("cuda"), 64, torch.bfloat16) == {"attention": backend}
    for windowed in (False, True):
        assert resolve_backend("auto", "cpu", windowed=windowed) == "torch"


def test_cudnn_is_refused_without_cuda_and_for_windows():
    seq = documents([3])
    with pytest.raises(MissingBackendError, match=r'"cudnn" needs a CUDA device.*use "torch"'):
        causal_attention(*random_inputs(seq), seq, backend="cudnn")
    with pytest.raises(
        UsageError,
        match=r"'cudnn': windowed attention has 'auto', 'reference', 'torch', 'tiles', 'sdpa', 'flex', 'flash'$",
    ):
        resolve_backend("cudnn", "cuda", windowed=True)
    with pytest.raises(
        ConfigError, match=r"backend = 'cudnn': must be one of auto, reference, torch, tiles, sdpa, flex, flash$"
    ):
        SWAConfig(n_heads=2, backend="cudnn")


def test_doubles_are_refused_with_what_takes_them():
    for lengths in ([5], [3, 2]):
        seq = documents(lengths)
        with pytest.raises(UsageError, match='takes no float64: use "torch" or "reference"'):
            cuda.cudnn_attention(*random_inputs(seq, dtype=torch.float64), seq, CAUSAL, scale=1.0)


def test_fp32_keys_too_wide_for_flex_are_refused_by_name_and_computed_otherwise_where_it_is_chosen():
    seq = documents([40, 24], [64])
    q, k, v = (x.detach() for x in random_inputs(seq, heads=2, groups=2, key=192, value=128))
    with pytest.raises(UsageError, match=r'"flex": fp32 keys of width 192 need .* \(at most 128\): use "sdpa", or 16'):
        cuda.flex_attention(q, k, v, seq, CAUSAL, scale=0.1)
    found = cuda.cudnn_attention(q, k, v, seq, CAUSAL, scale=0.1)
    expected = reference_attention(q, k, v, allowed_mask(seq, Window(None, 0)), scale=0.1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not cuda.too_wide_for_flex(q.bfloat16())
    assert not cuda.too_wide_for_flex(q[..., :128])


def test_windowed_attention_that_is_free_to_choose_computes_wide_fp32_keys_by_sdpa(monkeypatch):
    monkeypatch.setattr(attention, "resolve_backend", lambda backend, *_, **__: "flex")
    seq = documents([40, 24], [64])
    q, k, v = (x.detach() for x in random_inputs(seq, heads=2, groups=2, key=192, value=128))
    found = windowed_attention(q, k, v, seq, window=8, sinks=2, scale=0.1)
    expected = reference_attention(q, k, v, allowed_mask(seq, Window(8, 2)), scale=0.1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
