"""`prepare`: text to a cached dataset, which is written atomically.

A small source is encoded in this process. A large one is cut into units, which are encoded by one process per core, or
by N independent runs of this program, and are then joined. After a kill, only unfinished units are encoded again. The
dataset is byte for byte the same for any number of processes.
"""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from swamla.data.caching import mark_used
from swamla.data.config import MIXTURE, TOKEN_IDS, DataConfig, parse_bpe
from swamla.data.dataset import FORMAT_VERSION, META, TOKENIZER, Dataset, PreparedDataset, Throughput, write_meta
from swamla.data.likeness import describe_unlike
from swamla.data.progress import Reading, expected_text
from swamla.data.reading import Notes
from swamla.data.shards import Progress, divide, encode_documents, is_held_out, usable_fraction
from swamla.data.sources import Source, Unit, open_source
from swamla.data.token_ids import Ids, write_ids
from swamla.data.tokenizer import Tokenizer, bpe_version, load_tokenizer, make_tokenizer, tokenizer_files
from swamla.data.units import Job, Workers, available_cores
from swamla.errors import ConfigError, DataError, SwamlaError, UsageError, require
from swamla.files import fsync, new_folder, sha256_of
from swamla.registry import plugin_of

TOKENIZER_SAMPLE = 1 << 26  # characters; more text hardly changes the BPE and takes longer
_PLACES = 64  # evenly spaced units from which the tokenizer's sample is taken
_FAR = 2  # warn if the held-out share of the text is off by this factor from that of the documents
_AT_ONCE = 4  # sources of up to this many units are encoded in this process: starting others would take as long
_SAMPLED = 4  # evenly spaced units of a stream whose held-out documents are evaluated
_STALE_SECONDS = {".staging-*": 24 * 3600, ".units-*": 14 * 24 * 3600, ".stream-*": 14 * 24 * 3600}
_RULES = 3  # raise this when the rule for held-out documents changes


