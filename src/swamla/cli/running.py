"""Shared by the commands that train: the run's folder, and its data."""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from swamla import distributed
from swamla.cli.console import Console, program, say, say_rows
from swamla.cli.progress import shown_progress
from swamla.data.chat_rows import ChatDataset
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset, TrainingData
from swamla.data.hub import PREFIX
from swamla.data.preparing import prepare
from swamla.data.reopening import lacks_plugin, reopen
from swamla.data.task_rows import TaskDataset
from swamla.errors import DataError, HubDataError, Interrupted, MissingBackendError, UsageError
from swamla.hub.pull import pull
from swamla.train import TrainConfig
from swamla.train.changes import config_of
from swamla.train.claims import Claim, claim_new, claim_numbered
from swamla.train.launch import begun_by
from swamla.train.run_folder import identity_of_run

BRIEF = ("mixture", "stream", "source", "tokenizer", "train", "held out", "note")  # rows of a dataset's description
_COUNTED = re.compile(r"^(\d+ [^:]*): .*$", re.DOTALL)  # a note with places: "3 empty documents skipped: one in …"
UTILISATION_TOKENS = 1 << 18  # read to estimate the share of positions that carry loss


def read_data(config: DataConfig, console: Console, *, workers: int | None = None) -> Dataset:
    """The dataset, tokenized now or from the cache. The main rank goes first and fills the cache for the others."""
    found = []

    def prepared() -> None:
        with shown_progress(console) as progress:
            found.append(prepare(config, progress=progress, workers=workers))

    distributed.on_main(prepared)
    if not found:
        prepared()
    return found[0]


def data_of_run(
    run_dir: Path, config: DataConfig, console: Console, *, training: bool = False, workers: int | None = None
) -> TrainingData:
    """The data that a run started with: from the cache by fingerprint, otherwise read again from its source.

    `config` may differ from the run's in the handling of bad rows and in the cache; if it names other data, that is
    read. Warns and raises as `reopen` does. Raises `DataError` if neither cache nor source has the data.
    """
    if config.task is not None:
        return TaskDataset(config.task)
    if config.chat is not None:
        return ChatDataset(config, tokenizer=str(run_dir / "tokenizer.json"))
    known, began = identity_of_run(run_dir), config_of(run_dir).data
    began = replace(began, on_bad_row=config.on_bad_row, invalid_utf8=config.invalid_utf8, cache_dir=config.cache_dir)
    if known is None or config != began:
        return read_data(config, console, workers=workers)

    def reopened() -> Dataset | None:
        return reopen(config, known, training=training, workers=workers)

    # Only the main rank decides: another one might find a dataset that the main rank is still writing.
    if distributed.on_main(lambda: reopened() is not None):
        dataset = reopened()
        assert dataset is not None
        return dataset
    try:
        return read_data(replace(config, tokenizer=str(run_dir / "tokenizer.json")), console, workers=workers)
    except DataError as error:
        anew = f"train --resume {run_dir} --data PATH" if training else f"evaluate {run_dir} --data PATH --held_out"
        way_on = f"{error}; where the same text is elsewhere: {program()} {anew}"
        lost = f"its data is no longer in {config.cache}, and {lacks_plugin(config, known) or way_on}"
        raise DataError(f"{run_dir}: {lost}") from error


def prepare_data(
    config: DataConfig,
    console: Console,
    *,
    block_size: int = TrainConfig.block_size,
    workers: int | None = None,
    resumed: Path | None = None,
    verbose: bool = False,
) -> TrainingData:
    """The data of a run, described on the console. resumed: the folder of a resumed run.  verbose: all about it."""
    dataset: TrainingData
    if config.task is not None:
        dataset = TaskDataset(config.task)
    elif config.chat is not None and resumed is None:
        dataset = ChatDataset(config)
    elif resumed is None:
        try:
            dataset = read_data(config, console, workers=workers)
        except (HubDataError, MissingBackendError) as error:
            raise type(error)(f"{error}{_without_the_hub(config)}") from error
    else:
        dataset = data_of_run(resumed, config, console, training=True, workers=workers)
    describe_data(dataset, console, block_size, brief=not verbose)
    return dataset


def _without_the_hub(config: DataConfig) -> str:
    """What to add to the line of an error of the hub: flags with which a new run needs nothing of it."""
    flags = ["--data FILE"] if any(part.source.startswith(PREFIX) for part in config.sources) else []
    if config.tokenizer == "gpt2" or config.tokenizer.startswith("hub:"):
        flags.append("--tokenizer bpe:4096")
    return f"; to train without the hub: {' '.join(flags)}" if flags else ""


