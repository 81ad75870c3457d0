"""How the models of a run are scored: on which text or answers, in rows of which length, in which precision."""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from swamla.checkpoint import Checkpoint, read_run_config
from swamla.cli.console import Console, say
from swamla.cli.flags import Flag
from swamla.cli.overrides import apply_flags
from swamla.cli.running import data_of_run, read_data
from swamla.config import from_plain
from swamla.data.chat_rows import ChatDataset
from swamla.data.config import CHAT, DataConfig
from swamla.data.dataset import Dataset, TrainingData
from swamla.data.reopening import reopen
from swamla.data.shards import Split
from swamla.data.task_rows import HELD_OUT_ROWS, TaskDataset
from swamla.data.tokenizer import Tokenizer, load_tokenizer
from swamla.errors import DataError, SwamlaError, UsageError
from swamla.evaluate import part_of, validation
from swamla.model.language_model import LanguageModel
from swamla.tasks import PREFIX
from swamla.tasks import parse as parse_task
from swamla.train import RunConfig
from swamla.train.changes import config_of
from swamla.train.init_from import lineage
from swamla.train.precision import Chosen, autocast, resolve_as_trained
from swamla.train.run_folder import identity_of_run

Part = Literal["all", "validation", "test"]

# To find a training document that is the beginning of a tested one: the largest number of documents that are searched,
# the number of first tokens by which they are found, and of last tokens, before the cut, that may differ.
_FEW, _ALIKE, _AT_THE_CUT = 10_000, 16, 16
_OVERLAP = 64  # characters that two parts of a text have in common at least, to be said to overlap


def run_config(run: Path) -> RunConfig:
    """The config of a run. Raises as `read_run_config` does."""
    plain = read_run_config(run)
    plain.pop("format_version", None)
    return from_plain(RunConfig, plain, origin=str(run / "config.json"))


@dataclass(frozen=True)
class Scoring:
    """How a run's models are scored: the text or the answers, the length of rows, the precision."""

    dataset: TrainingData
    block_size: int
    precision: Chosen
    part: Part

    @classmethod
    def of(
        cls,
        dataset: TrainingData,
        config: RunConfig,
        checkpoint: Checkpoint,
        model: LanguageModel,
        block_size: int = 0,
        part: Part = "all",
    ) -> "Scoring":
        """As the run was trained; block_size: 0 for the run's, or the task's."""
        length = dataset.task.length if isinstance(dataset, TaskDataset) else config.train.block_size
        return cls(dataset, block_size or length, precision_of(config, checkpoint, model), part)

    @property
    def text(self) -> Split:
        """What is scored, where it is text."""
        assert isinstance(self.dataset, Dataset)
        return part_of(self.dataset.held_out, self.part, self.dataset.tokenizer.decode)

    @property
    def rows(self) -> str:
        """What is scored, where it is answers."""
        if isinstance(self.dataset, ChatDataset):
            return f"{len(self.dataset.held_out):,} held-out conversations"
        return f"{HELD_OUT_ROWS:,} {'test rows' if self.part == 'test' else 'held-out rows'}"

    @property
    def figure(self) -> str:
        """The name of the one figure of `score` that models are compared by; answers have no bytes."""
        return "bits_per_byte" if isinstance(self.dataset, Dataset) else "loss"

    @property
    def unit(self) -> str:
        """That of `figure`."""
        return "bits per byte" if isinstance(self.dataset, Dataset) else "nats per label"

    def announce(self) -> None:
        """Say on stderr how much is scored."""
        what = f"the answers of {self.rows}"
        if isinstance(self.dataset, Dataset):
            text = self.text
            what = f"{text.n_tokens + text.n_documents:,} tokens, {text.n_bytes:,} bytes of text"
        say(Console(stderr=True), f"scoring {what} …")

    def score(self, model: LanguageModel) -> dict[str, float]:
        """The figures of `Evaluation.as_dict`, or of `Answers.as_dict`."""
        with autocast(self.precision, model.device):
            return validation(self.dataset, self.block_size, part=self.part)(model)


def precision_of(config: RunConfig, checkpoint: Checkpoint, model: LanguageModel) -> Chosen:
    """The precision in which a run's model is scored: its training's."""
    trained = str(checkpoint.state.get("precision", ""))
    return resolve_as_trained(config.train.precision, trained, model.device)


