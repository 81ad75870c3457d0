"""The memory of a training step, by the accounting, and which settings need less if it runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from swamla import distributed
from swamla.errors import OutOfMemory, is_out_of_memory
from swamla.model.accounting import activation_bytes, count_parameters, parameter_specs
from swamla.train.config import RunConfig
from swamla.train.precision import Chosen, has_bf16
from swamla.train.state import TrainState

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a step runs: its precision, its device, and how the run is parallelised.

    ranks: processes that share a step's rows.  shards: processes that hold one replica of the model.
    """

    precision: Chosen
    device: torch.device = _CPU
    ranks: int = 1
    shards: int = 1


def training_bytes(config: RunConfig, place: Place) -> dict[str, int]:
    """Bytes per process, by kind; exact except for the activations, see `activation_bytes`.

    While accumulating, a rank of FSDP holds the full gradient. A rank of DDP holds it twice: accumulated, and in the
    buckets that are reduced with the last micro-batch.
    """
    train, shards = config.train, place.shards
    weights = 4 * count_parameters(config.model).total
    gradients = weights // shards
    if train.accumulation > 1:
        gradients = 2 * weights if shards == 1 < place.ranks else weights
    return {
        "weights": weights // shards,
        "gradients": gradients,
        "optimizer_state": train.optimizer.state_bytes(parameter_specs(config.model)) // shards,
        "averaged_weights": weights // shards if train.averages_weights else 0,
        "activations_estimate": activation_bytes(
            config.model,
            train.batch_size // place.ranks // train.accumulation * train.block_size,
            element_bytes=4 if place.precision == "fp32" else 2,
            checkpointing=train.checkpointing,
            length=train.block_size,
            device=place.device.type,
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change of settings that saves memory: its settings, the bytes it saves, and its effect."""

    settings: str
    saves: int
    effect: str


def advice(config: RunConfig, place: Place) -> list[Advice]:
    """Every single change that saves memory: first those that keep the step the same; within a rank, by bytes saved."""
    before = sum(training_bytes(config, place).values())
    found = []
    for rank, settings, effect, changed, there in _changes(config, place):
        saves = before - sum(training_bytes(changed, there).values())
        if saves > 0:
            found.append((rank, -saves, Advice(settings=settings, saves=saves, effect=effect)))
    return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]


_Change = tuple[int, str, str, RunConfig, Place]


def _changes(config: RunConfig, place: Place) -> Iterator[_Change]:
    """Rank (0 keeps the step the same), settings, effect, and the resulting config and place."""
    train = config.train
    own = train.batch_size // place.ranks
    rows = own // train.accumulation
    for count in dict.fromkeys((2 * train.accumulation, own)):
        if count > train.accumulation and own % count == 0:
            effect = f"micro-batches of {own // count} row{'s' * (own > count)} instead of {rows}; the same step"
            yield 0, f"accumulation = {count}", effect, _with(config, accumulation=count), place
    if train.checkpointing != "all":
        effect = "recomputes blocks in the backward pass; the same numbers"
        yield 0, "checkpointing = all", effect, _with(config, checkpointing="all"), place
    if place.ranks > 1 and place.shards == 1:
        effect = "each process holds a shard of the model; the same step"
        yield 0, "parallel = fsdp", effect, _with(config, parallel="fsdp"), replace(place, shards=place.ranks)
    if place.precision == "fp32" and has_bf16(place.device):
        yield 1, "precision = bf16", "bf16 products", _with(config, precision="bf16"), replace(place, precision="bf16")
    for flag, coarser in train.optimizer.coarser():
        yield 1, flag, "optimizer moments in fewer bits", _with(config, optimizer=coarser), place
    if train.averages_weights:
        flag = "ema = none" if train.ema is not None else "ema_width = none"
        yield 1, flag, "no averaged weights", _with(config, ema=None, ema_width=None), place
    if rows == 1 and train.block_size > 1:  # only shorter rows make a micro-batch of one row smaller
        half = train.block_size // 2
        shorter = _with(config, block_size=half, curriculum="")
        yield 2, f"block_size = {half}", "shorter rows: another run", shorter, place


def _with(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))  # type: ignore[arg-type]


@contextmanager
def advised(config: RunConfig, state: TrainState, run_dir: Path) -> Iterator[None]:
    """Turn an out-of-memory error into `OutOfMemory`, whose notes list what the memory is for, and what needs less.

    If CUDA's allocations were recorded (`profile`), they are written to RUN/profile/out-of-memory.pickle, for
    https://pytorch.org/memory_viz; swamla never reads this file.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raised = OutOfMemory(f"out of memory on {state.device}: {(str(error).splitlines() or ['MemoryError'])[0]}")
        config = replace(config, model=state.model.config)  # with the chosen backends
        snapshot = _keep_snapshot(state.device, run_dir / "profile" / "out-of-memory.pickle")
        for note in (*_notes(config, _place_of(state)), *snapshot):
            raised.add_note(note)
        raise raised from error


def _place_of(state: TrainState) -> Place:
    parameters = list(state.model.parameters())
    local = sum(distributed.local(p).numel() for p in parameters)
    return Place(
        precision=state.precision,
        device=state.device,
        ranks=distributed.world_size(),
        shards=round(sum(p.numel() for p in parameters) / max(local, 1)),
    )


def _notes(config: RunConfig, place: Place) -> Iterator[str]:
    """The memory that a step needs, and the advice, one line each."""
    needs = training_bytes(config, place)
    labels = {"activations_estimate": "activations about"}
    kinds = [f"{labels.get(name, name.replace('_', ' '))} {_size(n)}" for name, n in needs.items() if n]
    yield f"a training step needs about {_size(sum(needs.values()))}: {', '.join(kinds)}"
    found = advice(config, place)
    width = max((len(entry.settings) for entry in found), default=0)
    for entry in found:
        yield f"{entry.settings:<{width}}  saves about {_size(entry.saves)} ({entry.effect})"


def _size(n_bytes: float) -> str:
    unit, name = (1e9, "GB") if n_bytes >= 1e9 else (1e6, "MB")
    return f"{n_bytes / unit:,.3g} {name}"


def _keep_snapshot(device: torch.device, file: Path) -> list[str]:
    """Write the recorded CUDA allocations, if there are any; returns a line that says where."""
    if device.type != "cuda" or not torch._C._cuda_isHistoryEnabled():
        return []
    try:
        file.parent.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(file))
    except (OSError, RuntimeError, MemoryError) as error:
        return [f"the snapshot of the allocations could not be written: {error}"]
    return [f"the allocations are in {file}: view it with https://pytorch.org/memory_viz"]
