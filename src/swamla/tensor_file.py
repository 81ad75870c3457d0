"""Tensors in safetensors files: tied tensors are stored once, and damaged files and pickles are refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from swamla.errors import CorruptError
from swamla.files import as_new_file

MAX_HEADER_BYTES = 100_000_000
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_tensors(file: Path, named: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, each storage once: a tied name is recorded in the header as an alias of the first.

    metadata: another entry of the header in place of that, for tensors of which none is tied.
    """
    unique, aliases = without_aliases(named)
    # One key only: safetensors writes several keys in random order, and equal runs must give equal files.
    with as_new_file(file):
        save_file(unique, file, metadata=dict(metadata or {"aliases": json.dumps(aliases)}))


def without_aliases(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without those that share storage with an earlier one, and alias → name of the earlier one."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in named.items():
        first = seen.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), name)
        if first == name or tensor.numel() == 0:
            unique[name] = tensor.detach().contiguous()
        else:
            aliases[name] = first
    return unique, aliases


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU; a name tied to another gives the same tensor object.

    Raises `CorruptError` for pickles, huge headers and damage.
    """
    metadata = read_header(file).get("__metadata__", {})
    try:
        aliases = json.loads(metadata.get("aliases", "{}"))
        tensors = load_file(file)
        return tensors | {alias: tensors[name] for alias, name in aliases.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{file}: {error}") from error


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> dtype, shape, offsets. Raises as `read_tensors` does."""
    with file.open("rb") as stream:
        head, size = stream.read(8), file.stat().st_size
        length = int.from_bytes(head, "little")
        if head.startswith(_PICKLE_MAGIC) and length > size:
            raise CorruptError(f"{file}: is a pickle: refused, only safetensors and JSON are read")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CorruptError(
                f"{file}: header of {length} bytes in a file of {size}: not a safetensors file, or damaged"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CorruptError(f"{file}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CorruptError(f"{file}: its header is not a table")
    return header


def misfits(got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The first five names that are missing, unexpected or of another shape, as text; empty if all fit."""
    wrong = [
        f"{name}: got {got.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in [*expected, *sorted(got.keys() - expected.keys())]
        if got.get(name) != expected.get(name)
    ]
    more = f" … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return f"{'; '.join(wrong[:5])}{more}"
