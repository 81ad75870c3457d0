"""What a study's page shows beside the scores: losses by position, induction, curves, speed, and caches.

What needs the trained weights is measured once, when all runs have ended, and kept as lines of measured.jsonl, in
speed.json and in decoding.json; the page is drawn from these files, however often.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from swamla.config import from_plain
from swamla.data.dataset import Dataset, TrainingData
from swamla.data.packing import NO_LABEL, HeldOutRows
from swamla.data.shards import Split
from swamla.errors import UsageError
from swamla.evaluate import part_of, recall, validation
from swamla.evaluate.recall_grid import SEED as TEST_SEED
from swamla.files import read_json, write_text_atomically
from swamla.interpret.explaining import repeat_size
from swamla.interpret.repeats import Repeats, induction, repeated_rows
from swamla.interpret.sections import Positions
from swamla.model.accounting import state_bytes
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout
from swamla.study.decoding import SECONDS as GENERATION_SECONDS
from swamla.study.decoding import Generation, measure_decoding, read_decoding
from swamla.study.folder import append_line, read_lines, waited_for
from swamla.study.matching import STATE_ELEMENT_BYTES
from swamla.study.plan import Study
from swamla.study.runs import Outcome, Pace, paces, run_folder, seed_runs
from swamla.study.scoring import as_trained, load_run
from swamla.tasks import Task
from swamla.train.precision import Chosen, autocast
from swamla.train.speed import step_seconds
from swamla.train.tracking.metrics import read_metrics

MEASURED, SPEED = "measured", "speed.json"
LOGIT_BYTES = 1 << 28  # of all logits of the rows that are scored together
READ = 1 << 20  # tokens of the training text whose ids the random repeats are drawn from
REPEAT_SEED = 0
CHOICE_SEED = 0  # of a task's held-out rows that are no test rows
POINTS = 40  # of a curve
LONGEST = 1 << 15  # tokens up to which caches are counted
ROUNDS, SECONDS = 20, 20.0  # of timing all arms in turns, at most


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers to a task's test rows, by `swamla.evaluate.recall`. low, high: the accuracy's Wilson interval at 95 %.

    state_bytes: of one row's state, in fp32.
    """

    accuracy: float
    low: float
    high: float
    queries: int
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A line of measured.jsonl: a run of a fresh seed.

    positions: on the test part of a text.  repeats: on random repeats of `length` ids in `rows` rows; None, and `why`,
    for a model whose attention cannot be told.  answers: in the study's task.
    """

    run: str
    arm: str
    seed: int
    positions: Positions | None = None
    answers: Answers | None = None
    repeats: Repeats | None = None
    length: int = 0
    rows: int = 0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of an arm's training step, timed in turns with all others: median, quartiles, and how many steps."""

    median: float
    low: float
    high: float
    rounds: int


# ---- what needs the weights -----------------------------------------------------------------------------------------


def measure_runs(folder: Path, study: Study, outcomes: Mapping[str, Outcome], dataset: TrainingData) -> list[Measured]:
    """Measure every finished run of a fresh seed that is not measured yet, and return all.

    Another process that measures the study is waited for.
    """
    finished = [one for one in seed_runs(study, outcomes).values() if one.status == "finished"]
    with waited_for(folder, MEASURED):
        known = {one.run for one in read_measured(folder)}
        left = [outcome for outcome in finished if outcome.run not in known]
        if left:
            torch.set_num_threads(study.asked.threads)
            measured = _measuring(study, dataset)
        for outcome in left:
            model, precision = load_run(folder, study, outcome)
            one = Measured(run=outcome.run, arm=outcome.arm, seed=outcome.seed, **measured(model, precision))
            append_line(folder / f"{MEASURED}.jsonl", asdict(one))
    order = [arm.name for arm in study.arms]
    return sorted(read_measured(folder), key=lambda one: (order.index(one.arm), one.seed))


def read_measured(folder: Path) -> list[Measured]:
    """What was measured of the runs so far."""
    return [from_plain(Measured, row, origin=str(folder)) for row in read_lines(folder, MEASURED)]


