"""Forward and backward of the ops beside other implementations: .venv/bin/python benchmarks/ops.py

Contenders take turns (A B A B …) in one process; printed are medians in milliseconds, after the machine's own matmul
rates. Needs the development dependencies (`make lint` installs them) and a machine with nothing else to do.
"""

import os
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from swamla.ops import (
    Layout,
    causal_attention,
    chunked_cross_entropy,
    gated_delta_rule,
    l2_normalize,
    rms_norm,
    short_conv,
    windowed_attention,
)

BF16, FP32 = torch.bfloat16, torch.float32


def race(title: str, contenders: dict[str, Callable[[], object]], rounds: int = 9) -> None:
    """Print the median time of each contender, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    print(f"{title}: " + ", ".join(f"{name} {sorted(found)[rounds // 2]:.2f}" for name, found in times.items()))


def backward(output: Callable[[], Tensor]) -> Callable[[], None]:
    """`output`, then its gradient in all inputs."""
    grad = torch.randn_like(output())
    return lambda: output().backward(grad)


def leaf(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def matmul() -> None:
    for dtype in (FP32, BF16):
        a = torch.randn(1024, 1024, dtype=dtype)
        race(f"matmul 1024³ {dtype} (1 ms is 2147 GFLOP/s)", {"torch": lambda a=a: a @ a}, 31)


def attention() -> None:
    for dtype in (BF16, FP32):
        q, k, v = (leaf(1, 4096, 6, 64, dtype=dtype) for _ in range(3))
        seq = Layout.one_document_per_row(1, 4096)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        contenders = {
            "torch causal": lambda h=heads_first: F.scaled_dot_product_attention(*h, is_causal=True),
            "causal": lambda q=q, k=k, v=v, seq=seq: causal_attention(q, k, v, seq),
            "windowed": lambda q=q, k=k, v=v, seq=seq: windowed_attention(q, k, v, seq, window=256, sinks=4),
        }
        race(f"attention T 4096, 6 heads of 64, {dtype}", {name: backward(run) for name, run in contenders.items()})
    for length in (2048, 4096, 8192, 16384, 32768):
        q, k, v = (leaf(1, length, 6, 64, dtype=BF16) for _ in range(3))
        seq = Layout.one_document_per_row(1, length)
        run = backward(lambda q=q, k=k, v=v, seq=seq: windowed_attention(q, k, v, seq, window=256, sinks=4))
        race(f"windowed attention T {length}, bf16", {"ours": run})


def delta_rule() -> None:
    for batch, length, heads in ((1, 4096, 6), (16, 256, 4)):
        gate = (-torch.rand(batch, length, heads)).requires_grad_()
        beta = torch.rand(batch, length, heads).requires_grad_()
        q, k, v = (leaf(batch, length, heads, 64) for _ in range(3))
        low = [x.detach().to(BF16).requires_grad_() for x in (q, k, v)]

        def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor = gate, beta: Tensor = beta) -> Tensor:
            return gated_delta_rule(l2_normalize(q), l2_normalize(k), v, gate, beta)[0]

        def theirs(q: Tensor = q, k: Tensor = k, v: Tensor = v, gate: Tensor = gate, beta: Tensor = beta) -> Tensor:
            return torch_chunk_gated_delta_rule(q, k, v, g=gate, beta=beta, use_qk_l2norm_in_kernel=True)[0]

        contenders = {
            "transformers fp32": backward(theirs),
            "fp32": backward(lambda q=q, k=k, v=v, ours=ours: ours(q, k, v)),
            "bf16": backward(lambda low=low, ours=ours: ours(*low)),
        }
        race(f"gated delta rule B {batch}, T {length}, {heads} heads of 64", contenders)


def convolution() -> None:
    for batch, length in ((16, 256), (1, 4096)):
        for dtype in (FP32, BF16):
            x, weight = leaf(batch, length, 768, dtype=dtype), leaf(768, 4, dtype=dtype)

            def torch_conv(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                padded = F.pad(x.mT, (3, 0))
                return F.silu(F.conv1d(padded, weight[:, None], groups=768).mT)

            contenders = {
                "conv1d": backward(torch_conv),
                "ours": backward(lambda x=x, weight=weight: short_conv(x, weight)),
            }
            race(f"short convolution ({batch}, {length}, 768) {dtype}", contenders)


def cross_entropy() -> None:
    for vocabulary in (4096, 50304):
        x, weight = leaf(4096, 256), leaf(vocabulary, 256)
        labels = torch.randint(vocabulary, (4096,))

        def plain(x: Tensor = x, weight: Tensor = weight, labels: Tensor = labels) -> None:
            with torch.autocast("cpu", BF16):
                loss = F.cross_entropy((x @ weight.T).float(), labels, reduction="sum")
            loss.backward()

        def chunked(x: Tensor = x, weight: Tensor = weight, labels: Tensor = labels) -> None:
            with torch.autocast("cpu", BF16):
                loss = chunked_cross_entropy(x, weight, labels)
            loss.backward()

        race(f"cross-entropy N 4096, D 256, V {vocabulary}, bf16 autocast", {"plain": plain, "ours": chunked}, 5)


def norm() -> None:
    x, weight = leaf(4096, 256), leaf(256)
    contenders = {
        "torch": backward(lambda: F.rms_norm(x, (256,), weight, 1e-6)),
        "ours": backward(lambda: rms_norm(x, weight, 1e-6)),
    }
    race("RMSNorm 4096 × 256 fp32", contenders, 31)


if __name__ == "__main__":
    for part in (matmul, attention, delta_rule, convolution, cross_entropy, norm):
        part()
