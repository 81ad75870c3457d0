"""`prepare`: text to a dataset, once. The result is cached, and appears whole or not at all."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swamla.data import bpe
from swamla.data.config import DataConfig, parse_bpe
from swamla.data.dataset import FORMAT_VERSION, META, TOKENIZER, Dataset, fingerprint_of
from swamla.data.encode import Encoded, Progress, encode_documents
from swamla.data.held_out import divide
from swamla.data.sources import Source, open_source
from swamla.data.tokenizer import Tokenizer, make_tokenizer, tokenizer_files
from swamla.errors import DataError
from swamla.files import fsync, sha256_of

__all__ = ["Dataset", "default_cache_dir", "prepare"]

_STALE_SECONDS = 24 * 3600


def default_cache_dir() -> Path:
    """$SWAMLA_CACHE, else ~/.cache/swamla."""
    return Path(os.environ.get("SWAMLA_CACHE") or "~/.cache/swamla").expanduser()


def cache_of(config: DataConfig) -> Path:
    """The folder in which `prepare` keeps what it makes of this data, and what it downloads."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()


def prepare(config: DataConfig, *, progress: Progress | None = None) -> Dataset:
    """The dataset that `config` describes, from the cache if source, tokenizer and settings are as they were.

    `progress(stage, documents, bytes)` is called as work goes on. Raises DataError for input that cannot be used and
    CorruptError for a damaged cache; a killed or failed preparation leaves nothing that would be taken for a dataset.
    """
    cache = cache_of(config)
    source = open_source(config, cache)
    target = cache / "data" / f"{_slug(source.name)}-{_cache_key(config, source)[:16]}"
    if not target.exists():
        with _naming_files(target, cache), _staging(target) as folder:
            _fill(folder, config, source, progress or _silent)
            _move(folder, target)
    return Dataset.open(target)


def _silent(stage: str, documents: int, n_bytes: int) -> None:
    pass


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:40]


def _cache_key(config: DataConfig, source: Source) -> str:
    """Changes whenever the dataset might: settings, any file's size or time, the tokenizer's files or its training."""
    settings = [config.text_column, config.tokenizer, config.held_out_fraction, config.invalid_utf8]
    tokenizer = [(path.name, sha256_of(path)) for path in tokenizer_files(config.tokenizer)]
    trained = bpe.training_version() if parse_bpe(config.tokenizer) else []
    content = [FORMAT_VERSION, source.name, source.state(), settings, tokenizer, trained]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _naming_files(target: Path, cache: Path) -> Iterator[None]:
    """Say of a file of ours that it cannot be written, of any other that it cannot be read."""
    try:
        yield
    except OSError as error:
        file = Path(error.filename) if error.filename else target  # a full disk names no file
        ours = file.is_relative_to(cache) or cache.is_relative_to(file)
        what = "written" if ours else "read"
        raise DataError(f"{file}: cannot be {what} ({error.strerror or error})") from error


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder of our own beside `target`, gone in the end whatever happens short of a kill."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Delete what killed preparations left; a live one has written within the day."""
    for folder in parent.glob(".staging-*"):
        times = [path.stat().st_mtime for path in (folder, *folder.glob("*")) if path.exists()]
        if times and time.time() - max(times) > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _fill(folder: Path, config: DataConfig, source: Source, progress: Progress) -> None:
    tokenizer = _make_tokenizer(config, source, progress)
    tokenizer.save(folder / TOKENIZER)
    notes: Counter[str] = Counter()
    rule, divided = divide(source.documents(notes), config.held_out_fraction)
    encoded = encode_documents(divided, tokenizer, folder, progress)
    _require_documents(config, encoded, notes)
    meta = {
        "format_version": FORMAT_VERSION,
        "source": config.source,
        "held_out_rule": rule,
        "tokenizer": {"spec": config.tokenizer, "fingerprint": tokenizer.fingerprint},
        "lossless": encoded.lossless,
        "notes": dict(notes),
        "files": _files(folder),
    }
    meta["fingerprint"] = fingerprint_of(meta)
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _make_tokenizer(config: DataConfig, source: Source, progress: Progress) -> Tokenizer:
    """Trained on what is not held out, if it is trained."""

    def texts(with_held_out: bool) -> Iterator[str]:
        n_documents = n_characters = 0
        _, divided = divide(source.documents(Counter()), config.held_out_fraction)
        for document, held_out in divided:
            if with_held_out or not held_out:
                yield document.text
                n_documents, n_characters = n_documents + 1, n_characters + len(document.text)
                progress("reading for the tokenizer", n_documents, n_characters)

    return make_tokenizer(config.tokenizer, texts(with_held_out=False), texts(with_held_out=True))


def _require_documents(config: DataConfig, encoded: Encoded, notes: Counter[str]) -> None:
    total = encoded.train + encoded.held_out
    if not total:
        left_out = ", ".join(f"{count} {what}" for what, count in notes.items()) or "no rows"
        raise DataError(f"{config.source}: no text to learn from ({left_out})")
    for split, count, advice in (
        ("held-out", encoded.held_out, "raise"),
        ("training", encoded.train, "lower"),
    ):
        if not count:
            fraction = config.held_out_fraction
            raise DataError(
                f"{config.source}: the {split} split is empty: of {total} documents, data.held_out_fraction = "
                f"{fraction} chose {encoded.held_out}; {advice} it"
            )


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file; the tokenizer has its own fingerprint."""
    paths = sorted(path for path in folder.iterdir() if path.name != TOKENIZER)
    return {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def _move(folder: Path, target: Path) -> None:
    """Put the finished folder in place; if another process was faster, its result is as good as ours."""
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)
    try:
        folder.rename(target)
    except OSError:
        if not (target / META).exists():
            raise
    fsync(target.parent)
