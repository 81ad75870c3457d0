"""flash-linear-attention, as far as the ops that call it share it: whether it is there, and where documents lie."""

import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from swamla.errors import is_out_of_memory
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import PADDING, Layout

OLDEST = (0, 6)  # older versions refuse Hopper with Triton >= 3.4
# The size of a training step: Triton autotunes per widths only, and keeps the choice made for the first shape.
PROBE_ROWS, PROBE_LENGTH = 8, 2048
PROBE_TOLERANCE = 0.05  # ‖found − expected‖ / ‖expected‖ in bf16; wrong kernels were off by 0.5


class Packing(NamedTuple):
    """Bounds of the N documents of B packed rows; padding counts as documents.

    bounds_M: each document's first index in the flattened B·T tokens, then B·T: M = N + 1 numbers (`cu_seqlens`).
    host_bounds_M: the same on the CPU.  first_B, last_B: each row's first document, and its last one without padding.
    """

    bounds_M: Tensor
    host_bounds_M: Tensor
    first_B: Tensor
    last_B: Tensor


def packing_of(seq: Layout) -> Packing:
    """The layout's `Packing`, built at its first use. If it was built eagerly, a compiled graph does not break here."""
    made = seq.made("fla")
    return _build_packing(seq) if made is None else made


@outside_graphs
def _build_packing(seq: Layout) -> Packing:
    return seq.table("fla", partial(_packing, seq))


def _packing(seq: Layout) -> Packing:
    # From `seq.runs`, which is on the host: no device synchronisation.
    (batch, time), device = seq.shape, seq.document_BT.device
    lengths = torch.tensor([length for count, length in seq.runs for _ in range(count)])
    host_bounds_M = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    bounds_M = host_bounds_M.to(device, non_blocking=True)
    first_B = torch.searchsorted(bounds_M, torch.arange(batch, device=device) * time)
    begin_N = bounds_M[:-1]
    row_N, index_N = begin_N // time, torch.arange(len(lengths), device=device)
    real_N = torch.where(seq.document_BT.flatten()[begin_N] == PADDING, first_B[row_N], index_N)
    last_B = first_B.scatter_reduce(0, row_N, real_N, "amax")
    for bounds in (bounds_M, host_bounds_M):  # their length differs between batches: compile once for all lengths
        torch._dynamo.maybe_mark_dynamic(bounds, 0)
    return Packing(bounds_M, host_bounds_M, first_B, last_B)


def obstacle(device: torch.device, kernels: tuple[str, ...], try_them: Callable[[str], str | None]) -> str | None:
    """Why the library cannot compute `kernels` on `device`, to follow the word "fla"; None if it can.

    kernels: their name and sizes. try_them: says what is wrong with them on this device; not asked if the library is
    missing or too old. The answer is cached, unless memory ran out. If it was asked eagerly, a compiled graph does not
    break here.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    asked = (str(device), *kernels)
    return _OBSTACLES[asked] if asked in _OBSTACLES else _find_obstacle(asked, try_them)


_OBSTACLES: dict[tuple[str, ...], str | None] = {}  # not `lru_cache`, through which the compiler traces


@outside_graphs
def _find_obstacle(asked: tuple[str, ...], try_them: Callable[[str], str | None]) -> str | None:
    try:
        found = _missing(asked[0]) or try_them(asked[0])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 'finds no memory on this device to be tried in: free some, or use "torch"'
    _OBSTACLES[asked] = found
    return found


def _missing(device: str) -> str | None:
    if not installed():
        return "needs flash-linear-attention: pip install 'swamla[gpu]'"
    said = version_of("fla-core") or version_of("flash-linear-attention")
    if numbers(said) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"needs flash-linear-attention >= {oldest}, {said} is installed: pip install --upgrade 'swamla[gpu]'"
    if not has_kernels(device):
        return f'needs a CUDA device, these tensors are on {device}: use "torch"'
    return None


def judged(errors: Callable[[], list[float]]) -> str | None:
    """What is wrong with kernels whose relative errors `errors` computes, or how they fail; None if nothing is."""
    try:
        largest = max(errors())
    except Exception as error:  # any failure of the library becomes the reason that the user reads
        if is_out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        return f'fails on this device: {type(error).__name__}: {first_line}: use "torch"'
    if not largest <= PROBE_TOLERANCE:
        return f'is wrong on this device by {largest:.1e} of the expected: use "torch"'
    return None


def probe_layout(device: str) -> Layout:
    """Packed rows of the probe's size."""
    document_BT = (torch.arange(PROBE_LENGTH) * 5 // (2 * PROBE_LENGTH)).expand(PROBE_ROWS, -1)
    return Layout.from_documents(document_BT).to(device)


def installed() -> bool:
    """Whether flash-linear-attention is installed."""
    return find_spec("fla") is not None


def has_kernels(device: str) -> bool:
    """Whether Triton kernels run on this device."""
    return torch.device(device).type == "cuda" and torch.cuda.is_available()


def is_hopper(device: str) -> bool:
    """Whether the device has compute capability 9.x: H100, H200 and the like."""
    return torch.cuda.get_device_capability(device)[0] == 9


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def numbers(version_: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version_)[:3])
