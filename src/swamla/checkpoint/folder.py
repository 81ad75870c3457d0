"""Crash-safe checkpoints without pickles: written to a staging folder with a manifest of sizes and SHA-256, fsynced,
renamed.

    RUN/config.json                                the resolved config, enough to rebuild the model
    RUN/tokenizer.json
    RUN/checkpoints/step-00000500/model.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json
                                                   ema.safetensors if the run averages its weights
                                                   adapters.safetensors if it trains these, beside the fixed weights
                                                   a sharded run has model/shard-….safetensors, one per rank, and so on
    RUN/checkpoints/best.json                      which step had the lowest held-out loss

A directory whose name begins with a dot is being written or deleted, and is never read.
"""

import errno
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from swamla import distributed
from swamla.checkpoint.shards import Like, LocalTensors, Shard, ShardReader, read_resharded, save_shards, shard_name
from swamla.errors import CorruptError, SwamlaError, UsageError
from swamla.faults import fault
from swamla.files import entry, fsync, read_json, regular_file, sha256_of, write_text_atomically
from swamla.tensor_file import misfits, save_tensors

FORMAT_VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, whose files matched its manifest when it was opened."""

    path: Path
    step: int
    state: dict[str, Any]
    files: tuple[str, ...]

    def tensors(self, group: str, like: Like = lambda name: None) -> dict[str, Tensor]:
        """The tensors of `group`, e.g. "model"; tied names give the same tensor object.

        like: maps a name to the tensor that will be loaded into, or None. If it is sharded, only this rank's shard is
        read, for any number of ranks that wrote the checkpoint.
        """
        return read_resharded(self.reader(group), like)

    def reader(self, group: str) -> ShardReader:
        """A reader for single tensors of `group`."""
        shards = [name for name in self.files if name.startswith(f"{group}/")] or [f"{group}.safetensors"]
        return ShardReader([regular_file(self.path / name, inside=self.path) for name in sorted(shards)])

    def groups(self) -> list[str]:
        """The names of all groups of tensors."""
        tensors = (name for name in self.files if name.endswith(".safetensors"))
        return sorted({name.split("/")[0].removesuffix(".safetensors") for name in tensors})

    def has(self, group: str) -> bool:
        """True if the checkpoint has the group."""
        return group in self.groups()


class WriterGroup:
    """The processes that write a checkpoint together; this class is for a single process."""

    rank = 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every process; returns all results in the order of ranks. If one fails, all raise."""
        return [work()]

    def any(self, flag: bool) -> bool:
        """True if the flag is True on any process. Called by the training thread, not by the writing thread."""
        return flag


ALONE = WriterGroup()


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor | Shard]],
    state: Mapping[str, Any],
    writers: WriterGroup = ALONE,
    others: Sequence[Mapping[str, LocalTensors]] = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `directory/step-<step>` atomically and return its path.

    tensors: group name -> tensors; a group becomes one safetensors file, or one file per process if it has shards.
    state: JSON data. writers: all its processes call this at the same step, each with its own shards.
    others: shards of further ranks, which a single process writes for them.
    metadata: of the header of unsharded tensors, in place of their aliases.
    Raises `SwamlaError`, naming the path and the bytes needed, if the disk is full; older checkpoints stay intact.
    """
    final, staging = directory / step_name(step), directory / f".saving-{step_name(step)}"
    main = writers.rank == 0

    def together(work: Callable[[], T]) -> list[T]:
        def explained() -> T:  # on the process that failed: the others receive only the message
            try:
                return work()
            except (OSError, SafetensorError) as error:
                raise _explain_write_error(error, final, tensors) from error

        return writers.together(explained)

    try:
        together(lambda: _begin(directory, staging) if main else None)
        listings = together(lambda: _write(staging, tensors, writers.rank, metadata))
        listings += [_write(staging, share, rank) for rank, share in enumerate(others, 1)]
        files = {name: listed for listing in listings for name, listed in listing.items()}
        fault("save-staging", step)
        together(lambda: _finish(staging, final, files, {"step": step, **state}) if main else None)
    except (OSError, SafetensorError) as error:
        raise _explain_write_error(error, final, tensors) from error
    finally:
        if main:
            shutil.rmtree(staging, ignore_errors=True)  # exists only after a failure
    return final


def _begin(directory: Path, staging: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    staging.mkdir()


def _write(
    staging: Path, tensors: Mapping[str, LocalTensors], rank: int, metadata: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Write this process's tensors; returns their entries of the manifest."""
    files = []
    for group, named in tensors.items():
        if any(isinstance(tensor, Shard) for tensor in named.values()):
            (staging / group).mkdir(exist_ok=True)
            files.append(staging / group / shard_name(rank))
            save_shards(files[-1], named)
        elif rank == 0:
            files.append(staging / f"{group}.safetensors")
            save_tensors(files[-1], cast("Mapping[str, Tensor]", named), metadata)
    for file in files:
        fsync(file)
        fsync(file.parent)
    return {str(file.relative_to(staging)): _listed(file) for file in files}


