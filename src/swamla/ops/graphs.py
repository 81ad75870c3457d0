"""What torch.compile makes of an op: nothing, or one graph of its own."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

SHAPES = 64


def outside_graphs(function: F) -> F:
    """`torch.compiler.disable`: a graph ends before this op, and another begins behind it.

    For ops whose Python depends on where documents lie, which would be compiled anew for every batch, and for those
    that the compiler knows in some dtypes only. It is asked for when the compiler first meets the op: loading the
    compiler takes as long as loading torch, which a program that compiles nothing is spared.
    """
    disabled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal disabled
        if not torch.compiler.is_compiling():
            return function(*args, **options)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **options)

    return call  # type: ignore[return-value]


def is_fused(x: Tensor) -> bool:
    """Whether x is traced by a compiler that makes one kernel of elementwise operations: on any device but a CPU.

    Plain tensor code is then as fast as a hand-written pass, which would end the graph.
    """
    return torch.compiler.is_compiling() and x.device.type != "cpu"


@lru_cache
def compiled(function: F) -> F:
    """`function` as one graph, whatever else is compiled: for ops that would waste memory uncompiled.

    The second size of a dimension compiles kernels for every size of it. More than `SHAPES` kinds of inputs are an
    error, and never computed uncompiled.
    """
    import torch.compiler.config as config

    config.recompile_limit = max(config.recompile_limit, SHAPES)
    return torch.compile(function, fullgraph=True)  # type: ignore[return-value]


def in_dtype_of(x: Tensor, y: Tensor) -> Tensor:
    """y in x's dtype. For the end of an autograd function in a graph: torch 2.11 loses its gradient where the last
    operation is a cast to the dtype that y has already.
    """
    return y if y.dtype == x.dtype else y.to(x.dtype)
