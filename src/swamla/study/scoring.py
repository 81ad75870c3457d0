"""Scores of a study's runs on the test part of the held-out text, or on test rows of a task: read once, at the end.

Also `work`, which executors call: it trains what is left, then scores.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swamla.checkpoint import latest_checkpoint, load
from swamla.data.config import DataConfig
from swamla.data.dataset import TrainingData
from swamla.data.datatrove import executor
from swamla.data.preparing import prepare
from swamla.data.task_rows import TaskDataset
from swamla.errors import UsageError
from swamla.evaluate import validation
from swamla.model.language_model import LanguageModel
from swamla.plugins import load_plugin
from swamla.study.folder import (
    TESTS,
    Test,
    append_line,
    note_program,
    opened,
    read_outcomes,
    read_tests,
    require_planned,
    waited_for,
)
from swamla.study.plan import Arm, Study
from swamla.study.running import run_study
from swamla.study.runs import Outcome, ready, run_folder, seed_runs
from swamla.train.precision import Chosen, autocast, resolve_as_trained


def score_tests(folder: Path, dataset: TrainingData) -> list[Test]:
    """Score every finished run of a fresh seed on the test part of the held-out text, once, when all runs have ended.

    Another process that scores the study is waited for. Raises `UsageError` for a study with runs left.
    """
    study, outcomes = opened(folder), read_outcomes(folder)
    if study is None or ready(study, outcomes):
        raise UsageError(f"{folder}: the study has runs left: the test part is read once, when all have ended")
    finished = [one for one in seed_runs(study, outcomes).values() if one.status == "finished"]
    torch.set_num_threads(study.asked.threads)
    scorer: Any = None
    with waited_for(folder, TESTS):
        known = {test.run for test in read_tests(folder)}
        for outcome in finished:
            if outcome.run in known:
                continue
            train = study.arm(outcome.arm).config.train
            scorer = scorer or validation(dataset, train.block_size, part="test")
            append_line(folder / f"{TESTS}.jsonl", asdict(_tested(folder, study, outcome, scorer)))
    return sorted(read_tests(folder), key=lambda test: ([arm.name for arm in study.arms].index(test.arm), test.seed))


def load_run(folder: Path, study: Study, outcome: Outcome) -> tuple[LanguageModel, Chosen]:
    """The model of a finished run as it was at its end, and the precision that it was trained with."""
    return as_trained(run_folder(folder, outcome.run), study.arm(outcome.arm))


def as_trained(run: Path, arm: Arm) -> tuple[LanguageModel, Chosen]:
    """The model of a run's last checkpoint, and the precision that it was trained with."""
    model, _ = load(run, "latest")
    checkpoint = latest_checkpoint(run / "checkpoints")
    trained = str(checkpoint.state.get("precision", "")) if checkpoint else ""
    return model, resolve_as_trained(arm.config.train.precision, trained, model.device)


def _tested(folder: Path, study: Study, outcome: Outcome, scorer: Callable[[Any], dict[str, float]]) -> Test:
    model, precision = load_run(folder, study, outcome)
    with autocast(precision, model.device):
        found = scorer(model)
    scores = {name: found[name] for name in ("bits_per_byte", "loss", "bytes", "accuracy") if name in found}
    return Test(run=outcome.run, arm=outcome.arm, seed=outcome.seed, tokens=int(found["tokens"]), **scores)


def work(folder: Path, plugins: tuple[str, ...], part: int, parts: int) -> None:
    """Work on a study as one of several processes, with its data from the cache: what executors call."""
    for file in plugins:
        load_plugin(file)
    study = opened(folder)
    assert study is not None
    dataset = data_of(study.arms[0].config.data)
    require_planned(study, dataset)
    note_program(folder)
    run_study(folder, part=part, parts=parts)
    score_tests(folder, dataset)


def data_of(config: DataConfig) -> TrainingData:
    """The texts, from the cache, or the rows of a task."""
    return TaskDataset(config.task) if config.task else prepare(config)


def executor_of(folder: Path, study: Study, kind: str, parts: int, settings: Mapping[str, Any] | None = None) -> Any:
    """datatrove's executor of kind local, slurm or ray, which works on a study in `parts` processes; see `executor`."""
    return executor(kind, partial(work, folder.resolve(), study.plugins), parts, folder / "datatrove", settings)
