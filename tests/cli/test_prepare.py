"""`swamla prepare`: parts, executors and what it says; training on what it knows without having it all."""

import json
from pathlib import Path

import pytest

from swamla.cli import main

TINY = {
    "model": {
        "width": 16,
        "blocks": {"mha": {"mixer": {"kind": "mha", "n_heads": 2}}},
        "pattern": ["mha"],
    },
    "train": {
        "steps": 6,
        "batch_size": 2,
        "block_size": 32,
        "eval_interval": 100,
        "save_interval": 3,
        "schedule": "constant",
    },
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with 300 rows, in some nine units."""
    rows = (json.dumps({"text": f"{i} " + "word " * (i % 40)}) + "\n" for i in range(300))
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("swamla.data.sources.UNIT_BYTES", 4000)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    """What a command prints, spaces joined; its exit status has to be `status`."""
    assert main(list(argv)) == status
    done = capsys.readouterr()
    assert (done.err == "") == (status == 0), done.err
    return " ".join((done.out + done.err).split())


def test_parts_say_what_is_left_and_the_last_one_describes_the_dataset(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("prepare", "rows.jsonl", "--tokenizer", "byte", "--workers", "1")
    first = said(capsys, *ask, "--part", "1/2")
    assert first.startswith("part 1/2 is done (")
    assert "tokens/s" in first
    assert first.endswith("units are still missing from other parts")
    assert "cannot assemble yet" in said(capsys, *ask, "--part", "assemble", status=2)
    assert "it had nothing left to do" in said(capsys, *ask, "--part", "1/2")
    last = said(capsys, *ask, "--part", "2/2")
    for line in ("document length 5 % ", "encoded", "fingerprint", "% of their segments are not a whole document"):
        assert line in last, line
    assert "bytes per token" in said(capsys, *ask, "--part", "assemble")


def test_prepare_tells_its_throughput_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("prepare", "rows.jsonl", "--tokenizer", "byte")
    assert "tokens/s" in said(capsys, *ask)
    assert "tokens/s" not in said(capsys, *ask)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--part", "3/2"), '--part 3/2: must be "i/N"'),
        (("--workers", "-1"), "--workers -1: must be >= 0"),
        (("--executor", "local"), "--parts 0: must be > 0"),
        (("--executor", "local", "--parts", "2", "--part", "1/2"), "--part does nothing beside --executor: leave it"),
        (("--executor", "local", "--parts", "2", "--workers", "2"), "--workers does nothing beside --executor"),
        (("--parts", "2"), "--parts does nothing without --executor: leave it out"),
        (("--executor_options", "time=1"), "--executor_options does nothing without --executor"),
        (("--executor", "local", "--parts", "2", "--executor_options", "x"), "--executor_options x: must be like"),
        (("--hub_config", "x"), "data.hub_config = 'x' (--hub_config): is for sources of the hub"),
        (("--stream", "1", "--buffer_docs", "5"), "data.buffer_docs = 5"),
        (("--stream", "1", "--part", "1/2"), "--stream 1: cannot be prepared in parts"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    line = said(capsys, "prepare", "rows.jsonl", "--tokenizer", "byte", *flags, status=2)
    assert message in line


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_a_run_on_a_mixture_of_streams_stopped_and_resumed_learns_the_same(home: Path) -> None:
    mixture = [{"source": "rows.jsonl", "weight": 3}, {"source": "other.jsonl", "weight": 1}]
    (home / "other.jsonl").write_text((home / "rows.jsonl").read_text().replace("word", "else"))
    data = {"source": "mixture", "mixture": mixture, "tokenizer": "byte", "stream": 2}
    (home / "recipe.json").write_text(json.dumps({**TINY, "data": data}))
    for argv in (
        ("recipe.json", "--output_dir", "whole"),
        ("recipe.json", "--output_dir", "half", "--steps", "3"),
        ("half/config.json", "--resume", "half", "--steps", "6"),
    ):
        assert main(["train", *argv]) == 0
    assert losses(home / "half") == losses(home / "whole")
    assert len(losses(home / "whole")) == 6


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "one of two texts"}, {"text": "the other one"}],
        {"data": [{"text": "one of two texts"}, {"text": "the other one"}]},
        {"train": [{"text": "one of two texts"}, {"text": "the other one"}]},
        {"model": [{"text": "one of two texts"}, {"text": "the other one"}], "data": {}},
        {"version": "1", "rows": [{"text": "one of two texts"}, {"text": "the other one"}]},
        {"0": {"text": "one of two texts"}, "1": {"text": "the other one"}},
    ],
)
def test_a_json_file_of_rows_is_no_recipe(rows, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps(rows))
    assert main(["prepare", "rows.json", "--tokenizer", "byte", "--held_out_fraction", "1"]) == 0
    said = capsys.readouterr()
    assert "source           rows.json" in said.out + said.err
    assert "2 documents" in said.out + said.err


def test_a_json_file_of_nothing_is_no_recipe(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text("{}")
    assert main(["prepare", "rows.json"]) == 2
    assert "stdlib" not in capsys.readouterr().out


def test_a_table_that_no_recipe_has_is_refused_not_passed_over(tmp_path, capsys) -> None:
    (tmp_path / "recipe.toml").write_text('[dta]\nsource = "stdlib"\n')
    assert main(["prepare", str(tmp_path / "recipe.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "dta: no such table; did you mean" in line


def test_two_columns_of_the_name_that_is_asked_for_are_refused(tmp_path, capsys) -> None:
    (tmp_path / "rows.csv").write_text("text,id,text\na,1,b\nc,2,d\n")
    assert main(["prepare", str(tmp_path / "rows.csv"), "--tokenizer", "byte"]) == 2
    assert "rows.csv: has several columns 'text'" in capsys.readouterr().err
