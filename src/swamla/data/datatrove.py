"""Run the parts of a preparation by datatrove's executors: local processes, a Slurm array, or a Ray cluster."""

from collections.abc import Mapping
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


def executor(kind: str, config: DataConfig, parts: int, settings: Mapping[str, Any] | None = None) -> Any:
    """datatrove's executor for `parts` tasks, each on one core; its `run()` starts them.

    All tasks share the cache of `config`; the last one joins the units to the dataset. settings: further arguments of
    the executor, such as Slurm's `time` and `partition`. Raises ConfigError, UsageError for unknown settings,
    MissingBackendError without datatrove.
    """
    require(kind in EXECUTORS, "executor", kind, f"must be one of {', '.join(EXECUTORS)}")
    require(parts > 0, "parts", parts, "must be > 0: the number of tasks")
    try:
        cls = getattr(import_module(f"datatrove.executor.{kind}"), EXECUTORS[kind])
    except ImportError as error:
        raise MissingBackendError(f"executor = {kind} needs datatrove: pip install 'swamla[data]' ({error})") from error
    ours = {
        "pipeline": [partial(_make_part, config, plugin_file(class_of(config.source)))],
        "tasks": parts,
        "logging_dir": str(config.cache / "datatrove"),
        "skip_completed": False,  # finished units are known by their files, not by datatrove's logs
    }
    try:
        return cls(**{**ours, **(settings or {})})
    except TypeError as error:
        raise UsageError(f"`executor_options`: {error}") from error


def _make_part(config: DataConfig, plugin: Path | None, data: Any, rank: int = 0, world_size: int = 1) -> Any:
    """One task: part `rank` (from 0) of `world_size`."""
    if plugin is not None:
        load_plugin(plugin)
    prepare_part(config, Part(rank + 1, world_size), workers=1)
    return data
