"""Sharded tensors: each process writes its shards, and any number of processes reads them back, resharded.

Files have DCP's safetensors layout (torch.distributed.checkpoint.HuggingFaceStorageWriter with save_distributed, read
by HuggingFaceStorageReader): one per process and group, with the offset of each shard in the header. We do not use DCP
itself for three reasons. It plans by collectives, which a background thread must not issue concurrently with those of
training. It keeps a second copy in memory of all that it writes. Its reader silently fills missing shards with zeros.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swamla.distributed import as_sharded, local, sharded
from swamla.errors import CorruptError
from swamla.files import as_new_file
from swamla.ops.rounding import FORMATS, Rounded
from swamla.tensor_file import read_header, without_aliases

SHARDING = "DCP_SHARDING_INFO"  # DCP's names: the entry of the header, and a tensor's offset in it
OFFSETS = "saved_offsets"
QUANTIZED = "quantized"  # the entry of the header of rounded weights (`quantized.py`), which has their aliases too
SCALE = "_scale"  # behind a rounded weight's name: the name of its scales

Numbers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A box of a larger tensor of `shape`, which begins at `offset`."""

    tensor: Tensor
    shape: Numbers
    offset: Numbers


LocalTensors = Mapping[str, Tensor | Shard]


def local_tensors(named: Mapping[str, Tensor], *, main: bool) -> dict[str, Tensor | Shard]:
    """What this process writes: its shards, if it has the first replica; on the main process also unsharded tensors."""
    found: dict[str, Tensor | Shard] = {}
    for name, tensor in named.items():
        if not sharded(tensor):
            if main:
                found[name] = tensor
        elif _is_first_replica(tensor):
            (box,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
            found[name] = Shard(tensor=local(tensor).detach(), shape=tuple(tensor.shape), offset=tuple(box.offsets))
    return found


def _is_first_replica(tensor: Any) -> bool:
    place = tensor.device_mesh.get_coordinate()
    return all(i == 0 for i, how in zip(place, tensor.placements, strict=True) if how.is_replicate())


def shard_name(index: int) -> str:
    """The file of process `index` (from 0) in a group's folder; names sort by process."""
    return f"shard-{index + 1:05d}-model-00001-of-00001.safetensors"


def save_shards(file: Path, named: LocalTensors) -> None:
    """Write one process's shards and unsharded tensors."""
    tensors = {name: t.tensor if isinstance(t, Shard) else t for name, t in named.items() if not _is_surplus(t)}
    tensors, aliases = without_aliases(tensors)
    places: dict[str, Any] = {name: {"alias": first} for name, first in aliases.items()}
    for name, tensor in tensors.items():
        whole = named[name]
        offset = whole.offset if isinstance(whole, Shard) else (0,) * tensor.ndim
        places[name] = {OFFSETS: list(offset), "shape": list(whole.shape if isinstance(whole, Shard) else tensor.shape)}
    with as_new_file(file):
        save_file(tensors, file, metadata={SHARDING: json.dumps(places)})


def _is_surplus(one: Tensor | Shard) -> bool:
    """True for the empty shard of a rank that a tensor is too small for."""
    return isinstance(one, Shard) and not one.tensor.numel() and bool(prod(one.shape))


@dataclass(frozen=True)
class _Box:
    """The place of a stored shard."""

    file: Path
    offset: Numbers
    size: Numbers


class ShardReader:
    """Reads the tensors of a group from the files of all processes; rounded weights in fp32.

    Raises `CorruptError` if a file is damaged, or if the shards of a tensor leave gaps or overlap.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._boxes: dict[str, list[_Box]] = {}
        self._shapes: dict[str, Numbers] = {}
        self.aliases: dict[str, str] = {}
        self.quantized = ""  # the format of rounded weights, "" if there are none
        self._rounded: dict[str, str] = {}  # name -> format
        self._open: dict[Path, Any] = {}
        for file in files:
            with _corrupt_if_damaged(file):
                self._read_header(file)
        for name, boxes in self._boxes.items():
            self._check_whole(name, boxes)
        for alias, name in self.aliases.items():
            if name not in self._boxes:
                raise CorruptError(f"{files[0].parent}: {alias} is tied to {name}, which is missing")

    def _read_header(self, file: Path) -> None:
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
            shape = tuple(place.get("shape", end))  # torch's own writer leaves it out
            known = self._shapes.get(name, shape)
            if "shape" in place and name in self._shapes and shape != known:
                raise ValueError(f"{name} is part of {shape}, and of {known} in another file")
            self._shapes[name] = tuple(map(max, shape, known))
            self._boxes.setdefault(name, []).append(_Box(file, offset, size))
        quantized = json.loads(metadata.get(QUANTIZED, "{}"))
        self.aliases |= quantized.get("aliases", {})
        self.quantized = quantized.get("format", self.quantized)
        for name, rounded in quantized.get("weights", {}).items():
            self._read_rounded(file, name, rounded["format"], tuple(rounded["shape"]))

    def _read_rounded(self, file: Path, name: str, format: str, shape: Numbers) -> None:
        """Give the name the shape of the weight, once integers and scales are found to have theirs."""
        if format not in FORMATS or len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"{name} is stored as {format} of {shape}")
        found = self._shapes.pop(name, None), self._shapes.pop(name + SCALE, None)
        expected = tuple(part for _, part in Rounded.parts(shape, format))
        if found != expected:
            raise ValueError(f"{name}: integers and scales of shapes {found}, expected {expected}")
        del self._boxes[name + SCALE]
        self._boxes[name] = [_Box(file, (0,) * len(shape), shape)]
        self._shapes[name], self._rounded[name] = shape, format

    def _check_whole(self, name: str, boxes: list[_Box]) -> None:
        """Check that every element is stored once: boxes are inside, disjoint, and as large together as the tensor."""
        shape, where = self._shapes[name], f"{boxes[0].file.parent}: {name}"
        inside = all(o + s <= n for box in boxes for o, s, n in zip(box.offset, box.size, shape, strict=True))
        filled = sum(prod(box.size) for box in boxes)
        # A duplicate begins at the offset of another box; other errors change the number of elements.
        again = any(
            a.offset == b.offset for a, b in pairwise(sorted(boxes, key=lambda box: box.offset)) if prod(b.size)
        )
        if not inside or again or filled != prod(shape):
            raise CorruptError(f"{where}: its {len(boxes)} shards have {filled} elements, the whole has {prod(shape)}")

    def shapes(self) -> dict[str, Numbers]:
        """Name -> full shape, aliases included."""
        return self._shapes | {alias: self._shapes[name] for alias, name in self.aliases.items()}

    def read(self, name: str, offset: Numbers | None = None, size: Numbers | None = None) -> Tensor:
        """The tensor on the CPU, or its box at `offset` of `size`, assembled from the stored shards."""
        name = self.aliases.get(name, name)
        boxes = self._boxes[name]
        offset = (0,) * len(self._shapes[name]) if offset is None else tuple(offset)
        size = self._shapes[name] if size is None else tuple(size)
        if name in self._rounded:
            part = self._weight(name)[tuple(map(slice, offset, map(add, offset, size)))]
            return part.contiguous()
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

    def _weight(self, name: str) -> Tensor:
        """A rounded weight in fp32."""
        (box,) = self._boxes[name]
        integers, scale = (self._stored(box, stored, (), ()) for stored in (name, name + SCALE))
        with _corrupt_if_damaged(box.file):
            return Rounded(self._rounded[name], integers, scale, self._shapes[name]).checked().weight()

    def _stored(self, box: _Box, name: str, begin: Numbers, extent: Numbers) -> Tensor:
        """A part of a stored box, from `begin` on and of size `extent`; the whole box if `extent` is empty."""
        with _corrupt_if_damaged(box.file):
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
def _corrupt_if_damaged(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{file}: {error}") from error


Like = Callable[[str], Tensor | None]


def read_resharded(reader: ShardReader, like: Like) -> dict[str, Tensor]:
    """All tensors, sharded like `like(name)`; whole if that is None or not sharded.

    A tensor of another shape is returned whole, so that the caller can report it.
    """
    found: dict[str, Tensor] = {}
    for name, shape in reader.shapes().items():
        model = like(name)
        if name in reader.aliases and reader.aliases[name] in found:
            continue
        if model is not None and sharded(model) and tuple(model.shape) == shape:
            (box,) = model.__create_chunk_list__()  # type: ignore[attr-defined]
            part = reader.read(name, tuple(box.offsets), tuple(box.sizes))
            found[name] = as_sharded(part.to(local(model).device), model)
        else:
            found[name] = reader.read(name)
    return found | {alias: found[name] for alias, name in reader.aliases.items()}
