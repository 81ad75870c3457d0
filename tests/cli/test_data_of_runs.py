"""Runs and their data: found again by what it holds, and nothing lost to input that turns out bad late."""

import json
import shutil
from pathlib import Path

import pytest

from swamla.cli import main
from swamla.data.packing import permutation
from swamla.data.stream import _UNITS

from .test_prepare import TINY, losses

UNIT = 4000
SAMPLED = {0, 2, 4, 6}  # of nine units those that are prepared for the evaluation


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with 300 rows, in nine units."""
    (tmp_path / "rows.jsonl").write_text("".join(row(i) for i in range(300)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("swamla.data.sources.UNIT_BYTES", UNIT)
    monkeypatch.setattr("swamla.cli.running.UTILISATION_TOKENS", 64)
    return tmp_path


def row(i: int) -> str:
    return json.dumps({"text": f"{i} " + "word " * (i * 7 % 40)}) + "\n"


def recipe(name: str, **data: object) -> str:
    Path(name).write_text(json.dumps({**TINY, "data": {"source": "rows.jsonl", "tokenizer": "byte", **data}}))
    return name


def run(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    """What a command says on stderr; its exit status has to be `status`."""
    assert main(list(argv)) == status
    return capsys.readouterr().err


def late_bad_row() -> int:
    """A row that a stream of one unit a window reads third or later, and no sample has."""
    order = permutation(9, 0, 0, _UNITS).tolist()
    unit = next(unit for unit in order[2:] if unit not in SAMPLED and unit < 8)
    starts = [sum(map(len, map(row, range(i)))) for i in range(300)]
    return next(i for i, start in enumerate(starts) if start > unit * UNIT + UNIT // 2)


@pytest.mark.parametrize("mended", ["longer", "shorter", "skipped"])
def test_a_bad_row_in_a_stream_ends_a_run_that_is_saved_and_goes_on_once_it_is_mended_or_skipped(
    home: Path, capsys: pytest.CaptureFixture[str], mended: str
) -> None:
    lines = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    at = late_bad_row()
    lines[at] = '{"text": broken\n'
    (home / "rows.jsonl").write_text("".join(lines))
    recipe("recipe.json", stream=1)
    ask = (
        "train",
        "recipe.json",
        "--output_dir",
        "r",
        "--steps",
        "600",
        "--save_interval",
        "1000",
        "--batch_size",
        "4",
    )
    said = run(capsys, *ask, status=2)
    assert f"rows.jsonl: line {at + 1}: not JSON" in said
    assert "all is saved after step" in said
    reached = int(said.partition("after step ")[2].partition(":")[0])
    assert reached > 10
    assert (home / "r" / "checkpoints" / f"step-{reached:08d}").is_dir()
    assert f"line {at + 1}: not JSON" in run(capsys, "train", "--resume", "r", status=2)  # and again, losing nothing
    until = ("--steps", str(reached + 3))
    if mended == "skipped":
        said = run(capsys, "train", "--resume", "r", "--on_bad_row", "skip", *until)
    else:
        lines[at] = json.dumps({"text": "mended " * (90 if mended == "longer" else 0)}) + "\n"
        (home / "rows.jsonl").write_text("".join(lines))
        said = run(capsys, "train", "--resume", "r", *until)
        assert "rows.jsonl changed (or was copied) since the run began" in said
    steps = [step for step, _ in losses(home / "r")]
    assert steps == list(range(1, reached + 4))


DATA: dict[str, dict[str, object]] = {
    "whole": {},
    "packed": {"buffer_docs": 20},
    "bpe": {"tokenizer": "bpe:300"},
    "mixture": {
        "source": "mixture",
        "mixture": [{"source": "rows.jsonl", "weight": 3}, {"source": "other.jsonl", "weight": 1}],
        "tokenizer": "bpe:300",
    },
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("fate", ["deleted", "changed"])
def test_a_run_goes_on_and_is_evaluated_with_what_it_began_with_whatever_became_of_its_files(
    home: Path, capsys: pytest.CaptureFixture[str], kind: str, fate: str
) -> None:
    (home / "other.jsonl").write_text((home / "rows.jsonl").read_text().replace("word", "else"))
    run(capsys, "train", recipe("recipe.json", **DATA[kind]), "--output_dir", "whole")
    run(capsys, "train", "recipe.json", "--output_dir", "half", "--steps", "3")
    main(["evaluate", "whole", "--json"])
    scored = json.loads(capsys.readouterr().out)
    if fate == "deleted":
        (home / "rows.jsonl").unlink()
    else:
        (home / "rows.jsonl").write_text('{"text": "something else"}\n' * 40)
    said = run(capsys, "train", "--resume", "half", "--steps", "6")
    assert said.count("\n") == 1
    assert f"rows.jsonl {'is gone' if fate == 'deleted' else 'changed'}" in said
    assert losses(home / "half") == losses(home / "whole")
    assert main(["evaluate", "whole", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scored


def test_with_neither_files_nor_cache_one_line_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "train", recipe("recipe.json"), "--output_dir", "r")
    (home / "rows.jsonl").unlink()
    shutil.rmtree(home / "cache")
    way = {"train": "train --resume r --data PATH", "evaluate": "evaluate r --data PATH --held_out"}
    source = {"train": "--data ", "evaluate": "data.source = "}  # evaluate's --data is other text
    for command in (("train", "--resume", "r"), ("evaluate", "r")):
        said = run(capsys, *command, status=2)
        assert said.count("\n") == 1
        assert f"r: its data is no longer in {home / 'cache'}, and {source[command[0]]}" in said
        assert f"{way[command[0]]}\n" in said
    rows = "".join(row(i) for i in range(300))  # and that is the way
    (home / "elsewhere.jsonl").write_text(rows)
    run(capsys, "evaluate", "r", "--data", "elsewhere.jsonl", "--held_out")
    run(capsys, "train", "--resume", "r", "--data", "elsewhere.jsonl")


def test_files_that_moved_are_the_same_data(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "train", recipe("recipe.json"), "--output_dir", "whole")
    run(capsys, "train", "recipe.json", "--output_dir", "half", "--steps", "3")
    (home / "rows.jsonl").rename("elsewhere.jsonl")
    shutil.rmtree(home / "cache")
    assert run(capsys, "train", "--resume", "half", "--steps", "6", "--data", "elsewhere.jsonl") == ""
    assert losses(home / "half") == losses(home / "whole")


def test_a_stream_is_evaluated_without_its_files_and_not_trained_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "train", recipe("recipe.json", stream=2), "--output_dir", "r", "--steps", "3")
    (home / "rows.jsonl").rename("away")
    assert "is gone" in run(capsys, "evaluate", "r")
    assert "a stream reads its files during training" in run(capsys, "train", "--resume", "r", status=2)


def test_a_resumed_run_names_the_tokenizer_that_it_asked_for_whoever_made_the_data(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "train", recipe("recipe.json"), "--output_dir", "r", "--steps", "3")
    (home / "rows.jsonl").rename(home / "moved.jsonl")
    for made in home.glob("**/data/*/meta.json"):
        shutil.rmtree(made.parent)
    run(capsys, "prepare", "moved.jsonl", "--tokenizer", "r/tokenizer.json")
    assert main(["train", "--resume", "r"]) == 0
    said = capsys.readouterr()
    assert "rows.jsonl is gone or unreadable" in said.err
    assert "byte, vocabulary 257" in said.out + said.err
    assert "r/tokenizer.json" not in said.out + said.err


def test_a_run_older_than_data_json_is_found_by_its_checkpoint(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "train", recipe("recipe.json"), "--output_dir", "r", "--steps", "3")
    (home / "r" / "data.json").unlink()
    (home / "rows.jsonl").unlink()
    assert "is gone" in run(capsys, "train", "--resume", "r", "--steps", "4")


def test_a_damaged_data_json_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "train", recipe("recipe.json"), "--output_dir", "r", "--steps", "3")
    for content in ("{", "[3]", '[{"fingerprint": "x"}]'):
        (home / "r" / "data.json").write_text(content)
        assert "data.json: damaged" in run(capsys, "train", "--resume", "r", status=3)
