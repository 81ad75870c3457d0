"""The rows of the GPU benchmark, most important first: rows at the end are skipped if time runs out."""

import subprocess
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks import gpu_gates as gates
from benchmarks import gpu_ops as ops
from benchmarks.contenders import NANOCHAT, QWEN3_NEXT
from benchmarks.gpu_decoding import decoding_gate, generation
from benchmarks.gpu_running import Figures, Place, Row
from benchmarks.gpu_timing import ceilings
from benchmarks.gpu_training import gpt2_training, our_training, their_training
from swamla.bench.measuring import machine
from swamla.train.utilisation import peak_of

MACHINE, CEILINGS, GATES = "machine", "ceilings", "gates"
PACKAGES = ("triton", "transformers", "flash-linear-attention", "torchao")


def environment(place: Place) -> Iterator[Figures]:
    """The machine and the versions of packages."""
    found: Figures = {**machine(), "peak": peak_of(torch.device(place.device), "bf16").name, "cuda": torch.version.cuda}
    found |= {name: _version(name) for name in PACKAGES}
    if place.device == "cuda":
        found["driver"] = _driver()
        found["cudnn"] = torch.backends.cudnn.version()
        found["device_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    yield found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return answer[0] if answer else "unknown"


TUNING = 100  # seconds that flash-linear-attention may tune its kernels, once on a machine


def _gate(name: str, run: Any, *vouches: str, needs: float = 8, limit: float = 80) -> Row:
    return Row(name=name, table=GATES, run=run, vouches=vouches, needs=needs, limit=limit)


def _attention(backend: str) -> list[Row]:
    kinds = {"attention": gates.attention_gate}
    if backend != "cudnn":
        kinds["windowed attention"] = gates.windowed_gate
    vouched = f"attention/{backend}"
    return [_gate(f"{kind}, {backend}", partial(run, backend=backend), vouched) for kind, run in kinds.items()]


def _training(name: str, local: str, title: str = "bf16, compiled", **options: Any) -> Row:
    run = partial(our_training, name=name, local=local, **options)
    return Row(name=f"{name} {local}, {title}", table="training", run=run, needs=20, limit=100)


def _gpt2(name: str, title: str = "bf16, compiled", **options: Any) -> Row:
    run = partial(gpt2_training, name=name, **options)
    return Row(name=f"GPT-2 as {name}, {title}", table="training", run=run, needs=25, limit=110)


def _theirs(library: str, name: str, title: str, **options: Any) -> Row:
    run = partial(their_training, library=library, name=name, **options)
    return Row(name=f"{library} as {name}, {title}", table="training", run=run, needs=25, limit=110)


def _generation(name: str, local: str) -> Row:
    run = partial(generation, name=name, local=local)
    return Row(name=f"{name} {local}", table="generation", run=run, needs=15, limit=60)


def _op(table: str, name: str, run: Any, needs: float = 5) -> Row:
    return Row(name=name, table=table, run=run, needs=needs, limit=40)


# Most important first: the gates of the headline rows, then these rows; gates of other rows come before those. A first
# call of eight minutes should reach decoding.
ROWS: tuple[Row, ...] = (
    Row(name="environment", table=MACHINE, run=environment, needs=5),
    Row(name="ceilings", table=CEILINGS, run=ceilings, needs=5),
    *_attention("cudnn"),
    *_attention("flex"),
    *_attention("flash"),
    _gate("loss", gates.loss_gate, "loss/chunked"),
    _gate("experts", gates.experts_gate, "experts/torch"),
    _training("small", "swa"),
    _gpt2("small"),
    _training("base", "swa"),
    _training("moe-1b", "swa"),
    _theirs(NANOCHAT, "small", "bf16, compiled", compiled=True),
    *[
        _gate(f"decoding, {name}", partial(decoding_gate, decoding=name), f"decoding/{name}")
        for name in ("eager", "graph")
    ],
    _generation("small", "swa"),
    *[
        _gate(f"delta rule, {name}", partial(gates.delta_rule_gate, backend=name), f"delta rule/{name}", limit=limit)
        for name, limit in (("torch", 80), ("fla", 80 + TUNING))
    ],
    *[
        _gate(f"convolution, {name}", partial(gates.convolution_gate, backend=name), f"convolution/{name}", limit=limit)
        for name, limit in (("torch", 80), ("fla", 80 + TUNING))
    ],
    _gate("model, compiled", gates.model_gate, "model/compiled", needs=20, limit=90),
    _training("small", "gdn"),
    _training("base", "swa", "fp8, compiled", precision="fp8"),
    _op("loss", "head and cross-entropy", ops.losses),
    _op("optimizers", "small", partial(ops.optimizers, name="small")),
    _op("attention", "causal, cudnn", partial(ops.causal_ops, backend="cudnn")),
    _op("attention", "windowed, flex", partial(ops.windowed_ops, backend="flex"), 10),
    _training("small", "swa", "bf16, compiled, whole rows", documents=1.0),
    _training("small", "swa", "bf16, eager", compiled=False),
    _op("ffn", "mixture of experts", ops.experts),
    *_attention("torch"),
    _op("attention", "causal, torch", partial(ops.causal_ops, backend="torch")),
    _op("attention", "windowed, torch", partial(ops.windowed_ops, backend="torch"), 10),
    *[_op("delta rule", name, partial(ops.delta_rule_ops, backend=name)) for name in ("torch", "fla", "transformers")],
    _generation("base", "swa"),
    _training("base", "gdn"),
    _training("moe-1b", "gdn"),
    _theirs(QWEN3_NEXT, "small", "bf16, eager"),
    _gpt2("base"),
    _generation("small", "gdn"),
    _generation("moe-1b", "swa"),
    _op("attention", "causal, flex", partial(ops.causal_ops, backend="flex"), 10),
)
