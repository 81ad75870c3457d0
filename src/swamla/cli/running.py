"""What the commands share that train: prepare the data, hand the trainer its validation, train."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from swamla.data.config import DataConfig
from swamla.data.preparing import Dataset, prepare
from swamla.errors import UsageError
from swamla.evaluate import evaluate_split
from swamla.model.language_model import LanguageModel
from swamla.train import RunConfig, TrainState, train

EVALUATION_TOKENS = 16384  # computed at once: more would only cost memory


def prepare_data(config: DataConfig, console: Console) -> Dataset:
    """The data of a run, tokenized now or found in the cache, and described on the console."""
    with console.status("reading …") as status:  # shown on terminals only

        def progress(stage: str, documents: int, n_bytes: int) -> None:
            status.update(f"{stage}: {documents:,} documents, {n_bytes:,} bytes")

        dataset = prepare(config, progress=progress)
    rows = dataset.describe()
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        say(console, f"{label:<{width}}  {value}")
    return dataset


def run_training(
    config: RunConfig,
    dataset: Dataset,
    run_dir: Path,
    console: Console,
    *,
    resume: bool = False,
    on_start: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Train `config` in `run_dir`, validated on the held-out split; raises as `swamla.train.train` does."""
    evaluate = validation(dataset, config.train.block_size, config.train.eval_tokens)
    return train(config, run_dir, dataset=dataset, evaluate=evaluate, resume=resume, console=console, on_start=on_start)


def validation(
    dataset: Dataset, block_size: int, max_tokens: int | None = None
) -> Callable[[LanguageModel], dict[str, float]]:
    """A function that scores a model on the held-out split, or on its first `max_tokens`."""
    batch_size = max(1, EVALUATION_TOKENS // block_size)

    def evaluate(model: LanguageModel) -> dict[str, float]:
        return evaluate_split(
            model,
            dataset.held_out,
            eos_id=dataset.tokenizer.eos_id,
            block_size=block_size,
            batch_size=batch_size,
            max_tokens=max_tokens,
        ).as_dict()

    return evaluate


def new_folder(output_dir: str, name: str) -> Path:
    """The folder of a new run: `output_dir`, or where that is empty runs/NAME, numbered when it is taken.

    Raises `UsageError`, before any data is read, for a folder that has something in it.
    """
    if not output_dir:
        return _numbered(Path("runs") / name)
    folder = checked(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty: choose another folder, or continue it with --resume")
    return folder


def checked(folder: str) -> Path:
    """A folder the user named, as a path that the system can take."""
    if "\0" in folder:
        raise UsageError(f"{folder!r}: a path cannot hold NUL")
    return Path(folder)


def _numbered(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3 … that does not exist."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def say(console: Console, text: str) -> None:
    """Print text as it is: no markup, no wrapping, no highlighting."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