def scored_data(
    source: str,
    run: Path,
    config: RunConfig,
    checkpoint: Checkpoint,
    given: Mapping[str, Any],
    flags: Mapping[str, Flag],
    *,
    held_out: bool = False,
) -> TrainingData:
    """What a model is scored on: text, rows of a task, or conversations.

    source: as --data; "" for the run's own.  given, flags, held_out: as of `other_data`.
    Raises `UsageError` for what was said of the data that is for texts alone, and for a task with other ids.
    """
    scored = source or config.data.source
    if scored.startswith(PREFIX):
        task = parse_task(scored)
        if others := sorted(given.keys() & {*flags, "held_out", "block_size"}):
            raise UsageError(f"--{others[0]} is for texts; a task has its sizes in its name: --data '{PREFIX}{task}'")
        rows = TaskDataset(task)
        if rows.tokenizer.fingerprint != load_tokenizer(run / "tokenizer.json").fingerprint:
            other = f"its {task.vocab_size} ids are others than those that the run was trained on"
            raise UsageError(f"{rows.source}: {other}: give it the run's kind and vocabulary")
        return rows
    if scored.startswith(CHAT):
        if others := sorted(given.keys() & {*flags, "held_out"}):
            raise UsageError(f"--{others[0]} is for texts; of conversations the held-out answers are scored")
        own = config.data if config.data.chat is not None else DataConfig(source=scored, tokenizer="byte")
        return ChatDataset(replace(own, source=scored), tokenizer=str(run / "tokenizer.json"))
    if source:
        return other_data(source, run, config, given, flags, held_out=held_out)
    return own_data(run, config, checkpoint)


def own_data(run: Path, config: RunConfig, checkpoint: Checkpoint) -> Dataset:
    """The text that a run was trained on; warns if it has changed since."""
    dataset = data_of_run(run, config.data, Console(stderr=True))
    assert isinstance(dataset, Dataset), config.data.source
    trained_on = checkpoint.state["data_fingerprint"]
    if dataset.fingerprint != trained_on:
        warnings.warn(
            f"{config.data.source} has changed since training (fingerprint {dataset.fingerprint[:12]}, then "
            f"{trained_on[:12]}): the text scored now may have been trained on",
            stacklevel=2,
        )
    return dataset


def other_data(
    source: str, run: Path, config: RunConfig, given: Mapping[str, Any], flags: Mapping[str, Flag], *, held_out: bool
) -> Dataset:
    """The dataset of --data, encoded with the run's tokenizer; warns of documents that the model was trained on.

    given, flags: what else was said of the data.  held_out: only the part that a run on it would hold out.
    """
    dataset = data_of_flag(source, run, config, given, flags, held_out=held_out)
    for found in trained_on(dataset.held_out, dataset.tokenizer, dataset.source, config.data, run):
        warnings.warn(found.told, stacklevel=2)
    return dataset


def data_of_flag(
    source: str, run: Path, config: RunConfig, given: Mapping[str, Any], flags: Mapping[str, Flag], *, held_out: bool
) -> Dataset:
    """The dataset of `other_data`, without a look at what the model was trained on."""
    fraction = config.data.held_out_fraction if held_out else 1.0
    data = {"source": source, "tokenizer": str(run / "tokenizer.json"), "held_out_fraction": fraction}
    plain = {"data": data | {"cache_dir": config.data.cache_dir}}
    typed = apply_flags(plain, given, flags)
    chosen = from_plain(DataConfig, plain["data"], path="data", origin=lambda field: typed.get(field, "--data"))
    return read_data(chosen, Console(stderr=True))


class TrainedOn(NamedTuple):
    """What a model was trained on of a tested text, in a line. sure: False if that could not be found out."""

    told: str
    sure: bool