def _measuring(
    study: Study, dataset: TrainingData, part: Literal["validation", "test"] = "test"
) -> Callable[[LanguageModel, Chosen], dict[str, Any]]:
    """A function that measures a model: fields of `Measured`. part: of the held-out text, or rows of a task."""
    if not isinstance(dataset, Dataset):
        assert study.task is not None
        return partial(_answers, study.task, TEST_SEED if part == "test" else CHOICE_SEED)
    split = part_of(dataset.held_out, part, dataset.tokenizer.decode)
    ids = np.unique(dataset.train.tokens[:READ]).tolist()
    return partial(_on_text, split, ids, dataset.tokenizer.eos_id, study.arms[0].config.train.block_size)


def _answers(task: Task, seed: int, model: LanguageModel, precision: Chosen) -> dict[str, Any]:
    with autocast(precision, model.device):
        found = recall(model, task, seed=seed)
    low, high = found.score.interval
    answers = Answers(
        accuracy=found.score.accuracy,
        low=low,
        high=high,
        queries=found.score.queries,
        state_bytes=found.state_bytes,
    )
    return {"answers": answers}


def _on_text(
    split: Split, ids: Sequence[int], start: int, block_size: int, model: LanguageModel, precision: Chosen
) -> dict[str, Any]:
    with autocast(precision, model.device):
        positions = loss_by_position(model, split, eos_id=start, block_size=block_size)
    try:
        length, rows = repeat_size(model, len(ids), block_size)
        repeats_BT = repeated_rows(ids, start, length=length, rows=rows, seed=REPEAT_SEED)
        repeats = induction(model, repeats_BT.to(model.device))
    except UsageError as error:  # a mixer without `explain`, or too few ids
        return {"positions": positions, "why": str(error)}
    return {"positions": positions, "repeats": repeats, "length": length, "rows": rows}


