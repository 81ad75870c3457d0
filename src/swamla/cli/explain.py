"""`swamla explain RUN|FOLDER`: what a model does with its context, as a page, pictures and JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swamla.checkpoint import load, read_run_config
from swamla.cli.console import Console, say, say_wrapped
from swamla.cli.flags import argument, parse
from swamla.cli.importing import tokenizer_of
from swamla.cli.progress import shown_progress
from swamla.cli.running import checked, data_of_run, run_folder, writable
from swamla.config import from_plain
from swamla.data.caching import short_source
from swamla.data.chat_rows import ChatDataset
from swamla.data.config import TOKEN_IDS
from swamla.data.dataset import Dataset
from swamla.data.shards import Split
from swamla.data.tokenizer import IdTokenizer, Tokenizer
from swamla.errors import UsageError
from swamla.interop import load_pretrained
from swamla.interpret.drawn import drawn_tokens
from swamla.interpret.explaining import LONG, Subject, explained
from swamla.interpret.page.report import REPORT_JSON, write_report
from swamla.model.language_model import LanguageModel
from swamla.tasks import PREFIX
from swamla.tasks import parse as parse_task
from swamla.train import RunConfig
from swamla.train.run_folder import identity_of_run

ENOUGH = 256  # predictions of a text, below which the report says that they are few
MOST_ROWS, FEW_ROWS, SHORTEST = 64, 4, 64  # rows of text; below FEW_ROWS they are halved, if they stay this long
READ = 1 << 20  # tokens of the training text whose ids the random repeats are drawn from


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Explain a model: induction, the attention of every head, what the loss owes to which head and layer.

    Writes report.html (one page that needs no network), its figures as PNG, and explain.json. Takes about a minute.
    run: the run's folder, or a folder that transformers saved.
    text: measure on this text and draw its attention, instead of the run's held-out text.
    file: the same, with the text of this file.
    output: the report's folder; by default explain in a run, or NAME-explained for a folder of transformers.
    checkpoint: best, latest, or a step; of a run.
    seed: of the random repeats.
    """

    run: str = argument(positional=True, metavar="RUN|FOLDER")
    text: str | None = None
    file: str = argument("", metavar="FILE")
    output: str = argument("", short="o", metavar="FOLDER")
    checkpoint: str = "best"
    seed: int = 0


def main(argv: list[str]) -> int:
    """Measure, write the report, and print the verdicts."""
    arguments, given = parse(Arguments, argv, command="swamla explain")
    folder = run_folder(arguments.run)
    text = _text(arguments)
    is_run = not _is_of_transformers(folder)
    if not is_run and "checkpoint" in given:
        raise UsageError(f"--checkpoint is for runs; {folder} is a model of transformers, which has one")
    named = checked(arguments.output) if arguments.output else None
    output = named or (folder / "explain" if is_run else Path(f"{folder.resolve().name}-explained"))
    _require_free(output)
    if is_run:
        model, tokenizer = load(folder, arguments.checkpoint)
    else:
        model = load_pretrained(folder)
        tokenizer = tokenizer_of(folder, model.config.vocab_size)
    subject = _subject_of_run(folder, model, tokenizer, text) if is_run else _subject(folder, model, tokenizer, text)
    with writable(output), shown_progress(Console(stderr=True)) as progress:
        found = explained(
            model,
            tokenizer,
            subject,
            seed=arguments.seed,
            progress=lambda stage, share: progress(f"explaining, {stage}", 0, 0, share),
        )
        progress("explaining, drawing", 0, 0, 0.98)
        write_report(found, output)
    console = Console()
    for verdict in found.verdicts:
        say_wrapped(console, verdict.text, label=f"{verdict.question} ", indent=2)
    for note in subject.notes:
        say_wrapped(console, note, label="Note: ", indent=2)
    say(console, f"{output / 'report.html'}: open it in a browser")
    return 0


