"""The split into training and held-out text: by the text alone, however it is stored."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from swamla.data.config import DataConfig, WeightedSource
from swamla.data.dataset import Dataset
from swamla.data.preparing import prepare
from swamla.data.shards import divide, is_held_out, usable_fraction
from swamla.errors import ConfigError, DataError

TEXTS = [f"document {i}\n" + "été 漢字\n" * (i % 5 + 1) for i in range(60)]
EXPECTED = sorted(text for text in TEXTS if is_held_out(text, 0.3))


def plain(path: Path, texts: list[str] = TEXTS) -> None:
    """A folder of text files."""
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03d}.txt").write_bytes(text.encode())


def jsonl(path: Path, texts: list[str] = TEXTS) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def parquet(path: Path, texts: list[str] = TEXTS) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)


def sides(path: Path, **settings: object) -> tuple[list[str], list[str]]:
    """The texts trained on and those held out, line ends and byte-order marks as in the originals, sorted."""
    dataset = prepare(DataConfig(source=str(path), tokenizer="byte", held_out_fraction=0.3, **settings))  # type: ignore[arg-type]
    return tuple(sorted(text.replace("\r\n", "\n") for text in texts_of(dataset, split)) for split in SPLITS)  # type: ignore[return-value]


SPLITS = ("train", "held_out")


def texts_of(dataset: Dataset, split: str) -> list[str]:
    documents = getattr(dataset, split)
    return [dataset.tokenizer.decode(documents.document(i).tolist()) for i in range(documents.n_documents)]


def crlf(path: Path) -> None:
    plain(path, [text.replace("\n", "\r\n") for text in TEXTS])


def marked(path: Path) -> None:
    plain(path, ["\ufeff" + text for text in TEXTS])


def renamed(path: Path) -> None:
    plain(path, TEXTS[::-1])


def jsonl_crlf(path: Path) -> None:
    path.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\r\n" for text in TEXTS))


def jsonl_marked(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS))


def one_row_before(path: Path) -> None:
    jsonl(path, ["one more", *TEXTS])


CONTAINERS = {
    "folder": plain,
    "folder-crlf": crlf,
    "folder-renamed": renamed,
    "rows.jsonl": jsonl,
    "crlf.jsonl": jsonl_crlf,
    "marked.jsonl": jsonl_marked,
    "before.jsonl": one_row_before,
    "rows.parquet": parquet,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_same_texts_are_held_out_whatever_they_lie_in(tmp_path: Path, name: str) -> None:
    CONTAINERS[name](tmp_path / name)
    train, held_out = sides(tmp_path / name)
    assert [text for text in held_out if text != "one more"] == EXPECTED
    assert [text for text in train if text != "one more"] == sorted(set(TEXTS) - set(EXPECTED))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_the_same_texts_are_held_out_compressed_or_not(tmp_path: Path, suffix: str, pack: object) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack((tmp_path / "a.jsonl").read_bytes()))  # type: ignore[operator]
    assert sides(tmp_path / f"b.jsonl{suffix}") == sides(tmp_path / "a.jsonl")


def test_no_text_that_sources_of_a_mixture_share_is_trained_on_in_one_and_held_out_in_the_other(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS[:40])
    parquet(tmp_path / "b.parquet", TEXTS[20:])
    sources = tuple(WeightedSource(source=str(tmp_path / name), weight=1) for name in ("a.jsonl", "b.parquet"))
    mixed = prepare(DataConfig(source="mixture", mixture=sources, tokenizer="byte", held_out_fraction=0.3))
    assert not set(texts_of(mixed, "train")) & set(texts_of(mixed, "held_out"))
    assert sorted(set(texts_of(mixed, "held_out"))) == EXPECTED


@pytest.mark.parametrize("length", [10, 99, 1000])
def test_a_single_text_is_cut_after_the_same_word_whatever_its_line_ends(length: int) -> None:
    text = "".join("ab\n" if i % 3 else "\n" for i in range(length))
    _, lf = divide([text], 0.1)
    _, crlf = divide([text.replace("\n", "\r\n")], 0.1)
    (train, _), (held_out, _) = lf
    assert len(train) == int(len(text) * 0.9)
    assert train + held_out == text
    assert [part.replace("\r\n", "\n") for part, _ in crlf] == [train, held_out]


# all of a source


def test_where_everything_is_held_out_every_document_is_and_none_is_trained_on(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "one.txt").write_text(TEXTS[0])
    for name, texts in (("a.jsonl", TEXTS), ("one.txt", TEXTS[:1])):
        dataset = prepare(DataConfig(source=str(tmp_path / name), tokenizer="byte", held_out_fraction=1.0))
        assert texts_of(dataset, "held_out") == texts
        assert dataset.held_out_text() == "".join(texts).encode()
        assert dataset.train.n_documents == 0
        assert "all of it" in dict(dataset.describe())["held out"]
        dataset.verify()
        with pytest.raises(DataError, match="nothing to train on: all of its text is held out"):
            dataset.rows(32, 0)


def test_a_tokenizer_that_would_have_nothing_to_learn_from_is_refused() -> None:
    for settings in ({"tokenizer": "bpe:300"}, {"tokenizer": "byte", "stream": 2}):
        with pytest.raises(ConfigError, match="all text is held out"):
            DataConfig(held_out_fraction=1.0, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", TEXTS[:20])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_line_ends_of_any_kind_and_a_mark_at_the_beginning_do_not_decide(text: str, fraction: float) -> None:
    expected = is_held_out(text, fraction)
    for end in ("\r\n", "\r"):
        assert is_held_out(text.replace("\n", end), fraction) == expected
        assert is_held_out("\ufeff" + text.replace("\n", end), fraction) == expected


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.05, 0.5, 0.99, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10, 30])
def test_however_few_documents_there_are_one_at_least_is_on_each_side(count: int, fraction: float) -> None:
    for seed in range(50):
        texts = [f"{seed}: text {i}" for i in range(count)]
        usable = usable_fraction(texts, fraction)
        held_out = [text for text in texts if is_held_out(text, usable)]
        assert 0 < len(held_out) < count
        asked = [text for text in texts if is_held_out(text, fraction)]
        if 0 < len(asked) < count:
            assert usable == fraction
        else:
            assert len(held_out) == (1 if not asked else count - 1)
        assert usable_fraction(reversed([*texts, *texts]), fraction) == usable  # whatever order, and repeated


def test_a_folder_of_few_files_is_prepared_and_its_tokenizer_has_not_seen_what_is_held_out(tmp_path: Path) -> None:
    plain(tmp_path / "few", [f"file {i} " + chr(0x4E00 + i) * 9 for i in range(4)])
    dataset = prepare(DataConfig(source=str(tmp_path / "few"), tokenizer="bpe:300", held_out_fraction=1e-6))
    assert (dataset.train.n_documents, dataset.held_out.n_documents) == (3, 1)
    (letter,) = {c for c in dataset.held_out_text().decode() if ord(c) >= 0x4E00}
    merged = {dataset.tokenizer.decode([i]) for i in range(256, dataset.tokenizer.vocab_size - 1)}
    assert not any(letter in text for text in merged)
    again = prepare(DataConfig(source=str(tmp_path / "few"), tokenizer="bpe:300", held_out_fraction=1e-6))
    assert again.fingerprint == dataset.fingerprint
