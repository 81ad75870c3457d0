"""Run the parts of a preparation, or of a study, by datatrove's executors: local processes, a Slurm array, or Ray."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from swamla.data.config import DataConfig
from swamla.data.preparing import Part, prepare_part
from swamla.data.sources import class_of
from swamla.errors import MissingBackendError, UsageError, require
from swamla.plugins import load_plugin, plugin_file

EXECUTORS = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}


def preparation(kind: str, config: DataConfig, parts: int, settings: Mapping[str, Any] | None = None) -> Any:
    """The executor of a preparation in `parts` parts, see `executor`.

    All tasks share the cache of `config`; the last one joins the units to the dataset.
    """
    task = partial(_make_part, config, plugin_file(class_of(config.source)))
    return executor(kind, task, parts, config.cache / "datatrove", settings)


def executor(
    kind: str,
    task: Callable[[int, int], None],
    parts: int,
    logs: Path,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """datatrove's executor for `parts` tasks, each on one core; its `run()` starts them.

    task: called with its number from 0 and with `parts`; what is finished already it has to know itself.  settings:
    further arguments of the executor, such as Slurm's `time` and `partition`. Raises ConfigError, UsageError for
    unknown settings, MissingBackendError without datatrove.
    """
    require(kind in EXECUTORS, "executor", kind, f"must be one of {', '.join(EXECUTORS)}")
    require(parts > 0, "parts", parts, "must be > 0: the number of tasks")
    try:
        cls = getattr(import_module(f"datatrove.executor.{kind}"), EXECUTORS[kind])
    except ImportError as error:
        raise MissingBackendError(f"executor = {kind} needs datatrove: pip install 'swamla[data]' ({error})") from error
    ours = {
        "pipeline": [partial(_step, task)],
        "tasks": parts,
        "logging_dir": str(logs),
        "skip_completed": False,  # what is finished is known by our files, not by datatrove's logs
    }
    try:
        return cls(**{**ours, **(settings or {})})
    except TypeError as error:
        raise UsageError(f"`executor_options`: {error}") from error


def _step(task: Callable[[int, int], None], data: Any, rank: int = 0, world_size: int = 1) -> Any:
    """A task as a step of datatrove's pipelines, which passes its data on."""
    task(rank, world_size)
    return data


def _make_part(config: DataConfig, plugin: Path | None, rank: int, parts: int) -> None:
    """One task: part `rank` (from 0) of `parts`."""
    if plugin is not None:
        load_plugin(plugin)
    prepare_part(config, Part(rank + 1, parts), workers=1)
