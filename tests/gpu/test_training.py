"""A whole model on a GPU: compiled or not it computes what it does on a CPU, and Muon steps as it does there."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from swamla.cli.self_check import tiny_model
from swamla.model.block import BlockConfig
from swamla.model.compiling import compile_blocks
from swamla.ops.layout import Layout
from swamla.train.optim import MuonConfig
from tests.gpu.checks import no_waiting, poison, randn

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def step(model, device, seed, time=96):
    """Loss and gradients, in bf16, of rows whose documents depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    document_BT = (torch.rand(4, time, generator=generator) < 0.1).cumsum(1)
    tokens_BT = torch.randint(64, (4, time), generator=generator)
    labels_BT = tokens_BT.roll(-1, 1)
    model.zero_grad()
    poison()
    with torch.autocast(device.type, torch.bfloat16):
        seq = Layout.from_documents(document_BT).to(device)
        nats, _ = model.loss(tokens_BT.to(device), labels_BT.to(device), seq)
    poison()
    nats.backward()
    return nats.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in found[1].items():
        reference = expected[1][name]
        assert (gradient - reference).norm() <= tolerance * reference.norm() + 1e-6, name


def without_experts():
    """Every mixer. Experts are chosen by comparison, which rounding may turn over: parity is of what has none."""
    config = tiny_model(torch.device("cpu")).config
    dense = {name: BlockConfig(mixer=block.mixer) for name, block in config.blocks.items()}
    return replace(config, blocks=dense).build(seed=0).to(CUDA).train()


def test_the_layout_of_packed_rows_goes_to_the_gpu_without_waiting():
    seq = Layout.from_documents(torch.arange(64).view(2, 32) // 5)
    seq.to(CUDA)
    with no_waiting():
        found = seq.to(CUDA)
    assert torch.equal(found.position_BT.cpu(), seq.position_BT)


def test_a_model_computes_what_it_does_on_a_cpu():
    model = without_experts()
    found = step(model, CUDA, 0)
    assert_alike(found, step(model.cpu(), torch.device("cpu"), 0), 5e-2)


def test_compiled_blocks_compute_what_uncompiled_ones_do():
    reference, model = without_experts(), without_experts()
    compile_blocks(model, "default", CUDA)
    for seed in range(3):
        assert_alike(step(model, CUDA, seed), step(reference, CUDA, seed), 5e-2)
    tokens_BT = torch.randint(model.config.vocab_size, (2, 48), device=CUDA)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens_BT), reference.eval()(tokens_BT), atol=5e-2, rtol=5e-2)


def test_blocks_are_whole_graphs_that_serve_all_documents():
    torch._dynamo.reset()
    model = tiny_model(CUDA).train()
    compile_blocks(model, "default", CUDA)
    step(model, CUDA, 0, time=64)  # an op outside graphs is not named where it is met for the first time
    counters.clear()
    graphs = []
    for seed in range(3):
        loss, _ = step(model, CUDA, seed)
        assert math.isfinite(loss)
        graphs.append(counters["stats"]["unique_graphs"])
    # The delta rule of "torch", where flash-linear-attention is not there, is the one op outside.
    assert not [reason for reason in counters["graph_break"] if "chunked_gated_delta_rule" not in reason]
    assert graphs[1] == graphs[2]


def test_muon_steps_as_on_the_cpu():
    sides = {"a": (64, 96), "b": (96, 64), "c": (64, 64), "d": (96, 64)}
    models = []
    for device in ("cpu", "cuda"):
        model = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in sides.items()})
        for seed, parameter in enumerate(model.parameters()):
            parameter.data = randn(*parameter.shape, seed=seed).to(device)
            parameter.grad = randn(*parameter.shape, seed=10 + seed).to(device)
        MuonConfig().build(model, lr=0.1, weight_decay=0.1).step()
        models.append([parameter.detach().cpu() for parameter in model.parameters()])
    for ours, theirs in zip(*models, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
