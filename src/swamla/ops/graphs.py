"""How ops meet torch.compile: excluded from graphs, or always compiled as a graph of their own."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

SHAPES = 64  # kinds of inputs that one function is compiled for


def outside_graphs(function: F) -> F:
    """`torch.compiler.disable`: the graph breaks at this op.

    For ops whose Python code depends on the documents' lengths, which would be recompiled for every batch, and for ops
    that the compiler supports in some dtypes only. The compiler is loaded when it first traces the op, because loading
    it takes as long as loading torch, and most programs compile nothing.
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
    """`function` compiled as one graph, with or without `--compile`: for ops that waste memory uncompiled.

    A dimension's second size compiles kernels for all sizes. More than `SHAPES` kinds of inputs are an error: there is
    no silent fallback to uncompiled code.
    """
    import torch.compiler.config as config

    config.recompile_limit = max(config.recompile_limit, SHAPES)
    return torch.compile(function, fullgraph=True)  # type: ignore[return-value]


def in_dtype_of(x: Tensor, y: Tensor) -> Tensor:
    """y in x's dtype. For the end of an autograd function in a graph: torch 2.11 loses its gradient where the last
    operation is a cast to the dtype that y has already.
    """
    return y if y.dtype == x.dtype else y.to(x.dtype)
