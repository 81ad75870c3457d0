"""The staging folder of a push: hard links to a run's files, so that training can continue.

The training process calls `stage`. The pushing process calls `complete`, which assembles the weights if they are
averaged or sharded.
"""

import json
import os
import shutil
from pathlib import Path

from swamla.checkpoint import Checkpoint, list_checkpoints, step_name, verify
from swamla.checkpoint.run import weights_of
from swamla.errors import UsageError
from swamla.files import entry, read_json
from swamla.hub.card import model_card
from swamla.tensor_file import save_tensors

COPIED = (
    "config.json",
    "data.json",
    "tokenizer.json",
    "metrics.jsonl",
    "loss.png",
    "wandb/run_id",
)  # not linked, because a run rewrites these files
BEST, WEIGHTS = "checkpoints/best.json", "model.safetensors"


def stage(run_dir: Path, folder: Path, repo_id: str) -> int:
    """Fill the new `folder` with the files to push, except `WEIGHTS` to be assembled; returns the newest step.

    Raises `UsageError` for a run without a checkpoint, `CorruptError` and `OSError` for damaged or unreadable files.
    """
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        raise UsageError(f"{run_dir}: has no checkpoint to push")
    newest, scored = checkpoints[-1], _scored(run_dir)
    if (run_dir / BEST).exists():
        _link(run_dir / BEST, folder / BEST)
    for checkpoint in {newest, scored}:
        for file in (path for path in checkpoint.rglob("*") if path.is_file()):
            _link(file, folder / file.relative_to(run_dir))
    for name in COPIED:
        if (run_dir / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run_dir / name, folder / name)
    opened = _opened(scored)
    if not opened.has("ema") and not opened.has("adapters") and (scored / WEIGHTS).exists():
        _link(scored / WEIGHTS, folder / WEIGHTS)
    state = read_json(scored / "state.json", inside=scored)
    (folder / "README.md").write_text(model_card(run_dir, state, repo_id), encoding="utf-8")
    return int(json.loads((newest / "state.json").read_text())["step"])


def complete(folder: Path) -> None:
    """Write `WEIGHTS` to a staged folder, if missing: the weights that `swamla.load` returns, and buffers."""
    if not (folder / WEIGHTS).exists():
        save_tensors(folder / WEIGHTS, weights_of(_opened(_scored(folder))))


def _scored(run_dir: Path) -> Path:
    """The best checkpoint, or the newest if none is marked."""
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    if not (run_dir / BEST).exists():
        return newest
    return newest.with_name(
        step_name(entry(read_json(run_dir / BEST, inside=run_dir), "step", int, file=run_dir / BEST))
    )


def _opened(path: Path) -> Checkpoint:
    listed = verify(path, hashes=False)  # hashes would delay training
    return Checkpoint(path=path, step=listed["step"], state={}, files=tuple(listed["files"]))


def _link(file: Path, to: Path) -> None:
    """A hard link, or a copy if the file system does not support them."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
