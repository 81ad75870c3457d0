"""What every registered source keeps to, those of plugins included."""

import hashlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.data import hub, sources
from swamla.data.config import DataConfig, WeightedSource
from swamla.data.dataset import Dataset
from swamla.data.preparing import Part, prepare, prepare_part
from swamla.data.reading import Notes
from swamla.data.shards import is_held_out
from swamla.data.sources import Source, open_source
from swamla.registry import members_of, plugin_of
from tests.toys import registered

KINDS = ("files", "hf", "shakespeare", "stdlib", "toy_text")
FRACTION = 0.3


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sources, "UNIT_BYTES", 4000)
    with registered():
        yield


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Data of each kind, of more than a few units. Nothing is fetched: what the hub would send lies here."""
    texts = [f"{i} " + "word " * (i * 7 % 40) for i in range(200)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(rows)
    (folder / "b.txt").write_text("one text")
    source = {"files": str(folder), "hf": "hf:some/rows", "toy_text": "toy_text:300"}.get(request.param, request.param)
    commit = "0" * 40
    listing = hub.HubListing("some/rows", commit, (("a.jsonl", len(rows), "hash"), ("b.txt", 8, "hash")))
    monkeypatch.setattr(hub, "list_dataset", lambda *_: listing)
    monkeypatch.setattr(hub.HubFile, "open", lambda self, mode: (folder / self.path).open(mode))
    monkeypatch.setattr(hub, "SHAKESPEARE_SHA256", hashlib.sha256(rows).hexdigest())
    cache = tmp_path / "cache"
    hub.keep_shakespeare(cache, folder / "a.jsonl")
    if request.param == "stdlib":  # a part of it is enough
        library = tmp_path / "library"
        library.mkdir()
        for i, text in enumerate(texts):
            (library / f"{i}.py").write_text(f"# {text}\n")
        monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(library))
    return DataConfig(source=source, tokenizer="byte", held_out_fraction=FRACTION, cache_dir=str(cache))


def opened(config: DataConfig) -> Source:
    return open_source(config, config.cache)


def several(config: DataConfig) -> bool:
    """False where there is but one document, which is cut in two."""
    return not config.source.startswith("shakespeare")


def test_these_are_the_tests_of_all_that_is_registered() -> None:
    assert set(KINDS) == set(members_of(Source))


def test_units_hold_each_document_once_and_in_order_however_often_they_are_read(config: DataConfig) -> None:
    source = opened(config)
    whole = list(source.documents(Notes()))
    assert whole == list(opened(config).documents(Notes()))
    units = source.units()
    assert [text for unit in units for text in source.unit_documents(unit, Notes())] == whole
    assert all(source.describe_unit(unit) for unit in units)
    assert len(units) > 4 or config.source == "shakespeare"


def test_it_is_known_by_a_state_and_read_by_another_process_as_here(config: DataConfig) -> None:
    source = opened(config)
    assert json.loads(json.dumps(source.state())) == opened(config).state()
    sent = pickle.loads(pickle.dumps(source))
    assert sent.digest() == source.digest()
    if config.source.startswith("hf:"):
        return  # its files are only here
    assert list(sent.documents(Notes())) == list(source.documents(Notes()))


def bytes_of(dataset: Dataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dataset.path.iterdir()}


def test_processes_and_parts_make_of_it_what_one_process_makes(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config.source.startswith("hf:"):
        pytest.skip("other processes speak to a hub: tests/data/test_hub.py has one")
    by_two = prepare(config, workers=2)
    in_parts = replace(config, cache_dir=str(tmp_path / "parts"))
    hub.keep_shakespeare(in_parts.cache, tmp_path / "files/a.jsonl")
    for number in (1, 2):
        done = prepare_part(in_parts, Part(number, 2), workers=1)
    assert done.dataset is not None
    monkeypatch.setattr(sources, "UNIT_BYTES", 1 << 30)
    whole = replace(config, cache_dir=str(tmp_path / "whole"))
    hub.keep_shakespeare(whole.cache, tmp_path / "files/a.jsonl")
    assert bytes_of(by_two) == bytes_of(done.dataset) == bytes_of(prepare(whole))


def test_its_documents_are_held_out_by_their_text(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 1 << 30)
    texts = list(opened(config).documents(Notes()))
    expected = "".join(text for text in texts if is_held_out(text, FRACTION)).encode()
    dataset = prepare(config)
    assert (dataset.held_out_text() == expected) == several(config)
    assert dataset.held_out.n_bytes + dataset.train.n_bytes == sum(len(text.encode()) for text in texts)
    assert dataset.identity() == [
        {
            "fingerprint": dataset.fingerprint,
            "raw": opened(config).digest(),
            **({"plugin": "toy_source.py"} if plugin_of(type(opened(config))) else {}),
        }
    ]


def test_it_streams_and_mixes(config: DataConfig, tmp_path: Path) -> None:
    if config.source.startswith("hf:"):
        pytest.skip("other processes speak to a hub: tests/data/test_hub.py has one")
    other = WeightedSource(source=str(tmp_path / "files/a.jsonl"), weight=1.0)
    parts = (WeightedSource(source=config.source, weight=1.0), other)
    mixture = prepare(replace(config, source="mixture", mixture=parts))
    assert mixture.rows(64, 0).batch(0, 20).tokens_BT.shape == (20, 64)
    assert set(mixture.epochs()) == {config.source, other.source}
    if several(config):
        stream = prepare(replace(config, stream=2), workers=1)
        assert stream.rows(64, 0).batch(0, 20).tokens_BT.shape == (20, 64)
        stream.supply.close()  # type: ignore[attr-defined]
