"""Optimizers: equal to torch's, grouped as they should be, named and restored exactly."""

import pytest
import torch
from torch import nn

from swamla.errors import CorruptError
from swamla.model import ParameterSpec
from swamla.train.optim import AdamWConfig, LionConfig, Muon, MuonConfig
from swamla.train.optim import muon as muon_module
from swamla.train.optim.muon import is_hidden, orthogonalise, polynomials
from tests.toys import TOYS

from .helpers import MODEL

CONFIGS = [
    MuonConfig(),
    MuonConfig(normuon=0.9),
    TOYS["toy_sgd"](),
    *(make(moments=moments) for make in (AdamWConfig, LionConfig) for moments in ("fp32", "bf16", "8bit")),
]
SHAPES = [(24, 16), (16, 24), (16, 16), (64, 16), (16, 24)]


def tiny_model(seed=0):
    from dataclasses import replace

    torch.manual_seed(seed)
    return replace(MODEL, vocab_size=512).build()


def take_steps(model, optimizer, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.set_lr(1e-2)
        optimizer.step()


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def steps_of_both_muons(dtype):
    """Where the matrices were, and where five steps of ours and of torch's took them."""
    before, ours, theirs = matrices(0), matrices(0), matrices(0)
    a = Muon(ours, lr=1e-2, weight_decay=0.1, dtype=dtype)
    b = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    return zip(before, ours, theirs, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stacked_muon_takes_the_steps_of_torch_muon(monkeypatch, dtype):
    # torch's own code, told to go to a wider format where it says bfloat16: what is left is the algorithm.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.to(dtype))
    for before, p, q in steps_of_both_muons(dtype):
        assert not torch.equal(q, before)
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_stacked_muon_in_bf16_takes_the_steps_of_torch_muon_but_for_rounding():
    for before, p, q in steps_of_both_muons(
        torch.bfloat16
    ):  # where the matrix products sum in one order, equal to the bit
        assert torch.linalg.norm(p - q) <= 1e-2 * torch.linalg.norm(q - before)


def test_muon_takes_each_expert_as_a_matrix_of_its_own(monkeypatch):
    monkeypatch.setattr(muon_module, "STACK", 16 * 24 * 2)  # so that the stacks are taken apart as well
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.randn(31, 16, 24, generator=generator), torch.randn(3, 24, 16, generator=generator)]
    together = [nn.Parameter(stack.clone()) for stack in stacks]
    alone = [nn.Parameter(expert.clone()) for stack in stacks for expert in stack]
    a, b = (Muon(params, lr=1e-2, weight_decay=0.1) for params in (together, alone))
    for _ in range(3):
        for p in together:
            p.grad = torch.randn(p.shape, generator=generator)
        for p, gradient in zip(alone, (expert for stack in together for expert in stack.grad), strict=True):
            p.grad = gradient.clone()
        a.step()
        b.step()
    for p, q in zip((expert for stack in together for expert in stack), alone, strict=True):
        torch.testing.assert_close(p, q)
    assert not torch.equal(together[0], stacks[0])


def test_muon_never_orthogonalises_more_numbers_at_a_time_than_a_stack_may_have(monkeypatch):
    monkeypatch.setattr(muon_module, "STACK", 1000)
    sizes = []
    real = muon_module.orthogonalise

    def seen(stack, steps):
        sizes.append(stack.numel())
        return real(stack, steps)

    monkeypatch.setattr(muon_module, "orthogonalise", seen)
    params = [nn.Parameter(torch.ones(s)) for s in [(16, 24), (24, 16), (16, 24), (16, 16), (7, 16, 24)]]
    for p in params:
        p.grad = torch.randn_like(p)
    Muon(params, lr=1e-2, weight_decay=0.1).step()
    assert max(sizes) <= 1000
    assert sum(sizes) == sum(p.numel() for p in params)


def test_orthogonalised_matrices_have_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 16, 40, generator=generator)
    values = torch.linalg.svdvals(orthogonalise(stack, polynomials("jordan", 5)))
    assert 0.6 < values.min() <= values.max() < 1.3


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = tiny_model()
    taken = {name for name, p in model.named_parameters() if is_hidden(ParameterSpec(name, p.shape))}
    assert taken == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert not is_hidden(ParameterSpec("embedding.weight", (512, 16)))
    assert not is_hidden(ParameterSpec("head.weight", (512, 16)))
    assert not is_hidden(ParameterSpec("blocks.0.mixer.conv_weight", (64, 4)))
    optimizer = MuonConfig().build(model, lr=1e-3, weight_decay=0.1)
    owned = [p for part in optimizer.optimizers for group in part.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_steps_are_the_same_to_the_bit_every_time(config):
    found = []
    for _ in range(2):
        model = tiny_model()
        take_steps(model, config.build(model, lr=1e-2, weight_decay=0.1), 3)
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_restored_optimizer_goes_on_to_the_bit(config):
    model, twin = tiny_model(), tiny_model()
    optimizer = config.build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    other = config.build(twin, lr=1e-2, weight_decay=0.1)
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    other.load_state_tensors(state, stateless=optimizer.stateless(), origin="here")
    take_steps(model, optimizer, 2, seed=9)
    take_steps(twin, other, 2, seed=9)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_missing_optimizer_state_is_named():
    model = tiny_model()
    optimizer = AdamWConfig().build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, optimizer, 1)
    state = {k: v for k, v in optimizer.state_tensors().items() if not k.startswith("embedding.weight/")}
    with pytest.raises(CorruptError, match=r"here: no optimizer state for embedding\.weight"):
        optimizer.load_state_tensors(state, stateless=[], origin="here")


