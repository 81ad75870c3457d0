"""Ops that torch.compile calls as they are."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_held: list[list[Callable[..., Any]]] = []  # what each marked function calls, until it is kept outside


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


def keep_outside_graphs() -> None:
    """From now on no graph holds a marked op."""
    torch._dynamo.trace_rules.add(__name__)  # `call` itself would be compiled else, once for every shape
    while _held:
        held = _held.pop()
        held[0] = torch.compiler.disable(held[0])
