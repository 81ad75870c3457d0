"""Tensors that several processes hold together: each writes what it holds, and any number of processes read it back.

Files are those of DCP's safetensors layout (torch.distributed.checkpoint.HuggingFaceStorageWriter with
save_distributed, which HuggingFaceStorageReader reads): one a process and group, in whose header stands where in the
whole each tensor begins. We write and read them ourselves, because DCP plans by collectives, which a background thread
must not issue beside those of training, because it would hold a second copy of all that is written in memory, and
because its reader takes holes for zeros. No part of them is a pickle.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swamla.distributed import as_sharded, local, sharded
from swamla.errors import CorruptError
from swamla.tensor_file import read_header, without_aliases

SHARDING = "DCP_SHARDING_INFO"  # the header's entry, and below it the name of a tensor's offset, are DCP's
OFFSETS = "saved_offsets"

Numbers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of a larger tensor, which begins at `offset` in a whole of `shape`."""

    tensor: Tensor
    shape: Numbers
    offset: Numbers


Held = Mapping[str, Tensor | Piece]


def held_here(named: Mapping[str, Tensor], *, main: bool) -> dict[str, Tensor | Piece]:
    """What this process is to write: its pieces, unless another has the same, and the rest if it is the main one."""
    held: dict[str, Tensor | Piece] = {}
    for name, tensor in named.items():
        if not sharded(tensor):
            if main:
                held[name] = tensor
        elif _is_first_replica(tensor):
            (box,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
            held[name] = Piece(tensor=local(tensor).detach(), shape=tuple(tensor.shape), offset=tuple(box.offsets))
    return held


def _is_first_replica(tensor: Any) -> bool:
    place = tensor.device_mesh.get_coordinate()
    return all(i == 0 for i, how in zip(place, tensor.placements, strict=True) if how.is_replicate())


def shard_name(index: int) -> str:
    """The file of the process `index` (from 0) in the folder of a group; names sort as processes do."""
    return f"shard-{index + 1:05d}-model-00001-of-00001.safetensors"


def save_pieces(file: Path, held: Held) -> None:
    """Write what one process holds; a tensor that is no piece is written as the whole that it is."""
    tensors = {name: t.tensor if isinstance(t, Piece) else t for name, t in held.items() if not _is_nothing(t)}
    tensors, aliases = without_aliases(tensors)
    places: dict[str, Any] = {name: {"alias": first} for name, first in aliases.items()}
    for name, tensor in tensors.items():
        whole = held[name]
        offset = whole.offset if isinstance(whole, Piece) else (0,) * tensor.ndim
        places[name] = {OFFSETS: list(offset), "shape": list(whole.shape if isinstance(whole, Piece) else tensor.shape)}
    save_file(tensors, file, metadata={SHARDING: json.dumps(places)})


def _is_nothing(one: Tensor | Piece) -> bool:
    """True for the share of a process that is one too many for a tensor."""
    return isinstance(one, Piece) and not one.tensor.numel() and bool(prod(one.shape))


@dataclass(frozen=True)
class _Box:
    """Where a part of a tensor is stored."""

    file: Path
    offset: Numbers
    size: Numbers


class Pieces:
    """The tensors in the files that all processes wrote of a group.

    Raises `CorruptError` where a file is damaged or where the pieces of a tensor do not make up the whole.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._boxes: dict[str, list[_Box]] = {}
        self._shapes: dict[str, Numbers] = {}
        self.aliases: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            with _damage_named(file):
                self._take_in(file)
        for name, boxes in self._boxes.items():
            self._check_whole(name, boxes)
        for alias, name in self.aliases.items():
            if name not in self._boxes:
                raise CorruptError(f"{files[0].parent}: {alias} is tied to {name}, which is not there")

    def _take_in(self, file: Path) -> None:
        header = read_header(file)
        metadata = header.pop("__metadata__", {})
        places = json.loads(metadata.get(SHARDING, "{}"))
        self.aliases |= {name: place["alias"] for name, place in places.items() if "alias" in place}
        self.aliases |= json.loads(metadata.get("aliases", "{}"))
        for name, stored in header.items():
            size, place = tuple(stored["shape"]), places.get(name, {})
            offset = tuple(place.get(OFFSETS, (0,) * len(size)))
            if len(offset) != len(size) or not all(isinstance(i, int) and i >= 0 for i in offset):
                raise ValueError(f"{name} begins at {offset}, with the shape {size}")
            end = tuple(o + s for o, s in zip(offset, size, strict=True))
            shape = tuple(place.get("shape", end))  # which torch's own writer does not tell
            known = self._shapes.get(name, shape)
            if "shape" in place and name in self._shapes and shape != known:
                raise ValueError(f"{name} is part of {shape}, and of {known} in another file")
            self._shapes[name] = tuple(map(max, shape, known))
            self._boxes.setdefault(name, []).append(_Box(file, offset, size))

    def _check_whole(self, name: str, boxes: list[_Box]) -> None:
        """Every element once: boxes are disjoint, inside, and as many elements as the whole."""
        shape, where = self._shapes[name], f"{boxes[0].file.parent}: {name}"
        inside = all(o + s <= n for box in boxes for o, s, n in zip(box.offset, box.size, shape, strict=True))
        filled = sum(prod(box.size) for box in boxes)
        # In their order a box can only reach into the next if they begin in the same place along all but one side.
        again = any(
            a.offset == b.offset for a, b in pairwise(sorted(boxes, key=lambda box: box.offset)) if prod(b.size)
        )
        if not inside or again or filled != prod(shape):
            raise CorruptError(f"{where}: its {len(boxes)} pieces hold {filled} elements, the whole has {prod(shape)}")

    def shapes(self) -> dict[str, Numbers]:
        """Name -> shape of the whole, aliases included."""
        return self._shapes | {alias: self._shapes[name] for alias, name in self.aliases.items()}

    def read(self, name: str, offset: Numbers | None = None, size: Numbers | None = None) -> Tensor:
        """The tensor on the CPU, or the box of it that begins at `offset` and has `size`, whoever wrote its parts."""
        name = self.aliases.get(name, name)
        boxes = self._boxes[name]
        offset = (0,) * len(self._shapes[name]) if offset is None else tuple(offset)
        size = self._shapes[name] if size is None else tuple(size)
        if len(boxes) == 1 and size == self._shapes[name]:
            return self._stored(boxes[0], name, (), ())
        found = None
        for box in boxes:
            begin = tuple(map(max, offset, box.offset))
            ends = (min(o + s, p + t) for o, s, p, t in zip(offset, size, box.offset, box.size, strict=True))
            extent = tuple(max(end - start, 0) for start, end in zip(begin, ends, strict=True))
            if found is not None and not prod(extent):
                continue
            part = self._stored(box, name, tuple(b - o for b, o in zip(begin, box.offset, strict=True)), extent)
            found = torch.zeros(size, dtype=part.dtype) if found is None else found
            if prod(extent):
                _inside(found, tuple(b - o for b, o in zip(begin, offset, strict=True)), extent).copy_(part)
        assert found is not None
        return found

    def _stored(self, box: _Box, name: str, begin: Numbers, extent: Numbers) -> Tensor:
        """What is stored of a box, from `begin` in it; all of it where nothing is said."""
        with _damage_named(box.file):
            if box.file not in self._open:
                self._open[box.file] = safe_open(box.file, framework="pt")
            if not extent:
                return self._open[box.file].get_tensor(name)
            if not prod(extent):
                begin = (0,) * len(extent)
            return self._open[box.file].get_slice(name)[
                tuple(slice(b, b + e) for b, e in zip(begin, extent, strict=True))
            ]


def _inside(tensor: Tensor, begin: Numbers, extent: Numbers) -> Tensor:
    for dim, (start, length) in enumerate(zip(begin, extent, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{file}: {error}") from error


Like = Callable[[str], Tensor | None]


def read_like(pieces: Pieces, like: Like) -> dict[str, Tensor]:
    """All tensors, each spread over the processes as `like` of its name is, whole where that is not spread or None.

    One whose shape differs from what it should be like is returned whole, for whoever takes it to complain of.
    """
    found: dict[str, Tensor] = {}
    for name, shape in pieces.shapes().items():
        model = like(name)
        if name in pieces.aliases and pieces.aliases[name] in found:
            continue
        found[name] = (
            _spread(pieces, name, model) if model is not None and _matches(model, shape) else pieces.read(name)
        )
    return found | {alias: found[name] for alias, name in pieces.aliases.items()}


def _matches(model: Tensor, shape: Numbers) -> bool:
    return sharded(model) and tuple(model.shape) == shape


def _spread(pieces: Pieces, name: str, model: Tensor) -> Tensor:
    (box,) = model.__create_chunk_list__()  # type: ignore[attr-defined]
    part = pieces.read(name, tuple(box.offsets), tuple(box.sizes))
    return as_sharded(part.to(local(model).device), model)
