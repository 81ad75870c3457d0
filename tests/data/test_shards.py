"""Shards: what was written is read back, and whatever is not what was written is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset, fingerprint_of
from swamla.data.packing import HeldOutRows, PackedRows
from swamla.data.shards import ArrayWriter, open_array, token_dtype
from swamla.data.tokenizer import CharTokenizer
from swamla.errors import CorruptError, DataError

Make = Callable[..., Dataset]


def test_an_array_written_in_parts_is_the_array(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path / "a.npy", np.uint16) as writer:
        writer.append([1, 2, 65535])
        writer.append([])
        writer.append(np.arange(100_000) % 60_000)
    assert np.array_equal(np.load(tmp_path / "a.npy")[:3], [1, 2, 65535])
    assert np.array_equal(np.load(tmp_path / "a.npy")[3:], np.arange(100_000) % 60_000)


def test_an_id_too_large_for_the_shards_type_is_an_error_with_its_offset(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path / "a.npy", np.uint16) as writer:
        writer.append([1, 2])
        with pytest.raises(DataError, match=r"a\.npy: offset 3: id 65536 is too large for uint16"):
            writer.append([1, 65536])


def test_the_type_follows_the_vocabulary() -> None:
    assert [token_dtype(size).name for size in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    with pytest.raises(DataError, match="too large"):
        token_dtype(2**32 + 1)


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptError, match=r"a\.npy: .*pickled, which is never loaded") as caught:
        open_array(tmp_path / "a.npy")
    assert caught.value.exit_status == 3


def test_arrays_of_another_kind_are_refused(tmp_path: Path) -> None:
    for array in (np.zeros((2, 2), dtype=np.int64), np.zeros(3)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(CorruptError, match="one-dimensional"):
            open_array(tmp_path / "a.npy")


def test_documents_read_back_are_the_documents(make_dataset: Make, corpus: Path) -> None:
    dataset = make_dataset()
    texts = {path.read_bytes().decode() for path in corpus.rglob("*.txt")}
    for split in (dataset.train, dataset.held_out):
        assert split.n_documents == len(split.lengths) == len(split.byte_counts)
        for i in range(split.n_documents):
            text = dataset.tokenizer.decode(split.document(i).tolist())
            assert text in texts
            assert len(text.encode()) == split.byte_counts[i]
    assert dataset.train.n_documents + dataset.held_out.n_documents == 40


def test_the_held_out_text_is_the_held_out_documents_to_the_byte(make_dataset: Make) -> None:
    dataset = make_dataset(tokenizer="bpe:300")
    split = dataset.held_out
    decoded = "".join(dataset.tokenizer.decode(split.document(i).tolist()) for i in range(split.n_documents))
    assert dataset.held_out_text() == decoded.encode()
    assert len(dataset.held_out_text()) == split.n_bytes


def test_an_intact_dataset_verifies_and_describes_itself(make_dataset: Make) -> None:
    dataset = make_dataset()
    dataset.verify()
    rows = dict(dataset.describe())
    assert rows["tokenizer"] == "byte, vocabulary 257"
    assert "by a hash of their text" in rows["held out"]
    assert rows["bytes per token"].startswith("1.000")


FILES = [f"{split}.{part}.npy" for split in ("train", "held_out") for part in ("tokens", "offsets", "bytes")]


@pytest.mark.parametrize("name", [*FILES, "held_out.txt"])
def test_a_truncated_or_missing_file_is_found_on_opening_and_a_flipped_bit_on_verifying(
    make_dataset: Make, name: str
) -> None:
    dataset = make_dataset()
    path = dataset.path / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptError, match=rf"{name}: damaged \({len(data) - 1} bytes instead of {len(data)}\)"):
        Dataset.open(dataset.path)
    path.unlink()
    with pytest.raises(CorruptError, match=rf"{name}: damaged \(missing\)") as caught:
        Dataset.open(dataset.path)
    assert caught.value.exit_status == 3
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptError, match=name):
        Dataset.open(dataset.path).verify()


def test_counted_bytes_that_are_not_those_of_the_held_out_text_are_an_error(make_dataset: Make) -> None:
    dataset = make_dataset()
    counts = np.load(dataset.path / "held_out.bytes.npy", mmap_mode="r+")
    total = int(counts.sum())
    counts[0] += 1
    counts.flush()
    with pytest.raises(CorruptError, match=rf"held_out\.bytes\.npy counts {total + 1} bytes of text, .* has {total};"):
        Dataset.open(dataset.path)


def test_another_tokenizer_beside_the_shards_is_an_error(make_dataset: Make) -> None:
    dataset = make_dataset()
    CharTokenizer("abc").save(dataset.path / "tokenizer.json")
    with pytest.raises(CorruptError, match=r"tokenizer\.json: not the tokenizer that these shards were made with"):
        Dataset.open(dataset.path)


def test_data_that_changed_is_told_by_its_fingerprint(make_dataset: Make, corpus: Path) -> None:
    before = make_dataset()
    assert make_dataset().fingerprint == before.fingerprint
    (corpus / "new.txt").write_text("more")
    assert make_dataset().fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda meta: meta.update(format_version=99), DataError, "dataset format 99, this swamla reads 2"),
        (lambda meta: meta.update(fingerprint="0"), CorruptError, r"meta\.json: damaged"),
        (lambda meta: meta.pop("files"), CorruptError, r"meta\.json: damaged"),
    ],
)
def test_meta_data_of_another_version_or_damaged_is_an_error(
    make_dataset: Make, edit: Callable[[dict], object], error: type[Exception], message: str
) -> None:
    path = make_dataset().path
    meta = json.loads((path / "meta.json").read_text())
    edit(meta)
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(error, match=message):
        Dataset.open(path)


def test_a_dataset_of_the_format_before_is_still_read_by_the_runs_that_have_it(make_dataset: Make) -> None:
    path = make_dataset().path
    meta = json.loads((path / "meta.json").read_text())
    meta.update(format_version=1, notes={"empty documents skipped": 3})
    meta["fingerprint"] = fingerprint_of(meta)
    (path / "meta.json").write_text(json.dumps(meta))
    dataset = Dataset.open(path)
    dataset.verify()
    assert dataset.fingerprint == meta["fingerprint"]
    assert ("note", "3 empty documents skipped") in dataset.describe()


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a prepared dataset"):
        Dataset.open(tmp_path)


def read_training_rows(dataset: Dataset) -> None:
    PackedRows(dataset.train, 5, 0, dataset.tokenizer.eos_id).batch(0, 10_000)


def read_held_out_rows(dataset: Dataset) -> None:
    list(HeldOutRows(dataset.held_out, 5, dataset.tokenizer.eos_id).batches(4))


@pytest.mark.parametrize(("split", "read"), [("train", read_training_rows), ("held_out", read_held_out_rows)])
def test_an_id_outside_of_the_vocabulary_is_named_with_shard_and_offset(
    make_dataset: Make, split: str, read: Callable[[Dataset], None]
) -> None:
    dataset = make_dataset()
    tokens = np.load(dataset.path / f"{split}.tokens.npy", mmap_mode="r+")
    tokens[7] = 300
    tokens.flush()
    dataset = Dataset.open(dataset.path)
    message = rf"{split}\.tokens\.npy: offset 7: token id 300 is outside of the vocabulary \(0 to 256\)"
    with pytest.raises(CorruptError, match=message):
        getattr(dataset, split).verify()
    with pytest.raises(CorruptError, match=message):
        read(dataset)


def test_a_dataset_may_be_moved(make_dataset: Make, tmp_path: Path) -> None:
    dataset = make_dataset()
    moved = shutil.move(dataset.path, tmp_path / "elsewhere")
    assert Dataset.open(moved).fingerprint == dataset.fingerprint
    Dataset.open(moved).verify()


def test_settings_that_cannot_be_are_refused() -> None:
    for settings in (
        {"source": ""},
        {"held_out_fraction": 0.0},
        {"held_out_fraction": 1.5},
        {"held_out_fraction": float("nan")},
        {"tokenizer": "bpe:256"},
        {"tokenizer": "bpe:many"},
        {"invalid_utf8": "ignore"},
        {"text_column": ""},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DataConfig(**settings)  # type: ignore[arg-type]
