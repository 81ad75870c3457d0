"""Where the time of a training step goes: PyTorch's kernels by kind, from its profiler."""

from collections import defaultdict
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import QUICK, Shape, contender
from benchmarks.running import Bench
from benchmarks.tables.training import training_step

TABLE = "profile"
NAMES = ("swa swa mla", "gdn gdn mla", "mha")
LENGTH, ROWS, STEPS = 1024, 4, 3

KINDS = {
    "products with weights": "mm addmm",
    "products in mixers": "bmm baddbmm baddbmm_ linalg_solve_triangular addmv_",
    "softmax and exponentials": "_softmax _softmax_backward_data exp exp_ silu silu_backward sigmoid softplus log_",
    "copies and casts": "copy_ cat fill_ index_select index_put_ index_add_ scatter_add_ gather constant_pad_nd",
    "optimizer": "_fused_adamw_",
}
ELEMENTWISE = "other elementwise work"
OVERHEAD = "between kernels"  # the interpreter, autograd, dispatch, and these ops, which compute nothing:
VIEWS = """
    view reshape slice select as_strided transpose t permute unsqueeze expand unflatten flatten split split_with_sizes
    squeeze unbind detach narrow chunk unfold _unsafe_view empty empty_strided empty_like new_empty new_zeros zeros
    to _to_copy item _local_scalar_dense matmul linear softmax
"""
KIND_OF = {op: name for name, ops in [*KINDS.items(), (OVERHEAD, VIEWS)] for op in ops.split()}


def measure(bench: Bench) -> None:
    """The table, a row per model."""
    shape, length, rows = (QUICK, 32, 2) if bench.quick else (Shape(), LENGTH, ROWS)
    for name in NAMES:
        step = training_step(contender(name, shape, length), shape.vocabulary, rows, length)
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(STEPS):
                step()
        bench.results.add(TABLE, {"name": name, "step_tokens": rows * length, **shares(profiler.key_averages())})


def shares(events: Any) -> dict[str, float]:
    """The share of the time of each kind of kernel, and of the time between kernels."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        found[kind(event.key)] += event.self_cpu_time_total
    whole = sum(found.values())
    return {name: found[name] / whole for name in (*KINDS, ELEMENTWISE, OVERHEAD)}


def kind(event: str) -> str:
    """The kind of a profiler event."""
    op = event.removeprefix("aten::")
    return OVERHEAD if op == event else KIND_OF.get(op, ELEMENTWISE)
