"""The self-check of `swamla doctor`: every op's fast path against its reference, and a tiny model end to end."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.checkpoint import latest_checkpoint, load_into, save_checkpoint
from swamla.cli.plain import BLOCK_PARTS
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.norm import NormConfig
from swamla.ops import (
    Layout,
    causal_attention,
    chunked_cross_entropy,
    gated_delta_rule,
    kimi_delta_attention,
    l2_normalize,
    rms_norm,
    short_conv,
    windowed_attention,
)
from swamla.ops.grouped_mm import grouped_mm
from swamla.registry import members_of
from swamla.train.optim import AdamWConfig, OptimizerConfig
from swamla.train.precision import autocast, resolve_precision

TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}  # for fp32 results, relative to the largest number
BF16_TOLERANCE = 2e-2
STEPS = 30
FALL = 0.7  # the largest allowed ratio of the last loss to the first

Op = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a check. detail: the finding, or the error."""

    name: str
    ok: bool
    detail: str
    seconds: float


def run_checks(device: torch.device) -> Iterator[Outcome]:
    """Run all checks, one by one; a failure does not stop the others."""
    for name, check in _checks():
        started = time.monotonic()
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        try:
            detail, ok = check(device), True
        except Exception as error:  # every failure is reported
            first_line = (str(error).splitlines() or [""])[0]
            detail, ok = f"{type(error).__name__}: {first_line}", False
        torch.set_rng_state(generator_state)
        yield Outcome(name=name, ok=ok, detail=detail, seconds=time.monotonic() - started)


def _checks() -> list[tuple[str, Callable[[torch.device], str]]]:
    return [
        ("causal attention", _causal),
        ("windowed attention", _windowed),
        ("gated delta rule", _delta_rule),
        ("Kimi delta attention", _kimi_delta_attention),
        ("short convolution", _convolution),
        ("grouped products", _grouped),
        ("cross-entropy", _cross_entropy),
        ("RMSNorm", _norm),
        ("training", _training),
        ("norms, optimizers", _norms_and_optimizers),
        ("step by step", _steps),
        ("saving and loading", _saving),
    ]


class Wrong(Exception):
    """A check found a difference."""


def compare(fast: Op, reference: Op, inputs: Sequence[Tensor], tolerance: float) -> str:
    """Compare outputs and gradients of every input. Raises `Wrong` if they differ by more than `tolerance`."""
    results = []
    for op in (fast, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = op(*leaves)
        upstream = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    worst = max(_difference(a, b) for a, b in zip(*results, strict=True))
    if not worst <= tolerance:  # NaN fails too
        raise Wrong(f"outputs and gradients differ from the reference by {worst:.1e}, allowed {tolerance:.0e}")
    near = f"within {worst:.0e} of" if worst else "equal to"
    return f"{near} the reference, gradients included"


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape).to(device)


