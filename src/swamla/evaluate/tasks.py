"""Find tasks of lm-eval by name, and run them."""

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.evaluator
import numpy as np
import torch
import tqdm
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from swamla.data.hub import reason
from swamla.errors import DataError, HubDataError, SwamlaError, UsageError
from swamla.evaluate.harness import HarnessModel

BOOTSTRAPS = 100_000  # resamples from which lm-eval estimates a standard error that has no formula


@cache
def task_manager(include_path: str = "") -> TaskManager:
    """lm-eval's index of its tasks, and of the YAML files under a folder of the user's own, which takes seconds."""
    if include_path and not Path(include_path).is_dir():
        raise UsageError(f"include_path = {include_path!r}: must be a folder of task files (YAML)")
    return TaskManager(include_path=include_path or None)


def list_tasks(include_path: str = "") -> list[tuple[str, str]]:
    """(name, kind) of everything that --tasks may name; the kind is group, tag or the task's output_type."""
    entries = task_manager(include_path).task_index
    kinds = {name: entry.kind.name.lower() for name, entry in entries.items()}
    types = {name: (entry.cfg or {}).get("output_type", "task") for name, entry in entries.items()}
    return [(name, kind if kind in ("group", "tag") else types[name]) for name, kind in sorted(kinds.items())]


def find_tasks(names: Sequence[str], include_path: str = "") -> dict[str, Any]:
    """The tasks, with their data, of these names, patterns ("mmlu_*") or YAML files, as lm-eval's loader gives them.

    Raises `UsageError` for an unknown name, with the nearest known ones, `HubDataError` for data that cannot be
    fetched, and `DataError` for a task that cannot be made.
    """
    manager = task_manager(include_path)
    wanted: list[str] = []
    for name in names:
        found = [name] if Path(name).is_file() else manager.match_tasks([name])
        if not found:
            near = get_close_matches(name, manager.all_tasks, n=5)
            hint = f"did you mean {', '.join(near)}?" if near else "swamla evaluate RUN --tasks list shows them"
            raise UsageError(f"no task {name!r}; {hint}")
        wanted += found
    try:
        tasks = manager.load(list(dict.fromkeys(wanted)))
    except OSError as error:
        what = f"the data of {', '.join(names)} cannot be read ({reason(error)})"
        raise HubDataError(f"{what}; most tasks fetch it from the hub at first use, which needs a network") from error
    except Exception as error:  # of lm-eval, of the task's own Python, or of datasets
        raise DataError(f"{', '.join(names)} cannot be loaded ({type(error).__name__}: {reason(error)})") from error
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UsageError(f"task {name}: runs code that a model wrote, or is about more than text: not supported")
    return tasks


def evaluate_tasks(
    lm: HarnessModel,
    tasks: dict[str, Any],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    samples: bool = False,
) -> dict[str, Any]:
    """Run what `find_tasks` found; returns lm-eval's results, versions and configs.

    num_fewshot: examples in the context, instead of the task's number; tasks that fix theirs at 0 keep it, as in
    lm-eval.  limit: only that many documents of each task.  samples: with every document and answer. Sets the seeds of
    Python, numpy and torch to lm-eval's. Raises `DataError` for a task whose texts cannot be made.
    """
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0 and (num_fewshot is not None or own is None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        with _quiet():
            found = lm_eval.evaluator.evaluate(lm, tasks, limit=limit, log_samples=samples, bootstrap_iters=BOOTSTRAPS)
    except (SwamlaError, OSError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # of a task's templates and columns
        raise DataError(f"lm-eval cannot run the tasks ({type(error).__name__}: {reason(error)})") from error
    return dict(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's progress bars, which ignore tqdm's own switch, and without its lines on stdout."""
    bars: dict[Any, Any] = {module: module.tqdm for module in (lm_eval.api.task, tqdm)}
    for module in bars:
        module.tqdm = lambda items, **_: items
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for module, bar in bars.items():
            module.tqdm = bar
