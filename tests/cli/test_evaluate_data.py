"""`evaluate --data`: all of a test set is scored, by flags of its own, with the run's model and tokenizer alone."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla.cli import main
from swamla.data.shards import is_held_out

from .test_prepare import TINY

TEXTS = [f"Question {i}: what is {i} times {i}?\nIt is {i * i}, said the clerk.\n" for i in range(40)]
TEST = [f"A test text of which the run knows nothing, number {i}: {'tick ' * i}" for i in range(25)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on one source, and one on a mixture whose rows stand in a column of another name."""
    folder = tmp_path_factory.mktemp("home")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    single = {"source": str(rows), "text_column": "body", "tokenizer": "byte", "cache_dir": str(folder / "cache")}
    parts = [{"source": str(rows), "text_column": "body", "weight": weight} for weight in (1.0, 2.0)]
    mixed = {"source": "mixture", "mixture": parts, "tokenizer": "byte", "cache_dir": str(folder / "cache")}
    for name, data in (("single", single), ("mixed", mixed)):
        (folder / f"{name}.json").write_text(json.dumps({**TINY, "data": data}))
        assert main(["train", str(folder / f"{name}.json"), "--output_dir", str(folder / name)]) == 0
    return folder


def as_txt_folder(folder: Path) -> list[str]:
    (folder / "set").mkdir()
    for number, text in enumerate(TEST):
        (folder / "set" / f"{number}.txt").write_text(text)
    return [str(folder / "set")]


