"""Which ops torch.compile's graphs hold, and which it calls as they are."""

from collections.abc import Callable
from functools import lru_cache, wraps
from types import CodeType
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

SHAPES = 64
OUTSIDE = ("cpu",)  # devices on which no graph holds an op that could be inside: it is as fast between graphs

_held: list[list[Callable[..., Any]]] = []  # what each marked function calls, until it is kept outside
_open: list[CodeType] = []  # of functions marked `open_to_graphs`
_constant: list[Callable[..., Any]] = []


def outside_graphs(function: F) -> F:
    """Mark an op that a graph should not hold: it ends there, and another begins behind it.

    Such are ops whose Python depends on where documents lie, which would be compiled anew for every batch, and those
    that the compiler knows in some number formats only. Nothing changes before `keep_outside_graphs`, so that who
    compiles nothing need not load the compiler.
    """
    held: list[Callable[..., Any]] = [function]
    _held.append(held)

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return held[0](*args, **options)

    return call  # type: ignore[return-value]


def open_to_graphs(function: F) -> F:
    """Mark an op that chooses: a graph holds it where it computes by itself, and ends where it calls one outside.

    It is compiled as part of a graph or not at all.
    """
    _open.append(function.__code__)
    return function


def constant_in_graphs(function: F) -> F:
    """Mark a question about this machine: asked while a graph is made, its answer is part of the graph."""
    _constant.append(function)
    return function


@lru_cache
def compiled(function: F) -> F:
    """`function` as one graph, whatever else is compiled: for those that would waste memory uncompiled.

    The second size of a dimension compiles kernels for every size of it. More than `SHAPES` kinds of inputs are an
    error, and never computed uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    return torch.compile(function, fullgraph=True)  # type: ignore[return-value]


def keep_outside_graphs() -> None:
    """From now on marks count: no graph holds a function that is marked to stay outside."""
    torch._dynamo.trace_rules.add(__name__)  # `call` itself would be compiled else, once for every shape
    while _held:
        held = _held.pop()
        held[0] = torch.compiler.disable(held[0])
    while _open:
        torch._dynamo.eval_frame.skip_code(_open.pop())
    while _constant:
        torch.compiler.assume_constant_result(_constant.pop())
