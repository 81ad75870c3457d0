"""Find the data of a run in the cache by its fingerprint, even if the raw files are gone."""

import json
import warnings
from pathlib import Path

from swamla.data.caching import mark_used
from swamla.data.config import MIXTURE, TOKEN_IDS, DataConfig
from swamla.data.dataset import META, TOKENIZER, Dataset, PreparedDataset
from swamla.data.sources import Files, Source, class_of, open_source
from swamla.data.units import Job
from swamla.errors import DataError

Identity = list[dict[str, str]]


def reopen(
    config: DataConfig, identity: Identity, *, training: bool = False, workers: int | None = None
) -> Dataset | None:
    """The dataset that a run on `config` started with, by its `Dataset.identity`; None if it is not in the cache.

    Warns if the raw files are missing or changed, since the prepared tokens are used nevertheless. Training on a stream
    needs the raw files: raises DataError without them.
    """
    singles = config.sources
    if len(singles) != len(identity):
        return None
    folders = [_find(config.cache / "data", each["fingerprint"]) for each in identity]
    found: list[Dataset] = []
    for single, each, folder in zip(singles, identity, folders, strict=True):
        if folder is None:
            return None
        mark_used(folder)
        source = _raw(single, each, folder, needed=training and bool(config.stream))
        # Sources with equal texts share a folder of the cache, whose meta.json names the first one.
        told = (source.origin if source else "") or single.source
        dataset = PreparedDataset.read(
            folder,
            source=told,
            made_of={name: value for name, value in each.items() if name != "fingerprint"},
            buffer_docs=config.buffer_docs,
            spec=single.tokenizer,
        )
        streamed = _stream(single, dataset, source, workers) if config.stream else dataset
        if streamed is None:
            return None
        found.append(streamed)
    if config.source != MIXTURE:
        return found[0]
    from swamla.data.mixing import MixtureDataset  # needs torch

    return MixtureDataset(found, [part.weight for part in config.mixture])


def _find(data: Path, fingerprint: str) -> Path | None:
    """The folder of the prepared dataset with this fingerprint."""
    for folder in _folders(data, META):
        try:
            if json.loads((folder / META).read_text(encoding="utf-8"))["fingerprint"] == fingerprint:
                return folder
        except (OSError, ValueError, KeyError, TypeError):  # being written, removed, or damaged
            continue
    return None


def _folders(data: Path, file: str) -> list[Path]:
    staged = (".staging-", ".units-", ".unit-", ".dropped-")
    return sorted(path.parent for path in data.glob(f"*/{file}") if not path.parent.name.startswith(staged))


def lacks_plugin(config: DataConfig, identity: Identity) -> str:
    """The error message for a source whose plugin is not loaded; "" if none is missing."""
    pairs = zip(config.sources, identity, strict=False)
    for single, each in pairs:
        if "plugin" in each and class_of(single.source) is Files:
            return f"data.source = {single.source!r}: needs its plugin: --plugin {each['plugin']}"
    return ""


def _raw(config: DataConfig, identity: dict[str, str], folder: Path, *, needed: bool) -> Source | None:
    """The raw files, or None if they are missing; warns if they are missing or changed."""
    if config.source == TOKEN_IDS:
        return None  # there are no raw files
    went_on = f"using its prepared tokens in {folder}"
    try:
        source = open_source(config, config.cache)
    except DataError as error:
        if needed:
            lost = f"{error} (a stream reads its files during training: restore them)"
            raise DataError(lacks_plugin(config, [identity]) or lost) from error
        warnings.warn(f"{config.source} is gone or unreadable: {went_on}", stacklevel=3)
        return None
    if identity["raw"] and source.digest() != identity["raw"]:
        warnings.warn(f"{config.source} changed (or was copied) since the run began: {went_on}", stacklevel=3)
    return source


def _stream(config: DataConfig, sample: PreparedDataset, source: Source | None, workers: int | None) -> Dataset | None:
    from swamla.data.stream import FILE, StreamDataset, StreamPlan, UnitSupply  # needs torch

    for folder in _folders(sample.path.parent, FILE):
        plan = StreamPlan.read(folder)
        if plan.sample != sample.fingerprint or not (folder / TOKENIZER).exists():
            continue
        units = plan.units if source is None else plan.units_of(source)
        absent = Files(name=config.source)  # enough for evaluation, which reads no raw file
        job = Job(source or absent, units, folder, config.held_out_fraction)
        return StreamDataset(sample, UnitSupply(job, workers), config.stream, plan.key)
    return None
