"""flash-linear-attention, as far as the ops that call it share it: whether it is there, and where documents lie."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from swamla.ops import libraries
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import PADDING, Layout
from swamla.ops.libraries import numbers, version_of

OLDEST = (0, 6)  # older versions refuse Hopper with Triton >= 3.4
# The size of a training step: Triton autotunes per widths only, and keeps the choice made for the first shape.
PROBE_ROWS, PROBE_LENGTH = 8, 2048
INSTEAD = "torch"  # the backend to take where it cannot compute


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
    """`libraries.obstacle` of these kernels, which are not tried if the library is missing or too old."""
    return libraries.obstacle(device, ("fla", *kernels), lambda there: _missing(there) or try_them(there), INSTEAD)


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


def probe_layout(device: str) -> Layout:
    """Packed rows of the probe's size."""
    document_BT = (torch.arange(PROBE_LENGTH) * 5 // (2 * PROBE_LENGTH)).expand(PROBE_ROWS, -1)
    return Layout.from_documents(document_BT).to(device)


def installed() -> bool:
    """Whether flash-linear-attention is installed."""
    return find_spec("fla") is not None


def patience() -> str:
    """What to tell who waits for a model to be built where this library may compute; "" elsewhere."""
    if not (installed() and torch.cuda.is_available()):
        return ""
    return " (flash-linear-attention tunes its kernels for a minute or two, the first time on a machine)"


def has_kernels(device: str) -> bool:
    """Whether Triton kernels run on this device."""
    return torch.device(device).type == "cuda" and torch.cuda.is_available()


def is_hopper(device: str) -> bool:
    """Whether the device has compute capability 9.x: H100, H200 and the like."""
    return torch.cuda.get_device_capability(device)[0] == 9