def trained_on(
    tested: Split, tokenizer: Tokenizer, source: str, config: DataConfig, run: Path, who: str = "the run"
) -> Iterator[TrainedOn]:
    """What `run` was trained on of `tested`, and what the runs were whose weights it began with, as far as known.

    tokenizer: of the run, which `tested` is encoded with.  source: where the text is from.  config: of the run's data.
    """
    if told := _trained_text(tested, tokenizer, source, config, run, who):
        yield TrainedOn(told, sure=True)
    for other in islice(lineage(run), 1, None):
        origin = f"{other}, whose weights {who} began with,"
        try:
            if told := _trained_text(tested, tokenizer, source, config_of(other).data, other, origin):
                yield TrainedOn(told, sure=True)
        except SwamlaError as error:  # damaged, or no longer there
            yield TrainedOn(f"cannot tell what {origin} was trained on: {error}", sure=False)


def _trained_text(tested: Split, tokenizer: Tokenizer, source: str, config: DataConfig, run: Path, who: str) -> str:
    """What `run` was trained on of `tested`, found by its tokens, or by the source's name without these; or ""."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # changed raw files do not matter here
        known = identity_of_run(run)
        own = None if known is None else reopen(config, known)
    if own is not None and (shared := _documents_shared(tested, own.train, tokenizer)):
        only = " (only a sample of its streamed data was compared)" if config.stream else ""
        return f"{source}: {who} was trained on {shared} of these {tested.n_documents} documents{only}"
    if own is not None and _begins_as_trained(tested, own.train):
        return f"{source}: {who} was trained on the beginning of one of its documents"
    if own is not None and _overlaps_an_only_document(tested, own.train, tokenizer):
        return f"{source}: {who} was trained on a part of one of its documents"
    if own is None and source in {config.source, *(part.source for part in config.mixture)}:
        return f"{source}: {who} was trained on it"
    return ""


def _documents_shared(tested: Split, trained: Split, tokenizer: Tokenizer) -> int:
    """How many documents of `tested` are also in `trained`, ignoring line ends; both are encoded with `tokenizer`."""
    wanted = [_with_other_line_ends(tested.document(index), tokenizer) for index in range(tested.n_documents)]
    lengths = sorted({len(ids) for alike in wanted for ids in alike})
    possible = np.flatnonzero(np.isin(trained.lengths, lengths))  # others need not be read
    known = {_digest(trained.document(int(index))) for index in possible}
    return sum(any(_digest(ids) in known for ids in alike) for alike in wanted)


def _with_other_line_ends(ids: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of a document and, if it has several lines, of its text with \\n and with \\r\\n line ends."""
    text = tokenizer.decode(ids.tolist())
    unix = _unix(text)
    others = {unix, unix.replace("\n", "\r\n")} - {text} if "\n" in unix else set()
    found = [ids]
    for other in sorted(others):
        with suppress(DataError):  # a character vocabulary may lack this line end
            found.append(np.array(tokenizer.encode(other)))
    return found


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype(np.uint32).tobytes(), digest_size=16).digest()


def _begins_as_trained(tested: Split, trained: Split) -> bool:
    """Whether a training document is the beginning of a tested one: the only document of a source is cut in two.

    The last few tokens before the cut may differ from those of the whole.
    """
    if trained.n_documents > _FEW:  # then no document was cut
        return False
    begun: dict[bytes, list[int]] = defaultdict(list)
    for index in np.flatnonzero(trained.lengths >= _ALIKE + _AT_THE_CUT):
        begun[trained.document(int(index))[:_ALIKE].tobytes()].append(int(index))
    for whole in map(tested.document, range(tested.n_documents)):
        for number in begun[whole[:_ALIKE].tobytes()]:
            start = trained.document(number)[:-_AT_THE_CUT]
            if 2 * len(start) > len(whole) > len(start) and np.array_equal(whole[: len(start)], start):
                return True
    return False


def _overlaps_an_only_document(tested: Split, trained: Split, tokenizer: Tokenizer) -> bool:
    """Whether the only training document, the first part of a text, goes on into a tested one, its other part.

    That is so where two runs held out different shares of one document.
    """
    if trained.n_documents != 1:
        return False
    known = _unix(tokenizer.decode(trained.document(0).tolist()))
    for text in (_unix(tokenizer.decode(tested.document(index).tolist())) for index in range(tested.n_documents)):
        beginning = text[:_OVERLAP]
        at = known.find(beginning) if len(beginning) == _OVERLAP else -1
        while at >= 0:
            common = min(len(text), len(known) - at)
            if text[:common] == known[at : at + common]:
                return True
            at = known.find(beginning, at + 1)
    return False


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
