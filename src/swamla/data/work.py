"""The steps from a source to a dataset, and the folders in which they leave what they made."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from swamla.data import bpe
from swamla.data.assembling import assemble, require_documents, write_meta
from swamla.data.config import DataConfig, parse_bpe
from swamla.data.dataset import FORMAT_VERSION, META, TOKENIZER, Dataset, Throughput
from swamla.data.encode import Progress, encode_documents
from swamla.data.held_out import divide
from swamla.data.learning import Share, learn_tokenizer
from swamla.data.notes import Notes
from swamla.data.sources import Source, open_source
from swamla.data.stream_plan import StreamPlan
from swamla.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from swamla.data.unit_files import Job
from swamla.data.units import Unit, units_of
from swamla.data.workers import Workers, available_cores
from swamla.errors import DataError, SwamlaError, require
from swamla.files import fsync, sha256_of

_STALE_SECONDS = {".staging-*": 24 * 3600, ".units-*": 14 * 24 * 3600, ".stream-*": 14 * 24 * 3600}
_SAMPLED = 4  # units of a stream, evenly over it, whose held-out documents are evaluated
_RULES = 3  # to be raised when other documents are held out than before


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
        require(
            part is not None and part.number <= part.count,
            "part",
            text,
            'must be "i/N" with 1 <= i <= N, or "assemble"',
        )
        assert part is not None
        return part

    def of(self, numbers: list[int]) -> list[int]:
        """Those of the units that are this part's to make."""
        return [number for number in numbers if self.count and number % self.count == self.number - 1]


def default_cache_dir() -> Path:
    """$SWAMLA_CACHE, else ~/.cache/swamla."""
    return Path(os.environ.get("SWAMLA_CACHE") or "~/.cache/swamla").expanduser()


def cache_of(config: DataConfig) -> Path:
    """The folder in which `prepare` keeps what it makes of this data, and what it downloads."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()


def single_sources(config: DataConfig) -> list[DataConfig]:
    """The sources of a mixture, each as if it were alone; of any other data itself."""
    return [
        replace(config, mixture=(), **{name: value for name, value in part.__dict__.items() if name != "weight"})
        for part in config.mixture
    ] or [config]


class Work:
    """One source on its way to a dataset. target: the dataset's folder.  folder: where its units are kept till then."""

    def __init__(self, config: DataConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.cache = cache_of(config)
        self.source = open_source(config, self.cache)
        self.target = self.cache / "data" / f"{_slug(self.source.name)}-{_cache_key(config, self.source)[:16]}"
        self.folder = self.target.with_name(f".units-{self.target.name}")

    def job(self, units: list[Unit]) -> Job:
        return Job(self.source, tuple(units), self.folder, self.config.held_out_fraction)

    def make(self, units: list[Unit], part: Part, workers: int) -> Throughput | None:
        """Make the units of a part that are missing; None if there was nothing to do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.target.parent)
        job = self.job(units)
        numbers = part.of(job.missing())
        if not numbers:
            return None
        self.tokenizer(units)
        begin = time.monotonic()
        workers = min(workers, len(numbers))
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
                if assemble(self.job(units), staging, self.config, self.tokenizer(units)) == 1:
                    self.make_whole()
                else:
                    _move(staging, self.target)
        except (SwamlaError, OSError):
            if not self.target.exists():  # else another part was faster, and has removed the units
                raise
        shutil.rmtree(self.folder, ignore_errors=True)

    def stream(self, workers: int | None) -> Dataset:
        """A sample of the source, prepared as it would be by itself, and the means to read the rest bit by bit."""
        from swamla.data.streaming import StreamDataset, UnitSupply

        name = self.target.name
        folder = self.target.with_name(f".stream-{name}")
        self.target, self.folder = (path.with_name(f"{path.name}-sample") for path in (self.target, self.folder))
        with self.naming_files():
            units = units_of(self.source)
            count, throughput = min(len(units), _SAMPLED), None
            sample = [units[place * len(units) // count] for place in range(count)]
            if not self.target.exists():
                throughput = self.make(sample, Part(1, 1), workers or available_cores())
                self.join(sample)
            dataset = Dataset.open(self.target, throughput)
            plan = StreamPlan.of(self.source, units, dataset.fingerprint)
            if not (folder / TOKENIZER).exists():
                folder.mkdir(parents=True, exist_ok=True)
                plan.write(folder)
                save_tokenizer(dataset.tokenizer, folder / TOKENIZER)
        job = Job(self.source, tuple(units), folder, self.config.held_out_fraction)
        return StreamDataset(dataset, UnitSupply(job, workers), self.config.stream, plan.key)

    def make_whole(self) -> Throughput:
        """Make the dataset in this process, in one go."""
        units = [Unit(0, len(self.source.entries))]
        with _staging(self.target) as folder:
            tokenizer = learn_tokenizer(self.config, [Share(self.source, units)], self.progress)
            tokenizer.save(folder / TOKENIZER)
            begin = time.monotonic()
            notes = Notes(self.source.left_out.plain())
            rule, divided = divide(self.source.documents(notes), self.config.held_out_fraction)
            encoded = encode_documents(divided, tokenizer, folder, self.progress)
            require_documents(self.config, encoded, notes)
            write_meta(folder, self.config, self.source.origin, tokenizer, rule, encoded, notes)
            _move(folder, self.target)
        return Throughput(encoded.tokens, encoded.bytes, time.monotonic() - begin, 1)

    @contextmanager
    def naming_files(self) -> Iterator[None]:
        """Say of a file of ours that it cannot be written, of any other that it cannot be read."""
        try:
            yield
        except OSError as error:
            file = Path(error.filename) if error.filename else self.target  # a full disk names no file
            ours = file.is_relative_to(self.cache) or self.cache.is_relative_to(file)
            what = "written" if ours else "read"
            raise DataError(f"{file}: cannot be {what} ({error.strerror or error})") from error


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:40]


def _cache_key(config: DataConfig, source: Source) -> str:
    """Changes whenever the dataset might: settings, any file's size or time, the tokenizer's files or its training."""
    settings = [config.text_column, config.tokenizer, config.held_out_fraction, config.invalid_utf8, config.on_bad_row]
    tokenizer = [(path.name, sha256_of(path)) for path in tokenizer_files(config.tokenizer)]
    trained = bpe.training_version() if parse_bpe(config.tokenizer) else []
    content = [FORMAT_VERSION, _RULES, source.name, source.state(), settings, tokenizer, trained]
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


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer's file: readers see none or all of it."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    tokenizer.save(staged)
    fsync(staged)
    staged.replace(path)
