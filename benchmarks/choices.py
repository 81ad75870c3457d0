"""Every op's chosen path against its alternatives, on this machine and on slower ones that it emulates.

    python -m benchmarks.choices

Each emulated machine is a process with restricted instructions, with one thread and with two. Paths that are raced
(attention) are chosen as in a training run, with an empty cache; those of the other ops are fixed. Then all paths are
timed alternately, forward and backward, for longer than the race took. A ratio is between the shortest times, because
disturbances only add time. 1.00: the chosen path is the fastest; 0.90: another path takes a tenth less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from swamla import process

process.prepare()  # as the command line does

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.ops import gated_delta_rule, l2_normalize, short_conv
from swamla.ops.attention.trial import AttentionTrial
from swamla.ops.layout import Layout
from swamla.ops.linear import linear
from swamla.train.precision import Chosen
from swamla.train.racing import UNITS, choose, describe_cpu

MACHINES = {
    "as it is": {},
    "AVX512-BF16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "AVX512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "plain": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
WITH_BF16 = ("as it is", "AVX512-BF16")  # elsewhere it is emulated, and "auto" is fp32
TRIALS = (
    AttentionTrial(heads=6, key_heads=6, key=64, value=64),
    AttentionTrial(heads=6, key_heads=6, key=96, value=64),
    AttentionTrial(heads=6, key_heads=6, key=64, value=64, window=256, sinks=4),
)
LENGTHS = (512, 1024, 4096)
SECONDS = 3.0  # to time the paths of one op
LEAST = 0.95  # lowest accepted ratio

Step = Callable[[], object]
Contest = tuple[str, str, dict[str, Step]]  # op, chosen path, all paths


def contests(precision: Chosen) -> Iterator[Contest]:
    """All ops with more than one path."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for length in LENGTHS:
        chosen = choose(set(TRIALS), dtype, length=length)
        for trial in TRIALS:
            steps = {path: trial.step(path, length, dtype) for path in trial.paths(dtype)}
            yield f"{trial}, documents of {length}", chosen[trial].chosen, steps
    for rows, length, channels in ((1, 4096, 1152), (8, 512, 768)):
        yield _convolution(rows, length, channels, dtype)
    for width in (64, 128):
        yield _delta_rule(width, dtype)
    if precision == "fp32":
        for rows, width, out in ((1, 384, 1152), (1, 384, 4096), (8, 1024, 4096), (64, 384, 1152), (512, 384, 1152)):
            yield _linear(rows, width, out)


def _gradients(op: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Step:
    leaves = [x.requires_grad_() for x in inputs]
    upstream = torch.ones_like(op(*leaves))
    return lambda: torch.autograd.grad(op(*leaves), leaves, upstream)


def _convolution(rows: int, length: int, channels: int, dtype: torch.dtype) -> Contest:
    x_BTD, weight_DW = torch.randn(rows, length, channels).to(dtype), torch.randn(channels, 4)

    def pytorch(x_BTD: Tensor, weight_DW: Tensor) -> Tensor:
        y = F.conv1d(F.pad(x_BTD.mT, (3, 0)), weight_DW[:, None].to(x_BTD.dtype), groups=len(weight_DW))
        return F.silu(y).mT

    seq = Layout.one_document_per_row(rows, length)
    paths = {name: partial(short_conv, seq=seq, backend=name) for name in ("torch", "reference")}
    steps = {name: _gradients(op, (x_BTD, weight_DW)) for name, op in {**paths, "F.conv1d": pytorch}.items()}
    return f"short convolution, {rows} × {length} tokens, {channels} channels", "torch", steps


def _delta_rule(width: int, dtype: torch.dtype) -> Contest:
    q, k, v = (torch.randn(1, 4096, 4, width).to(dtype) for _ in range(3))
    gates = [-torch.rand(1, 4096, 4), torch.rand(1, 4096, 4)]

    def rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, chunk: int) -> Tensor:
        return gated_delta_rule(l2_normalize(q), l2_normalize(k), v, log_alpha, beta, chunk=chunk)[0]

    steps = {str(chunk): _gradients(partial(rule, chunk=chunk), [q, k, v, *gates]) for chunk in (32, 64)}
    return f"delta rule, 4 heads of {width}, 4096 tokens, by chunk", "32", steps


def _linear(rows: int, width: int, out: int) -> Contest:
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    times = max(1, 50_000_000 // (rows * out * width))

    def many(op: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def step() -> None:
            with torch.no_grad():
                for _ in range(times):
                    op(x, weight)

        return step

    def onednn(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    steps = {"chosen": many(linear), "F.linear": many(F.linear), "oneDNN": many(onednn)}
    return f"linear without gradients, {rows} rows, {width} to {out}", "chosen", steps


def shortest(steps: dict[str, Step]) -> dict[str, float]:
    """The shortest time of each path, timed alternately (A B A B …)."""
    begin, found = time.perf_counter(), dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
    rounds = 0
    while rounds < 3 or time.perf_counter() - begin < SECONDS:
        rounds += 1
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            found[name] = min(found[name], time.perf_counter() - started)
    return found


def here(precisions: Sequence[Chosen]) -> None:
    """Print a JSON line for every op, measured in this process."""
    torch.manual_seed(0)
    print(json.dumps(describe_cpu()), flush=True)
    for precision in precisions:
        for op, chosen, steps in contests(precision):
            print(json.dumps({"op": op, "precision": precision, "chosen": chosen, "s": shortest(steps)}), flush=True)


def emulate(name: str, threads: int) -> float:
    """Measure on one emulated machine and print its table; returns the lowest ratio."""
    bf16 = name in WITH_BF16 and any(there() for there in UNITS.values())
    precisions = "bf16,fp32" if bf16 else "fp32"
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | MACHINES[name] | {"OMP_NUM_THREADS": str(threads), "SWAMLA_CACHE": cache}
        environment.pop("SWAMLA_MEASURE", None)
        command = [sys.executable, "-m", "benchmarks.choices", "--here", precisions]
        found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    machine, *rows = map(json.loads, found.splitlines())
    print(f"\n{name}, {threads} threads: {machine['processor']}, {machine['instructions']}\n")
    print("| op | | chosen | ms | alternatives, ms | best by chosen |\n| --- | --- | --- | --- | --- | --- |")
    ratios = []
    for row in rows:
        took, best = row["s"][row["chosen"]], min(row["s"].values())
        others = ", ".join(f"{path} {1e3 * s:.3g}" for path, s in row["s"].items() if path != row["chosen"])
        ratios.append(best / took)
        print(
            f"| {row['op']} | {row['precision']} | {row['chosen']} | {1e3 * took:.3g} | {others} | {ratios[-1]:.2f} |",
            flush=True,
        )
    return min(ratios)


def main() -> int:
    """Measure on all machines; the exit status is 1 if a ratio is below `LEAST`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MACHINES), help=f"some of {', '.join(MACHINES)}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--here", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        here(options.here.split(","))
        return 0
    names = options.only.split(",")
    if unknown := set(names) - MACHINES.keys():
        parser.error(f"--only {', '.join(unknown)}: must be some of {', '.join(MACHINES)}")
    lowest = min(emulate(name, int(threads)) for name in names for threads in options.threads.split(","))
    print(f"\nlowest ratio: {lowest:.2f}, must be at least {LEAST}")
    return int(lowest < LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
