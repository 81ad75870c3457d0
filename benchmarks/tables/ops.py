"""Single ops, forward and backward: ours against PyTorch's or transformers', on the training table's shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.running import Bench, Maker, times_faster
from swamla.bench.measuring import Run
from swamla.bench.results import Row
from swamla.model import MoEConfig
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

TABLE = "ops"
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = {"bf16": BF16, "fp32": FP32}
OURS = "swamla"
ROUNDS, LIMIT = 15, 6.0  # of one race; seconds


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the ops. tokens: of a row.  lengths: for windowed attention by length.  experts, hidden: of the MoE."""

    tokens: int = 4096
    heads: int = 6
    head: int = 64
    window: int = 256
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    vocabularies: tuple[int, ...] = (4096, 50304)
    experts: int = 32
    hidden: int = 256

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.heads * self.head


QUICK = Sizes(tokens=64, heads=2, head=16, window=16, lengths=(32, 64), vocabularies=(64, 256), experts=4, hidden=16)
Race = tuple[Row, dict[str, Maker]]  # common entries of its rows; contenders, the baseline first
BY_LENGTH = "windowed attention by length"  # has no baseline


def measure(bench: Bench) -> None:
    """The table, op by op."""
    sizes = QUICK if bench.quick else Sizes()
    for races in (attention, delta_rule, windows, cross_entropy, experts, convolution, norm):
        for what, makers in races(sizes):
            outcomes = bench.race(TABLE, what, makers, rounds=ROUNDS, limit=LIMIT)
            baseline = None if what["op"] == BY_LENGTH else outcomes.get(next(iter(makers)))
            for name, outcome in outcomes.items():
                row: Row = {"name": name, **what, "ratio": times_faster(baseline, outcome)}
                bench.results.add(TABLE, {**row, "peak_bytes": outcome.peak_bytes, **outcome.row()})


def attention(sizes: Sizes) -> Iterator[Race]:
    """Causal and windowed attention against PyTorch's causal one."""
    for kind, dtype in DTYPES.items():
        q, k, v = (leaf(1, sizes.tokens, sizes.heads, sizes.head, dtype=dtype) for _ in range(3))
        seq = Layout.one_document_per_row(1, sizes.tokens)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        yield (
            {"op": "attention", "length": sizes.tokens, "dtype": kind},
            {
                "PyTorch, causal": backward(lambda h=heads_first: F.scaled_dot_product_attention(*h, is_causal=True)),
                f"{OURS}, causal": backward(lambda q=q, k=k, v=v, seq=seq: causal_attention(q, k, v, seq)),
                f"{OURS}, windowed": backward(
                    lambda q=q, k=k, v=v, seq=seq: windowed_attention(q, k, v, seq, window=sizes.window, sinks=4)
                ),
            },
        )


def windows(sizes: Sizes) -> Iterator[Race]:
    """Windowed attention at several lengths in the same rounds: its time should be linear in the length."""
    makers = {}
    for length in sizes.lengths:
        q, k, v = (leaf(1, length, sizes.heads, sizes.head, dtype=BF16) for _ in range(3))
        seq = Layout.one_document_per_row(1, length)
        makers[f"{length} tokens"] = backward(
            lambda q=q, k=k, v=v, seq=seq: windowed_attention(q, k, v, seq, window=sizes.window, sinks=4)
        )
    yield {"op": BY_LENGTH, "dtype": "bf16"}, makers


