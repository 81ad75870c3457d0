"""`prepare`: text to a dataset, once. The result is cached, and appears whole or not at all.

A small source is encoded at once, in this process. A large one is cut into units, which are encoded by as many
processes as there are cores, or by N independent runs of this program, and are then joined. What was finished before a
kill is never done again, and the dataset is byte for byte the same however its units came to be.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace

from swamla.data import hub
from swamla.data.config import MIXTURE, DataConfig, parse_bpe
from swamla.data.dataset import Dataset, Throughput
from swamla.data.encode import Progress
from swamla.data.learning import Share, learn_tokenizer
from swamla.data.unit_files import silent
from swamla.data.units import units_of
from swamla.data.work import Part, Work, cache_of, default_cache_dir, save_tokenizer, single_sources
from swamla.data.workers import available_cores
from swamla.errors import ConfigError, require

__all__ = ["Dataset", "Part", "PartDone", "default_cache_dir", "prepare", "prepare_part"]

_FAR = 2  # times as much, or as little, held-out text as documents
_AT_ONCE = 4  # units that are encoded in this process: starting others, and joining what they made, takes as long


@dataclass(frozen=True)
class PartDone:
    """How far an array of parts is. dataset: once no unit is missing.  throughput: of this part, if it did any work."""

    units: int
    missing: int
    throughput: "Throughput | None"
    dataset: Dataset | None


def prepare(config: DataConfig, *, progress: Progress | None = None, workers: int | None = None) -> Dataset:
    """The dataset that `config` describes, from the cache if source, tokenizer and settings are as they were.

    `progress(stage, documents, bytes)` is called as work goes on. workers: processes for a large source, by default as
    many as there are cores. Raises DataError for input that cannot be used and CorruptError for a damaged cache; a
    killed or failed preparation leaves nothing that would be taken for a dataset.
    """
    if config.source == MIXTURE:
        return _prepare_mixture(config, progress or silent, workers)
    work = Work(config, progress or silent)
    dataset = work.stream(workers) if config.stream else _prepare_whole(work, workers)
    dataset.raw = work.source.digest()
    _warn_of_share(config, dataset)
    if config.buffer_docs:
        dataset.fit_documents(config.buffer_docs)
    return dataset


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


def _prepare_whole(work: Work, workers: int | None) -> Dataset:
    """All of one source, now or from the cache."""
    if work.target.exists():
        return Dataset.open(work.target)
    with work.naming_files():
        units = units_of(work.source)
        if len(units) > _AT_ONCE:
            throughput = work.make(units, Part(1, 1), workers or available_cores())
            work.join(units)
        else:
            throughput = work.make_whole()
    return Dataset.open(work.target, throughput)


def _prepare_mixture(config: DataConfig, progress: Progress, workers: int | None) -> Dataset:
    """Every source of a mixture by itself, with one tokenizer, which learns from each by its weight."""
    from swamla.data.mixing import MixtureDataset

    singles = single_sources(config)
    weights = [part.weight for part in config.mixture]
    if parse_bpe(config.tokenizer) or config.tokenizer == "char":
        works = [Work(single, progress) for single in singles]
        key = json.dumps([[work.target.name, weight] for work, weight in zip(works, weights, strict=True)])
        path = cache_of(config) / "tokenizers" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            learned = [Share(w.source, units_of(w.source), weight) for w, weight in zip(works, weights, strict=True)]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tokenizer(learn_tokenizer(config, learned, progress), path)
        singles = [replace(single, tokenizer=str(path)) for single in singles]
    return MixtureDataset([prepare(single, progress=progress, workers=workers) for single in singles], weights)


def prepare_part(
    config: DataConfig, part: Part, *, progress: Progress | None = None, workers: int | None = None
) -> PartDone:
    """Make one part's units; the part that finds that none is missing any more makes the dataset of them.

    Raises as `prepare` does.
    """
    for field, value in (("mixture", config.mixture), ("stream", config.stream)):
        require(not value, f"data.{field}", value, "cannot be prepared in parts; prepare its sources by themselves")
    work = Work(config, progress or silent)
    if config.source.startswith(hub.PREFIX) and not hub.is_commit(config.hub_revision):
        raise ConfigError(
            "data.hub_revision",
            config.hub_revision,
            f"parts begin at different times: pin it; now {work.source.origin}",
        )
    if work.target.exists():
        return PartDone(0, 0, None, Dataset.open(work.target))
    with work.naming_files():
        units = units_of(work.source)
        throughput = work.make(units, part, workers or available_cores()) if part.count else None
        missing = len(work.job(units).missing())
        if missing:
            return PartDone(len(units), missing, throughput, None)
        work.join(units)
    dataset = Dataset.open(work.target, throughput)
    _warn_of_share(config, dataset)
    return PartDone(len(units), 0, throughput, dataset)
