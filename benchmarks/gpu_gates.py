"""Gates: the outputs and gradients of every fast path against its reference, before timing."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_models import batch_of, every_mixer, filled
from benchmarks.gpu_running import Figures, Place
from swamla.errors import MissingBackendError
from swamla.model import BlockConfig, DenseConfig, LanguageModelConfig
from swamla.model.compiling import compile_blocks
from swamla.model.language_model import LanguageModel
from swamla.ops import (
    causal_attention,
    chunked_cross_entropy,
    gated_delta_rule,
    grouped_mm,
    l2_normalize,
    short_conv,
    windowed_attention,
)
from swamla.ops.gated_delta.cuda import obstacle
from swamla.ops.layout import Layout
from swamla.train.precision import autocast

OUTPUT, GRADIENT = 1e-2, 2e-2  # largest ‖fast − reference‖ / ‖reference‖ in bf16
MODEL = 5e-2  # for the gradient of a whole model, where the errors of layers add up

Op = Callable[..., Tensor]  # of (*inputs, backend=…)
Case = tuple[str, Op, list[Tensor]]


def attention_gate(place: Place, backend: str) -> Iterator[Figures]:
    """Causal attention at MLA's widths, with shared keys, on packed documents, at a length that no block divides."""
    time = 48 if place.quick else 2000
    whole, packed = _layouts(place, time)
    wide, shared = (4, 4, 192, 128), (4, 2, 64, 64)  # heads, key heads, widths of keys and values
    cases = [
        (name, partial(causal_attention, seq=seq), _heads(place, seq, *shape))
        for name, seq, shape in (
            ("192/128 wide, whole rows", whole, wide),
            ("192/128 wide, documents", packed, wide),
            ("2 query heads a key, documents", packed, shared),
        )
    ]
    return _verdicts(cases, backend)


def windowed_gate(place: Place, backend: str) -> Iterator[Figures]:
    """Sliding-window attention, with and without sinks."""
    window, time = (16, 48) if place.quick else (256, 2000)
    whole, packed = _layouts(place, time)
    cases = [
        (name, partial(windowed_attention, seq=seq, window=window, sinks=sinks), _heads(place, seq, 4, 4, 64, 64))
        for name, seq, sinks in (
            ("whole rows, 4 sinks", whole, 4),
            ("documents, 4 sinks", packed, 4),
            ("documents, no sinks", packed, 0),
        )
    ]
    return _verdicts(cases, backend)


def delta_rule_gate(place: Place, backend: str) -> Iterator[Figures]:
    """The gated delta rule, with heads of 128 and 64 if the backend supports them on this GPU."""
    time = 48 if place.quick else 500
    device = torch.device(place.device)
    widths = [width for width in (128, 64) if backend != "fla" or obstacle(device, 2, width, width) is None]
    cases: list[Case] = []
    for rows, seq in zip(("whole rows", "documents"), _layouts(place, time), strict=True):
        for width in widths or (128, 64):
            q, k, v = _heads(place, seq, 2, 2, width, 2 * width)
            gates = [-0.3 * torch.rand(q.shape[:3], device=q.device), torch.rand(q.shape[:3], device=q.device)]
            cases.append((f"{width} wide, {rows}", partial(_delta_rule, seq=seq), [q, k, v, *gates]))
    return _verdicts(cases, backend)


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, **options: Any) -> Tensor:
    v = v.chunk(2, dim=-1)[0]  # a view of a wider tensor, as in the mixer
    return gated_delta_rule(l2_normalize(q), l2_normalize(k), v, log_alpha, beta, **options)[0]


def convolution_gate(place: Place, backend: str) -> Iterator[Figures]:
    """The short convolution of four taps, its input a slice of a wider tensor."""
    time, width = (48, 32) if place.quick else (2000, 3072)
    cases: list[Case] = []
    for rows, seq in zip(("whole rows", "documents"), _layouts(place, time), strict=True):
        x = torch.randn(*seq.shape, width, 2, device=place.device, dtype=torch.bfloat16)
        weight = torch.randn(width, 4, device=place.device)
        cases.append((rows, partial(_convolution, seq=seq), [x, weight]))
    return _verdicts(cases, backend)