@torch.no_grad()
def loss_by_position(model: LanguageModel, split: Split, *, eos_id: int, block_size: int) -> Positions:
    """Losses on a split where 1, 2, 3–4, 5–8 … tokens of the document were read: the predictions of bits per byte.

    In rows of `block_size` tokens without context from the previous row, as they are scored.
    """
    batch_size = max(1, LOGIT_BYTES // (4 * block_size * model.config.vocab_size))
    nats_T, count_T = torch.zeros(block_size, dtype=torch.float64), torch.zeros(block_size, dtype=torch.int64)
    for batch in HeldOutRows(split, block_size, eos_id).batches(batch_size):
        seq = Layout.from_documents(batch.document_BT).to(model.device)
        losses_BT = model.token_losses(batch.tokens_BT.to(model.device), batch.labels_BT.to(model.device), seq)
        there_BT = batch.labels_BT != NO_LABEL
        position_N = seq.position_BT.cpu()[there_BT]
        nats_T += torch.bincount(position_N, losses_BT.double().cpu()[there_BT], minlength=block_size)
        count_T += torch.bincount(position_N, minlength=block_size)
    return by_powers(nats_T, count_T)


def by_powers(nats_T: Tensor, count_T: Tensor) -> Positions:
    """Losses where 1, 2, 3–4, 5–8 … tokens were read, of sums of nats and numbers of labels where 1, 2, 3 … were."""
    longest = len(count_T)
    last = [min(2**power, longest) for power in range(math.ceil(math.log2(longest)) + 1)]
    first = [1, *(end + 1 for end in last[:-1])]
    counts = [int(count_T[begin - 1 : end].sum()) for begin, end in zip(first, last, strict=True)]
    sums = [float(nats_T[begin - 1 : end].sum()) for begin, end in zip(first, last, strict=True)]
    seen = [index for index, count in enumerate(counts) if count]  # documents may all be shorter than a row
    return Positions(
        first=tuple(first[index] for index in seen),
        last=tuple(last[index] for index in seen),
        loss=tuple(sums[index] / counts[index] for index in seen),
        tokens=tuple(counts[index] for index in seen),
    )


def measure_speed(folder: Path, study: Study, dataset: TrainingData) -> dict[str, Speed]:
    """Time training steps of all arms in turns, A B C A B C …, once; later calls read what was found."""
    with waited_for(folder, "speed"):
        if not (folder / SPEED).exists():
            torch.set_num_threads(study.asked.threads)
            configs = {arm.name: arm.config for arm in study.arms}
            found = step_seconds(configs, dataset, rounds=ROUNDS, seconds=SECONDS)
            plain = {name: asdict(_speed(each)) for name, each in found.items()}
            write_text_atomically(folder / SPEED, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    return read_speed(folder)


def _speed(seconds: Sequence[float]) -> Speed:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return Speed(median=median, low=low, high=high, rounds=len(seconds))


def read_speed(folder: Path) -> dict[str, Speed]:
    """Arm → the time of its steps; empty if it was not measured."""
    file = folder / SPEED
    if not file.exists():
        return {}
    plain = read_json(file, inside=folder)
    return {name: from_plain(Speed, each, path=name, origin=str(file)) for name, each in plain.items()}


# ---- what the runs have written, and what configs say ---------------------------------------------------------------

Curve = dict[str, list[float]]
Spread = tuple[list[float], list[float], list[float]]  # means, lowest and highest of all seeds


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Training losses of an arm's fresh seeds, means over spans of steps. tokens: seen at the middle of a span.

    loss, difference: (mean, lowest, highest) over the seeds, of the loss and of it less the first arm's at the same
    seed, empty for the first.
    """

    arm: str
    tokens: list[float]
    loss: Spread
    difference: Spread


def curves(folder: Path, study: Study, outcomes: Mapping[str, Outcome]) -> list[Curves]:
    """The curves of every arm that has finished runs of fresh seeds, whose metrics are still there."""
    span = max(1, math.ceil(study.arms[0].steps / POINTS))
    found: dict[str, dict[int, list[float]]] = {}
    for one in seed_runs(study, outcomes).values():
        file = run_folder(folder, one.run) / "metrics.jsonl"
        if one.status == "finished" and file.exists():
            whole = max(1, study.arm(one.arm).steps // span)  # a rest of a span is noisier, and no span
            found.setdefault(one.arm, {})[one.seed] = _means(read_metrics(file), span)[:whole]
    drawn = []
    for arm in study.arms:
        first = study.reference_of(arm)
        own, others = found.get(arm.name, {}), found.get(first.name, {})
        if not own:
            continue
        count = min(map(len, own.values()))
        paired = [seed for seed in own if seed in others] if arm is not first else []
        both = min([count, *(len(others[seed]) for seed in paired)])
        apart = [[own[seed][at] - others[seed][at] for at in range(both)] for seed in paired]
        a_span = min(span, arm.steps) * arm.config.train.batch_size * arm.config.train.block_size
        drawn.append(
            Curves(
                arm=arm.name,
                tokens=[(at + 0.5) * a_span for at in range(count)],
                loss=_spread([losses[:count] for losses in own.values()]),
                difference=_spread(apart),
            )
        )
    return drawn


def _means(records: Sequence[Mapping[str, Any]], span: int) -> list[float]:
    """The mean training loss over every whole `span` steps; steps that were skipped have none."""
    losses: dict[int, list[float]] = {}
    for record in records:
        if record.get("loss") is not None:
            losses.setdefault((record["step"] - 1) // span, []).append(record["loss"])
    means = []
    for at in range(len(losses)):
        if at not in losses:
            break
        means.append(statistics.fmean(losses[at]))
    return means


def _spread(rows: Sequence[Sequence[float]]) -> Spread:
    columns = list(zip(*rows, strict=True))
    return [statistics.fmean(each) for each in columns], [*map(min, columns)], [*map(max, columns)]


def caches(study: Study) -> dict[str, dict[int, int]]:
    """Arm → tokens → bytes of the state of one sequence in fp32, from the config alone, for powers of two."""
    found: dict[str, dict[int, int]] = {}
    for arm in study.arms:
        model = arm.config.model
        longest = min(LONGEST, model.learned_positions or LONGEST)
        lengths = [2**power for power in range(5, 40) if 2**power <= longest]
        found[arm.name] = {n: state_bytes(model, n, element_bytes=STATE_ELEMENT_BYTES) for n in lengths}
    return found


def peak_memory(folder: Path, outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    """Arm → the most bytes that one of its runs had, by the runs' own records."""
    most: dict[str, int] = {}
    for one in outcomes.values():
        file = run_folder(folder, one.run) / "metrics.jsonl"
        if one.status == "finished" and file.exists():
            seen = [int(record["peak_memory"]) for record in read_metrics(file) if record.get("peak_memory")]
            most[one.arm] = max([most.get(one.arm, 0), *seen])
    return {arm: value for arm, value in most.items() if value}


def renamed(ones: Sequence[Any], names: Mapping[str, str]) -> tuple[Any, ...]:
    """Those of the arms that `names` has, by the names that it gives."""
    return tuple(replace(one, arm=names[one.arm]) for one in ones if one.arm in names)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All of it, by arm. memory: bytes of the process.  measured, speed, decoding: empty where it was not measured."""

    curves: tuple[Curves, ...]
    measured: tuple[Measured, ...]
    speed: Mapping[str, Speed]
    memory: Mapping[str, int]
    caches: Mapping[str, Mapping[int, int]]
    paces: tuple[Pace, ...]
    decoding: Mapping[str, Sequence[Generation]] = field(default_factory=dict)

    def of(self, names: Mapping[str, str]) -> "Evidence":
        """That of some arms, by other names. names: arm → its name there."""
        return Evidence(
            curves=renamed(self.curves, names),
            measured=renamed(self.measured, names),
            speed={names[arm]: found for arm, found in self.speed.items() if arm in names},
            memory={names[arm]: found for arm, found in self.memory.items() if arm in names},
            caches={names[arm]: found for arm, found in self.caches.items() if arm in names},
            paces=renamed(self.paces, names),
            decoding={names[arm]: found for arm, found in self.decoding.items() if arm in names},
        )

    @classmethod
    def read(cls, folder: Path, study: Study, outcomes: Mapping[str, Outcome]) -> "Evidence":
        """What a study's folder has; nothing is measured."""
        order, kept = [arm.name for arm in study.arms], seed_runs(study, outcomes)
        measured = (one for one in read_measured(folder) if one.run in kept)
        return cls(
            curves=tuple(curves(folder, study, outcomes)),
            measured=tuple(sorted(measured, key=lambda one: (order.index(one.arm), one.seed))),
            speed=read_speed(folder),
            memory=peak_memory(folder, outcomes),
            caches=caches(study),
            paces=tuple(paces(study, outcomes)),
            decoding=read_decoding(folder),
        )


def with_closing(study: Study, dataset: TrainingData, run: Path) -> Study:
    """The study with the seconds that all will take once its runs have ended, by a short run of the first arm.

    That run is scored and measured as those of fresh seeds will be, but on the validation part, of a task on rows that
    choices are made by: the test part is read once, at the end. Runs of slower arms take longer by as much as their
    steps do; of generation the most is taken.
    """
    torch.set_num_threads(study.asked.threads)
    first = study.arms[0]
    model, precision = as_trained(run, first)
    score = validation(dataset, first.config.train.block_size, part="validation")
    measured = _measuring(study, dataset, part="validation")
    begun = time.monotonic()
    with autocast(precision, model.device):
        score(model)
    measured(model, precision)
    each = (time.monotonic() - begun) / (first.seconds_per_step or 1.0)
    runs = sum(each * (arm.seconds_per_step or 1.0) * study.seeds_of(arm) for arm in study.arms)
    timing = min(SECONDS, ROUNDS * sum(arm.seconds_per_step for arm in study.arms))
    return replace(study, closing_seconds=round(runs + timing + GENERATION_SECONDS, 1))


def measure(
    folder: Path, study: Study, outcomes: Mapping[str, Outcome], dataset: TrainingData, say: Callable[[str], None]
) -> Evidence:
    """Measure what is not measured yet of a study whose runs have all ended. say: told what is done."""
    what = "answers" if study.task else "losses by position and induction"
    say(f"measuring {what} of all seeds …")
    measure_runs(folder, study, outcomes, dataset)
    say("timing steps of all arms in turns …")
    measure_speed(folder, study, dataset)
    say("timing generation of all arms in turns …")
    measure_decoding(folder, study, dataset)
    return Evidence.read(folder, study, outcomes)
