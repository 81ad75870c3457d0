"""Checkpoints that survive: staged, listed with size and SHA-256, fsynced, renamed into place; nothing is a pickle.

    RUN/config.json                                what the run is, enough to rebuild the model
    RUN/tokenizer.json
    RUN/checkpoints/step-00000500/model.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json
    RUN/checkpoints/best.json                      which step had the lowest held-out loss

A directory whose name begins with a dot is being written or being deleted, and is never read.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swamla.errors import CorruptError, SwamlaError, UsageError

if TYPE_CHECKING:
    from swamla.data.tokenizer import Tokenizer
    from swamla.model.language_model import LanguageModel

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose every file matched its manifest when it was opened."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of `group`, e.g. "model"; a name that was tied to another gives the same tensor object."""
        return read_tensors(_regular_file(self.path / f"{group}.safetensors", inside=self.path))


def save_checkpoint(
    directory: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write `directory/step-<step>` so that it is there whole or not at all, and return its path.

    tensors: group name -> tensors; each group becomes one safetensors file. state: plain JSON data.
    Raises `SwamlaError`, naming the path and the bytes needed, when the disk is full; older checkpoints stay intact.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    final, staging = directory / step_name(step), directory / f".saving-{step_name(step)}"
    staging.mkdir()
    try:
        for group, named in tensors.items():
            _save_tensors(staging / f"{group}.safetensors", named)
        (staging / "state.json").write_text(json.dumps({"step": step, **state}, allow_nan=False))
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(staging.iterdir())}
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in staging.iterdir():
            _fsync(file)
        _fsync(staging)
        if final.exists():  # a damaged or abandoned future of a run that was resumed from before it
            final.rename(directory / f".deleting-{final.name}")
        staging.rename(final)
        _fsync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _explain_write_error(error, final, tensors) from error
    _sweep(directory)
    return final


