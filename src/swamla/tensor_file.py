"""Tensors in safetensors files: tied ones once, nothing but tensors, and no file that is not what it should be."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from swamla.errors import CorruptError

MAX_HEADER_BYTES = 100_000_000
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_tensors(file: Path, named: Mapping[str, Tensor]) -> None:
    """Write tensors, each storage once: a tied name is recorded in the header as an alias of the first."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in named.items():
        first = seen.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), name)
        if first == name or tensor.numel() == 0:
            unique[name] = tensor.detach().contiguous()
        else:
            aliases[name] = first
    # One key only: safetensors writes several in an order of its own each time, and equal runs give equal files.
    save_file(unique, file, metadata={"aliases": json.dumps(aliases)})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU; a name tied to another gives the same tensor object.

    Raises `CorruptError` for pickles, huge headers and damage.
    """
    with file.open("rb") as stream:
        head = stream.read(8)
    header, size = int.from_bytes(head, "little"), file.stat().st_size
    if head.startswith(_PICKLE_MAGIC) and header > size:
        raise CorruptError(f"{file}: is a pickle: refused, only safetensors and JSON are read")
    if len(head) < 8 or header > min(size - 8, MAX_HEADER_BYTES):
        raise CorruptError(f"{file}: header of {header} bytes in a file of {size}: not a safetensors file, or damaged")
    try:
        tensors = load_file(file)
        return tensors | {alias: tensors[name] for alias, name in _aliases(file, header).items()}
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CorruptError(f"{file}: {error}") from error


def _aliases(file: Path, header_bytes: int) -> dict[str, str]:
    with file.open("rb") as stream:
        stream.seek(8)
        metadata = json.loads(stream.read(header_bytes)).get("__metadata__", {})
    return json.loads(metadata.get("aliases", "{}"))