def describe_data(
    dataset: TrainingData, console: Console, block_size: int = TrainConfig.block_size, *, brief: bool = False
) -> None:
    """Print a description of the data, and how well it fills rows of `block_size`; on the main rank only.

    brief: only what the data is, its size, how much is held out, and what was left out, without places.
    """
    if not distributed.is_main():
        return
    described = dataset.describe()
    if brief:
        described = [(label, _COUNTED.sub(r"\1", text)) for label, text in described if label in BRIEF]
    elif isinstance(dataset, Dataset) and dataset.train.n_documents:
        described.append(("utilisation", _utilisation(dataset, block_size)))
    say_rows(console, described)


def _utilisation(dataset: Dataset, block_size: int) -> str:
    count = max(1, UTILISATION_TOKENS // block_size)
    batch = dataset.rows(block_size, 0).batch(0, count)
    filled, cut = batch.n_labels / batch.tokens_BT.numel(), batch.cut_share(dataset.tokenizer.eos_id)
    return (
        f"{filled:.2%} of the positions in {count:,} rows of {block_size} carry loss; {cut:.0%} of their segments are "
        f"not a whole document"
    )


@contextmanager
def naming_resume_command(command: str, run_dir: Path) -> Iterator[None]:
    """Append to an `Interrupted` raised inside the command line that resumes the run."""
    try:
        yield
    except Interrupted as stop:
        resume_with = f"{program()} {command} --resume {shlex.quote(str(run_dir))}"
        raise Interrupted(f"{stop}; go on with: {resume_with}", stop.exit_status) from None


def fetch_run(repo_id: str, run_dir: Path, revision: str, console: Console) -> None:
    """Download a run from the hub into the new folder `run_dir` and print its commit. Raises as `pull` does."""
    with console.status(f"fetching {repo_id} …"):
        pulled = pull(repo_id, run_dir, revision=revision)
    say(console, f"{repo_id} at commit {pulled.commit}, step {pulled.step}, is in {run_dir}")


def claim_folder(output_dir: str, name: str) -> Claim:
    """Claim the folder of a new run: `output_dir`, or runs/NAME, numbered if that exists.

    Raises `UsageError`, before any data is read, for a folder that is not empty.
    """
    return claim_new(checked(output_dir)) if output_dir else claim_numbered(Path("runs") / name)


def resumed_folder(resume: str, output_dir: str, name: str) -> Path:
    """The folder of the run to resume: `resume` or `output_dir`, else the newest of runs/NAME, runs/NAME-2 …

    Raises `UsageError` if both are given, or if there is no run.
    """
    if resume and output_dir:
        raise UsageError("--resume RUN and --output_dir both name a folder: give one of them")
    folder = run_folder(resume) if resume else checked(output_dir) if output_dir else _newest(Path("runs") / name)
    if not (folder / "config.json").is_file():
        raise UsageError(f"--resume: {folder} holds no run to continue (it has no config.json)")
    return folder


def begun_folder(names: tuple[str, ...], folder: str, name: str) -> tuple[Path, bool] | None:
    """The folder of the run that a launch, given by its names, started or resumed, and whether it was asked to stop.

    Looks in `folder` or, if that is empty, in runs/NAME, runs/NAME-2 …; None if the launch started no run.
    """
    begun = begun_by(names, [checked(folder)] if folder else _siblings(Path("runs") / name))
    return begun and (begun[0], begun[1].stopped)


def checked(folder: str) -> Path:
    """The path of a folder that the user named. Raises `UsageError` for NUL."""
    if "\0" in folder:
        raise UsageError(f"{folder!r}: a path cannot hold NUL")
    return Path(folder)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Make the folder that --output names, before long work; an error or a stop takes it away again if it is empty.

    Raises `UsageError` where nothing can be written to it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: nothing can be written there: name another folder")
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # something was written
                folder.rmdir()
        raise


def run_folder(name: str) -> Path:
    """The folder of a run that the user named: a path, or a name under runs/, as `swamla runs` lists them."""
    given = checked(name)
    named = Path("runs") / given
    return named if not given.exists() and named.exists() else given


def _newest(folder: Path) -> Path:
    """The run among `folder` and its numbered siblings that was started or resumed last; `folder` without any."""
    begun = [path for path in _siblings(folder) if (path / "config.json").is_file()]
    return max(begun, key=lambda path: (path / "config.json").stat().st_mtime_ns, default=folder)


def _siblings(folder: Path) -> list[Path]:
    """Those of `folder`, folder-2, folder-3 … that exist."""
    name = re.compile(re.escape(folder.name) + r"(-\d+)?")
    return [path for path in folder.parent.glob("*") if name.fullmatch(path.name)]
