"""Rows of streams, of mixtures and of whole documents: pure functions of (seed, sample), nothing lost or doubled."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from swamla.data import sources
from swamla.data.config import DataConfig, WeightedSource
from swamla.data.dataset import Dataset, Rows
from swamla.data.mixing import CYCLE, MixtureDataset, MixtureRows, shares
from swamla.data.packing import NO_LABEL, Batch, BestFitRows, PackedRows, best_fit
from swamla.data.preparing import Part, prepare, prepare_part
from swamla.data.stream import StreamDataset
from swamla.errors import ConfigError, DataError
from swamla.ops.layout import PADDING

from .test_packing import EOS, LENGTHS, make_split


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.__dict__.values(), second.__dict__.values(), strict=True))


def counted_documents(batch: Batch, eos_id: int) -> Counter[tuple[int, ...]]:
    """The documents whose beginning and end are in one row, counted."""
    found: Counter[tuple[int, ...]] = Counter()
    for tokens, labels, documents in zip(batch.tokens_BT, batch.labels_BT, batch.document_BT, strict=True):
        for document in range(int(documents.max()) + 1):
            mine = documents == document
            if tokens[mine][0] == eos_id and labels[mine][-1] == eos_id:
                found[tuple(labels[mine][:-1].tolist())] += 1
    return found


# best fit


@pytest.mark.parametrize("buffer_docs", [1, 4, 100])
@pytest.mark.parametrize("block_size", [2, 8, 31, 100])
def test_best_fit_rows_hold_each_position_once_an_epoch(block_size: int, buffer_docs: int) -> None:
    split = make_split()
    rows = BestFitRows(split, block_size, 0, EOS, buffer_docs)
    blocks, at = -(-len(LENGTHS) // buffer_docs), 0
    for epoch in range(3):
        count = sum(rows.n_rows(epoch * blocks + block) for block in range(blocks))
        batch = rows.batch(at, count)
        at += count
        labels = batch.labels_BT[batch.labels_BT != NO_LABEL].tolist()
        assert Counter(labels) == {**dict.fromkeys(range(split.n_tokens), 1), EOS: len(LENGTHS)}
        assert torch.equal(batch.labels_BT == NO_LABEL, batch.document_BT == PADDING)
        starts = batch.document_BT.diff(dim=1, prepend=torch.full((count, 1), -1)) == 1
        assert ((batch.tokens_BT == EOS) <= starts).all()


def test_best_fit_cuts_only_what_is_longer_than_a_row() -> None:
    split = make_split()
    rows = BestFitRows(split, 31, 1, EOS, 100)
    batch = rows.batch(0, rows.n_rows(0))
    whole = counted_documents(batch, EOS)
    assert whole == Counter(tuple(split.document(i).tolist()) for i, n in enumerate(LENGTHS) if n + 1 <= 31)
    assert batch.cut_share(EOS) == pytest.approx(3 / 11)  # 65 positions in three pieces, eight whole documents
    packed = PackedRows(split, 31, 1, EOS)
    assert packed.batch(0, 50).cut_share(EOS) > batch.cut_share(EOS)


def test_best_fit_takes_the_row_with_the_least_room() -> None:
    assert best_fit(np.array([6, 7, 3, 4, 10]), 10).tolist() == [2, 1, 1, 2, 0]
    draw = np.random.default_rng(0)
    length = draw.integers(1, 65, 2000)
    row = best_fit(length, 64)
    filled = np.bincount(row, weights=length)
    assert filled.max() <= 64
    assert filled.sum() / (64 * len(filled)) > 0.98


def test_a_best_fit_sample_is_the_same_however_it_is_asked_for() -> None:
    split = make_split()
    whole = BestFitRows(split, 20, 5, EOS, 4).batch(0, 60)
    fresh = BestFitRows(split, 20, 5, EOS, 4)
    for first, count in ((59, 1), (3, 20), (0, 60)):
        part = fresh.batch(first, count)
        assert equal(part, Batch(*(values[first : first + count] for values in whole.__dict__.values())))
    assert not equal(whole, BestFitRows(split, 20, 6, EOS, 4).batch(0, 60))


def test_packing_of_whole_documents_is_asked_for_by_the_config_and_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "word " * (i % 9 + 1)}) + "\n" for i in range(80)))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", held_out_fraction=0.2)
    plain, fitted = prepare(config), prepare(replace(config, buffer_docs=50))
    assert isinstance(plain.rows(64, 0), PackedRows)
    assert isinstance(fitted.rows(64, 0), BestFitRows)
    assert fitted.path == plain.path
    assert len({plain.fingerprint, fitted.fingerprint, prepare(replace(config, buffer_docs=9)).fingerprint}) == 3
    eos = plain.tokenizer.eos_id
    assert fitted.rows(64, 0).batch(0, 20).cut_share(eos) == 0 < plain.rows(64, 0).batch(0, 20).cut_share(eos)


# streams


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """240 documents in some nine units."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 4000)
    texts = [f"{i} " + "stream " * (i * 7 % 40) for i in range(240)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(
        source=str(tmp_path / "s.jsonl"),
        tokenizer="byte",
        held_out_fraction=0.1,
        cache_dir=str(tmp_path / "c"),
        stream=3,
    )


def streamed(config: DataConfig) -> StreamDataset:
    dataset = prepare(config, workers=1)
    assert isinstance(dataset, StreamDataset)
    return dataset


def rows_per_epoch(rows: Rows) -> int:
    assert hasattr(rows, "n_rows")
    return sum(rows.n_rows(block) for block in range(rows._windows))  # type: ignore[attr-defined]


def test_an_epoch_of_a_stream_holds_every_document_that_is_trained_on_once(stream: DataConfig) -> None:
    prepared = prepare(replace(stream, stream=0))
    dataset = streamed(stream)
    expected = Counter(tuple(prepared.train.document(i).tolist()) for i in range(prepared.train.n_documents))
    rows = dataset.rows(5000, 0)
    count = rows_per_epoch(rows)
    eos = dataset.tokenizer.eos_id
    epochs = [rows.batch(0, count), rows.batch(count, count)]
    for batch in epochs:
        labels = batch.labels_BT[batch.labels_BT != NO_LABEL].tolist()
        assert labels.count(eos) == prepared.train.n_documents
        assert Counter(labels) == Counter(t for text, n in expected.items() for t in [*text, eos] * n)
        assert counted_documents(batch, eos) <= expected
    assert not equal(*epochs)
    dataset.supply.close()


def test_a_stream_resumes_exactly_whatever_is_left_of_its_units(stream: DataConfig, tmp_path: Path) -> None:
    first = streamed(stream)
    rows = first.rows(256, 3)
    batches = [rows.batch(at, 8) for at in range(0, 240, 8)]
    first.supply.close()
    folder = first.supply.job.folder
    assert len(first.supply.job.present()) < len(first.supply.job.units)
    for cache in (stream.cache_dir, str(tmp_path / "elsewhere")):
        again = streamed(replace(stream, cache_dir=cache))
        assert again.fingerprint == first.fingerprint
        resumed = again.rows(256, 3)
        for at in (232, 104, 0):
            assert equal(resumed.batch(at, 8), batches[at // 8]), (cache, at)
        again.supply.close()
    assert folder.name.startswith(".stream-")


def test_a_stream_keeps_little_on_disk(stream: DataConfig) -> None:
    dataset = streamed(replace(stream, stream=1))
    rows = dataset.rows(64, 0)
    kept = [len(dataset.supply.job.present()) for at in range(0, 600, 20) if rows.batch(at, 1)]
    assert len(dataset.supply.job.units) > 6
    assert max(kept) <= 5
    dataset.supply.close()


def test_two_readers_of_a_stream_that_drop_each_others_units_read_on(stream: DataConfig) -> None:
    dataset, other = streamed(replace(stream, stream=1)), streamed(replace(stream, stream=1))
    rows = [each.rows(64, seed) for each, seed in ((dataset, 0), (dataset, 1), (other, 2))]
    for at in range(0, 300, 10):
        for reader in rows:
            assert reader.batch(at, 10).tokens_BT.shape == (10, 64)
    for each in (dataset, other):
        each.supply.close()


def test_damage_met_in_a_stream_is_named_when_its_rows_are_due(stream: DataConfig) -> None:
    path = Path(stream.source)
    dataset = streamed(stream)
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i in range(200, 0, -1) if len(lines[i]) > 40)
    lines[at] = b"{" + b"x" * (len(lines[at]) - 2) + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=rf"s\.jsonl: line {at + 1}: not JSON"):
        dataset.rows(64, 0).batch(0, rows_per_epoch(dataset.rows(64, 0)))
    dataset.supply.close()


def test_what_a_stream_leaves_out_is_told_with_its_place_at_first_and_whenever_it_has_doubled(
    stream: DataConfig, recwarn: pytest.WarningsRecorder
) -> None:
    path = Path(stream.source)
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(100, 240, 10):  # behind the sample
        lines[number] = b"{\n"
    path.write_bytes(b"".join(lines))
    dataset = streamed(replace(stream, on_bad_row="skip", stream=1))
    rows = dataset.rows(64, 0)
    for _ in range(2):  # a second epoch tells nothing anew
        rows_per_epoch(rows)
    told = [str(warning.message) for warning in recwarn if "bad rows" in str(warning.message)]
    counts = [int(line.split()[0]) for line in told]
    assert counts[0] >= 1
    assert all(b >= 2 * a for a, b in pairwise(counts))
    assert 14 / 2 < counts[-1] <= 14
    assert all(re.search(r" bad rows skipped so far, e\.g\. .*s\.jsonl: .*: not JSON", line) for line in told)
    dataset.supply.close()


def test_held_out_documents_of_a_stream_are_never_in_its_rows(stream: DataConfig) -> None:
    dataset = streamed(replace(stream, held_out_fraction=0.3))
    held_out = {tuple(dataset.held_out.document(i).tolist()) for i in range(dataset.held_out.n_documents)}
    rows = dataset.rows(5000, 0)
    seen = counted_documents(rows.batch(0, rows_per_epoch(rows)), dataset.tokenizer.eos_id)
    assert len(held_out) > 10
    assert not held_out & set(seen)
    dataset.supply.close()


# mixtures


@pytest.fixture
def mixture(tmp_path: Path) -> DataConfig:
    for name, count in (("a", 90), ("b", 40), ("c", 15)):
        lines = (json.dumps({name: f"{name} {i} " + f"{name}x " * (i % 13)}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = tuple(
        WeightedSource(source=str(tmp_path / f"{name}.jsonl"), weight=weight, text_column=name)
        for name, weight in (("a", 5), ("b", 2.5), ("c", 2.5))
    )
    return DataConfig(source="mixture", mixture=sources, tokenizer="bpe:270", held_out_fraction=0.2)


def mixed(config: DataConfig) -> MixtureDataset:
    dataset = prepare(config)
    assert isinstance(dataset, MixtureDataset)
    return dataset


def test_sources_have_their_share_of_every_cycle_and_run_through_their_own_rows_in_order(mixture: DataConfig) -> None:
    rows = mixed(mixture).rows(32, 0)
    source, index = rows.places(np.arange(3 * CYCLE))
    for cycle in range(3):
        assert np.bincount(source[cycle * CYCLE : (cycle + 1) * CYCLE]).tolist() == [2048, 1024, 1024]
    for which, share in enumerate((2048, 1024, 1024)):
        assert index[source == which].tolist() == list(range(3 * share))
    assert len(set(source[:50])) == 3


def test_a_mixtures_sample_is_that_of_its_source(mixture: DataConfig) -> None:
    dataset = mixed(mixture)
    rows = dataset.rows(32, 7)
    batch = rows.batch(CYCLE - 20, 60)
    source, index = rows.places(np.arange(CYCLE - 20, CYCLE + 40))
    singles = [part.rows(32, 7) for part in dataset.parts]
    for i in range(60):
        alone = singles[source[i]].batch(int(index[i]), 1)
        assert torch.equal(alone.labels_BT[0], batch.labels_BT[i])
    assert equal(dataset.rows(32, 7).batch(CYCLE - 20, 60), batch)
    assert not equal(dataset.rows(32, 8).batch(CYCLE - 20, 60), batch)


def test_a_mixture_has_one_tokenizer_and_the_held_out_text_of_all(mixture: DataConfig) -> None:
    dataset = mixed(mixture)
    assert len({part.tokenizer.fingerprint for part in dataset.parts}) == 1
    assert dataset.held_out.n_bytes == sum(part.held_out.n_bytes for part in dataset.parts) > 0
    assert len(dataset.held_out_text()) == dataset.held_out.n_bytes
    assert dataset.bytes_per_label == pytest.approx(
        sum(w * part.bytes_per_label for w, part in zip((0.5, 0.25, 0.25), dataset.parts, strict=True))
    )
    dataset.verify()
    assert mixed(mixture).fingerprint == dataset.fingerprint
    other = replace(mixture, mixture=(*mixture.mixture[:2], replace(mixture.mixture[2], weight=2.6)))
    assert mixed(other).fingerprint != dataset.fingerprint
    assert sum("of the rows from" in text for _, text in dataset.describe()) == 3


def test_shares_are_whole_rows_as_near_as_can_be() -> None:
    assert shares([1, 1, 1], 4096).tolist() == [1366, 1365, 1365]
    assert shares([1e-9, 1, 1e-9], 10).tolist() == [1, 8, 1]
    assert shares([0.3, 0.7], 10).tolist() == [3, 7]
    assert shares([1], 10).tolist() == [10]


def test_a_mixture_of_streams_is_a_mixture(stream: DataConfig, mixture: DataConfig) -> None:
    parts = (WeightedSource(source=stream.source, weight=1.0), mixture.mixture[0])
    dataset = mixed(replace(stream, source="mixture", mixture=parts))
    assert [type(part) for part in dataset.parts] == [StreamDataset, StreamDataset]
    batch = dataset.rows(64, 0).batch(0, 40)
    assert batch.tokens_BT.shape == (40, 64)
    for part in dataset.parts:
        part.supply.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"source": "mixture"}, "mixture"),
        ({"mixture": (WeightedSource(source="x", weight=1),)}, "source"),
        ({"stream": -1}, "stream"),
        ({"buffer_docs": -1}, "buffer_docs"),
        ({"stream": 1, "buffer_docs": 1}, "buffer_docs"),
    ],
)
def test_settings_that_cannot_be_together_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} = "):
        DataConfig(**settings)
    for wrong in ({"weight": 0.0}, {"weight": float("nan")}, {"source": "mixture"}, {"source": ""}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            WeightedSource(**{"source": "x", "weight": 1.0, **wrong})


def test_mixtures_and_streams_are_not_prepared_in_parts(mixture: DataConfig, stream: DataConfig) -> None:
    for config, field in ((mixture, "mixture"), (stream, "stream")):
        with pytest.raises(ConfigError, match=f"data.{field} = .*cannot be prepared in parts"):
            prepare_part(config, Part(1, 2))


def test_all_datasets_are_datasets() -> None:
    assert issubclass(StreamDataset, Dataset)
    assert issubclass(MixtureDataset, Dataset)
    assert all(hasattr(each, "batch") for each in (PackedRows, BestFitRows, MixtureRows))
