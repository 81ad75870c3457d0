"""Scores of a study's runs on the test part of the held-out text, or on test rows of a task: read once, at the end."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swamla.checkpoint import latest_checkpoint, load
from swamla.data.dataset import TrainingData
from swamla.errors import UsageError
from swamla.evaluate import validation
from swamla.model.language_model import LanguageModel
from swamla.study.folder import TESTS, Test, append_line, opened, read_outcomes, read_tests, waited_for
from swamla.study.plan import Arm, Study
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
