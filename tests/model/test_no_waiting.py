"""The host runs ahead of the device: nothing that a training step computes depends on numbers read back from it."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import RMSNormConfig
from swamla.model.rope import RopeConfig, YarnScaling
from swamla.ops import cross_entropy, short_conv
from swamla.ops.attention import cuda
from swamla.ops.attention.reference import Window, allowed_mask
from swamla.ops.gated_delta.cpu import Documents, documents_of
from swamla.ops.gated_delta.cuda import packing_of
from swamla.ops.layout import Layout
from swamla.train.optim import AdamWConfig, LionConfig, MuonConfig
from tests.toys import TOYS

aten = torch.ops.aten
READ_BACK = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.item,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_consecutive,
}


class Watch(TorchDispatchMode):
    """Raises where a device's numbers decide what the host does next."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func.overloadpacket not in READ_BACK, f"{func} makes the host wait"
        if func.overloadpacket is aten.index:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "indexing by a mask waits"
        assert func is not aten.repeat_interleave.Tensor or kwargs.get("output_size") is not None
        return func(*args, **kwargs)


def test_the_watch_sees_what_waits():
    x = torch.tensor([1.0, 0.0])
    for waits in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: bool(x.any())):
        with Watch(), pytest.raises(AssertionError):
            waits()


WIDTH, TIME = 32, 70
YARN = RopeConfig(scaling=YarnScaling(factor=4.0, original_length=32))
MIXERS = {
    "mha": MHAConfig(n_heads=2),
    "gqa": MHAConfig(n_heads=4, n_kv_heads=2, rope=YARN),
    "swa": SWAConfig(n_heads=2, window=16),
    "mla": MLAConfig(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
    "latent": LatentConfig(n_heads=2),
    "gdn": GDNConfig(n_heads=2),
    "kda": KDAConfig(n_heads=2),
    "toy": TOYS["toy"](),
}
FFNS = {
    "dense": DenseConfig(),
    "moe": MoEConfig(n_experts=4, n_activated=2, expert_hidden=16, aux_loss=0.1, z_loss=0.1),
    "latent_moe": LatentMoEConfig(n_experts=8, n_activated=4, expert_hidden=32),
}
PACKED = [[0] * 30 + [1] * 40, [0] * 60 + [-1] * 10]


def step(block, seq):
    x = torch.randn(*seq.shape, WIDTH, requires_grad=True)
    y, statistics = block.whole(x, seq)
    (y.sum() + sum(value for name, value in statistics.items() if name == "loss")).backward()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
def test_a_mixer_forward_and_backward_reads_nothing_back(name, packed, monkeypatch):
    # Only a CPU is asked whether a NaN turned up.
    monkeypatch.setattr(Documents, "would_mix", lambda documents, result: False)
    block = BlockConfig(mixer=MIXERS[name]).build(WIDTH, RMSNormConfig(), 0.1).train()
    seq = Layout.from_documents(torch.tensor(PACKED)) if packed else Layout.one_document_per_row(2, TIME)
    step(block, seq)  # makes the layout's tables, which are counted on the host: see below
    with Watch():
        step(block, seq)


def test_an_accelerator_is_not_asked_whether_a_nan_turned_up():
    packed = documents_of(Layout.from_documents(torch.tensor(PACKED)), 16)
    assert packed.would_mix(torch.tensor([1.0, float("nan")]))
    assert not packed.would_mix(torch.tensor([1.0, 2.0]))
    with Watch():
        assert not packed.would_mix(torch.empty(2, device="meta"))


@pytest.mark.parametrize("name", FFNS)
def test_an_ffn_forward_and_backward_reads_nothing_back(name):
    block = BlockConfig(mixer=MIXERS["mha"], ffn=FFNS[name]).build(WIDTH, RMSNormConfig(), 0.0)
    seq = Layout.one_document_per_row(2, TIME)
    step(block, seq)
    with Watch():
        step(block, seq)


def test_attention_of_whole_rows_on_cuda_reads_nothing_back(monkeypatch):
    monkeypatch.setattr(cuda, "FUSED", [SDPBackend.MATH])  # the CPU's
    q, k, v = (torch.randn(2, TIME, 2, width, requires_grad=True) for width in (20, 20, 12))
    with Watch():
        cuda.fused_attention(q, k, v, scale=0.2).sum().backward()


def test_tables_are_made_without_asking_another_device():
    """The device "meta" has no numbers: whoever asked for one would fail."""
    for rows in (PACKED, [[0] * TIME] * 2):
        host = Layout.from_documents(torch.tensor(rows))
        seq = host.to("meta")
        for window, sinks in ((None, 0), (16, 4)):
            assert cuda.block_mask(seq, Window(window, sinks)).kv_indices.device.type == "meta"
            assert allowed_mask(seq, Window(window, sinks)).shape == (2, TIME, TIME)
        assert packing_of(seq).last_B.shape == (2,)
        assert (documents_of(seq, 16).padding_BT is not None) == (rows is PACKED)
        assert YARN.tables(seq, 8)[0].device.type == "meta"
        x, weight = torch.empty(2, TIME, 6, device="meta"), torch.empty(6, 4, device="meta")
        assert short_conv(x, weight, seq=seq, backend="torch").shape == x.shape
        assert torch.equal(seq.host_position_BT, host.position_BT)


def test_the_loss_as_on_cuda_reads_nothing_back(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_check_labels", lambda *_: None)
    monkeypatch.setattr(cross_entropy, "_losses_and_gradients", cross_entropy._fused_losses_and_gradients)
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with Watch():
        cross_entropy.chunked_cross_entropy(x, weight, torch.arange(20)).backward()


@pytest.mark.parametrize("config", [MuonConfig(), AdamWConfig(), LionConfig()], ids=lambda config: config.kind)
def test_an_optimizer_step_reads_nothing_back(config):
    model = nn.ModuleDict(
        {name: nn.Linear(*sides) for name, sides in (("a", (16, 24)), ("b", (24, 16)), ("c", (16, 16)))}
    )
    optimizer = config.build(model, lr=1e-3, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with Watch():
        optimizer.step()


def test_muon_multiplies_stacks_and_not_matrices():
    model = nn.ModuleDict({str(n): nn.Linear(16, 24, bias=False) for n in range(7)})
    optimizer = MuonConfig().build(model, lr=1e-3, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Count():
        optimizer.step()
    products = [func for func in counted if func in (aten.bmm, aten.baddbmm, aten.mm, aten.addmm)]
    assert len(products) == 3 * MuonConfig().iterations