def test_optimizer_state_of_another_shape_is_refused():
    model = tiny_model()
    optimizer = AdamWConfig().build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, optimizer, 1)
    state = optimizer.state_tensors() | {"embedding.weight/exp_avg": torch.zeros(2, 2)}
    with pytest.raises(CorruptError, match=r"embedding\.weight/exp_avg: got \(2, 2\), expected \(512, 16\)"):
        optimizer.load_state_tensors(state, stateless=[], origin="here")


def test_an_optimizer_of_another_kind_does_not_take_the_state():
    model = tiny_model()
    adamw = AdamWConfig().build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, adamw, 1)
    muon = MuonConfig().build(model, lr=1e-2, weight_decay=0.1)
    with pytest.raises(CorruptError, match="optimizer state"):
        muon.load_state_tensors(adamw.state_tensors(), stateless=[], origin="here")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_only_what_has_a_gradient_is_updated_and_remembered_and_that_too_is_restored(config):
    model, twin = tiny_model(), tiny_model()
    optimizer = config.build(model, lr=1e-2, weight_decay=0.1)
    assert optimizer.stateless() == sorted(name for name, _ in model.named_parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with_gradient = {name for name, _ in model.named_parameters() if name.startswith("blocks.0.mixer.")}
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p) if name in with_gradient else None
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == with_gradient
    assert set(optimizer.stateless()) == before.keys() - with_gradient
    twin.load_state_dict(model.state_dict())
    other = config.build(twin, lr=1e-2, weight_decay=0.1)
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    other.load_state_tensors(state, stateless=optimizer.stateless(), origin="here")
    assert other.stateless() == optimizer.stateless()
    take_steps(model, optimizer, 2, seed=9)
    take_steps(twin, other, 2, seed=9)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("other", CONFIGS, ids=str)
def test_the_state_of_one_optimizer_is_no_other_ones(config, other):
    model = tiny_model()
    optimizer = config.build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, optimizer, 1)
    into = other.build(model, lr=1e-2, weight_decay=0.1)
    if config == other:
        into.load_state_tensors(optimizer.state_tensors(), stateless=[], origin="here")
    else:
        with pytest.raises(CorruptError, match=r"here: .* (optimizer state has|got torch\.)"):
            into.load_state_tensors(optimizer.state_tensors(), stateless=[], origin="here")
        assert into.state_tensors() == {}  # refused before anything was taken over


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_on_a_gpu_each_optimizer_goes_where_it_goes_on_the_cpu(config):
    before = [p.detach() for p in tiny_model().parameters()]
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        optimizer = config.build(model, lr=1e-2, weight_decay=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        found.append([p.detach().cpu() for p in model.parameters()])
    for start, p, q in zip(before, *found, strict=True):
        assert torch.linalg.norm(p - q) <= 0.05 * torch.linalg.norm(p - start)  # bf16 is rounded by other noise there
