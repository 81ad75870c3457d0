"""What torch.compile's front end makes of blocks on a GPU, for which the device "meta" stands in: it has no kernels."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch.nn.attention import SDPBackend

from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import RMSNormConfig
from swamla.ops import attention, gated_delta
from swamla.ops.layout import Layout

WIDTH, TIME = 64, 70
MIXERS = {
    "mha": MHAConfig(n_heads=2),
    "gqa": MHAConfig(n_heads=4, n_kv_heads=2),
    "swa": SWAConfig(n_heads=2, window=16),
    "mla": MLAConfig(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
    "latent": LatentConfig(n_heads=2),
    "gdn": GDNConfig(n_heads=2),
}
FFNS = {
    "dense": DenseConfig(),
    "moe": MoEConfig(n_experts=4, n_activated=2, expert_hidden=16, aux_loss=0.1, z_loss=0.1),
    "latent_moe": LatentMoEConfig(n_experts=8, n_activated=4, expert_hidden=32),
}
PACKINGS = ([[70], [70]], [[30, 40], [70]], [[1, 60, 9], [69, 1]], [[10] * 7, [35, 35]])


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    """Backends are those of CUDA, and checks that know devices by name let this one pass."""
    from torch.nn.attention import flex_attention

    def of_cuda(backend, device, *, windowed=False):
        return resolve(backend, "cuda", windowed=windowed)

    resolve = attention.resolve_backend
    monkeypatch.setattr(attention, "resolve_backend", of_cuda)
    monkeypatch.setattr(attention, "_autocast", lambda *tensors: tensors)
    monkeypatch.setattr(gated_delta, "resolve_backend", lambda *_, **__: "fla")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention.cuda, "FUSED", [SDPBackend.MATH])
    torch._dynamo.reset()


def layout(rows):
    tokens = [[document for document, length in enumerate(row) for _ in range(length)] for row in rows]
    return Layout.from_documents(torch.tensor(tokens)).to("meta")


def compiled(function):
    """The compiled function, and the graphs that it came to be."""
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    return torch.compile(function, fullgraph=True, dynamic=False, backend=counted), graphs


def built(config, device):
    with torch.device(device):
        return config.build(WIDTH, RMSNormConfig(), dropout=0.0)


def mix_and_back(run, config, rows):
    seq = layout(rows)
    config.mixer.prepare(seq, WIDTH)
    x = torch.empty(*seq.shape, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    run(x, seq).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_is_one_graph_and_other_documents_compile_nothing_anew(name):
    config = BlockConfig(mixer=MIXERS[name])
    run, graphs = compiled(built(config, "meta").bfloat16().mix)
    for rows in PACKINGS:
        mix_and_back(run, config, rows)
    assert len(graphs) == 2  # of rows that are one document, and of packed ones


def test_layers_alike_share_a_graph_whatever_the_layers_before_them_made_of_the_layout():
    configs = [BlockConfig(mixer=MIXERS[name]) for name in ("swa", "mla", "swa", "mla", "gdn", "gdn", "swa")]
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    blocks = [built(config, "meta").bfloat16() for config in configs]
    runs = [torch.compile(block.mix, fullgraph=True, dynamic=False, backend=counted) for block in blocks]
    for rows in PACKINGS[1:]:
        seq = layout(rows)
        x = torch.empty(*seq.shape, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for config, run in zip(configs, runs, strict=True):
            config.mixer.prepare(seq, WIDTH)
            x = run(x, seq)
        x.sum().backward()
    assert len(graphs) == 3


def test_backends_that_loop_over_documents_end_graphs():
    config = BlockConfig(mixer=replace(MIXERS["swa"], backend="reference"))
    run, _ = compiled(built(config, "meta").bfloat16().mix)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"in windowed_attention(.|\n)*graphs.py.*in call"):
        mix_and_back(run, config, PACKINGS[0])


@pytest.mark.parametrize("name", FFNS)
def test_every_ffn_is_one_graph_in_bf16(monkeypatch, name):
    grouped_mm = import_module("swamla.ops.grouped_mm")
    monkeypatch.setattr(
        grouped_mm, "_outside", grouped_mm._grouped_mm
    )  # a CPU that passes for a GPU: meta has no autocast
    block = built(BlockConfig(mixer=MIXERS["mha"], ffn=FFNS[name]), "cpu")
    run, graphs = compiled(block.feed)
    x = torch.randn(2, TIME, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, statistics = run(x, Layout.one_document_per_row(2, TIME))
    (y.float().sum() + sum(value for name, value in statistics.items() if name == "loss")).backward()
    assert all(parameter.grad is not None for parameter in block.ffn.parameters())
    assert len(graphs) == 1