def _listed(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _finish(staging: Path, final: Path, files: dict[str, Any], state: dict[str, Any]) -> None:
    """On the main process, once all tensors are on disk: write the state and the manifest, and rename the folder."""
    (staging / "state.json").write_text(json.dumps(state, allow_nan=False))
    files = dict(sorted((files | {"state.json": _listed(staging / "state.json")}).items()))
    manifest = {"format_version": FORMAT_VERSION, "step": state["step"], "files": files}
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (staging / "state.json", staging / "manifest.json", staging):
        fsync(path)
    fault("save-manifest", state["step"])
    if final.exists():  # damaged, or from before the run was resumed at an earlier step
        final.rename(final.with_name(f".deleting-{final.name}"))
    staging.rename(final)
    fault("save-rename", state["step"])
    fsync(final.parent)
    _sweep(final.parent)


def verify(path: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, which is returned. hashes: not only the sizes.

    Raises `CorruptError` naming the first file that is missing, truncated, altered or outside the checkpoint, and
    `UsageError` for a format newer than this program.
    """
    listing = path / "manifest.json"
    manifest = read_json(listing, inside=path)
    require_format(manifest, listing)
    entry(manifest, "step", int, file=listing)
    for name, listed in entry(manifest, "files", dict, file=listing).items():
        file = regular_file(path / name, inside=path)
        size, expected = file.stat().st_size, entry(listed, "bytes", int, file=listing)
        if size != expected:
            raise CorruptError(f"{file}: {size} bytes, the manifest says {expected}: truncated or overwritten")
        if hashes and sha256_of(file) != entry(listed, "sha256", str, file=listing):
            raise CorruptError(f"{file}: SHA-256 differs from the manifest: the file was altered or is damaged")
    return manifest


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and open one checkpoint directory; tensors are read on demand. Raises as `verify` does."""
    manifest = verify(path)
    state = read_json(path / "state.json", inside=path)
    return Checkpoint(path=path, step=manifest["step"], state=state, files=tuple(manifest["files"]))


def whole_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None, with a warning, if it is damaged."""
    try:
        return load_checkpoint(path)
    except CorruptError as error:
        warnings.warn(f"damaged checkpoint: {error}", stacklevel=2)
        return None


def latest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None if there are no checkpoints; warns of each damaged one.

    Raises `CorruptError` if all checkpoints are damaged.
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


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Copy `tensors` into the parameters and buffers of `module`, each rank its own shard; all names must match.

    Raises `CorruptError` listing the first five names that are missing, unexpected or of another shape.
    """
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if wrong := misfits(got, expected):
        raise CorruptError(f"{origin}: weights do not fit the model: {wrong}")
    with torch.no_grad():
        for name, own in module.state_dict().items():
            distributed.local(own).copy_(distributed.shard_like(tensors[name], own))


def stored_paths(checkpoint: Checkpoint) -> dict[str, str]:
    """Block → its mixer's backend, if that was chosen by measurement on a CPU.

    A resumed run keeps it, since another backend rounds differently. Raises `CorruptError` if the entry is damaged.
    """
    paths = checkpoint.state.get("paths", {})
    if not isinstance(paths, dict) or not all(isinstance(backend, str) for backend in paths.values()):
        raise CorruptError(
            f'{checkpoint.path / "state.json"}: damaged: "paths" is {paths!r}, expected names of backends'
        )
    return paths


def list_checkpoints(directory: Path) -> list[Path]:
    """Paths of the complete checkpoints under `directory`, oldest first; not verified."""
    return sorted(p for p in directory.glob("step-*") if p.name.removeprefix("step-").isdigit())


def prune(directory: Path, *, keep_last: int, pinned: Iterable[int] = ()) -> None:
    """Verify the newest checkpoint, then delete all but the newest `keep_last` and the `pinned` steps."""
    pinned_steps = set(pinned)
    paths = list_checkpoints(directory)
    to_delete = [p for p in paths[: -max(keep_last, 1)] if step_of(p) not in pinned_steps]
    if to_delete:
        verify(paths[-1])
    for path in to_delete:  # renamed first, so that a partly deleted directory is never taken for a checkpoint
        path.rename(directory / f".deleting-{path.name}")
        fault("prune", step_of(paths[-1]))
    _sweep(directory)


def set_aside_after(directory: Path, step: int) -> None:
    """Rename checkpoints later than `step`, from which a run resumes, to `damaged-step-…`."""
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            shutil.rmtree(directory / f"damaged-{path.name}", ignore_errors=True)
            path.rename(directory / f"damaged-{path.name}")


def mark_best(directory: Path, step: int, loss: float) -> None:
    """Write best.json atomically: the checkpoint of `step` has the lowest held-out loss so far."""
    write_text_atomically(directory / "best.json", json.dumps({"step": step, "loss": loss}) + "\n")


def require_format(data: dict[str, Any], file: Path) -> None:
    """Raise `UsageError` for a format newer than this program, `CorruptError` for an invalid one."""
    version = entry(data, "format_version", int, file=file)
    if version > FORMAT_VERSION:
        raise UsageError(
            f"{file}: format version {version}, this swamla reads up to {FORMAT_VERSION}: pip install --upgrade swamla"
        )
    if version < 1:
        raise CorruptError(f"{file}: invalid format version {version}")


def _explain_write_error(error: Exception, path: Path, tensors: Mapping[str, LocalTensors]) -> Exception:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and "os error 28" not in str(error) and "os error 122" not in str(error):
        return error
    whole = [t.tensor if isinstance(t, Shard) else t for named in tensors.values() for t in named.values()]
    needed = sum(tensor.nbytes for tensor in whole)
    free = shutil.disk_usage(path.parent).free
    return SwamlaError(f"{path}: disk full: needs {needed:,} bytes, {free:,} are free; older checkpoints are intact")


def _sweep(directory: Path) -> None:
    """Delete what an interrupted save or prune left behind."""
    for pattern in (".saving-*", ".deleting-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path)


def step_name(step: int) -> str:
    """The name of a step's checkpoint; names sort by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
