"""A run's folder: made for a new run, taken up again by a resumed one."""

import fcntl
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from swamla import distributed
from swamla.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    mark_best,
    read_run_config,
    set_aside_after,
    step_name,
    stored_paths,
)
from swamla.config import from_plain, to_plain
from swamla.data.dataset import Dataset
from swamla.data.tokenizer import load_tokenizer
from swamla.errors import ConfigError, CorruptError, DataError, Interrupted, UsageError
from swamla.files import entry, read_json, write_text_atomically
from swamla.model.language_model import LanguageModel
from swamla.train.backends import resolve_backends
from swamla.train.compile import compile_blocks
from swamla.train.config import RunConfig
from swamla.train.ema import WeightAverage
from swamla.train.fp8 import convert_to_fp8
from swamla.train.launch import Launch, this_launch
from swamla.train.machine import describe_machine, differences
from swamla.train.parallel import build_model
from swamla.train.paths import fastest_paths, usual_length
from swamla.train.precision import Chosen, resolve_device, resolve_precision
from swamla.train.state import TrainState, seed_generators

# Settings a resumed run may change without becoming another run.
MAY_CHANGE = (
    *("train.steps", "train.max_minutes", "train.device", "train.threads", "train.log_interval"),
    *("train.checkpointing", "train.compile", "train.parallel", "train.shards", "train.accumulation"),
    "train.expert_parallel",
    *("train.lr", "train.min_lr_ratio", "train.schedule", "train.warmup", "train.decay"),
    *("train.weight_decay", "train.grad_clip", "train.save_interval", "train.keep_last"),
    *("train.async_save", "train.on_save_error"),
    *("train.max_skipped", "train.spike_factor", "train.rank_timeout_minutes"),
    *("train.eval_interval", "train.eval_seconds", "train.eval_tokens"),
    *("train.tensorboard", "train.wandb_project", "train.wandb_run_name", "train.hf_repo_id", "train.hf_private"),
    *("train.profile", "train.profile_steps", "train.profile_warmup"),
)


@contextmanager
def open_run(
    config: RunConfig, run_dir: Path, *, dataset: Dataset, resume: bool
) -> Iterator[tuple[RunConfig, TrainState]]:
    """The settled config and the state from which the loop goes on; the folder is written or checked.

    Of several ranks the main one alone holds, checks and writes the folder, which all must see. Until the block ends
    no other process can train in the folder. Raises `UsageError` for a folder that is not empty without `resume`, that
    holds no run with it, or that is being trained in; `ConfigError` and `DataError` when a resumed run would go on
    with another model, other data or another order of the data.
    """
    distributed.require_rows(config.train.batch_size, config.train.accumulation)
    launch = this_launch()
    with ExitStack() as held:

        def check() -> Checkpoint | None:
            if resume and run_dir.is_dir():
                held.enter_context(_alone_in(run_dir))
            checkpoint = _checkpoint_to_take_up(run_dir, dataset) if resume else None
            settled = settle(config, dataset)
            if resume:
                check_same_run(settled, run_dir)
            else:
                require_empty(run_dir)
            return checkpoint

        def write() -> None:
            if not resume:
                run_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(_alone_in(run_dir))
                require_empty(run_dir)  # another run may have come while this one was being made
            plain = {"format_version": FORMAT_VERSION, **to_plain(config)}
            dataset.tokenizer.save(run_dir / "tokenizer.json")
            write_text_atomically(run_dir / "config.json", json.dumps(plain, indent=2) + "\n")
            Launch(names=launch).write(run_dir)

        checkpoint = distributed.on_main(check)
        config = settle(config, dataset)
        state = fresh_state(config, dataset, before=checkpoint)
        if checkpoint is not None:
            _take_up(state, checkpoint)
        distributed.on_main(write)
        try:
            yield config, state
        except Interrupted:  # torchrun may start all again, which would undo it
            distributed.on_main(lambda: Launch(names=launch, stopped=True).write(run_dir))
            raise


@contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it however this process ends. `UsageError` if another one holds it."""
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        if not _locks(folder, fcntl.LOCK_EX):
            time.sleep(0.05)  # `is_running` holds it for a moment
            if not _locks(folder, fcntl.LOCK_EX):
                raise UsageError(f"{run_dir}: another process is training in it: wait for it, or stop it first")
        yield
    finally:
        os.close(folder)


def is_running(run_dir: Path) -> bool:
    """True while a process trains in the folder."""
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        return not _locks(folder, fcntl.LOCK_SH)
    finally:
        os.close(folder)


def _locks(folder: int, how: int) -> bool:
    """True if the lock could be had at once."""
    try:
        fcntl.flock(folder, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def require_empty(run_dir: Path) -> None:
    """Raise `UsageError` for a folder, or a file, in the place of a new run."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UsageError(f"{run_dir}: exists and is not empty: choose another folder, or continue it with --resume")


def settle(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The config with the vocabulary size that the tokenizer decides. Raises `ConfigError` for one too small."""
    needed = dataset.tokenizer.vocab_size
    if config.model.vocab_size == 0:
        return replace(config, model=replace(config.model, vocab_size=needed))
    if config.model.vocab_size < needed:
        raise ConfigError("model.vocab_size", config.model.vocab_size, f"must be >= the tokenizer's {needed}, or 0")
    return config


def fresh_state(config: RunConfig, dataset: Dataset, *, before: Checkpoint | None = None) -> TrainState:
    """The state of a run before its first step, a function of the config's seed.

    before: a checkpoint whose paths are taken, whatever is fast on this machine; else they are measured.
    """
    train = config.train
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    device = resolve_device(train.device)
    precision = resolve_precision(train.precision, device)
    paths, notes = _paths(config, dataset, device, precision, before)
    model_config = config.model.with_backends(paths)
    backends = resolve_backends(model_config, device, precision)
    seed_generators(train.seed)

    def prepare(model: LanguageModel) -> None:
        model.checkpoint_activations(train.checkpointing)
        if precision == "fp8":
            notes.append(convert_to_fp8(model, device))

    spread = build_model(
        model_config,
        parallel=train.parallel,
        shards=train.shards,
        expert_parallel=train.expert_parallel,
        seed=train.seed,
        device=device,
        prepare=prepare,
    )
    model = spread.model
    if (described := spread.describe()) is not None:
        notes.append(described)
    if train.compile != "none":
        notes.append(compile_blocks(model, train.compile, device))
    elif precision == "fp8" and device.type == "cuda":
        notes.append("fp8 without compile: its casts run one by one, and may cost more than its products save")
    return TrainState(
        spread=spread,
        optimizer=train.optimizer.build(model, lr=train.lr, weight_decay=train.weight_decay),
        precision=precision,
        backends=backends,
        notes=tuple(notes),
        data_fingerprint=dataset.fingerprint,
        device=device,
        machine=describe_machine(device),
        paths=paths,
        average=None if train.ema is None else WeightAverage(model, train.ema),
    )


def _paths(
    config: RunConfig, dataset: Dataset, device: torch.device, precision: Chosen, before: Checkpoint | None
) -> tuple[dict[str, str], list[str]]:
    """Block → backend, the same on every rank, and what to tell of it."""
    if before is not None and _machine_of(before).get("device", device.type) == device.type == "cpu":
        return stored_paths(before), []

    def measured() -> tuple[dict[str, str], list[str]]:
        length = usual_length(dataset, config.train.block_size)
        paths, choices = fastest_paths(config.model, device, precision, length=length)
        return paths, [str(choice) for choice in choices]

    return distributed.on_main(measured)


def _checkpoint_to_take_up(run_dir: Path, dataset: Dataset) -> Checkpoint | None:
    """The newest checkpoint that verifies, None before the first; of a run on the same data, whatever else changed."""
    if not (run_dir / "config.json").exists():
        raise UsageError(f"{run_dir}: nothing to resume (it has no config.json)")
    _check_same_tokenizer(run_dir, dataset)
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        warnings.warn(f"{run_dir}: holds no checkpoint yet: starting from the first step", stacklevel=2)
        return None
    before = entry(checkpoint.state, "data_fingerprint", str, file=checkpoint.path / "state.json")
    if before != dataset.fingerprint:
        raise _changed(run_dir, "the data", before, dataset.fingerprint)
    return checkpoint


def _check_same_tokenizer(run_dir: Path, dataset: Dataset) -> None:
    file = run_dir / "tokenizer.json"
    if file.exists():
        before, now = load_tokenizer(file).fingerprint, dataset.tokenizer.fingerprint
        if before != now:
            raise _changed(run_dir, "the data, or its tokenizer,", before, now)


def _changed(run_dir: Path, what: str, before: str, now: str) -> DataError:
    return DataError(
        f"{run_dir}: {what} changed since the checkpoint (fingerprint {now[:12]}, the run had {before[:12]}): "
        "restore the data, or start a new run"
    )


def _take_up(state: TrainState, checkpoint: Checkpoint) -> None:
    """Move a fresh state to `checkpoint`; warns where another machine computed it, for then the bits may differ."""
    state.restore(checkpoint)
    if other := differences(_machine_of(checkpoint), state.machine):
        warnings.warn(f"going on with {other}: not bit for bit as it would have gone on there", stacklevel=2)
    distributed.barrier()  # nothing is set aside that another rank still reads
    directory = checkpoint.path.parent
    distributed.on_main(lambda: set_aside_after(directory, checkpoint.step))
    best = distributed.on_main(lambda: _agreed_best(state, directory))
    state.best_step, state.best_loss = best or (None, None)
    if state.best_step == state.step != state.evaluated_step:
        state.evaluated_step, state.evaluated_at = state.step, state.seconds


def _machine_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint was computed on; older ones say nothing of it."""
    if "machine" not in checkpoint.state:
        return {}
    return entry(checkpoint.state, "machine", dict, file=checkpoint.path / "state.json")


def _agreed_best(state: TrainState, directory: Path) -> tuple[int, float] | None:
    """Make best.json and the state agree: a crash may have come between the two, or the best be damaged.

    A moment that was saved before it was evaluated is the best by best.json alone.
    """
    kept = {path.name for path in list_checkpoints(directory)}
    known = [best for best in (state.best, _marked_best(directory)) if best and step_name(best[0]) in kept]
    best = min((best for best in known if best[0] <= state.step), key=lambda best: best[1], default=None)
    if best is None:
        (directory / "best.json").unlink(missing_ok=True)
    else:
        mark_best(directory, *best)
    return best


def _marked_best(directory: Path) -> tuple[int, float] | None:
    """What best.json says, None where it says nothing of use."""
    file = directory / "best.json"
    try:
        marked = read_json(file, inside=directory) if file.exists() else {}
    except CorruptError:
        return None
    step, loss = marked.get("step"), marked.get("loss")
    return (step, loss) if type(step) is int and isinstance(loss, float) and math.isfinite(loss) else None


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Raise `ConfigError` where `config` would make another run of the one in the folder.

    Of all that differs it names what the rest follows from: the pattern, else what is of another kind. A vocabulary
    that the tokenizer has yet to decide (size 0) counts as the run's.
    """
    plain = read_run_config(run_dir)
    del plain["format_version"]
    # Read as a config, so that a setting which the run's swamla did not have yet counts as its default.
    before = dict(_leaves(to_plain(from_plain(RunConfig, plain, origin=str(run_dir / "config.json")))))
    now = dict(_leaves(to_plain(config)))
    if config.model.vocab_size == 0:
        now["model.vocab_size"] = before["model.vocab_size"]
    differing = [
        name
        for name in sorted((before.keys() | now.keys()) - set(MAY_CHANGE))
        if name.startswith(("model.", "train.")) and before.get(name) != now.get(name)
    ]
    if differing:
        name = min(differing, key=lambda name: (name != "model.pattern", not name.endswith(".kind")))
        had = f"the run to resume had {before.get(name)!r}; start a new run instead"
        raise ConfigError(name.removesuffix(".kind"), now.get(name), had)


def _leaves(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
