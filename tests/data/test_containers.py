"""Containers: rows and texts are the same in every kind of file, encoding and compression, or the file is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from swamla.data.config import DataConfig
from swamla.data.preparing import prepare
from swamla.data.reading import Notes
from swamla.data.sources import open_source
from swamla.errors import DataError

TEXTS = ["first", 'second\nline, with "quotes"', "dritte ß\r\nx\ty", "漢字 🙂", "\\ '", "x" * 200_000]
ROWS = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]


def table(delimiter: str) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
KINDS = {
    "lines.jsonl": LINES,
    "lines.ndjson": LINES.replace("\n", "\r\n"),
    "array.json": json.dumps(ROWS),
    "lines.json": LINES,
    "following.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "wrapped.json": json.dumps({"version": "1", "data": ROWS}),
    "by-id.json": json.dumps({row["id"]: row for row in ROWS}),
    "by-column.json": json.dumps({"id": {"0": 1}, "text": {str(i): text for i, text in enumerate(TEXTS)}}),
    "column.json": json.dumps({"text": TEXTS}),
    "table.csv": table(","),
    "table.tsv": table("\t"),
}
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 with mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16 big-endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "utf-32 big-endian": lambda text: b"\x00\x00\xfe\xff" + text.encode("utf-32-be"),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def read(path: Path, notes: Notes | None = None, **settings: str) -> list[str]:
    source = open_source(DataConfig(source=str(path), **settings), Path("unused"))  # type: ignore[arg-type]
    return list(source.documents(notes or Notes()))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_in_every_kind_encoding_and_compression_whatever_the_name_says_of_it(
    tmp_path: Path, kind: str, encoding: str
) -> None:
    data = ENCODINGS[encoding](KINDS[kind])
    for suffix, pack in PACKED.items():
        assert read(written(tmp_path / f"{kind}{suffix}", pack(data))) == TEXTS, suffix
        assert read(written(tmp_path / kind, pack(data))) == TEXTS, suffix


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_text_is_the_same_in_every_encoding_and_compression(tmp_path: Path, encoding: str) -> None:
    text = "one\r\ntwo 漢字 🙂\rthree\x00\n" * 3
    for suffix, pack in PACKED.items():
        assert read(written(tmp_path / f"a.txt{suffix}", pack(ENCODINGS[encoding](text)))) == [text], suffix
        assert read(written(tmp_path / "unnamed", pack(ENCODINGS[encoding](text)))) == [text], suffix


def test_a_parquet_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.txt")
    for suffix, pack in PACKED.items():
        assert read(written(tmp_path / f"b{suffix}", pack((tmp_path / "a.txt").read_bytes()))) == TEXTS, suffix


def test_one_object_is_one_row(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.json", b'{"text": "x",\n "n": [1, {"a": 2}]}')) == ["x"]


@pytest.mark.parametrize("suffix", [suffix for suffix in PACKED if suffix])
@pytest.mark.parametrize("kind", ["a.txt", "array.json", "table.csv", "lines.jsonl"])
def test_a_truncated_compressed_file_is_named(tmp_path: Path, kind: str, suffix: str) -> None:
    data = PACKED[suffix](KINDS.get(kind, LINES).encode() * 3)
    with pytest.raises(DataError, match=rf"{kind}{suffix}: truncated or damaged"):
        read(written(tmp_path / f"{kind}{suffix}", data[: len(data) * 2 // 3]))
    with pytest.raises(DataError, match=rf"{kind}{suffix}: truncated or damaged"):
        read(written(tmp_path / f"{kind}{suffix}", b"plain text"))


FRAMED: dict[str, tuple[Callable[[bytes], bytes], bytes]] = {  # and what may stand between frames
    ".zst": (zstandard.compress, b""),
    ".xz": (lzma.compress, bytes(8)),
    ".bz2": (bz2.compress, b""),
    ".gz": (gzip.compress, bytes(8)),
}


@pytest.mark.parametrize("suffix", FRAMED)
def test_frames_follow_each_other_and_one_that_is_damaged_is_named(tmp_path: Path, suffix: str) -> None:
    pack, padding = FRAMED[suffix]
    first, second = LINES.encode(), LINES.replace("first", "again").encode()
    for between in {b"", padding}:
        framed = pack(first) + between + pack(second) + between
        assert read(written(tmp_path / f"a.jsonl{suffix}", framed)) == [*TEXTS, "again", *TEXTS[1:]]
    other = bytearray(pack(second))
    other[2] ^= 0xFF
    for rest in (bytes(other), b"no frame at all", pack(second)[:-4]):
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix}: truncated or damaged"):
            read(written(tmp_path / f"a.jsonl{suffix}", pack(first) + rest))


SCRIPTS = {  # an alphabet's sentence, over and over
    "Cyrillic": "Все счастливые семьи похожи друг на друга. ",
    "Greek": "Εν αρχή ην ο λόγος. ",
    "Hebrew": "בראשית ברא אלהים את השמים. ",
    "Arabic": "كان يا ما كان في قديم الزمان. ",
    "Devanagari": "सभी मनुष्य जन्म से स्वतंत्र हैं। ",
    "Han": "道可道，非常道。 ",
    "Latin": "All happy families are alike. ",
}


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_utf_16_without_a_mark_is_told_from_text_in_every_script(tmp_path: Path, script: str, order: str) -> None:
    text = SCRIPTS[script] * 200 + "\n"
    with pytest.raises(DataError, match="binary data, not text"):
        read(written(tmp_path / "a.txt", text.encode(f"utf-16-{order}")))
    assert read(written(tmp_path / "a.txt", text.encode())) == [text]
    assert read(written(tmp_path / "a.txt", (text + "\0" * 3).encode())) == [text + "\0" * 3]


def test_a_file_of_lines_that_holds_a_mark_alone_has_no_row_and_stops_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / "a.jsonl", b"\xef\xbb\xbf")
    written(tmp_path / "data" / "b.jsonl", b'\xef\xbb\xbf \n{"text": "x"}\n')
    assert read(tmp_path / "data") == ["x"]


def test_objects_of_which_the_first_alone_is_on_one_line_are_rows(tmp_path: Path) -> None:
    rows = b'{"text": "one"}\n{\n  "text": "two"\n}\n{"text": "three"}\n'
    assert read(written(tmp_path / "a.json", rows)) == ["one", "two", "three"]


def test_a_truncated_utf_16_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt: truncated or damaged \('utf-16-le' codec"):
        read(written(tmp_path / "a.txt", "abc".encode("utf-16")[:-1]))


NOT_TEXT = {
    "a PDF: extract": b"%PDF-1.7\n1 0 obj",
    "a zip archive (as docx": b"PK\x03\x04 something",
    "an Office document": b"\xd0\xcf\x11\xe0" + b"\xa1" * 30,
    "an archive: unpack": b"7z\xbc\xaf\x27\x1c rest",
    "a tar archive": b"n" * 257 + b"ustar\x0000",
    "an Arrow file": b"ARROW1\0\0",
    "an SQLite database": b"SQLite format 3\0",
    "an RTF document": rb"{\rtf1 text}",
    "compressed more than once": gzip.compress(gzip.compress(b"text")),
    "binary data, not text": bytes(range(256)) * 10,
    "an image or a program": b"\x89PNG\r\n\x1a\n\0\0",
    "an image or a program, ": b"\x7fELF\x02\x01",
    "data of Python": b"\x93NUMPY\x01\0v\0",
    "data of Python (": b"\x80\x04\x95\0\0",
    "compressed by lz4 or lzma": b"\x04\x22\x4d\x18\0",
    "compressed by lz4 or lzma: ": b"]\0\0\x80\0" + b"\xff" * 8,
    "an Arrow file:": b"\xff\xff\xff\xff\x10\0\0\0",
    **{
        f"binary data, not text ({encoding} without a byte-order mark? convert it: iconv -f {encoding} ": text.encode(
            encoding
        )
        for encoding in ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE")
        for text in ["hello world, and more of it"]
    },
    "binary data, not text (UTF-16LE without": "Добрый день, как дела? Хорошо, а у вас?".encode("utf-16-le"),
}


@pytest.mark.parametrize("what", NOT_TEXT)
@pytest.mark.parametrize("name", ["unnamed", "a.txt", "a.csv", "a.json", "a.jsonl", "a.txt.gz"])
def test_what_is_no_text_is_refused_if_it_was_named_and_left_out_of_a_folder(
    tmp_path: Path, name: str, what: str
) -> None:
    data = NOT_TEXT[what]
    packed = name.endswith(".gz") and not data.startswith(b"\x1f\x8b")
    path = written(tmp_path / name, gzip.compress(data) if packed else data)
    with pytest.raises(DataError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: is {what}")
    (tmp_path / "b.txt").write_text("fine")
    notes = Notes()
    assert read(tmp_path, notes) == ["fine"]
    assert notes.counts == {"files that are not text left out": 1}
    assert str(path) in notes.places["files that are not text left out"][0]


@pytest.mark.parametrize(
    ("name", "data", "columns"),
    [
        ("a.csv", b"id,body\n1,x\n", "'id', 'body'"),
        ("a.tsv", b"id\tbody\n1\tx\n", "'id', 'body'"),
        ("a.json", b'[{"id": 1, "body": "x"}]', "'id', 'body'"),
        ("a.json", b'{"id": 1, "body": "x"}', "'id', 'body'"),
    ],
)
def test_a_table_without_the_column_lists_those_it_has_and_is_left_out_of_a_folder(
    tmp_path: Path, name: str, data: bytes, columns: str
) -> None:
    with pytest.raises(DataError, match=rf"{name}: .*no column 'text'; it has {columns} \(choose by"):
        read(written(tmp_path / name, data))
    assert read(tmp_path / name, text_column="body") == ["x"]
    (tmp_path / "b.txt").write_text("fine")
    notes = Notes()
    assert read(tmp_path, notes) == ["fine"]
    assert notes.counts == {"files without such rows left out": 1}


BAD = {
    "not.json": ('{"text": "good"', "", "not JSON"),
    "type.json": ('[{"text": "good"}, {"text": 3}]', "row 1", "needs text, got int"),
    "missing.json": ('[{"text": "good"}, {"body": "x"}]', "row 1", "no column 'text'"),
    "bytes.json": ('[{"text": "good"}, {"text": "a\udce9"}]', "row 1", "byte 0xe9 that is not UTF-8"),
    "json.jsonl": ('{"text": "good"}\n{"text"\n', "line 2", "not JSON"),
    "type.jsonl": ('{"text": "good"}\n[1]\n', "line 2", "needs an object"),
    "missing.jsonl": ('{"text": "good"}\n\n{"body": "x"}\n', "line 3", "no column 'text'"),
    "bytes.jsonl": ('{"text": "good"}\n{"text": "\udce9"}\n', "", "byte 27 (0xe9) is not valid UTF-8"),
    "surrogate.jsonl": ('{"text": "good"}\n{"text": "\\ud800"}\n', "line 2", "lone surrogate U+D800"),
    "quotes.csv": ('id,text\n1,good\n2,"bad"x\n', "line 3", "badly quoted"),
    "endless.csv": ('id,text\n1,"good"\n2,"bad\nand on\n', "line 3", "badly quoted"),
    "commas.csv": ("id,text\n1,good\n2,bad, bad\n", "line 3", "has 3 fields, the first row 2"),
    "short.tsv": ("id\ttext\n1\tgood\n2\n", "line 3", "has 1 fields, the first row 2"),
    "bytes.csv": ("id,text\n1,good\n2,\udce9\n", "line 3", "byte 0xe9 that is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_with_its_place_or_is_skipped_and_counted_with_it(tmp_path: Path, name: str) -> None:
    data, place, complaint = BAD[name]
    path = written(tmp_path / name, data.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as stopped:
        read(path)
    assert str(stopped.value).startswith(f"{path}: {place}")
    assert complaint in str(stopped.value)
    assert 'on_bad_row = "skip"' in str(stopped.value)
    notes = Notes()
    assert read(path, notes, on_bad_row="skip") == ([] if name == "not.json" else ["good"])
    assert notes.counts == {"bad rows skipped": 1}
    assert notes.places["bad rows skipped"][0].startswith(f"{path}: {place}")


def test_a_parquet_row_that_is_not_utf8_is_skipped_and_counted(tmp_path: Path) -> None:
    strings = pa.array([b"good", b"\xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 1: byte 0 \(0xff\)"):
        read(tmp_path / "a.parquet")
    notes = Notes()
    assert read(tmp_path / "a.parquet", notes, on_bad_row="skip") == ["good", "fine"]
    assert notes.counts == {"bad rows skipped": 1}


def test_a_text_file_of_a_folder_that_is_not_utf8_is_skipped_and_counted(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", b"caf\xe9")
    written(tmp_path / "b.txt", b"fine")
    notes = Notes()
    assert read(tmp_path, notes, on_bad_row="skip") == ["fine"]
    assert notes.counts == {"bad rows skipped": 1}


def test_what_was_skipped_is_kept_with_the_dataset_and_described(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i}"}) if i % 9 else "{" for i in range(90)]
    written(tmp_path / "a.jsonl", "\n".join(lines).encode())
    config = DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", held_out_fraction=0.3, on_bad_row="skip")
    for _ in range(2):  # made, and found again
        notes = [value for label, value in prepare(config).describe() if label == "note"]
        assert len(notes) == 1
        assert notes[0].startswith(f"10 bad rows skipped: {tmp_path}/a.jsonl: line 1: not JSON (Expecting")
        assert "a.jsonl: line 10: not JSON" in notes[0]
        assert notes[0].endswith(" …")


@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_bytes_that_are_not_utf8_are_replaced_alike_in_every_container(tmp_path: Path, kind: str) -> None:
    text = "a\udcff b\udce2\udc82 c\udcc3 ok\r\n"
    raw = text.encode("utf-8", "surrogateescape")
    if kind == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([raw], pa.binary()).view(pa.string())}), tmp_path / kind)
    else:
        inner = raw.replace(b"\r\n", b"\\r\\n")
        content = {
            "a.txt": raw,
            "a.jsonl": b'{"text": "' + inner + b'"}',
            "a.json": b'[{"text": "' + inner + b'"}]',
            "a.csv": b'text\n"' + raw + b'"\n',
        }
        written(tmp_path / kind, content[kind])
    notes = Notes()
    assert read(tmp_path / kind, notes, invalid_utf8="replace") == [raw.decode("utf-8", "replace")]
    assert notes.counts == {"invalid UTF-8 sequences replaced": 3}


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:300"])
@pytest.mark.parametrize("kind", ["folder", "lines.jsonl", "table.csv"])
def test_bytes_counted_through_tokens_are_those_of_the_held_out_text(tmp_path: Path, kind: str, tokenizer: str) -> None:
    texts = [f"\ufeff{i} été\r\n漢字\r🙂\n" * (i % 4 + 1) + "\udcff\udce2\udc82" for i in range(40)]
    raws = [text.encode("utf-8", "surrogateescape") for text in texts]
    if kind == "folder":
        (tmp_path / kind).mkdir()
        for i, raw in enumerate(raws):
            written(tmp_path / kind / f"{i}.txt", raw)
    elif kind == "table.csv":
        written(tmp_path / kind, b"text\n" + b"".join(b'"' + raw + b'"\n' for raw in raws))
    else:
        lines = [b'{"text": "' + raw.replace(b"\r", b"\\r").replace(b"\n", b"\\n") + b'"}\n' for raw in raws]
        written(tmp_path / kind, b"".join(lines))
    dataset = prepare(
        DataConfig(source=str(tmp_path / kind), tokenizer=tokenizer, held_out_fraction=0.3, invalid_utf8="replace")
    )
    split = dataset.held_out
    decoded = [dataset.tokenizer.decode(split.document(i).tolist()).encode() for i in range(split.n_documents)]
    assert b"".join(decoded) == dataset.held_out_text()
    assert [len(raw) for raw in decoded] == split.byte_counts.tolist()
    assert split.n_bytes == len(dataset.held_out_text()) > 0
    assert dataset.meta["lossless"]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """`data` with a few bytes changed, cut out or put in, most often near its ends."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 30])):
        near = min(100, len(changed))
        at = draw.choice([draw.randrange(len(changed)), draw.randrange(near), len(changed) - 1 - draw.randrange(near)])
        match draw.randrange(3):
            case 0:
                changed[at] = draw.randrange(256)
            case 1:
                del changed[at : at + draw.randrange(1, 20)]
            case 2:
                changed[at:at] = draw.randbytes(draw.randrange(1, 9))
        changed = changed or bytearray(b"x")
    return bytes(changed)