def verify(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, which is returned.

    Raises `CorruptError` naming the first file that is missing, truncated, altered or outside the checkpoint, and
    `UsageError` for a format newer than this program.
    """
    manifest = _read_json(path / "manifest.json", inside=path)
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UsageError(
            f"{path}: format version {version}, this swamla reads up to {FORMAT_VERSION}: pip install --upgrade swamla"
        )
    if version != FORMAT_VERSION or not isinstance(manifest.get("files"), dict):
        raise CorruptError(f"{path / 'manifest.json'}: not a checkpoint manifest")
    for name, listed in manifest["files"].items():
        file = _regular_file(path / name, inside=path)
        size = file.stat().st_size
        if size != listed["bytes"]:
            raise CorruptError(f"{file}: {size} bytes, the manifest says {listed['bytes']}: truncated or overwritten")
        if _sha256(file) != listed["sha256"]:
            raise CorruptError(f"{file}: SHA-256 differs from the manifest: the file was altered or is damaged")
    return manifest


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and open one checkpoint directory; tensors are read when asked for. Raises as `verify` does."""
    manifest = verify(path)
    return Checkpoint(path=path, step=manifest["step"], state=_read_json(path / "state.json", inside=path))


def latest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, None where there is none; each damaged one is named in a warning.

    Raises `CorruptError` when there are checkpoints and not one of them verifies.
    """
    damaged = []
    for path in reversed(list_checkpoints(directory)):
        try:
            return load_checkpoint(path)
        except CorruptError as error:
            damaged.append(str(error))
            warnings.warn(f"damaged checkpoint, trying the one before: {error}", stacklevel=2)
    if damaged:
        raise CorruptError(f"{directory}: no checkpoint verifies: {damaged[0]}")
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Paths of the finished checkpoints under `directory`, oldest first, unverified."""
    return sorted(p for p in directory.glob("step-*") if p.name.removeprefix("step-").isdigit())


def prune(directory: Path, *, keep_last: int, pinned: Iterable[int] = ()) -> None:
    """Delete all but the newest `keep_last` checkpoints and the `pinned` steps, once the newest has verified."""
    pinned_steps = set(pinned)
    paths = list_checkpoints(directory)
    doomed = [p for p in paths[: -max(keep_last, 1)] if _step_of(p) not in pinned_steps]
    if doomed:
        verify(paths[-1])
    for path in doomed:  # renamed first, so that a half-deleted directory never looks like a checkpoint
        path.rename(directory / f".deleting-{path.name}")
    _sweep(directory)


def set_aside_after(directory: Path, step: int) -> None:
    """Rename the checkpoints later than `step` to `damaged-step-…`: a run falls back to `step` only if they are."""
    for path in list_checkpoints(directory):
        if _step_of(path) > step:
            shutil.rmtree(directory / f"damaged-{path.name}", ignore_errors=True)
            path.rename(directory / f"damaged-{path.name}")


def mark_best(directory: Path, step: int, loss: float) -> None:
    """Record, atomically, that the checkpoint of `step` has the lowest held-out loss so far."""
    write_text_atomically(directory / "best.json", json.dumps({"step": step, "loss": loss}) + "\n")


def find_checkpoint(run_dir: Path, which: str = "best") -> Checkpoint:
    """The checkpoint of a run called "best", "latest" or by its step, e.g. "500".

    "best" is the one with the lowest held-out loss, or the latest where none was evaluated or the best is damaged (a
    warning says so). Raises `UsageError` where there is none.
    """
    directory = run_dir / "checkpoints"
    if which not in ("best", "latest") and not which.isdigit():
        raise UsageError(f'checkpoint {which!r}: must be "best", "latest" or a step, e.g. "500"')
    if which.isdigit():
        path = directory / step_name(int(which))
        if not path.is_dir():
            have = ", ".join(str(_step_of(p)) for p in list_checkpoints(directory)) or "none"
            raise UsageError(f"{run_dir}: no checkpoint of step {which}; there are: {have}")
        return load_checkpoint(path)
    if which == "best" and (directory / "best.json").exists():
        best = _read_json(directory / "best.json", inside=directory)
        try:
            return load_checkpoint(directory / step_name(best["step"]))
        except CorruptError as error:
            warnings.warn(f"the best checkpoint is damaged, using the latest: {error}", stacklevel=2)
    latest = latest_checkpoint(directory)
    if latest is None:
        raise UsageError(f"{run_dir}: holds no checkpoint (looked in {directory})")
    return latest


def load(run_dir: str | Path, which: str = "best") -> "tuple[LanguageModel, Tokenizer]":
    """Rebuild the model of a run, in evaluation mode and fp32, and its tokenizer. Exported as `swamla.load`.

    which: "best" (lowest held-out loss), "latest", or a step such as "500". Only safetensors and JSON are ever read.
    Raises `UsageError` for a folder that is no run, `CorruptError` for a damaged one.
    """
    run_dir = Path(run_dir)
    plain = read_run_config(run_dir)
    checkpoint = find_checkpoint(run_dir, str(which))

    from swamla.config import from_plain
    from swamla.data.tokenizer import load_tokenizer
    from swamla.model.config import LanguageModelConfig

    config = from_plain(LanguageModelConfig, plain["model"], path="model", origin=str(run_dir / "config.json"))
    model = config.build()
    load_into(model, checkpoint.tensors("model"), origin=str(checkpoint.path))
    return model.eval(), load_tokenizer(run_dir / "tokenizer.json")


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The plain config of a run. Raises `UsageError` when `run_dir` is not a run folder or is from a newer swamla."""
    file = run_dir / "config.json"
    if run_dir.is_file():
        raise UsageError(
            f"{run_dir}: is a file; give the run folder (pickles are never loaded, only safetensors and JSON)"
        )
    if not file.exists():
        raise UsageError(f"{run_dir}: not a run folder (it has no config.json)")
    plain = _read_json(file, inside=run_dir)
    if plain.get("format_version", 0) > FORMAT_VERSION:
        raise UsageError(
            f"{file}: format version {plain['format_version']}, this swamla reads up to {FORMAT_VERSION}: "
            "pip install --upgrade swamla"
        )
    return plain


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Copy `tensors` into the parameters and buffers of `module`, all of them and nothing else.

    Raises `CorruptError` listing the first five names that are missing, unexpected or of another shape.
    """
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = [
        f"{name}: got {got.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in [*expected, *(got.keys() - expected.keys())]
        if got.get(name) != expected.get(name)
    ]
    if wrong:
        more = f" … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CorruptError(f"{origin}: weights do not fit the model: {'; '.join(wrong[:5])}{more}")
    module.load_state_dict(dict(tensors))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU. Raises `CorruptError` for pickles, huge headers and damage."""
    with file.open("rb") as stream:
        head = stream.read(8)
    header, size = int.from_bytes(head, "little"), file.stat().st_size
    if head.startswith(_PICKLE_MAGIC) and header > size:
        raise CorruptError(f"{file}: is a pickle: refused, only safetensors and JSON are read")
    if len(head) < 8 or header > min(size - 8, MAX_HEADER_BYTES):
        raise CorruptError(f"{file}: header of {header} bytes in a file of {size}: not a safetensors file, or damaged")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CorruptError(f"{file}: {error}") from error
    return tensors | {alias: tensors[name] for alias, name in _aliases(file, header).items()}


def write_text_atomically(file: Path, text: str) -> None:
    """Replace `file` by one that holds `text`: readers see the old or the new, never half."""
    staging = file.with_name(f".{file.name}.new")
    staging.write_text(text, encoding="utf-8")
    _fsync(staging)
    staging.replace(file)
    _fsync(file.parent)


def _save_tensors(file: Path, named: Mapping[str, Tensor]) -> None:
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


def _aliases(file: Path, header_bytes: int) -> dict[str, str]:
    with file.open("rb") as stream:
        stream.seek(8)
        metadata = json.loads(stream.read(header_bytes)).get("__metadata__", {})
    return json.loads(metadata.get("aliases", "{}"))


def _regular_file(file: Path, *, inside: Path) -> Path:
    """`file` itself, if it is a regular file and lies in `inside` once symbolic links are followed."""
    if not file.resolve().is_relative_to(inside.resolve()):
        raise CorruptError(f"{file}: leads outside {inside} (to {file.resolve()}): refused")
    if not file.is_file():
        raise CorruptError(f"{file}: missing")
    return file


def _read_json(file: Path, *, inside: Path) -> dict[str, Any]:
    try:
        data = json.loads(_regular_file(file, inside=inside).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{file}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CorruptError(f"{file}: must hold a JSON object")
    return data


def _explain_write_error(error: Exception, path: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> Exception:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and "os error 28" not in str(error) and "os error 122" not in str(error):
        return error
    needed = sum(t.nbytes for named in tensors.values() for t in named.values())
    free = shutil.disk_usage(path.parent).free
    return SwamlaError(f"{path}: disk full: needs {needed:,} bytes, {free:,} are free; older checkpoints are intact")


def _sweep(directory: Path) -> None:
    """Remove what an interrupted save or prune left behind."""
    for pattern in (".saving-*", ".deleting-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path)


def step_name(step: int) -> str:
    """The name of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
