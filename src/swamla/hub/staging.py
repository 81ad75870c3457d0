"""What a run looks like on the hub: a folder made from files alone, of hard links, so that training may go on.

`stage` is for the process that trains. Weights that have to be put together first, averages or those of a sharded run,
are left to `complete`, for the process that pushes.
"""

import json
import os
import shutil
from pathlib import Path

from swamla.checkpoint import Checkpoint, list_checkpoints, step_name, verify
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
)  # what a run may rewrite
BEST, WEIGHTS = "checkpoints/best.json", "model.safetensors"


def stage(run_dir: Path, folder: Path, repo_id: str) -> int:
    """Fill the new `folder` with what goes to the hub but, maybe, `WEIGHTS`; return the newest checkpoint's step.

    Raises `UsageError` for a run without a checkpoint, `CorruptError` and `OSError` where files are not as they should.
    """
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        raise UsageError(f"{run_dir}: holds no checkpoint to push")
    newest, judged = checkpoints[-1], _judged(run_dir)
    if (run_dir / BEST).exists():
        _link(run_dir / BEST, folder / BEST)
    for checkpoint in {newest, judged}:
        for file in (path for path in checkpoint.rglob("*") if path.is_file()):
            _link(file, folder / file.relative_to(run_dir))
    for name in COPIED:
        if (run_dir / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run_dir / name, folder / name)
    if not _opened(judged).has("ema") and (judged / WEIGHTS).exists():
        _link(judged / WEIGHTS, folder / WEIGHTS)
    state = read_json(judged / "state.json", inside=judged)
    (folder / "README.md").write_text(model_card(run_dir, state, repo_id), encoding="utf-8")
    return int(json.loads((newest / "state.json").read_text())["step"])


def complete(folder: Path) -> None:
    """Give a staged folder the weights that are judged, and loaded: averages, where there are any, and buffers."""
    if not (folder / WEIGHTS).exists():
        checkpoint = _opened(_judged(folder))
        averages = checkpoint.tensors("ema") if checkpoint.has("ema") else {}
        save_tensors(folder / WEIGHTS, checkpoint.tensors("model") | averages)


def _judged(run_dir: Path) -> Path:
    """The best checkpoint, else the newest."""
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    if not (run_dir / BEST).exists():
        return newest
    return newest.with_name(
        step_name(entry(read_json(run_dir / BEST, inside=run_dir), "step", int, file=run_dir / BEST))
    )


def _opened(path: Path) -> Checkpoint:
    listed = verify(path, hashes=False)  # which would take long, while training waits
    return Checkpoint(path=path, step=listed["step"], state={}, files=tuple(listed["files"]))


def _link(file: Path, to: Path) -> None:
    """The same bytes under another name; a copy where the file system has no links."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