@pytest.mark.parametrize("name", [*KINDS, "a.parquet", "a.gz", "a.zst", "a.xz", "a.bz2", "utf-16.txt", "utf-32.csv"])
def test_whatever_is_damaged_in_a_file_is_told_in_one_line_if_at_all(tmp_path: Path, name: str) -> None:
    rows = [f"text {i} été" * 20 for i in range(30)]
    if name == "a.parquet":
        pq.write_table(pa.table({"text": rows}), tmp_path / name, row_group_size=7)
        whole = (tmp_path / name).read_bytes()
    else:
        text = (KINDS.get(name) or LINES).replace("x" * 200_000, "x" * 200)
        coded = text.encode(name.partition(".")[0] if name.startswith("utf") else "utf-8")
        whole = PACKED.get(Path(name).suffix, bytes)(coded)
    draw = random.Random(name)
    for _ in range(40):
        path = written(tmp_path / name, damaged(whole, draw))
        for settings in ({}, {"on_bad_row": "skip", "invalid_utf8": "replace"}):
            for text in texts_or_what_was_said(path, **settings):
                text.encode()


def texts_or_what_was_said(path: Path, **settings: str) -> list[str]:
    """The texts of a file, or the error about it, which is one line that begins with its name."""
    try:
        return read(path, **settings)
    except DataError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert said.startswith(str(path))
    return [said]


