"""Sources: every format yields its documents, and every damaged one a line that says where."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from swamla.data.config import DataConfig
from swamla.data.hub import shakespeare
from swamla.data.reading import Notes
from swamla.data.sources import Entry, StandardLibrary, open_source
from swamla.errors import DataError

ROWS = ["first", "second\nline", "dritte ß"]


def read(path: Path | str, notes: Notes | None = None, **settings: str) -> list[str]:
    source = open_source(DataConfig(source=str(path), **settings), Path("unused"))  # type: ignore[arg-type]
    return list(source.documents(Notes() if notes is None else notes))


def jsonl(rows: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)).encode()


def write_parquet(path: Path, rows: list[str | None], column: str = "text") -> None:
    pq.write_table(pa.table({"id": range(len(rows)), column: rows}), path, row_group_size=2)


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\x00ß".encode())
    assert read(path) == ["one\r\ntwo\x00ß"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_each_kind_reads_the_same_compressed_or_not(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        write_parquet(path, list(ROWS))
    else:
        path.write_bytes(jsonl(ROWS) if kind == "jsonl" else "".join(ROWS).encode())
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    packed = tmp_path / f"data.{kind}{suffix}"
    packed.write_bytes(pack(path.read_bytes()))
    expected = ["".join(ROWS)] if kind == "txt" else ROWS
    assert read(packed) == expected


def test_zstandard_frames_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one " * 200_000) + zstandard.compress(b"two"))
    assert read(path)[0] == "one " * 200_000 + "two"


def test_a_folder_is_read_in_the_order_of_names_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name, data in {
        "b.txt": b"b",
        "a/z.md": b"z",
        "a.jsonl": jsonl(ROWS[:2]),
        ".x": b"x",
        "c.bin": b"\x00c",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty.txt").touch()
    notes = Notes()
    assert read(tmp_path, notes) == ["first", "second\nline", "z", "b"]
    assert notes.counts == {"files that are not text left out": 1, "empty documents skipped": 1}


def test_the_standard_library_comes_without_tests_and_installed_packages() -> None:
    source = open_source(DataConfig(), Path("unused"))
    names = [entry.name for entry in source.entries]
    assert {"abc.py", "json/decoder.py"} < set(names)
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}


def test_python_files_are_read_in_the_encoding_they_declare(tmp_path: Path) -> None:
    source, notes = StandardLibrary(), Notes()
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\r\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"x = '\xe9'\n")
    a, b = (Entry(name, tmp_path / name, 0, ()) for name in ("a.py", "b.py"))
    assert next(source.read(a, notes)).endswith("x = 'é'\r\n")
    assert list(source.read(b, notes)) == []
    assert notes.counts == {"undecodable Python files skipped": 1}


def test_parquet_nulls_are_empty_documents(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x", None, "y"])
    notes = Notes()
    assert read(tmp_path / "a.parquet", notes) == ["x", "y"]
    assert notes.counts["empty documents skipped"] == 1


def test_the_text_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS, "body"))
    write_parquet(tmp_path / "a.parquet", list(ROWS), "body")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, text_column="body") == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_missing_text_column_is_an_error_that_lists_the_columns(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS, "body"))
    write_parquet(tmp_path / "a.parquet", list(ROWS), "body")
    with pytest.raises(DataError, match=rf"{name}.*no column 'text'; it has 'id', 'body'"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.parquet.gz"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "whole", [f"row {i} {i**9}" for i in range(5000)])
    plain = (tmp_path / "whole").read_bytes() if "parquet" in name else jsonl([str(i**9) for i in range(5000)])
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    packed = pack(plain)
    (tmp_path / name).write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(DataError, match=f"{name}: truncated or damaged"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"plain text, and nothing else at all")
    with pytest.raises(DataError, match=f"{name}: truncated or damaged"):
        read(tmp_path / name)


def test_invalid_utf8_is_an_error_with_file_and_byte_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode() * 10 + b"\xff rest")
    with pytest.raises(DataError, match=r"a\.txt: byte 20 \(0xff\) is not valid UTF-8"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: byte 25 \(0xe9\)"):
        read(tmp_path / "a.jsonl")


def test_invalid_utf8_is_replaced_on_request_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xffb\xe2\x82c\xef\xbf\xbd")
    notes = Notes()
    assert read(tmp_path / "a.txt", notes, invalid_utf8="replace")[0] == "a\ufffdb\ufffdc\ufffd"
    assert notes.counts == {"invalid UTF-8 sequences replaced": 2}


def test_lone_surrogates_in_json_are_treated_as_invalid_utf8_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "ab\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: line 2: lone surrogate U\+D800 at character 2"):
        read(tmp_path / "a.jsonl")
    notes = Notes()
    assert read(tmp_path / "a.jsonl", notes, invalid_utf8="replace")[1] == "ab\ufffd"
    assert notes.counts == {"invalid UTF-8 sequences replaced": 1}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("{", "not JSON"), ("[1]", "needs an object"), ('{"text": 3}', "needs text, got int")],
)
def test_a_line_that_is_not_a_row_is_an_error_with_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line)
    with pytest.raises(DataError, match=rf"a\.jsonl: line 3: .*{complaint}"):
        read(tmp_path / "a.jsonl")


def test_a_source_that_does_not_exist_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; did you mean 'stdlib'"):
        read("stdlb")
    with pytest.raises(DataError, match="nowhere': no such file or folder; give a path, or one of: stdlib"):
        read(tmp_path / "nowhere")


def test_an_empty_file_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no files"):
        read(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt: the file is empty"):
        read(tmp_path / "a.txt")


def test_shakespeare_offline_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"swamla prepare shakespeare-char --source FILE \(or each time: --data FILE\)"
    ) as caught:
        shakespeare(tmp_path, url=(tmp_path / "absent").as_uri())
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_download_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("please log in")
    with pytest.raises(DataError, match="not tiny Shakespeare"):
        shakespeare(tmp_path / "cache", url=(tmp_path / "page.html").as_uri())
    assert not (tmp_path / "cache" / "sources").exists()
