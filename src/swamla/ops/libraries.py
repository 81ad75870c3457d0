"""Kernels of optional libraries: tried once on a device, against our own code, before they are used."""

import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from swamla.errors import is_out_of_memory
from swamla.ops.graphs import outside_graphs

TOLERANCE = 0.05  # ‖found − expected‖ / ‖expected‖ in bf16; wrong kernels were off by 0.5

_OBSTACLES: dict[tuple[str, ...], str | None] = {}  # not `lru_cache`, through which the compiler traces


def obstacle(
    device: torch.device, kernels: tuple[str, ...], find: Callable[[str], str | None], instead: str
) -> str | None:
    """Why a library cannot compute `kernels` on `device`, to follow the backend's name; None if it can.

    kernels: library, name and sizes.  find: says why.  instead: the backend to advise. The answer is cached, unless
    memory ran out. If it was asked eagerly, a compiled graph does not break here.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    asked = (str(device), *kernels)
    return _OBSTACLES[asked] if asked in _OBSTACLES else _find_obstacle(asked, find, instead)


@outside_graphs
def _find_obstacle(asked: tuple[str, ...], find: Callable[[str], str | None], instead: str) -> str | None:
    try:
        found = find(asked[0])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return f'finds no memory on this device to be tried in: free some, or use "{instead}"'
    _OBSTACLES[asked] = found
    return found


def judged(compare: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]], instead: str) -> str | None:
    """What is wrong with a library's tensors beside the expected ones, or how it fails; None if nothing is."""
    try:
        found, expected = compare()
    except Exception as error:  # any failure of the library becomes the reason that the user reads
        if is_out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        return f'fails on this device: {type(error).__name__}: {first_line}: use "{instead}"'
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    if not bool((errors <= TOLERANCE).all()):  # so that a NaN is wrong, too; `amax` is one if any is
        return f'is wrong on this device by {errors.amax().item():.1e} of the expected: use "{instead}"'
    return None


def version_of(package: str) -> str:
    """The installed version, "" without the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def numbers(version_: str) -> tuple[int, ...]:
    """The first three numbers of a version, for comparisons."""
    return tuple(int(number) for number in re.findall(r"\d+", version_)[:3])