WITH_NULL = '{"text": "one"}\n{"text": null}\n{"text": "two"}\n'


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonlines", "jl", "json"])
@pytest.mark.parametrize("pack", ["", ".gz", ".gzip", ".xz", ".bz2", ".zst", ".zstd"])
def test_rows_of_json_are_rows_by_every_name_that_such_files_have(tmp_path: Path, suffix: str, pack: str) -> None:
    packers = {"": bytes, ".gz": gzip.compress, ".gzip": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    packers |= dict.fromkeys((".zst", ".zstd"), zstandard.ZstdCompressor().compress)
    notes = Notes()
    path = written(tmp_path / f"rows.{suffix}{pack}", packers[pack](WITH_NULL.encode()))
    assert read(path, notes) == ["one", "two"]
    assert notes.counts == {"empty documents skipped": 1}
    assert notes.places == {"empty documents skipped": [f"one in {path}"]}


@pytest.mark.parametrize("name", ["rows.bak", "rows.txt", "rows", "rows.gz"])
def test_rows_of_json_by_another_name_are_told(tmp_path: Path, name: str) -> None:
    notes = Notes()
    data = gzip.compress(WITH_NULL.encode()) if name.endswith(".gz") else WITH_NULL.encode()
    assert read(written(tmp_path / name, data), notes) == [WITH_NULL]
    told = "files of JSON lines taken for one text each by their names (rows are of .jsonl)"
    assert (notes.counts, notes.places) == ({told: 1}, {told: [name]})
    long = json.dumps({"id": 1, "text": "long " * 5000}) + "\n"  # its first line is longer than what is looked at
    notes = Notes()
    read(written(tmp_path / name, gzip.compress(long.encode()) if name.endswith(".gz") else long.encode()), notes)
    assert notes.counts == {told: 1}
    notes = Notes()
    assert read(written(tmp_path / name, data), notes, text_column="body") == [WITH_NULL]
    assert not notes.counts  # no rows with such a column


def test_what_is_there_and_is_no_file_is_not_said_to_be_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    for name, told in (
        ("pipe", r"is no file \(a pipe or device\?"),
        ("broken", "is a broken link"),
        ("x", "no such file"),
    ):
        with pytest.raises(DataError, match=rf"{name}': {told}"):
            read(tmp_path / name)


def test_a_description_of_a_table_in_a_folder_is_left_out_though_it_has_the_columns_name(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}, "splits": {"train": {}}}')
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    notes = Notes()
    assert read(tmp_path, notes) == ["fine"]
    assert notes.counts == {"files without such rows left out": 1}
