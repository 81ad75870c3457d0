"""A run's folder: created by a new run, checked and continued by a resumed one."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from swamla import distributed
from swamla.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    mark_best,
    set_aside_after,
    step_name,
    stored_paths,
)
from swamla.config import to_plain
from swamla.data.caching import remember_run
from swamla.data.dataset import TrainingData
from swamla.data.sources import located
from swamla.data.tokenizer import load_tokenizer
from swamla.errors import ConfigError, CorruptError, DataError, Interrupted, require
from swamla.files import entry, read_json, write_text_atomically
from swamla.model.accounting import parameter_specs
from swamla.model.adapters import attach
from swamla.model.compiling import compile_blocks, resolve_compile
from swamla.model.language_model import LanguageModel
from swamla.train.backends import fastest_paths, resolve_backends, usual_length
from swamla.train.changes import (
    check_horizon,
    check_same_run,
    config_of,
    describe_changes,
    scoring_of,
    settings_to_store,
)
from swamla.train.claims import Claim, claim_new, claim_run, is_unsaved, remove_unsaved
from swamla.train.config import RunConfig, TrainConfig
from swamla.train.ema import WeightAverage
from swamla.train.fp8 import convert_to_fp8
from swamla.train.init_from import RECORD, Origin, describe, origin_of
from swamla.train.launch import Launch, this_launch
from swamla.train.parallel.build import build_model, replicated
from swamla.train.precision import Chosen, measured_precision, resolve_device, resolve_precision
from swamla.train.racing import describe_cpu, races_on
from swamla.train.state import TrainState, seed_generators
from swamla.train.tracking.metrics import drop_records_after

DATA = "data.json"  # identifies the run's prepared data


@contextmanager
def open_run(
    config: RunConfig, run_dir: Path, *, dataset: TrainingData, resume: bool, claim: Claim | None = None
) -> Iterator[tuple[RunConfig, TrainState]]:
    """The resolved config and the state to train from. Writes a new run's folder, or checks and continues an old one.

    The main rank alone locks, checks and writes the folder, which all ranks must see. No other process can train in
    it until the context ends. claim: the lock, if the caller has taken it. A new run that fails before its first step
    removes its folder. Raises `UsageError` if the folder is in use, is not empty without `resume`, or holds no run
    with it; `ConfigError` or `DataError` if a resumed run would continue with another model, other data, another order
    of the data, or a higher learning rate that was not asked for.
    """
    config.train.require_rows()
    launch = this_launch()
    with ExitStack() as locks:

        def check() -> Checkpoint | None:
            if claim is None:
                locks.enter_context(claim_run(run_dir) if resume else claim_new(run_dir))
            checkpoint = _checkpoint_to_resume(run_dir, dataset) if resume else None
            origin = _origin(config.train, checkpoint)
            if origin is not None:
                origin.require_same_vocabulary(dataset.tokenizer, dataset.base)
            resolved = resolve_vocabulary(config, dataset)
            if origin is not None:
                origin.require_fit(resolved.model, grown=config.data.chat is not None)
            # Raises for too little text, before anything is written.
            dataset.rows(config.train.block_size, config.train.seed)
            if resume:
                check_same_run(resolved, run_dir)
            return checkpoint

        def write() -> None:
            if not resume and is_unsaved(run_dir):
                warnings.warn(f"{run_dir}: replaced a run that ended before its first checkpoint", stacklevel=2)
                remove_unsaved(run_dir)
            drop_records_after(run_dir / "metrics.jsonl", state.step)
            settings = settings_to_store(before, config.train, step=step, seconds=seconds)
            stored = replace(config, data=located(config.data), train=settings)  # for a command in another folder
            plain = {"format_version": FORMAT_VERSION, **to_plain(stored)}
            write_text_atomically(run_dir / "config.json", json.dumps(plain, indent=2) + "\n")
            dataset.tokenizer.save(run_dir / "tokenizer.json")
            if state.initialized_from is not None:
                write_text_atomically(run_dir / RECORD, json.dumps(state.initialized_from) + "\n")
            write_text_atomically(run_dir / DATA, json.dumps(dataset.identity(), indent=2) + "\n")
            Launch(names=launch).write(run_dir)
            remember_run(config.data.cache, run_dir)  # so that `swamla cache` knows whose data it holds

        checkpoint = distributed.on_main(check)
        before = distributed.on_main(lambda: config_of(run_dir).train if resume else config.train)
        config = resolve_vocabulary(config, dataset)
        step, seconds = (checkpoint.step, float(checkpoint.state.get("seconds", 0))) if checkpoint else (0, 0.0)
        check_horizon(before, config.train, step=step, seconds=seconds)
        state = fresh_state(config, dataset, _origin(config.train, checkpoint), before=checkpoint)
        state.scored_by = scoring_of(before)
        state.notes += tuple(describe_changes(before, config.train, step=step, seconds=seconds))
        if checkpoint is not None:
            _resume(state, checkpoint)
        distributed.on_main(write)
        try:
            yield config, state
        except Interrupted:  # if torchrun restarts the processes, they must not train on
            distributed.on_main(lambda: Launch(names=launch, stopped=True).write(run_dir))
            raise
        except BaseException:
            if not resume and state.step == 0 and distributed.is_main() and is_unsaved(run_dir):
                remove_unsaved(run_dir)
            raise


def _origin(train: TrainConfig, checkpoint: Checkpoint | None) -> Origin | None:
    """The run or folder in `init_from`; None for a resumed run, or if the weights are drawn from the seed."""
    return None if checkpoint or not train.init_from else origin_of(train.init_from, train.init_checkpoint)


def resolve_vocabulary(config: RunConfig, dataset: TrainingData) -> RunConfig:
    """The config, with the tokenizer's vocabulary size in place of 0. Raises `ConfigError` for a smaller one.

    Conversations may need more ids than the weights have, which then get rows for them.
    """
    needed = dataset.tokenizer.vocab_size
    if config.model.vocab_size == 0 or (
        config.data.chat and dataset.base.vocab_size <= config.model.vocab_size < needed
    ):
        return replace(config, model=replace(config.model, vocab_size=needed))
    if config.model.vocab_size < needed:
        raise ConfigError("model.vocab_size", config.model.vocab_size, f"must be >= the tokenizer's {needed}, or 0")
    return config


def fresh_state(
    config: RunConfig, dataset: TrainingData, origin: Origin | None = None, *, before: Checkpoint | None = None
) -> TrainState:
    """The state of a run before its first step: weights drawn from the seed, or loaded from `origin`.

    before: the checkpoint to be resumed; its precision and mixer backends are used instead of measuring the fastest
    ones on this machine.
    """
    train = config.train
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    device = resolve_device(train.device)
    notes: list[str] = []
    precision, measured = _precision(train, device, before)
    paths, raced = _paths(config, dataset, device, precision, before)
    model_config = config.model.with_backends(paths)
    backends = resolve_backends(model_config, device, precision)
    seed_generators(train.seed)

    def prepare(model: LanguageModel) -> None:
        model.checkpoint_activations(train.checkpointing)
        if precision == "fp8":
            notes.append(convert_to_fp8(model, device))

    strategy = build_model(model_config, train, device, prepare)
    model = strategy.model
    new_ids = range(dataset.base.vocab_size, dataset.tokenizer.vocab_size)
    initialized_from = None if origin is None else origin.fill(model, new_ids)
    if initialized_from is not None:
        notes.append(describe(initialized_from))
        if new_ids:
            notes.append(
                f"ids {new_ids.start} to {new_ids.stop - 1} are new: their rows begin as the mean of the others"
            )
    if train.lora:
        notes.append(_attach_adapters(model, train, dataset))
        if distributed.world_size() > 1:
            strategy = replicated(model)  # anew, as other parameters have gradients
    if (described := strategy.describe()) is not None:
        notes.append(described)
    compiling = resolve_compile(train.compile, device)
    if compiling != "none":
        notes.append(compile_blocks(model, compiling, device))
    elif train.compile == "auto" and device.type == "cuda":
        notes.append("compile: none, because Triton is not installed: pip install triton")
    elif precision == "fp8" and device.type == "cuda":
        notes.append(
            "fp8 without compile: each cast is a kernel of its own, which may cost more than fp8 products save"
        )
    optimizer = train.optimizer.build(model, lr=train.lr, weight_decay=train.weight_decay, precision=precision)
    base = model_config.base_shapes()
    multiples = {
        spec.name: train.optimizer.width_multiple(spec, base[spec.name])
        for spec in (parameter_specs(model_config) if base else ())
    }
    optimizer.set_rates(train.group_rates, multiples)
    return TrainState(
        strategy=strategy,
        optimizer=optimizer,
        precision=precision,
        backends=backends,
        notes=tuple(notes),
        measured=(*measured, *raced),
        data_fingerprint=dataset.fingerprint,
        initialized_from=initialized_from,
        device=device,
        machine=describe_machine(device),
        paths=paths,
        average=WeightAverage(model, train.ema or 0.0, width=train.ema_width) if train.averages_weights else None,
    )


def _attach_adapters(model: LanguageModel, train: TrainConfig, dataset: TrainingData) -> str:
    """Adapt the model as `train.lora` says; returns a line that says how much is trained."""
    if distributed.world_size() > 1:
        whole_model = "must be 0: adapters are trained with the whole model in each process (parallel = ddp)"
        replicas = train.parallel in ("auto", "ddp") and train.expert_parallel == 1
        require(replicas, "train.lora", train.lora, whole_model)
    whole = sum(p.numel() for p in model.parameters())
    attach(model, rank=train.lora, scale=train.lora_scale, seed=train.seed, ids=dataset.special_ids)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = " and the rows of the special ids" if dataset.special_ids else ""
    return f"lora: adapters of rank {train.lora}{rows} are trained, {trained:,} numbers beside {whole:,} fixed ones"


def identity_of_run(run_dir: Path) -> list[dict[str, str]] | None:
    """The identity of the run's data (`Dataset.identity`); for a run older than data.json, from its newest checkpoint.

    None if neither has it. Raises `CorruptError` if data.json is damaged.
    """
    file = run_dir / DATA
    if not file.exists():
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        state = read_json(checkpoints[-1] / "state.json", inside=checkpoints[-1]) if checkpoints else {}
        return [{"fingerprint": state["data_fingerprint"], "raw": ""}] if "data_fingerprint" in state else None
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
        names = ("fingerprint", "raw", "plugin")
        return [{name: str(each[name]) for name in names if name in each or name != "plugin"} for each in identity]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptError(f"{file}: damaged ({error!r}); delete it") from error


def _precision(train: TrainConfig, device: torch.device, before: Checkpoint | None) -> tuple[Chosen, list[str]]:
    """The precision, the same on every rank, and what was measured. "auto" keeps the precision of a resumed run."""
    if before is not None and train.precision == "auto":
        return cast(Chosen, entry(before.state, "precision", str, file=before.path / "state.json")), []

    def measured() -> tuple[Chosen, list[str]]:
        choice = measured_precision(device) if train.precision == "auto" else None
        if choice is None:
            return resolve_precision(train.precision, device), []
        return cast(Chosen, choice.chosen), [str(choice)]

    return distributed.on_main(measured)


def _paths(
    config: RunConfig, dataset: TrainingData, device: torch.device, precision: Chosen, before: Checkpoint | None
) -> tuple[dict[str, str], list[str]]:
    """Block → the backend of its mixer, the same on every rank, and what was measured."""
    if before is not None and _machine_of(before).get("device", device.type) == device.type == "cpu":
        return stored_paths(before), []

    def measured() -> tuple[dict[str, str], list[str]]:
        if not races_on(device):
            return {}, []
        length = usual_length(dataset, config.train.block_size)
        paths, choices = fastest_paths(config.model, device, precision, length=length)
        return paths, [str(choice) for choice in choices]

    return distributed.on_main(measured)


def _checkpoint_to_resume(run_dir: Path, dataset: TrainingData) -> Checkpoint | None:
    """The newest checkpoint that verifies, None if there is none yet. Raises `DataError` if the data changed."""
    _check_same_tokenizer(run_dir, dataset)
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        warnings.warn(f"{run_dir}: holds no checkpoint yet: starting from the first step", stacklevel=2)
        return None
    before = entry(checkpoint.state, "data_fingerprint", str, file=checkpoint.path / "state.json")
    if before != dataset.fingerprint:
        raise _data_changed(run_dir, "the data", before, dataset.fingerprint)
    return checkpoint


def _check_same_tokenizer(run_dir: Path, dataset: TrainingData) -> None:
    file = run_dir / "tokenizer.json"
    if file.exists():
        before, now = load_tokenizer(file).fingerprint, dataset.tokenizer.fingerprint
        if before != now:
            raise _data_changed(run_dir, "the data, or its tokenizer,", before, now)


def _data_changed(run_dir: Path, what: str, before: str, now: str) -> DataError:
    older = "" if (run_dir / DATA).exists() else ", or the run is older than the split by text and its cache is gone"
    return DataError(
        f"{run_dir}: {what} changed since the checkpoint (fingerprint {now[:12]}, the run had {before[:12]}){older}: "
        "restore the data, or start a new run"
    )


def _resume(state: TrainState, checkpoint: Checkpoint) -> None:
    """Restore a fresh state from `checkpoint`, set later checkpoints aside, and make best.json agree with the state.

    Warns if the checkpoint was computed on another machine: then the run may not continue bit for bit.
    """
    state.restore(checkpoint)
    if other := differences(_machine_of(checkpoint), state.machine):
        warnings.warn(f"resumed with {other}: the run may differ in its last bits", stacklevel=2)
    distributed.barrier()  # no rank may still read a checkpoint that is set aside
    directory = checkpoint.path.parent
    distributed.on_main(lambda: set_aside_after(directory, checkpoint.step))
    best = distributed.on_main(lambda: _agreed_best(state, directory))
    state.best_step, state.best_loss = best or (None, None)
    if state.best_step == state.step != state.evaluated_step:
        state.evaluated_step, state.evaluated_at = state.step, state.seconds


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on: `describe_cpu`, the device and the number of processes.

    Stored with every checkpoint and compared when the run resumes.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**describe_cpu(), "device": name, "processes": distributed.world_size()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """As text: "threads 2, before 1; torch 2.13.0, before 2.12.1"; "" if nothing that was recorded differs."""
    return "; ".join(
        f"{name} {now.get(name)}, before {value}" for name, value in before.items() if now.get(name) != value
    )


def _machine_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The machine that a checkpoint was computed on; empty for older checkpoints, which do not record it."""
    if "machine" not in checkpoint.state:
        return {}
    return entry(checkpoint.state, "machine", dict, file=checkpoint.path / "state.json")


def _agreed_best(state: TrainState, directory: Path) -> tuple[int, float] | None:
    """Make best.json agree with the state: the two may differ after a crash, and the best checkpoint may be damaged.

    If a step was saved before it was evaluated, only best.json knows that it is the best.
    """
    existing = {path.name for path in list_checkpoints(directory)}
    marked = _marked_best(directory)
    if marked and marked[0] == state.best_step:  # the step may have been evaluated again since
        marked = state.best
    known = [best for best in (state.best, marked) if best and step_name(best[0]) in existing]
    best = min((best for best in known if best[0] <= state.step), key=lambda best: best[1], default=None)
    if best is None:
        (directory / "best.json").unlink(missing_ok=True)
    else:
        mark_best(directory, *best)
    return best


def _marked_best(directory: Path) -> tuple[int, float] | None:
    """Step and loss in best.json; None if it is missing or damaged."""
    file = directory / "best.json"
    try:
        marked = read_json(file, inside=directory) if file.exists() else {}
    except CorruptError:
        return None
    step, loss = marked.get("step"), marked.get("loss")
    return (step, loss) if type(step) is int and isinstance(loss, float) and math.isfinite(loss) else None
