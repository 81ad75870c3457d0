"""Single ops, forward and backward, by backend; and the step of each optimizer."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_models import filled, preset
from benchmarks.gpu_running import Figures, Place
from benchmarks.gpu_timing import timed, times
from swamla.bench.measuring import peak_memory
from swamla.model import DenseConfig
from swamla.model.accounting import parameter_specs
from swamla.ops import (
    Layout,
    causal_attention,
    chunked_cross_entropy,
    gated_delta_rule,
    l2_normalize,
    windowed_attention,
)
from swamla.train.optim import AdamWConfig, MuonConfig, OptimizerConfig
from swamla.train.precision import autocast

BF16 = torch.bfloat16
BOTH_WAYS = 3.5  # FLOPs of forward and backward over forward: attention's backward has five products for two


def causal_ops(place: Place, backend: str) -> Iterator[Figures]:
    """MLA's attention: 16 heads with keys of 192 and values of 128."""
    heads, key, value = (2, 16, 16) if place.quick else (16, 192, 128)
    for batch, time in _sizes(place, (8, 2048), (1, 16384)):
        seq = Layout.one_document_per_row(batch, time, device=place.device)
        inputs = _leaves(place, *((batch, time, heads, width) for width in (key, key, value)))
        timing = timed(_both(partial(causal_attention, seq=seq, backend=backend), inputs), place)
        flops = BOTH_WAYS * batch * heads * (key + value) * time * (time + 1)
        yield {
            "shape": f"{batch} × {time}, {heads} heads {key}/{value}",
            **times(timing),
            "tflops_per_s": flops / timing.median / 1e12,
            "uses": [f"attention/{backend}"],
        }


def windowed_ops(place: Place, backend: str) -> Iterator[Figures]:
    """Sliding-window attention, window 256 with 4 sinks: 16 heads of 64."""
    heads, window = (2, 16) if place.quick else (16, 256)
    for batch, time in _sizes(place, (8, 2048), (1, 32768)):
        seq = Layout.one_document_per_row(batch, time, device=place.device)
        inputs = _leaves(place, *[(batch, time, heads, 64)] * 3)
        attend = partial(windowed_attention, seq=seq, window=window, sinks=4, backend=backend)
        timing = timed(_both(attend, inputs), place)
        yield {
            "shape": f"{batch} × {time}, {heads} heads of 64",
            **times(timing),
            "tokens_per_s": batch * time / timing.median,
            "uses": [f"attention/{backend}"],
        }


def delta_rule_ops(place: Place, backend: str) -> Iterator[Figures]:
    """The gated delta rule: 8 heads of 128. The backend "transformers" is Qwen3-Next's own, in torch."""
    heads, width = (2, 16) if place.quick else (8, 128)
    rule = _transformers_rule() if backend == "transformers" else partial(_our_rule, backend=backend)
    for batch, time in _sizes(place, (8, 2048), (1, 32768)):
        q, k, v = _leaves(place, *[(batch, time, heads, width)] * 3)
        gates = torch.rand(2, batch, time, heads, device=place.device)
        log_alpha, beta = (-0.3 * gates[0]).requires_grad_(), gates[1].clone().requires_grad_()
        timing = timed(_both(rule, [q, k, v, log_alpha, beta]), place)
        yield {
            "shape": f"{batch} × {time}, {heads} heads of {width}",
            **times(timing),
            "tokens_per_s": batch * time / timing.median,
            "uses": [f"delta rule/{backend}"],
        }


def _our_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, *, backend: str) -> Tensor:
    return gated_delta_rule(l2_normalize(q), l2_normalize(k), v, log_alpha, beta, backend=backend)[0]