def _convolution(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return short_conv(x.flatten(2)[..., : len(weight)], weight, **options)[..., None]


def loss_gate(place: Place) -> Iterator[Figures]:
    """Chunked cross-entropy."""
    tokens, width, vocabulary = (64, 32, 500) if place.quick else (4096, 512, 50304)
    x = torch.randn(tokens, width, device=place.device, dtype=torch.bfloat16)
    weight = 0.1 * torch.randn(vocabulary, width, device=place.device)
    labels = torch.randint(vocabulary, (tokens,), device=place.device)
    labels[::7] = -100

    def loss(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        if backend == "reference":
            return F.cross_entropy(x @ weight.mT, labels, reduction="sum")
        with autocast("bf16", x.device):
            return chunked_cross_entropy(x, weight, labels)

    return _verdicts([(f"{tokens} × {vocabulary}", loss, [x, weight])], "chunked")


def experts_gate(place: Place) -> Iterator[Figures]:
    """Grouped matrix products; some experts have no token."""
    tokens, experts, width = (64, 4, 32) if place.quick else (8192, 64, 256)
    x = torch.randn(tokens, width, device=place.device, dtype=torch.bfloat16)
    weight = torch.randn(experts, width, 2 * width, device=place.device, dtype=torch.bfloat16) * width**-0.5
    chosen = torch.randint(experts, (tokens,), device=place.device) // 2 * 2  # odd experts get no token
    ends = torch.bincount(chosen, minlength=experts).cumsum(0).int()
    return _verdicts([(f"{experts} experts", partial(_product, ends=ends), [x, weight])], "torch")


def _product(x: Tensor, weight: Tensor, ends: Tensor, backend: str) -> Tensor:
    return grouped_mm(x, weight, ends, backend=backend)


def model_gate(place: Place) -> Iterator[Figures]:
    """A compiled model with every mixer, in bf16 on packed documents, against the references in fp32."""
    length = 48 if place.quick else 1000
    reference, fast = (filled(hybrid(place, backend), place.device) for backend in ("reference", "auto"))
    fast.load_state_dict(reference.state_dict())
    if not place.quick:
        compile_blocks(fast, "default", torch.device(place.device))
    batch = batch_of(2, length, fast.config.vocab_size, documents=4)
    seq = Layout.from_documents(batch.document_BT).to(place.device)
    tokens_BT, labels_BT = batch.tokens_BT.to(place.device), batch.labels_BT.to(place.device)

    def loss_and_gradient(model: LanguageModel) -> tuple[Tensor, Tensor]:
        loss = model.loss(tokens_BT, labels_BT, seq)[0]
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = loss_and_gradient(reference)
    with autocast("bf16", torch.device(place.device)):
        found = loss_and_gradient(fast)
    output, gradient = (relative(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    yield _verdict("gdn swa mla", output, gradient, most=(OUTPUT, MODEL))


def hybrid(place: Place, backend: str) -> LanguageModelConfig:
    """A model with every mixer, all on this backend."""
    mixers = every_mixer(16, window=16) if place.quick else every_mixer(128, window=256)
    blocks = {
        name: BlockConfig(mixer=replace(mixer, backend=backend), ffn=DenseConfig(hidden=64 if place.quick else 512))
        for name, mixer in mixers.items()
    }
    width, vocabulary = (32, 64) if place.quick else (256, 1024)
    return LanguageModelConfig(vocab_size=vocabulary, width=width, blocks=blocks, pattern=tuple(blocks))


def _layouts(place: Place, time: int) -> tuple[Layout, Layout]:
    """Two rows of one document each, and two rows of several documents and padding."""
    document_BT = batch_of(2, time, 2, documents=5).document_BT
    document_BT[:, -time // 10 :] = -1
    whole = Layout.one_document_per_row(2, time, device=place.device)
    return whole, Layout.from_documents(document_BT).to(place.device)


def _heads(place: Place, seq: Layout, heads: int, groups: int, key: int, value: int) -> list[Tensor]:
    shapes = [(heads, key), (groups, key), (groups, value)]
    return [torch.randn(*seq.shape, *shape, device=place.device, dtype=torch.bfloat16) for shape in shapes]


def _verdicts(cases: Iterable[Case], backend: str) -> Iterator[Figures]:
    """Every case's errors against the reference in fp32 on the same inputs, or why the backend cannot compute it."""
    for name, op, inputs in cases:
        expected = _with_gradients(partial(op, backend="reference"), [x.float() for x in inputs])
        try:
            found = _with_gradients(partial(op, backend=backend), inputs)
        except MissingBackendError as missing:
            yield {"case": name, "skipped": str(missing)}
            continue
        output, *gradients = map(relative, found, expected)
        yield _verdict(name, output, max(gradients, key=lambda error: math.inf if math.isnan(error) else error))


def _verdict(name: str, output: float, gradient: float, most: tuple[float, float] = (OUTPUT, GRADIENT)) -> Figures:
    passed = output <= most[0] and gradient <= most[1]  # False for NaN
    return {"case": name, "output_error": output, "gradient_error": gradient, "passed": int(passed)}


def _with_gradients(op: Op, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients for a fixed upstream gradient; outputs of padding are masked."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = op(*leaves)
    seq = op.keywords.get("seq")  # type: ignore[attr-defined]
    if seq is not None:
        output = output * (seq.document_BT >= 0)[..., None, None]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


def relative(mine: Tensor, theirs: Tensor) -> float:
    """‖mine − theirs‖ / ‖theirs‖."""
    mine, theirs = mine.detach().double(), theirs.detach().double()
    return float((mine - theirs).norm() / theirs.norm())
