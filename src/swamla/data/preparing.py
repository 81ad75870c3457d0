"""`prepare`: text to a dataset, once. The result is cached, and appears whole or not at all.

A small source is encoded at once, in this process. A large one is cut into units, which are encoded by as many
processes as there are cores, or by N independent runs of this program, and are then joined. What was finished before a
kill is never done again, and the dataset is byte for byte the same however its units came to be.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from swamla.data.config import MIXTURE, DataConfig, parse_bpe
from swamla.data.dataset import FORMAT_VERSION, META, TOKENIZER, Dataset, PreparedDataset, Throughput, write_meta
from swamla.data.reading import Notes
from swamla.data.shards import Progress, divide, encode_documents, is_held_out
from swamla.data.sources import Source, Unit, open_source
from swamla.data.tokenizer import Tokenizer, bpe_version, load_tokenizer, make_tokenizer, tokenizer_files
from swamla.data.units import Job, Workers, available_cores
from swamla.errors import ConfigError, DataError, SwamlaError, require
from swamla.files import fsync, sha256_of
from swamla.registry import plugin_of

TOKENIZER_SAMPLE = 1 << 26  # characters; more text hardly changes the BPE and takes longer
_PLACES = 64  # units that a sample is taken from, evenly over all
_FAR = 2  # times as much, or as little, held-out text as documents
_AT_ONCE = 4  # units that are encoded in this process: starting others, and joining what they made, takes as long
_SAMPLED = 4  # units of a stream, evenly over it, whose held-out documents are evaluated
_STALE_SECONDS = {".staging-*": 24 * 3600, ".units-*": 14 * 24 * 3600, ".stream-*": 14 * 24 * 3600}
_RULES = 3  # to be raised when other documents are held out than before


def prepare(config: DataConfig, *, progress: Progress | None = None, workers: int | None = None) -> Dataset:
    """The dataset that `config` describes, from the cache if source, tokenizer and settings are as they were.

    `progress(stage, documents, bytes)` is called as work goes on. workers: processes for a large source, by default as
    many as there are cores. Raises DataError for input that cannot be used and CorruptError for a damaged cache; a
    killed or failed preparation leaves nothing that would be taken for a dataset.
    """
    progress = progress or _silent
    if config.source == MIXTURE:
        return _prepare_mixture(config, progress, workers)
    work = Preparation.of(config, progress)
    dataset = _prepare_stream(work, workers) if config.stream else _prepare_whole(work, workers)
    _warn_of_share(config, dataset)
    return dataset


def _prepare_whole(work: "Preparation", workers: int | None) -> PreparedDataset:
    """All of one source, now or from the cache."""
    if work.target.exists():
        return work.open()
    with work.naming_files():
        units = work.source.units()
        if len(units) <= _AT_ONCE:
            return work.open(work.encode())
        throughput = work.encode_units(units, Part(1, 1), workers)
        work.join(units)
    return work.open(throughput)


def _prepare_stream(work: "Preparation", workers: int | None) -> Dataset:
    """A sample of the source, prepared as it would be by itself, and the means to read the rest bit by bit."""
    from swamla.data.stream import StreamDataset, StreamPlan, UnitSupply  # needs torch

    sample = work.under(f"{work.target.name}-sample")
    folder = work.target.with_name(f".stream-{work.target.name}")
    with sample.naming_files():
        units = work.source.units()
        count, throughput = min(len(units), _SAMPLED), None
        chosen = [units[place * len(units) // count] for place in range(count)]
        if not sample.target.exists():
            throughput = sample.encode_units(chosen, Part(1, 1), workers)
            sample.join(chosen)
        dataset = sample.open(throughput)
        plan = StreamPlan.of(work.source, units, dataset.fingerprint)
        if not (folder / TOKENIZER).exists():
            folder.mkdir(parents=True, exist_ok=True)
            plan.write(folder)
            save_tokenizer(dataset.tokenizer, folder / TOKENIZER)
    job = Job(work.source, tuple(units), folder, work.config.held_out_fraction)
    return StreamDataset(dataset, UnitSupply(job, workers), work.config.stream, plan.key)


def _prepare_mixture(config: DataConfig, progress: Progress, workers: int | None) -> Dataset:
    """Every source of a mixture by itself, with one tokenizer, which learns from each by its weight."""
    from swamla.data.mixing import MixtureDataset  # needs torch

    singles = config.sources
    weights = [part.weight for part in config.mixture]
    if parse_bpe(config.tokenizer) or config.tokenizer == "char":
        works = [Preparation.of(single, progress) for single in singles]
        key = json.dumps([[work.target.name, weight] for work, weight in zip(works, weights, strict=True)])
        path = config.cache / "tokenizers" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            learned = [Share(w.source, w.source.units(), weight) for w, weight in zip(works, weights, strict=True)]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tokenizer(learn_tokenizer(config, learned, progress), path)
        singles = [replace(single, tokenizer=str(path)) for single in singles]
    return MixtureDataset([prepare(single, progress=progress, workers=workers) for single in singles], weights)


def _warn_of_share(config: DataConfig, dataset: Dataset) -> None:
    """Warn where the share of the text that is held out is far from the share of documents that was asked for."""
    held_out, train, asked = dataset.held_out.n_bytes, dataset.train.n_bytes, config.held_out_fraction
    share = held_out / (held_out + train)
    if not asked / _FAR <= share <= asked * _FAR:
        warnings.warn(
            f"{config.source}: {train:,} bytes are trained on and {held_out:,} held out, {share:.1%} of the text; "
            f"held_out_fraction = {asked:g} is a share of the documents, drawn by chance; for another "
            "share of the text change it, or divide long documents",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count` independent runs; of 0, the run that only puts their work together."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """ "2/8" or "assemble". Raises ConfigError for anything else."""
        found = re.fullmatch(r"([1-9]\d{0,6})/([1-9]\d{0,6})", text)
        part = cls(0, 0) if text == "assemble" else cls(int(found[1]), int(found[2])) if found else None
        fits = part is not None and part.number <= part.count
        require(fits, "part", text, 'must be "i/N" with 1 <= i <= N, or "assemble"')
        assert part is not None
        return part


@dataclass(frozen=True)
class PartDone:
    """How far an array of parts is. dataset: once no unit is missing.  throughput: of this part, if it did any work."""

    units: int
    missing: int
    throughput: Throughput | None
    dataset: Dataset | None


def prepare_part(
    config: DataConfig, part: Part, *, progress: Progress | None = None, workers: int | None = None
) -> PartDone:
    """Make one part's units; the part that finds that none is missing any more makes the dataset of them.

    Raises as `prepare` does.
    """
    for field, value in (("mixture", config.mixture), ("stream", config.stream)):
        require(not value, f"data.{field}", value, "cannot be prepared in parts; prepare its sources by themselves")
    work = Preparation.of(config, progress or _silent)
    if not work.source.pinned(config):
        raise ConfigError(
            "data.hub_revision",
            config.hub_revision,
            f"parts begin at different times: pin it; now {work.source.origin}",
        )
    if work.target.exists():
        return PartDone(0, 0, None, work.open())
    with work.naming_files():
        units = work.source.units()
        throughput = work.encode_units(units, part, workers) if part.count else None
        missing = len(work.job(units).missing())
        if missing:
            return PartDone(len(units), missing, throughput, None)
        work.join(units)
    dataset = work.open(throughput)
    _warn_of_share(config, dataset)
    return PartDone(len(units), 0, throughput, dataset)


@dataclass(frozen=True)
class Preparation:
    """One source on its way to a dataset. target: the dataset's folder."""

    config: DataConfig
    progress: Progress
    source: Source
    target: Path

    @classmethod
    def of(cls, config: DataConfig, progress: Progress) -> "Preparation":
        """Open the source, and choose the folder by all that decides what is in it."""
        source = open_source(config, config.cache)
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name or source.kind)[:40]
        name = f"{slug}-{_cache_key(config, source)[:16]}"
        return cls(config, progress, source, config.cache / "data" / name)

    def under(self, name: str) -> "Preparation":
        """The same with a folder of another name."""
        return replace(self, target=self.target.with_name(name))

    @property
    def folder(self) -> Path:
        """Where units are kept until they are joined."""
        return self.target.with_name(f".units-{self.target.name}")

    def job(self, units: list[Unit]) -> Job:
        return Job(self.source, tuple(units), self.folder, self.config.held_out_fraction)

    def open(self, throughput: Throughput | None = None) -> PreparedDataset:
        """The dataset that has been made."""
        return PreparedDataset.read(
            self.target,
            throughput=throughput,
            raw=self.source.digest(),
            plugin=plugin_of(type(self.source)),
            buffer_docs=self.config.buffer_docs,
        )

    def encode(self) -> Throughput:
        """Make the dataset in this process, in one go."""
        units = [Unit(0, len(self.source.entries))]
        with _staging(self.target) as folder:
            tokenizer = learn_tokenizer(self.config, [Share(self.source, units)], self.progress)
            tokenizer.save(folder / TOKENIZER)
            begin = time.monotonic()
            notes = Notes(self.source.left_out.plain())
            rule, divided = divide(self.source.documents(notes), self.config.held_out_fraction)
            encoded = encode_documents(divided, tokenizer, folder, self.progress)
            write_meta(folder, self.config, self.source.origin, tokenizer, rule, encoded, notes)
            _move(folder, self.target)
        return Throughput(encoded.tokens, encoded.bytes, time.monotonic() - begin, 1)

    def encode_units(self, units: list[Unit], part: Part, workers: int | None) -> Throughput | None:
        """Make the units of a part that are missing; None if there was nothing to do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.target.parent)
        job = self.job(units)
        numbers = [number for number in job.missing() if number % part.count == part.number - 1]
        if not numbers:
            return None
        self.tokenizer(units)
        begin = time.monotonic()
        workers = min(workers or available_cores(), len(numbers))
        documents = n_bytes = tokens = 0
        with Workers(job, workers) as pool:
            for done, record in enumerate(pool.make(numbers), 1):
                documents, n_bytes = documents + record.train + record.held_out, n_bytes + record.bytes
                tokens += record.tokens
                self.progress(f"encoding, unit {done} of {len(numbers)}", documents, n_bytes)
        return Throughput(tokens, n_bytes, time.monotonic() - begin, workers)

    def tokenizer(self, units: list[Unit]) -> Tokenizer:
        """The tokenizer of all units: what the first to come here made, or what any other would make."""
        path = self.folder / TOKENIZER
        if not path.exists():
            save_tokenizer(learn_tokenizer(self.config, [Share(self.source, units)], self.progress), path)
        return load_tokenizer(path)

    def join(self, units: list[Unit]) -> None:
        """Make the dataset of all units, and remove these."""
        try:
            with _staging(self.target) as staging:
                if self.job(units).join(staging, self.config, self.tokenizer(units)) == 1:
                    self.encode()
                else:
                    _move(staging, self.target)
        except (SwamlaError, OSError):
            if not self.target.exists():  # else another part was faster, and has removed the units
                raise
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def naming_files(self) -> Iterator[None]:
        """Say of a file of ours that it cannot be written, of any other that it cannot be read."""
        try:
            yield
        except OSError as error:
            file = Path(error.filename) if error.filename else self.target  # a full disk names no file
            cache = self.config.cache
            what = "written" if file.is_relative_to(cache) or cache.is_relative_to(file) else "read"
            raise DataError(f"{file}: cannot be {what} ({error.strerror or error})") from error


class Share(NamedTuple):
    """A source in units, and its share of what a tokenizer learns from."""

    source: Source
    units: list[Unit]
    weight: float = 1.0


def learn_tokenizer(config: DataConfig, parts: list[Share], progress: Progress) -> Tokenizer:
    """The tokenizer that `config` asks for: found, or learned from texts that depend on the input alone.

    A trained one never saw what is held out.
    """

    def counted(texts: Iterator[str]) -> Iterator[str]:
        n_documents = n_characters = 0
        for text in texts:
            yield text
            n_documents, n_characters = n_documents + 1, n_characters + len(text)
            progress("reading for the tokenizer", n_documents, n_characters)

    total = sum(part.weight for part in parts)
    every = (text for part in parts for text in part.source.documents(Notes()))
    some = (
        training_texts(part.source, part.units, config.held_out_fraction, int(TOKENIZER_SAMPLE * part.weight / total))
        for part in parts
    )
    return make_tokenizer(config.tokenizer, counted(chain.from_iterable(some)), counted(every))


def training_texts(source: Source, units: list[Unit], held_out_fraction: float, size: int) -> Iterator[str]:
    """Texts that are trained on, `size` characters: all of a small source, some from many places of a large one."""
    count = min(len(units), _PLACES)
    for place in range(count):
        documents = source.unit_documents(units[place * len(units) // count], Notes())
        if len(units) == 1:
            divided = divide(documents, held_out_fraction)[1]
        else:
            divided = ((text, is_held_out(text, held_out_fraction)) for text in documents)
        left = size // count
        for text, held_out in divided:
            if not held_out:
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer's file: readers see none or all of it."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    tokenizer.save(staged)
    fsync(staged)
    staged.replace(path)


def _cache_key(config: DataConfig, source: Source) -> str:
    """Changes whenever the dataset might: settings, any file's size or time, the tokenizer's files or its training."""
    settings = [config.text_column, config.tokenizer, config.held_out_fraction, config.invalid_utf8, config.on_bad_row]
    tokenizer = [(path.name, sha256_of(path)) for path in tokenizer_files(config.tokenizer)]
    trained = bpe_version() if parse_bpe(config.tokenizer) else []
    content = [FORMAT_VERSION, _RULES, source.name, source.state(), settings, tokenizer, trained]
    content += [source.kind] if plugin_of(type(source)) else []
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


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
    """Delete what killed preparations left and nobody has written to for long; units wait longer to be gone on with."""
    for pattern, age in _STALE_SECONDS.items():
        for folder in parent.glob(pattern):
            times = [path.stat().st_mtime for path in (folder, *folder.glob("*")) if path.exists()]
            if times and time.time() - max(times) > age:
                shutil.rmtree(folder, ignore_errors=True)


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


def _silent(stage: str, documents: int, n_bytes: int) -> None:
    pass