def as_jsonl(folder: Path) -> list[str]:
    lines = "".join(json.dumps({"answer": text, "text": "wrong column"}) + "\n" for text in TEST)
    (folder / "set.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return [str(folder / "set.jsonl.gz"), "--text_column", "answer"]


def as_csv(folder: Path) -> list[str]:
    (folder / "set.csv").write_text(csv_of(TEST))
    return [str(folder / "set.csv")]


def csv_of(texts: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue()


def as_parquet(folder: Path) -> list[str]:
    pq.write_table(pa.table({"text": TEST}), folder / "set.parquet")
    return [str(folder / "set.parquet")]


@pytest.mark.parametrize("run", ["single", "mixed"])
@pytest.mark.parametrize("write", [as_txt_folder, as_jsonl, as_csv, as_parquet])
def test_every_byte_of_a_test_set_is_scored_whatever_holds_it_and_whatever_the_run_read(
    home: Path, run: str, write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(home / run), "--json", "--data", *write(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(len(text.encode()) for text in TEST)
    assert found["tokens"] == found["bytes"] + len(TEST)  # a byte is a token, and each text has an end
    assert found["bytes_apart"] == 0
    assert found["scored"] == "all"


def test_the_score_does_not_depend_on_the_container(home: Path, tmp_path: Path, capsys) -> None:
    losses = []
    for write in (as_jsonl, as_csv, as_parquet):
        assert main(["evaluate", str(home / "single"), "--json", "--data", *write(tmp_path)]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_only_what_a_run_on_it_would_hold_out_is_scored_where_that_is_asked(home: Path, tmp_path: Path, capsys) -> None:
    assert main(["evaluate", str(home / "single"), "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    again = ["--data", str(home / "rows.jsonl"), "--text_column", "body", "--held_out"]
    assert main(["evaluate", str(home / "single"), "--json", *again]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["loss"], found["bytes"]) == (own["loss"], own["bytes"])
    assert 0 < found["bytes"] < sum(len(text.encode()) for text in TEXTS)


def test_text_that_the_weights_came_from_is_told_too(home: Path, tmp_path: Path, capsys) -> None:
    """Of a run that began with the weights of one that began with those of another, trained on other texts."""
    (tmp_path / "other.txt").write_text("".join(TEST))
    data = {"source": str(tmp_path / "other.txt"), "tokenizer": "byte", "cache_dir": str(home / "cache")}
    (tmp_path / "other.json").write_text(json.dumps({**TINY, "data": data}))
    for name, origin in (("second", home / "single"), ("third", tmp_path / "second")):
        into = ["--output_dir", str(tmp_path / name), "--init_from", str(origin)]
        assert main(["train", str(tmp_path / "other.json"), *into]) == 0
    capsys.readouterr()
    asked = ["--data", str(home / "rows.jsonl"), "--text_column", "body"]
    assert main(["evaluate", str(tmp_path / "third"), *asked]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "trained on" in line]
    assert len(told) == 1
    assert f"{home / 'single'}, whose weights the run began with, was trained on " in told[0]
    assert told[0].endswith(" of these 40 documents")
    # What became of those runs since is no reason not to score.
    record = tmp_path / "third" / "initialized_from.json"
    (tmp_path / "second" / "config.json").write_text("{")
    assert main(["evaluate", str(tmp_path / "third"), *asked]) == 0
    second = f"cannot tell what {tmp_path / 'second'}, whose weights the run began with, was trained on: "
    assert second in capsys.readouterr().err
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "gpt2"}')
    record.write_text(json.dumps({"folder": str(tmp_path / "exported"), "weights": "exported"}))
    assert main(["evaluate", str(tmp_path / "third"), *asked]) == 0
    assert "began with" not in capsys.readouterr().err


def test_a_streams_sample_is_said_to_be_one(home: Path, tmp_path: Path, capsys) -> None:
    data = {"source": str(home / "rows.jsonl"), "text_column": "body", "tokenizer": "byte", "stream": 2}
    data["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "stream.json").write_text(json.dumps({**TINY, "data": data}))
    assert main(["train", str(tmp_path / "stream.json"), "--output_dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    asked = ["--data", str(home / "rows.jsonl"), "--text_column", "body"]
    assert main(["evaluate", str(tmp_path / "run"), *asked]) == 0
    assert "of these 40 documents (only a sample of its streamed data was compared)" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["single", "mixed"])
def test_text_that_was_trained_on_is_told_under_whatever_name_it_comes(home: Path, run: str, tmp_path, capsys) -> None:
    assert main(["evaluate", str(home / run), "--json"]) == 0
    held_out = json.loads(capsys.readouterr().out)["tokens"]
    lengths = [len(text.encode()) + 1 for text in TEXTS]
    (tmp_path / "other.csv").write_bytes((csv_of(TEXTS + TEST)).encode())
    assert main(["evaluate", str(home / run), "--json", "--data", str(tmp_path / "other.csv")]) == 0
    said = capsys.readouterr()
    trained = int(re.search(r"the run was trained on (\d+) of these 65 documents", said.err)[1])
    kept = [length for text, length in zip(TEXTS, lengths, strict=True) if not is_held_out(text, 0.05)]
    assert trained == len(kept)
    assert sum(lengths) - sum(kept) == held_out // (2 if run == "mixed" else 1)  # whose parts are the same rows
    assert main(["evaluate", str(home / run), "--json", "--data", *as_csv(tmp_path)]) == 0
    assert "trained on" not in capsys.readouterr().err
    windows = "".join(json.dumps({"text": text.replace("\n", "\r\n")}) + "\n" for text in TEXTS)
    (tmp_path / "windows.jsonl").write_text(windows)
    assert main(["evaluate", str(home / run), "--json", "--data", str(tmp_path / "windows.jsonl")]) == 0
    assert f"the run was trained on {trained} of these 40 documents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text_column", "body"], "--text_column needs --data"),
        (["--data", "{home}/rows.jsonl"], "no column 'text'; it has 'body'"),
        (["--data", "{home}/rows.jsonl", "--text_column", "body", "--split", "test"], "(--split): is for"),
        (["--data", "{home}/none.txt"], "no such file or folder"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(home: Path, flags: list[str], message: str, capsys) -> None:
    assert main(["evaluate", str(home / "single"), *(flag.replace("{home}", str(home)) for flag in flags)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line


@pytest.mark.parametrize("name", ["one.txt", "another-name.txt"])
def test_that_a_single_document_was_trained_on_up_to_its_cut_is_told(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("".join(f"Line {i} of the only text, {i * i}.\n" for i in range(300)))
    config = {**TINY, "data": {"source": "one.txt", "tokenizer": "byte", "cache_dir": "cache"}}
    Path("recipe.json").write_text(json.dumps(config))
    assert main(["train", "recipe.json", "--output_dir", "run", "--steps", "1"]) == 0
    Path("one.txt").rename(name)
    Path("other.txt").write_text("Line 0 of the only text, 0.\nBut it goes on in another way altogether.\n" * 100)
    told = {}
    for source in (name, "other.txt"):
        capsys.readouterr()
        assert main(["evaluate", "run", "--data", source]) == 0
        told[source] = "trained on the beginning of one of its documents" in capsys.readouterr().err
    assert told == {name: True, "other.txt": False}


def test_the_validation_and_the_test_part_together_are_the_held_out_text(
    home: Path, capsys: pytest.CaptureFixture
) -> None:
    found = {}
    for part in ("all", "validation", "test"):
        capsys.readouterr()
        assert main(["evaluate", str(home / "single"), "--part", part, "--json"]) == 0
        found[part] = json.loads(capsys.readouterr().out)
    nats = {part: one["loss"] * one["tokens"] for part, one in found.items()}
    assert found["validation"]["tokens"] + found["test"]["tokens"] == found["all"]["tokens"]
    assert found["validation"]["bytes"] + found["test"]["bytes"] == found["all"]["bytes"]
    assert nats["validation"] != nats["test"]
    assert found["test"]["scored"] == "the test part of the held-out part"
    assert found["test"]["bytes_apart"] == 0