def prepare(
    config: DataConfig,
    *,
    token_ids: Ids | None = None,
    held_out: Ids | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Dataset:
    """The dataset that `config` describes, from the cache if source, tokenizer and settings are unchanged.

    token_ids: for the source "token_ids", the documents as ids of the tokenizer: a tensor or array, (T,) or one
    document a row, or an iterable of sequences of ids, one document each. Its end-of-document id, `eos_id`, also
    separates documents. They are written to the cache, so a run on them resumes and is evaluated without them.
    held_out: documents of the same kind that are never trained on; by default `held_out_fraction` of all.
    `progress(stage, documents, bytes, share)` is called repeatedly; share: about how much of the stage is done, 0 … 1,
    or None if that is unknown. workers: processes for a large source, by default one per core. Raises DataError for
    unusable input and CorruptError for a damaged cache. A killed or failed preparation leaves no partial dataset.
    """
    progress = progress or _silent
    if config.task is not None:
        rows = "its rows are those of swamla.data.TaskDataset(config.task)"
        raise UsageError(f"data.source = {config.source!r}: a task has no text to prepare: {rows}")
    if config.chat is not None:
        rows = "its rows are those of swamla.data.ChatDataset(config)"
        raise UsageError(f"data.source = {config.source!r}: conversations are not prepared ahead: {rows}")
    given = config.source == TOKEN_IDS
    require(given or (token_ids is None and held_out is None), "data.source", config.source, f'with ids: "{TOKEN_IDS}"')
    if given:
        return _prepare_ids(config, token_ids, held_out, progress)
    if config.source == MIXTURE:
        return _prepare_mixture(config, progress, workers)
    work = Preparation.of(config, progress)
    dataset = _prepare_stream(work, workers) if config.stream else _prepare_whole(work, workers)
    _warn_of_split(config, dataset)
    return dataset


def _prepare_whole(work: "Preparation", workers: int | None) -> PreparedDataset:
    """The dataset of one source, encoded now or from the cache."""
    if work.target.exists():
        return work.open()
    with work.naming_files():
        units = work.source.units()
        if len(units) <= _AT_ONCE:
            return work.open(work.encode())
        throughput = work.encode_units(units, Part(1, 1), workers)
        work.join(units)
    return work.open(throughput)


def _prepare_ids(config: DataConfig, train: Ids | None, held_out: Ids | None, progress: Progress) -> PreparedDataset:
    """The dataset of ids given from Python; equal ones share a folder of the cache."""
    if train is None:
        needed = (
            "its ids are given from Python: swamla.data.prepare(config, token_ids=…), and train(…, resume=True); an "
            "imported model has no data: name a file or another source"
        )
        raise DataError(f'data.source = "{TOKEN_IDS}": {needed}')
    tokenizer, data = make_tokenizer(config.tokenizer), config.cache / "data"
    with _staging(data / TOKEN_IDS) as folder:
        tokenizer.save(folder / TOKENIZER)
        rule, encoded = write_ids(train, held_out, config.held_out_fraction, tokenizer, folder, progress)
        write_meta(folder, config, "", tokenizer, rule, encoded, Notes())
        fingerprint = json.loads((folder / META).read_text(encoding="utf-8"))["fingerprint"]
        target = data / f"{TOKEN_IDS}-{fingerprint[:16]}"
        _move(folder, target)
    mark_used(target)
    return PreparedDataset.read(target, buffer_docs=config.buffer_docs)


def _prepare_stream(work: "Preparation", workers: int | None) -> PreparedDataset:
    """A stream: a few units of the source are prepared for evaluation, the rest is encoded during training."""
    from swamla.data.stream import StreamDataset, StreamPlan, UnitSupply  # needs torch

    sample = replace(work, target=work.target.with_name(f"{work.target.name}-sample"))
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
    """One dataset per source of a mixture, with one tokenizer, trained on a sample of all sources by their weights."""
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


def _warn_of_split(config: DataConfig, dataset: PreparedDataset) -> None:
    """Warn if the held-out text is unlike the training text.

    Or if its share is far from `held_out_fraction`, which is a share of the documents.
    """
    held_out, train, asked = dataset.held_out.n_bytes, dataset.train.n_bytes, config.held_out_fraction
    share = held_out / (held_out + train)
    if not asked / _FAR <= share <= asked * _FAR:
        warnings.warn(
            f"{config.source}: {train:,} bytes are for training and {held_out:,} are held out, {share:.1%} of the "
            f"text; data.held_out_fraction = {asked:g} is a share of the documents, chosen at random: change it, or "
            "split long documents",
            stacklevel=3,
        )
    if unlike := describe_unlike(dataset.meta.get("unseen", {})):
        warnings.warn(f"{config.source}: {unlike}; a larger `held_out_fraction` adds other documents", stacklevel=3)


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count` independent runs; count 0 is the run that only joins their units."""

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
    """Progress after one part: units in all, and still missing.

    throughput: of this part, if it encoded anything. dataset: if no unit is missing.
    """

    units: int
    missing: int
    throughput: Throughput | None
    dataset: Dataset | None


def prepare_part(
    config: DataConfig, part: Part, *, progress: Progress | None = None, workers: int | None = None
) -> PartDone:
    """Encode one part's units; the part after which none is missing joins them to the dataset.

    Raises as `prepare` does.
    """
    for field, value in (("mixture", config.mixture), ("stream", config.stream)):
        require(not value, f"data.{field}", value, "cannot be prepared in parts; prepare each source separately")
    work = Preparation.of(config, progress or _silent)
    if not work.source.pinned(config):
        raise ConfigError(
            "data.hub_revision",
            config.hub_revision,
            f"parts start at different times and need one fixed commit; now {work.source.origin}",
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
    _warn_of_split(config, dataset)
    return PartDone(len(units), 0, throughput, dataset)


@dataclass(frozen=True)
class Preparation:
    """The preparation of one source. target: the dataset's folder."""

    config: DataConfig
    progress: Progress
    source: Source
    target: Path

    @classmethod
    def of(cls, config: DataConfig, progress: Progress) -> "Preparation":
        """Open the source; the folder's name has a hash of everything that affects the dataset."""
        source = open_source(config, config.cache)
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name or source.kind)[:40]
        name = f"{slug}-{_cache_key(config, source)[:16]}"
        return cls(config, progress, source, config.cache / "data" / name)

    def job(self, units: list[Unit]) -> Job:
        """The encoding of these units, in a folder beside the target that is removed once they are joined."""
        folder = self.target.with_name(f".units-{self.target.name}")
        return Job(self.source, tuple(units), folder, self.config.held_out_fraction)

    def open(self, throughput: Throughput | None = None) -> PreparedDataset:
        """Open the finished dataset."""
        mark_used(self.target)
        plugin = plugin_of(type(self.source))
        made_of = {"raw": self.source.digest()} | ({"plugin": plugin} if plugin else {})
        buffer_docs = self.config.buffer_docs
        return PreparedDataset.read(self.target, throughput=throughput, made_of=made_of, buffer_docs=buffer_docs)

    def encode(self) -> Throughput:
        """Encode the whole source in this process."""
        units = [Unit(0, len(self.source.entries))]
        with _staging(self.target) as folder:
            tokenizer = learn_tokenizer(self.config, [Share(self.source, units)], self.progress)
            tokenizer.save(folder / TOKENIZER)
            begin = time.monotonic()
            notes = Notes(self.source.left_out.plain())
            fraction = usable_fraction(self.source.documents(Notes()), self.config.held_out_fraction)
            reading = Reading(self.source)
            rule, divided = divide(reading.documents(notes), fraction)
            encoded = encode_documents(
                divided,
                tokenizer,
                folder,
                lambda documents, n_bytes: self.progress("encoding", documents, n_bytes, reading.share),
            )
            write_meta(folder, self.config, self.source.origin, tokenizer, rule, encoded, notes)
            _move(folder, self.target)
        return Throughput(encoded.tokens, encoded.bytes, time.monotonic() - begin, 1)

    def encode_units(self, units: list[Unit], part: Part, workers: int | None) -> Throughput | None:
        """Encode the missing units of a part, in parallel; None if none is missing."""
        job = self.job(units)
        job.folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.target.parent)
        numbers = [number for number in job.missing() if number % part.count == part.number - 1]
        if not numbers:
            return None
        self.tokenizer(job)  # before the workers load it
        begin = time.monotonic()
        workers = min(workers or available_cores(), len(numbers))
        documents = n_bytes = tokens = 0
        with Workers(job, workers) as pool:
            self.progress(f"encoding, unit 0 of {len(numbers)}", 0, 0, 0.0)
            for done, record in enumerate(pool.make(numbers), 1):
                documents, n_bytes = documents + record.train + record.held_out, n_bytes + record.bytes
                tokens += record.tokens
                self.progress(f"encoding, unit {done} of {len(numbers)}", documents, n_bytes, done / len(numbers))
        return Throughput(tokens, n_bytes, time.monotonic() - begin, workers)

    def tokenizer(self, job: Job) -> Tokenizer:
        """The tokenizer of all units, trained if the job's folder has none; every process would train the same one."""
        path = job.folder / TOKENIZER
        if not path.exists():
            save_tokenizer(learn_tokenizer(self.config, [Share(self.source, list(job.units))], self.progress), path)
        return load_tokenizer(path)

    def join(self, units: list[Unit]) -> None:
        """Join all units to the dataset, and remove them."""
        job = self.job(units)
        self.progress("joining the units", 0, 0, None)
        try:
            with _staging(self.target) as staging:
                if job.join(staging, self.config, self.tokenizer(job)) == 1:
                    self.encode()
                else:
                    _move(staging, self.target)
        except (SwamlaError, OSError):
            if not self.target.exists():  # else another part was faster, and has removed the units
                raise
        shutil.rmtree(job.folder, ignore_errors=True)

    @contextmanager
    def naming_files(self) -> Iterator[None]:
        """Turn OSError into DataError: a file of the cache cannot be written, another file cannot be read."""
        try:
            yield
        except OSError as error:
            file = Path(error.filename) if error.filename else self.target  # a full disk names no file
            cache = self.config.cache
            what = "written" if file.is_relative_to(cache) or cache.is_relative_to(file) else "read"
            raise DataError(f"{file}: cannot be {what} ({error.strerror or error})") from error


class Share(NamedTuple):
    """A source in units, and the weight of its text in the tokenizer's training sample."""

    source: Source
    units: list[Unit]
    weight: float = 1.0


def learn_tokenizer(config: DataConfig, parts: list[Share], progress: Progress) -> Tokenizer:
    """The tokenizer that `config` asks for, loaded or trained.

    Its training sample is deterministic and has no held-out document.
    """

    expected = sum(expected_text(entry) for part in parts for entry in part.source.entries)

    def counted(texts: Iterator[str], most: int) -> Iterator[str]:
        n_documents = n_characters = 0
        for text in texts:
            yield text
            n_documents, n_characters = n_documents + 1, n_characters + len(text)
            share = n_characters / max(1, n_characters, min(most, expected))
            progress("reading for the tokenizer", n_documents, n_characters, share)
        progress("training the tokenizer", n_documents, n_characters, None)

    total = sum(part.weight for part in parts)
    every = (text for part in parts for text in part.source.documents(Notes()))
    some = (
        training_texts(part.source, part.units, config.held_out_fraction, int(TOKENIZER_SAMPLE * part.weight / total))
        for part in parts
    )
    return make_tokenizer(
        config.tokenizer, counted(chain.from_iterable(some), TOKENIZER_SAMPLE), counted(every, expected)
    )


def training_texts(source: Source, units: list[Unit], held_out_fraction: float, size: int) -> Iterator[str]:
    """Training documents, up to `size` characters in all, taken from evenly spaced units of the source."""
    count = min(len(units), _PLACES)
    for place in range(count):
        documents = source.unit_documents(units[place * len(units) // count], Notes())
        if len(units) == 1:
            every = source.unit_documents(units[0], Notes())
            divided = divide(documents, usable_fraction(every, held_out_fraction))[1]
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
    """Write a tokenizer's file atomically."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    tokenizer.save(staged)
    fsync(staged)
    staged.replace(path)


def _cache_key(config: DataConfig, source: Source) -> str:
    """A hash of all that affects the dataset: settings, files' sizes and times, the tokenizer's files or rules."""
    settings = [config.text_column, config.tokenizer, config.held_out_fraction, config.invalid_utf8, config.on_bad_row]
    tokenizer = [(path.name, sha256_of(path)) for path in tokenizer_files(config.tokenizer)]
    trained = bpe_version() if parse_bpe(config.tokenizer) else []
    content = [FORMAT_VERSION, _RULES, source.name, source.state(), settings, tokenizer, trained]
    content += [source.kind] if plugin_of(type(source)) else []
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, removed on exit."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    folder = new_folder(target.parent, ".staging-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Delete what killed preparations left behind; units are kept longer, since a preparation can reuse them."""
    for pattern, age in _STALE_SECONDS.items():
        for folder in parent.glob(pattern):
            times = [path.stat().st_mtime for path in (folder, *folder.glob("*")) if path.exists()]
            if times and time.time() - max(times) > age:
                shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    """Rename the finished folder to `target`; if another process was faster, its identical result stays."""
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)
    try:
        folder.rename(target)
    except OSError:
        if not (target / META).exists():
            raise
    fsync(target.parent)


def _silent(stage: str, documents: int, n_bytes: int, share: float | None) -> None:
    pass