def _text(arguments: Arguments) -> str | None:
    """What --text or --file gives. Raises `UsageError` for both, for an empty text, and for a file that is no text."""
    if arguments.text is not None and arguments.file:
        raise UsageError("--text and --file exclude each other: give one of them")
    if arguments.file:
        try:
            text = checked(arguments.file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--file {arguments.file}: is no UTF-8 text ({error.reason} at byte {error.start})"
            ) from error
    elif arguments.text is not None:
        text = arguments.text
    else:
        return None
    if not text.strip():
        raise UsageError(f"--{'file' if arguments.file else 'text'}: the text is empty; it needs two tokens at least")
    return text


def _is_of_transformers(folder: Path) -> bool:
    """Whether a folder is a model of transformers; a run has checkpoints. Raises `UsageError` for neither."""
    if (folder / "checkpoints").is_dir() or not (folder / "config.json").is_file():
        read_run_config(folder)
        return False
    return True


def _require_free(output: Path) -> None:
    """Raise `UsageError` unless a report can be written there: to a new or empty folder, or over an earlier report."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / REPORT_JSON).exists())):
        raise UsageError(f"--output {output}: exists and holds no report: choose another folder")


def _subject_of_run(run: Path, model: LanguageModel, tokenizer: Tokenizer, text: str | None) -> Subject:
    """A run with its held-out text, or with the given one."""
    plain = read_run_config(run)
    plain.pop("format_version", None)
    source = plain["data"].get("source", "")
    if source.startswith(PREFIX):
        if text is not None:
            raise UsageError(f"{run}: was trained on {source}, which has no text: leave out --text and --file")
        note = (
            f"It was trained on {source}, which has no text: only random repeats were measured. They begin with one "
            "more random id, not with a start."
        )
        subject = _without_text(run.name, model, tokenizer, note)
        return replace(subject, longest=parse_task(source).length)
    if source == TOKEN_IDS:
        trained = identity_of_run(run) is not None  # on ids given from Python; an imported run tells no length of rows
        return _subject(run, model, tokenizer, text, plain["train"]["block_size"] if trained else None)
    config = from_plain(RunConfig, plain, origin=str(run / "config.json"))
    dataset = data_of_run(run, config.data, Console(stderr=True))
    longest = config.train.block_size
    if isinstance(dataset, ChatDataset):
        return _subject_of_conversations(run.name, model, dataset, text, longest)
    assert isinstance(dataset, Dataset)  # what is no task and no conversations is text
    ids = np.unique(dataset.train.tokens[:READ] if dataset.train.n_tokens else dataset.held_out.tokens[:READ]).tolist()
    if text is not None:
        return _with_text(run.name, model, tokenizer, text, ids, longest)
    limits = (LONG, longest, model.config.learned_positions or LONG)
    rows = rows_of(dataset.held_out, tokenizer.eos_id, min(limits))
    if rows is None:
        subject = _without_text(run.name, model, tokenizer, "Its held-out text is too short to measure on.")
        return replace(subject, longest=longest)
    name = f"held-out text of {short_source(dataset.source)}"
    rows_BT, texts = rows
    text_ids = rows_BT[0].tolist()
    return Subject(name=run.name, ids=ids, rows_BT=rows_BT, texts=texts, text=text_ids, source=name, longest=longest)


def _subject_of_conversations(
    name: str, model: LanguageModel, dataset: ChatDataset, text: str | None, longest: int
) -> Subject:
    """A run on conversations, whose held-out ones are no texts to measure on, with the given text if there is one."""
    tokenizer = dataset.tokenizer
    seen = np.unique(np.concatenate([row.tokens.ids for row in dataset.train or dataset.held_out])).tolist()
    ids = [each for each in seen if each not in (tokenizer.eos_id, *dataset.special_ids)]
    what = f"It was trained on the conversations of {dataset.path.name}, which are no held-out text"
    if text is not None:
        subject = _with_text(name, model, tokenizer, text, ids, longest)
        return replace(subject, notes=(f"{what}: the given text may be of another kind.", *subject.notes))
    note = f"{what}, and no text was given (--text, --file): only random repeats were measured."
    return Subject(name=name, ids=ids, notes=(note,), longest=longest)


def _subject(
    folder: Path, model: LanguageModel, tokenizer: Tokenizer, text: str | None, longest: int | None = None
) -> Subject:
    """A model without data of its own."""
    name = folder.resolve().name
    if text is not None:
        return _with_text(name, model, tokenizer, text, _all_ids(tokenizer), longest)
    note = "No text was given (--text, --file): only random repeats were measured."
    return replace(_without_text(name, model, tokenizer, note), longest=longest)


def _without_text(name: str, model: LanguageModel, tokenizer: Tokenizer, note: str) -> Subject:
    return Subject(name=name, ids=_all_ids(tokenizer), notes=(note,))


def _with_text(
    name: str, model: LanguageModel, tokenizer: Tokenizer, text: str, ids: Sequence[int], longest: int | None = None
) -> Subject:
    """The text in rows no longer than those of training. Raises `UsageError` for a text of fewer than two tokens."""
    encoded = tokenizer.encode(text)
    if len(encoded) < 2:
        raise UsageError(f"the text {text[:40]!r} is a single token: two are needed at least")
    limit = min(LONG, longest or LONG, model.config.learned_positions or LONG)
    one = np.array(encoded)
    whole = Split(
        path=Path(name),
        tokens=one,
        offsets=np.array([0, len(one)]),
        byte_counts=np.array([0]),
        vocab_size=tokenizer.vocab_size,
    )
    rows = rows_of(whole, tokenizer.eos_id, min(limit, len(one) + 1))
    assert rows is not None
    rows_BT, texts = rows
    kept = rows_BT.numel() - len(rows_BT)
    notes = (
        [f"Of the text's {len(one):,} tokens {kept:,} were read, in rows of equal length."] if kept < len(one) else []
    )
    if kept < ENOUGH:
        figures = "the figures on text are those of this text, and may be chance"
        notes.append(f"The text has only {kept:,} tokens: {figures}.")
    if isinstance(tokenizer, IdTokenizer):
        notes.append("The model came without a tokenizer: its texts are ids.")
    shown = [tokenizer.eos_id, *encoded][:limit]
    if len(shown) <= len(encoded) and limit < drawn_tokens(model):
        notes.append(f"Its first {limit} tokens are drawn: rows of the model are no longer.")
    return Subject(
        name=name,
        ids=ids,
        rows_BT=rows_BT,
        texts=texts,
        text=shown,
        source="the given text",
        notes=tuple(notes),
        longest=longest,
    )


def _all_ids(tokenizer: Tokenizer) -> list[int]:
    return [each for each in range(tokenizer.vocab_size) if each != tokenizer.eos_id]


def rows_of(split: Split, start: int, length: int) -> tuple[Tensor, list[int]] | None:
    """Rows (B, T) of T tokens: `start` and T − 1 of a document, the first ones of documents spread over the split
    first; and which document each is of.

    T = length, halved while there are fewer than 4 rows and at least 64 tokens stay; at most 64 rows, None without any.
    """
    while True:
        pieces_N = split.lengths // (length - 1)  # whole ones of each document
        if pieces_N.sum() >= FEW_ROWS or length // 2 < SHORTEST:
            break
        length //= 2
    rows: list[np.ndarray] = []
    documents: list[int] = []
    piece = 0
    while len(rows) < MOST_ROWS and len(have := np.flatnonzero(pieces_N > piece)):
        count = min(MOST_ROWS - len(rows), len(have))
        for document in have[np.arange(count) * len(have) // count].tolist():
            begin = piece * (length - 1)
            rows.append(np.concatenate(([start], split.document(document)[begin : begin + length - 1])))
            documents.append(document)
        piece += 1
    return (torch.from_numpy(np.stack(rows).astype(np.int64)), documents) if rows else None
