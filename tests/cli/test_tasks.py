"""Tasks on the command line: train, resume, evaluate, generate, list and count a run on one."""

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from swamla.checkpoint import read_run_config
from swamla.cli import main
from swamla.cli.runs import summarize
from swamla.tasks import parse

TINY = ["--steps", "4", "--batch_size", "4", "--eval_interval", "2", "--eval_tokens", "256", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of four steps on MQAR, and what it printed."""
    folder, out = tmp_path_factory.mktemp("trained"), io.StringIO()
    given = ["--data", "task:mqar?pairs=2&length=16&vocabulary=16", "--cache_dir", str(folder / "cache")]
    with redirect_stdout(out):
        assert main(["train", "toy-mqar", *given, "--output_dir", str(folder / "run"), *TINY]) == 0
    return folder / "run", out.getvalue()


def test_a_run_on_a_task_prints_accuracy_and_no_bytes(trained: tuple[Path, str]) -> None:
    run, out = trained
    assert re.search(r"^source +task:mqar\?length=16&pairs=2&vocabulary=16&power=1.0&filler=keys$", out, re.MULTILINE)
    assert re.search(r"tokenizer +none: 16 ids with names, k0 … v7", out)
    assert len(re.findall(r"Step \d \| Held-out loss: [\d.]+ \| Accuracy: [01]\.\d{4}", out)) == 2
    assert "byte" not in out.replace("bytes_", "")
    assert "0.99 was not reached" in out
    config = read_run_config(run)
    assert config["data"]["source"] == "task:mqar?length=16&pairs=2&vocabulary=16&power=1.0&filler=keys"  # every size
    assert (config["data"]["tokenizer"], config["train"]["block_size"]) == ("names", 16)


def test_the_commands_that_a_run_suggests_work(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained
    question = re.search(r"--prompt '(.*)'", out)
    asked = re.search(r"The first command asks for (\w+)\.", " ".join(out.split()))
    assert question is not None
    assert asked is not None
    task = parse(read_run_config(run)["data"]["source"])
    row, names = task.row(0, 0, held_out=True), list(task.names())
    first = int(row.query_Q[0])
    assert question[1].split() == [names[i] for i in row.tokens_T[: first + 1]]
    assert asked[1] == names[row.labels_T[first]]
    assert main(["generate", str(run), "--greedy", "--max_new_tokens", "1", "--prompt", question[1]]) == 0
    generated = capsys.readouterr().out.split()
    assert generated[:-1] == question[1].split()
    assert generated[-1] in names
    longer = shutil.copytree(run, tmp_path / "longer")
    assert main(["train", "--resume", str(longer), "--steps", "6", "--schedule_steps", "6"]) == 0
    assert "resumed after step 4" in capsys.readouterr().out


def test_a_run_is_evaluated_on_held_out_rows_and_on_other_sizes(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2 * 1024
    assert found["source"] == "task:mqar?length=16&pairs=2&vocabulary=16&power=1.0&filler=keys"
    assert main(["evaluate", str(run), "--part", "test", "--json"]) == 0
    test = json.loads(capsys.readouterr().out)
    assert (test["scored"], found["scored"]) == ("test rows", "held-out rows")
    assert test["loss"] != found["loss"]
    assert main(["evaluate", str(run), "--data", "task:mqar?pairs=3&length=32&vocabulary=16"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"accuracy +[01]\.\d{4}\n", out)
    assert "over 3,072 labels in 1,024 held-out rows" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "task:mqar?vocabulary=18"], "its 18 ids are others than those that the run was trained on"),
        (["--data", "task:copy"], "its 17 ids are others"),
        (["--data", "task:mqar?vocabulary=16&pairs=9"], "> 18, two for each pair: half of it are keys"),
        (["--block_size", "8"], "--block_size is for texts; a task has its sizes in its name"),
        (["--data", "stdlib"], "is no name of an id"),
    ],
)
def test_what_a_run_on_a_task_cannot_be_scored_on_is_refused(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run, _ = trained
    assert main(["evaluate", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_runs_lists_a_task_with_its_accuracy(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained
    found = summarize(run)
    assert found.bits_per_byte is None
    assert found.accuracy is not None
    assert found.data == "task:mqar?length=16&pairs=2&vocabulary=16&power=1.0&filler=keys"
    assert main(["runs", str(run)]) == 0
    assert f"{100 * found.accuracy:.1f} %" in capsys.readouterr().out


def test_an_empty_prompt_of_a_task_is_refused(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained
    assert main(["generate", str(run)]) == 2
    assert "the prompt is empty: a row of a task begins with a token of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "toy-mqar", "--data", "task:mqra"], "no task is called 'mqra'; did you mean \"mqar\"?"),
        (["train", "toy-mqar", "--data", "task:mqar?pears=2"], 'no such setting; did you mean "pairs"?'),
        (
            ["train", "toy-mqar", "--data", "task:mqar?pairs=40"],
            "length = 64 (task:mqar?pairs=40): must be even and >=",
        ),
        (["train", "toy-mqar", "--block_size", "32"], "train.block_size = 32 (--block_size): must be 64"),
        (["train", "toy-mqar", "--tokenizer", "byte"], "data.tokenizer = 'byte' (--tokenizer): must be \"names\""),
        (["train", "toy-mqar", "--data", "stdlib"], "texts need e.g. byte"),
        (["quickstart", "--data", "task:mqar"], "on a task: train toy-mqar --data task:…"),
        (["quickstart", "--data", "chat:x.jsonl", "--tokenizer", "byte"], "on conversations: sft RUN --data FILE"),
        (["prepare", "task:mqar"], "has no text to prepare"),
    ],
)
def test_mistakes_with_tasks_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error") == 1
    assert not (tmp_path / "runs").exists()


def test_info_counts_the_names_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "toy-state-tracking", "--data", "task:state_tracking?group=s5"]) == 0
    assert "vocabulary 121" in capsys.readouterr().out


def test_any_recipe_is_trained_on_a_task_with_the_length_and_names_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ["--data", "task:copy?length=12", "--width", "16", "--output_dir", str(run)]
    assert main(["train", "shakespeare-char", *more, *TINY]) == 0
    config = read_run_config(run)
    assert config["data"]["tokenizer"] == "names"
    assert (config["train"]["block_size"], config["model"]["vocab_size"]) == (12, 18)


def test_a_toy_learns_to_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guessing one of the eight values is right in an eighth of all cases, one of the row's two in half of them."""
    data = ["--data", "task:mqar?pairs=2&length=8&vocabulary=16", "--output_dir", str(tmp_path / "run")]
    assert main(["train", "toy-mqar", *data, "--steps", "150", "--device", "cpu", "--eval_interval", "none"]) == 0
    found = summarize(tmp_path / "run")
    assert found.accuracy is not None
    assert found.accuracy > 0.9