def _transformers_rule() -> Callable[..., Tensor]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(q, k, v, g=log_alpha, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    return rule


def losses(place: Place) -> Iterator[Figures]:
    """Head and cross-entropy of 16,384 tokens: with all logits at once, and chunked."""
    tokens, width, vocabulary = (64, 32, 512) if place.quick else (16384, 1024, 50304)
    x, weight = _leaves(place, (tokens, width), (vocabulary, width), dtype=torch.float32)
    labels = torch.randint(vocabulary, (tokens,), device=place.device)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.mT).float(), labels, reduction="sum")

    def chunked(x: Tensor, weight: Tensor) -> Tensor:
        return chunked_cross_entropy(x, weight, labels)

    for name, loss in {"plain": plain, "chunked": chunked}.items():
        run = _both(_in_bf16(place, loss), [x, weight])
        run()
        timing = timed(run, place)
        yield {
            "loss": name,
            **times(timing),
            "peak_bytes": peak_memory(run),
            "tokens_per_s": tokens / timing.median,
            "uses": ["loss/chunked"] if name == "chunked" else [],
        }


def experts(place: Place) -> Iterator[Figures]:
    """The mixture of experts of moe-1b beside a dense FFN with its number of active parameters."""
    config = preset("moe-1b", "swa", place)
    sparse, width = config.blocks["mla"].ffn, config.width
    dense = DenseConfig(hidden=round(sparse.n_active_parameters(width) / (3 * width) / 64 + 0.5) * 64)
    batch, time = (2, 32) if place.quick else (8, 2048)
    (x,) = _leaves(place, (batch, time, width))
    seq = Layout.one_document_per_row(batch, time, device=place.device)
    for name, ffn in {"latent_moe": sparse, "dense": dense}.items():
        with torch.device(place.device):
            module = ffn.build(width)
        timing = timed(
            _both(_in_bf16(place, lambda x, *_, module=module: module(x, seq)[0]), [x, *module.parameters()]), place
        )
        yield {
            "ffn": name,
            **times(timing),
            "tokens_per_s": batch * time / timing.median,
            "tflops_per_s": 3 * batch * ffn.forward_flops(width, time) / timing.median / 1e12,
            "active": ffn.n_active_parameters(width),
            "uses": ["experts/torch"] if name == "latent_moe" else [],
        }


def optimizers(place: Place, name: str) -> Iterator[Figures]:
    """One step of each optimizer on a preset; the one that needs torchao is last."""
    config = preset(name, "swa", place)
    model = filled(config, place.device)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    contenders: dict[str, OptimizerConfig] = {
        "AdamW, fused": AdamWConfig(),
        "Muon": MuonConfig(),
        "AdamW, 8-bit moments": AdamWConfig(moments="8bit"),
    }
    numbers = sum(p.numel() for p in model.parameters())
    for title, settings in contenders.items():
        optimizer = settings.build(model, lr=1e-4, weight_decay=0.1)
        timing, state = timed(optimizer.step, place), settings.state_bytes(parameter_specs(config))
        yield {
            "optimizer": title,
            **times(timing),
            "parameters": numbers,
            "state_bytes": state,
            "least_bytes_per_s": (12 * numbers + 2 * state)
            / timing.median,  # read and write weights and state, read gradients
        }
        del optimizer


def _sizes(place: Place, *sizes: tuple[int, int]) -> list[tuple[int, int]]:
    """Batch sizes and row lengths."""
    return [(2, 48)] if place.quick else list(sizes)


def _leaves(place: Place, *shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> list[Tensor]:
    return [torch.randn(shape, device=place.device, dtype=dtype, requires_grad=True) for shape in shapes]


def _in_bf16(place: Place, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Under autocast."""

    def run(*inputs: Tensor) -> Tensor:
        with autocast("bf16", torch.device(place.device)):
            return op(*inputs)

    return run


def _both(op: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward pass of `op` on `inputs`."""
    upstream = torch.randn_like(op(*inputs).detach())

    def run() -> object:
        return torch.autograd.grad(op(*inputs), inputs, upstream, allow_unused=True)

    return run