def _documents(device: torch.device, time_: int) -> Layout:
    """One row of three documents."""
    cuts = torch.tensor([time_ // 5, time_ // 2])
    return Layout.from_documents(torch.bucketize(torch.arange(time_), cuts, right=True)[None]).to(device)


def _compare_backends(op: Op, inputs: Sequence[Tensor], device: torch.device, tolerance: float | None = None) -> str:
    tolerance = TOLERANCE[device.type] if tolerance is None else tolerance
    return compare(lambda *x: op(*x, backend="auto"), lambda *x: op(*x, backend="reference"), inputs, tolerance)


def _compare_paths(op: Op, inputs: Sequence[Tensor], device: torch.device) -> str:
    """Compare the backend of "auto", or on a CPU every backend that it may choose."""
    paths = ("tiles", "sdpa") if device.type == "cpu" else ("auto",)
    reference, tolerance = partial(op, backend="reference"), TOLERANCE[device.type]
    found = [compare(partial(op, backend=path), reference, inputs, tolerance) for path in paths]
    return found[0] if len(paths) == 1 else "; ".join(f"{p}: {detail}" for p, detail in zip(paths, found, strict=True))


def _as_trained(device: torch.device) -> AbstractContextManager[object]:
    """Autocast in the precision that "auto" chooses."""
    return autocast(resolve_precision("auto", device), device)


def _causal(device: torch.device) -> str:
    seq, inputs = _documents(device, 200), [_random(device, 1, 200, 4, 32) for _ in range(3)]
    return _compare_paths(lambda q, k, v, backend: causal_attention(q, k, v, seq, backend=backend), inputs, device)


def _windowed(device: torch.device) -> str:
    seq, inputs = _documents(device, 200), [_random(device, 1, 200, 4, 32) for _ in range(3)]

    def op(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return windowed_attention(q, k, v, seq, window=48, sinks=4, backend=backend)

    return _compare_paths(op, inputs, device)


def _delta_rule(device: torch.device) -> str:
    seq, (q, k, v) = _documents(device, 150), [_random(device, 1, 150, 2, 32) for _ in range(3)]
    gates = [-_random(device, 1, 150, 2).exp(), _random(device, 1, 150, 2).sigmoid()]

    def op(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, backend: str) -> Tensor:
        return gated_delta_rule(l2_normalize(q), l2_normalize(k), v, log_alpha, beta, seq=seq, backend=backend)[0]

    return _compare_backends(op, [q, k, v, *gates], device)


def _kimi_delta_attention(device: torch.device) -> str:
    seq, (q, k, v) = _documents(device, 150), [_random(device, 1, 150, 2, 32) for _ in range(3)]
    gates = [-_random(device, 1, 150, 2, 32).exp(), _random(device, 1, 150, 2).sigmoid()]

    def op(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, backend: str) -> Tensor:
        q, k = l2_normalize(q), l2_normalize(k)
        return kimi_delta_attention(q, k, v, log_alpha, beta, seq=seq, backend=backend)[0]

    return _compare_backends(op, [q, k, v, *gates], device)


def _convolution(device: torch.device) -> str:
    seq, inputs = _documents(device, 150), [_random(device, 1, 150, 24), _random(device, 24, 4)]
    return _compare_backends(lambda x, w, backend: short_conv(x, w, seq=seq, backend=backend), inputs, device)


def _grouped(device: torch.device) -> str:
    ends = torch.tensor([20, 20, 50, 64], dtype=torch.int32, device=device)
    inputs = [_random(device, 64, 32), _random(device, 4, 32, 48)]
    bf16 = resolve_precision("auto", device) == "bf16"  # the only dtype of these products on some devices
    with _as_trained(device):
        return _compare_backends(
            lambda x, w, backend: grouped_mm(x, w, ends, backend=backend),
            inputs,
            device,
            BF16_TOLERANCE if bf16 else None,
        )


def _cross_entropy(device: torch.device) -> str:
    labels = torch.arange(90, device=device) % 50
    return compare(
        lambda x, w: chunked_cross_entropy(x, w, labels, chunk=16),
        lambda x, w: F.cross_entropy(x @ w.T, labels, reduction="sum"),
        [_random(device, 90, 32), _random(device, 50, 32)],
        TOLERANCE[device.type],
    )


def _norm(device: torch.device) -> str:
    return compare(
        lambda x, w: rms_norm(x, w, 1e-6),
        lambda x, w: x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * w,
        [_random(device, 40, 64), _random(device, 64)],
        TOLERANCE[device.type],
    )


def tiny_model(device: torch.device) -> LanguageModel:
    """A model with every registered mixer and FFN."""
    mixers, ffns = (list(BLOCK_PARTS[part].values()) for part in ("mixer", "ffn"))
    blocks = {
        f"{index}": BlockConfig(mixer=mixers[index % len(mixers)].example(), ffn=ffns[index % len(ffns)].example())
        for index in range(max(len(mixers), len(ffns)))
    }
    config = LanguageModelConfig(vocab_size=64, width=64, blocks=blocks, pattern=tuple(blocks))
    return config.build().to(device)


def _training(device: torch.device) -> str:
    model = tiny_model(device).train()
    optimizer = AdamWConfig().build(model, lr=3e-3, weight_decay=0.1)
    tokens = torch.randint(8, (8, 64)).to(device)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with _as_trained(device):
            nats, _ = model.loss(tokens[:, :-1], tokens[:, 1:].contiguous())
        (nats / tokens[:, 1:].numel()).backward()
        optimizer.step()
        losses.append(nats.item() / tokens[:, 1:].numel())
    if not losses[-1] <= FALL * losses[0]:
        raise Wrong(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps, and must fall by 30 %")
    return f"loss {losses[0]:.2f} → {losses[-1]:.2f} in {STEPS} steps, every mixer and FFN"


def _norms_and_optimizers(device: torch.device) -> str:
    """Train small models for a few steps, so that every registered norm and optimizer is used once."""
    norms: list[Any] = list(members_of(NormConfig).values())
    optimizers: list[Any] = list(members_of(OptimizerConfig).values())
    tokens = torch.randint(8, (8, 32)).to(device)
    for index in range(max(len(norms), len(optimizers))):
        norm, optimizer = norms[index % len(norms)], optimizers[index % len(optimizers)]
        blocks = {"mha": BlockConfig(mixer=MHAConfig(n_heads=2))}
        config = LanguageModelConfig(vocab_size=64, width=64, blocks=blocks, pattern=("mha",), norm=norm.example())
        model = config.build().to(device).train()
        training = optimizer.example().build(model, lr=1e-3, weight_decay=0.0)
        losses = []
        for _ in range(5):
            training.zero_grad()
            nats, _ = model.loss(tokens[:, :-1], tokens[:, 1:].contiguous())
            loss = nats / tokens[:, 1:].numel()
            loss.backward()
            training.step()
            losses.append(loss.item())
        if not losses[-1] < losses[0]:
            raise Wrong(f"{optimizer.kind} with {norm.kind}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"the loss falls with each of {len(norms)} norms and {len(optimizers)} optimizers"


@torch.no_grad()
def _steps(device: torch.device) -> str:
    """Compare `step` with the forward pass. Without experts, because rounding may change which are chosen."""
    config = tiny_model(device).config
    dense = {name: replace(block, ffn=BlockConfig(mixer=block.mixer).ffn) for name, block in config.blocks.items()}
    model = replace(config, blocks=dense).build().to(device).eval()
    tokens = torch.randint(64, (2, 40)).to(device)
    state = model.init_state(2, 40)
    pieces = [model.step(piece, state) for piece in (tokens[:, :17], *tokens[:, 17:].split(1, dim=1))]
    worst = _difference(torch.cat(pieces, dim=1), model(tokens))
    allowed = 10 * TOLERANCE[device.type]
    if not worst <= allowed:
        raise Wrong(f"logits differ from those of the whole sequence by {worst:.1e}, allowed {allowed:.0e}")
    return f"a prompt and 23 single tokens within {worst:.0e} of the whole"


@torch.no_grad()
def _saving(device: torch.device) -> str:
    model = tiny_model(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), 1, tensors={"model": model.state_dict()}, state={})
        checkpoint = latest_checkpoint(Path(folder))
        assert checkpoint is not None
        other = tiny_model(device).eval()
        load_into(other, checkpoint.tensors("model"), origin=folder)
    tokens = torch.randint(64, (2, 40)).to(device)
    with _as_trained(device):
        logits, again = model(tokens), other(tokens)
    if not torch.equal(logits, again):
        raise Wrong("a saved and loaded model gives other logits")
    return "a checkpoint verifies and gives the same logits"
