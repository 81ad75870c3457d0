"""Encoded units, in their order, to the files of one dataset."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from swamla.data.config import DataConfig
from swamla.data.dataset import FORMAT_VERSION, HELD_OUT_TEXT, META, TOKENIZER, fingerprint_of
from swamla.data.encode import Encoded
from swamla.data.held_out import rule_for_many
from swamla.data.notes import Notes
from swamla.data.shards import ArrayWriter, open_array, token_dtype
from swamla.data.tokenizer import Tokenizer
from swamla.data.unit_files import Job, files_of, verify_unit
from swamla.errors import CorruptError, DataError

_COPIED = 1 << 24


def assemble(job: Job, folder: Path, config: DataConfig, tokenizer: Tokenizer) -> int:
    """Write the dataset whose units have all been made into `folder`; returns its number of documents.

    Every byte of the units is checked. Where there is only one document, nothing is written: it has to be cut in two.
    """
    records = [job.record(number) for number in range(len(job.units))]
    encoded = Encoded(
        train=sum(record.train for record in records),
        held_out=sum(record.held_out for record in records),
        train_tokens=sum(record.train_tokens for record in records),
        tokens=sum(record.tokens for record in records),
        bytes=sum(record.bytes for record in records),
        lossless=all(record.lossless for record in records),
    )
    if encoded.train + encoded.held_out == 1:
        return 1
    notes = Notes(job.source.left_out.plain())
    for number, record in enumerate(records):
        notes.include(record.notes)
        verify_unit(job.path(number), record)
        if record.tokenizer != tokenizer.fingerprint:
            path = job.path(number)
            raise CorruptError(f"{path}: was made with another tokenizer than its neighbours; delete {path.parent}")
    require_documents(config, encoded, notes)
    paths = [job.path(number) for number in range(len(job.units))]
    for split in ("train", "held_out"):
        _join_split(paths, split, folder, token_dtype(tokenizer.vocab_size))
    with (folder / HELD_OUT_TEXT).open("wb") as joined:
        for path in paths:
            joined.write((path / HELD_OUT_TEXT).read_bytes())
    tokenizer.save(folder / TOKENIZER)
    write_meta(folder, config, job.source.origin, tokenizer, rule_for_many(config.held_out_fraction), encoded, notes)
    return encoded.train + encoded.held_out


def _join_split(paths: list[Path], split: str, folder: Path, dtype: np.dtype) -> None:
    with ExitStack() as stack:

        def writer(part: str, kind: object) -> ArrayWriter:
            return stack.enter_context(ArrayWriter(folder / f"{split}.{part}.npy", kind))

        tokens, offsets, byte_counts = writer("tokens", dtype), writer("offsets", np.int64), writer("bytes", np.int64)
        offsets.append([0])
        for path in paths:
            unit_tokens, unit_offsets, unit_bytes = (
                open_array(path / f"{split}.{part}.npy") for part in ("tokens", "offsets", "bytes")
            )
            offsets.append(unit_offsets[1:] + tokens.count)
            byte_counts.append(unit_bytes)
            for start in range(0, len(unit_tokens), _COPIED):
                tokens.append(unit_tokens[start : start + _COPIED])


def write_meta(
    folder: Path,
    config: DataConfig,
    origin: str,
    tokenizer: Tokenizer,
    rule: str,
    encoded: Encoded,
    notes: Notes,
) -> None:
    """Write meta.json: the same bytes for the same data, whenever and however it was made."""
    meta = {
        "format_version": FORMAT_VERSION,
        "source": origin or config.source,
        "held_out_rule": rule,
        "tokenizer": {"spec": config.tokenizer, "fingerprint": tokenizer.fingerprint},
        "lossless": encoded.lossless,
        "notes": notes.plain(),
        "files": files_of(folder, but=(TOKENIZER,)),  # that one has its own fingerprint
    }
    meta["fingerprint"] = fingerprint_of(meta)
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def require_documents(config: DataConfig, encoded: Encoded, notes: Notes) -> None:
    """Raise DataError unless there is something to train on, and something held out."""
    total = encoded.train + encoded.held_out
    if not total:
        left_out = "; ".join(notes.lines()) or "no rows"
        raise DataError(f"{config.source}: no text to learn from ({left_out})")
    fraction = config.held_out_fraction
    for split, count, advice in (
        ("held-out", encoded.held_out, "raise"),
        ("training", encoded.train, "lower"),
    ):
        if not count and fraction < 1:
            raise DataError(
                f"{config.source}: the {split} split is empty: of {total} documents, data.held_out_fraction = "
                f"{fraction} chose {encoded.held_out}; {advice} it"
            )