def delta_rule(sizes: Sizes) -> Iterator[Race]:
    """The gated delta rule against transformers' fallback in PyTorch."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    shape = (1, sizes.tokens, sizes.heads)
    gate, beta = (-torch.rand(shape)).requires_grad_(), torch.rand(shape).requires_grad_()
    for kind, dtype in DTYPES.items():
        q, k, v = (leaf(*shape, sizes.head, dtype=dtype) for _ in range(3))

        def theirs(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return torch_chunk_gated_delta_rule(q, k, v, g=gate, beta=beta, use_qk_l2norm_in_kernel=True)[0]

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return gated_delta_rule(l2_normalize(q), l2_normalize(k), v, gate, beta)[0]

        what: Row = {"op": "gated delta rule", "length": sizes.tokens, "dtype": kind}
        yield what, {"transformers": backward(theirs), OURS: backward(ours)}


def cross_entropy(sizes: Sizes) -> Iterator[Race]:
    """Head and cross-entropy; the bytes of the gradients themselves are listed apart."""
    for vocabulary in sizes.vocabularies:
        x, weight = leaf(sizes.tokens, sizes.width), leaf(vocabulary, sizes.width)
        labels = torch.randint(vocabulary, (sizes.tokens,))

        def plain(x: Tensor = x, weight: Tensor = weight, labels: Tensor = labels) -> None:
            with torch.autocast("cpu", BF16):
                loss = F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")
            torch.autograd.grad(loss, (x, weight))

        def chunked(x: Tensor = x, weight: Tensor = weight, labels: Tensor = labels) -> None:
            with torch.autocast("cpu", BF16):
                loss = chunked_cross_entropy(x, weight, labels)
            torch.autograd.grad(loss, (x, weight))

        what: Row = {
            "op": "head and cross-entropy",
            "length": sizes.tokens,
            "vocabulary": vocabulary,
            "dtype": "bf16 autocast",
            "gradient_bytes": x.nbytes + weight.nbytes,
        }
        yield what, {"PyTorch": lambda plain=plain: plain, OURS: lambda chunked=chunked: chunked}


def experts(sizes: Sizes) -> Iterator[Race]:
    """A mixture of experts with DeepSeek-V3's routing, one shared expert and four active ones."""

    def theirs() -> Run:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        config = DeepseekV3Config(
            vocab_size=8,
            hidden_size=sizes.width,
            moe_intermediate_size=sizes.hidden,
            num_hidden_layers=1,
            first_k_dense_replace=0,
            num_attention_heads=sizes.heads,
            n_routed_experts=sizes.experts,
            num_experts_per_tok=4,
            n_group=1,
            topk_group=1,
            num_mtp_layers=0,
        )
        return step(DeepseekV3ForCausalLM(config).model.layers[0].mlp)

    def ours() -> Run:
        moe = MoEConfig(n_experts=sizes.experts, n_activated=4, expert_hidden=sizes.hidden).build(sizes.width)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        seq = Layout.one_document_per_row(1, sizes.tokens)
        return step(lambda x: moe(x, seq)[0])

    x = leaf(1, sizes.tokens, sizes.width)

    def step(module: Callable[[Tensor], Tensor]) -> Run:
        def run() -> None:
            with torch.autocast("cpu", BF16):
                y = module(x)
            y.sum().backward()

        return run

    what: Row = {"op": "mixture of experts", "length": sizes.tokens, "experts": sizes.experts, "dtype": "bf16 autocast"}
    yield what, {"transformers": theirs, OURS: ours}


def convolution(sizes: Sizes) -> Iterator[Race]:
    """The short convolution of queries, keys and values, with its SiLU, against `F.conv1d`."""
    channels = 3 * sizes.width
    for kind, dtype in DTYPES.items():
        x, weight = leaf(1, sizes.tokens, channels, dtype=dtype), leaf(channels, 4, dtype=dtype)

        def theirs(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=channels).mT)

        what: Row = {"op": "short convolution", "length": sizes.tokens, "dtype": kind}
        yield what, {"PyTorch": backward(theirs), OURS: backward(lambda x=x, weight=weight: short_conv(x, weight))}


def norm(sizes: Sizes) -> Iterator[Race]:
    """RMSNorm of the residual stream."""
    x, weight = leaf(sizes.tokens, sizes.width), leaf(sizes.width)
    yield (
        {"op": "RMSNorm", "length": sizes.tokens, "dtype": "fp32"},
        {
            "PyTorch": backward(lambda: F.rms_norm(x, (sizes.width,), weight, 1e-6)),
            OURS: backward(lambda: rms_norm(x, weight, 1e-6)),
        },
    )


def backward(output: Callable[[], Tensor]) -> Maker:
    """A contender that computes `output` and its gradients."""

    def make() -> Run:
        grad = torch.randn_like(output())
        return lambda: output().backward(grad)

    return make


def leaf(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """A random tensor that requires a gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)
