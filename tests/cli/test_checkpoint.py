"""`swamla checkpoint`: lists, verifies, converts; exit status 3 where something is damaged."""

import json
import os
from pathlib import Path

import pytest
import torch

from swamla.checkpoint import mark_best, save_checkpoint
from swamla.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints 1, 2 and 3, of which 2 is the best."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoints", step, tensors={"model": {"w": torch.ones(1000)}}, state={})
    mark_best(tmp_path / "checkpoints", 2, 1.5)
    return tmp_path


def flip(run: Path, step: int) -> Path:
    """Turn one bit over; sizes stay."""
    file = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


def listed(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict]:
    assert main(["checkpoint", "list", str(run), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_tells_size_and_marks_of_every_checkpoint(run: Path, capsys) -> None:
    rows = listed(run, capsys)
    assert [(row["step"], row["best"], row["latest"]) for row in rows] == [
        (1, False, False),
        (2, True, False),
        (3, False, True),
    ]
    size = sum(file.stat().st_size for file in Path(rows[0]["path"]).iterdir())
    assert [row["bytes"] for row in rows] == [size] * 3
    assert {row["state"] for row in rows} == {"whole"}
    assert {row["layout"] for row in rows} == {"single file"}
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
    assert "best" in lines[2]
    assert "latest" in lines[3]
    assert max(map(len, lines)) <= 80


def test_list_sees_a_truncated_file_and_with_verify_a_flipped_bit_too(run: Path, capsys) -> None:
    file = flip(run, 1)
    os.truncate(run / "checkpoints/step-00000003/model.safetensors", 9)
    quick, thorough = listed(run, capsys), listed(run, capsys, "--verify")
    assert [row["damaged"] for row in quick] == [False, False, True]
    assert [row["damaged"] for row in thorough] == [True, False, True]
    assert str(file) in thorough[0]["state"]
    assert thorough[1]["state"] == "verified"
    assert main(["checkpoint", "list", str(run)]) == 0
    assert "truncated" in " ".join(capsys.readouterr().out.split())


def test_verify_of_a_run_names_the_damaged_file_and_ends_with_3(run: Path, capsys) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": verified\n") == 3
    file = flip(run, 2)
    assert main(["checkpoint", "verify", str(run)]) == 3
    out, err = capsys.readouterr()
    assert out.count(": verified\n") == 2
    assert err.startswith(f"swamla: error: 1 of 3 checkpoints damaged: {file}: SHA-256 differs from the manifest")


def test_verify_takes_one_checkpoint_and_tells_it_as_json(run: Path, capsys) -> None:
    one = run / "checkpoints" / "step-00000002"
    flip(run, 1)
    assert main(["checkpoint", "verify", str(one), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["path"], row["state"], row["best"]) == (str(one), "verified", True)
    (one / "manifest.json").unlink()
    assert main(["checkpoint", "verify", str(one), "--json"]) == 3
    assert f"{one / 'manifest.json'}: missing" in json.loads(capsys.readouterr().out)[0]["state"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["list", "/nonexistent"], "/nonexistent: not a run folder"),
        (["verify", "/nonexistent"], "/nonexistent: not a run folder"),
        (["verify", "/nonexistent/step-1"], "/nonexistent/step-1: there is no checkpoint to verify"),
        (["lits"], 'did you mean "list"?'),
        (["list"], "the following arguments are required: RUN; swamla checkpoint list --help"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv: list[str], message: str, capsys) -> None:
    assert main(["checkpoint", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_without_checkpoints_has_none_to_list_and_none_to_verify(tmp_path: Path, capsys) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert listed(tmp_path, capsys) == []
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2


def test_a_best_json_that_says_nothing_is_a_warning_and_the_list_goes_on(run: Path, capsys) -> None:
    (run / "checkpoints" / "best.json").write_text("{}")
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "swamla: warning:" in err
    assert "best.json" in err
    assert [row["best"] for row in json.loads(out)] == [False] * 3


def test_help_names_the_actions(capsys) -> None:
    assert main(["checkpoint"]) == main(["checkpoint", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(action in shown for action in ("list", "verify", "convert"))
