"""`swamla prepare DATA`: tokenize data ahead of training."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.overrides import apply_flags, data_flags
from swamla.cli.progress import shown_progress
from swamla.cli.run_config import locate_beside
from swamla.cli.running import describe_data, read_data
from swamla.config import did_you_mean, from_plain, load_file
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.hub import keep_shakespeare
from swamla.data.preparing import Part, prepare_part
from swamla.errors import DataError, UsageError, require
from swamla.evaluate import bytes_apart
from swamla.recipes import ALIASES, recipe_names, recipe_path
from swamla.tasks import PREFIX

_SECTIONS = {"format_version", "model", "spare", "data", "train"}  # of a recipe


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokenize data ahead of training, into the cache that training uses.

    data: a recipe, for its data, or a source: stdlib, a file or a folder. --source replaces a recipe's source.
    workers: processes that encode large data, each on one core; 0 for one per core.
    part: i/N: do the i-th of N parts of the work, independently of the others, in one shared --cache_dir; the part
        that finishes last assembles the dataset. "assemble": only that.
    executor: local, slurm or ray: run the parts with this executor of datatrove (pip install 'swamla[data]').
    parts: the number of parts for --executor.
    executor_options: its further arguments: "time=04:00:00 partition=cpu".
    """

    data: str = argument(positional=True, field="data.source")
    workers: int = 0
    part: str = argument("", metavar="i/N")
    executor: str = ""
    parts: int = 0
    executor_options: str = ""


def main(argv: list[str]) -> int:
    """Prepare the data, verify every byte, and describe it."""
    arguments, given = parse(Arguments, argv, command="swamla prepare", more=data_flags())
    if arguments.data.startswith(PREFIX):
        raise UsageError(f"{arguments.data}: a task has no text to prepare: its rows are drawn while it is trained on")
    refuse_idle(given, ("part", "workers"))
    plain: dict[str, Any] = {"data": {"source": arguments.data}}
    written: Callable[[str], str] = _nowhere
    if _is_recipe(arguments.data):
        recipe = recipe_path(arguments.data)
        plain, written = load_file(recipe)
        for name in plain.keys() - _SECTIONS:
            raise UsageError(
                f"{written(name) or recipe}: {name}: no such table; {did_you_mean(name, sorted(_SECTIONS))}"
            )
        locate_beside(plain, recipe, written, given)
    elif "source" in given:
        raise UsageError(f"--source goes with a recipe ({', '.join(recipe_names())}), and {arguments.data} is none")
    downloaded = plain.get("data", {}).get("source") == "shakespeare"
    flags = apply_flags(plain, given, data_flags())
    config = from_plain(
        DataConfig, plain.get("data", {}), path="data", origin=lambda field: flags.get(field) or written(field)
    )
    console = Console()
    if downloaded and "source" in given:
        config = _instead_of_download(config, arguments.data, console)
    require(arguments.workers >= 0, "workers", arguments.workers, "must be >= 0; 0 takes all cores")
    workers = arguments.workers or None
    if "executor" in given:
        return _hand_over(config, arguments, console)
    part = Part.parse(arguments.part) if "part" in given else None
    dataset = _run_part(config, part, workers, console) if part else read_data(config, console, workers=workers)
    if dataset:
        describe_data(dataset, console)
        dataset.verify()
        apart = bytes_apart(dataset.held_out, dataset.tokenizer.decode)
        say(console, f"held-out bytes counted minus bytes of the decoded tokens: {apart:,}")
    return 0


def _nowhere(field: str) -> str:
    """The place of a field that no recipe has."""
    return ""


def _is_recipe(data: str) -> bool:
    """Whether a name or file is a recipe; a .json file may also contain rows of text, and "files:PATH" is data."""
    if data.startswith("files:"):
        return False
    if data in (*recipe_names(), *ALIASES) or data.endswith(".toml"):
        return True
    if not data.endswith(".json") or not Path(data).is_file():
        return False
    try:
        plain = json.loads(Path(data).read_bytes())
    except (ValueError, RecursionError):
        return False  # lines of JSON, or damaged: the reader of rows reports it
    if not isinstance(plain, dict) or not plain or not plain.keys() <= _SECTIONS:
        return False
    return all(isinstance(section, dict) for name, section in plain.items() if name != "format_version")


def _hand_over(config: DataConfig, arguments: Arguments, console: Console) -> int:
    """Start datatrove's executor; its tasks may still run when this returns, e.g. a Slurm array."""
    from swamla.data.datatrove import preparation

    preparation(arguments.executor, config, arguments.parts, executor_settings(arguments.executor_options)).run()
    say(console, f"handed {arguments.parts} parts to {arguments.executor}; the last one assembles the dataset")
    return 0


def refuse_idle(given: Mapping[str, Any], beside_executor: Sequence[str]) -> None:
    """Raise `UsageError` for flags that do nothing: these beside --executor, its own without it."""
    handed = "executor" in given
    for name in beside_executor if handed else ("parts", "executor_options"):
        if name in given:
            raise UsageError(f"--{name} does nothing {'beside' if handed else 'without'} --executor: leave it out")


def executor_settings(options: str) -> dict[str, str | int]:
    """The executor's arguments in "time=04:00:00 partition=cpu". Raises `ConfigError` for other text."""
    settings: dict[str, str | int] = {}
    for option in options.split():
        name, equals, value = option.partition("=")
        require(bool(name and equals), "executor_options", option, 'must be like "time=04:00:00 partition=cpu"')
        settings[name] = int(value) if value.isdigit() else value
    return settings


def _run_part(config: DataConfig, part: Part, workers: int | None, console: Console) -> Dataset | None:
    """Do a part; returns the dataset if none is missing. Raises `DataError` if one is missing for "assemble"."""
    with shown_progress(console) as progress:
        done = prepare_part(config, part, progress=progress, workers=workers)
    if done.dataset is not None:
        return done.dataset
    left = f"{done.missing} of {done.units} units are still missing from other parts"
    if not part.count:
        raise DataError(f"{config.source}: cannot assemble yet: {left}")
    say(console, f"part {part.number}/{part.count} is done ({done.throughput or 'it had nothing left to do'}); {left}")
    return None


def _instead_of_download(config: DataConfig, recipe: str, console: Console) -> DataConfig:
    """Copy a given tiny Shakespeare to the cache, so that training does not download it; returns the config to use."""
    if keep_shakespeare(config.cache, Path(config.source).expanduser()):
        return replace(config, source="shakespeare")
    say(console, f"{config.source} is not the text of {recipe}: train on it with --data {config.source}")
    return config
