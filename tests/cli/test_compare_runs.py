"""`swamla compare RUN RUN`: two finished runs on the same documents, as `swamla evaluate` scores each of them."""

import csv
import json
import re
from pathlib import Path

import pytest

from swamla.checkpoint import load
from swamla.cli import compare_runs, main
from swamla.cli.compare_runs import names_runs
from swamla.errors import UsageError
from swamla.study import two_runs

from .test_evaluate_data import TEST, TEXTS
from .test_prepare import TINY

TASK = "task:mqar?pairs=2&length=16"


def trained(folder: Path, name: str, *flags: str, source: str = "rows.jsonl", tokenizer: str = "byte") -> None:
    data = {"source": str(folder / source), "tokenizer": tokenizer, "held_out_fraction": 0.3}
    if source == "rows.jsonl":
        data["text_column"] = "body"
    data["cache_dir"] = str(folder / "cache")
    (folder / f"{name}.json").write_text(json.dumps({**TINY, "data": data}))
    into = ["--output_dir", str(folder / "runs" / name), "--device", "cpu", "--precision", "fp32"]
    assert main(["train", str(folder / f"{name}.json"), *into, *flags]) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs on the same text, of two mixers and two tokenizers, one on other text, and two of a task."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEST))
    trained(folder, "first")
    trained(folder, "second", "--pattern", "gdn", "--lr", "0.01")
    trained(folder, "chars", tokenizer="char")
    trained(folder, "elsewhere", source="other.jsonl")
    for name in ("mha", "gdn"):
        (folder / f"{name}.json").write_text(json.dumps({**TINY, "data": {"source": TASK}}))
        into = ["--output_dir", str(folder / "runs" / name), "--device", "cpu", "--block_size", "16"]
        assert main(["train", str(folder / f"{name}.json"), "--pattern", name, *into]) == 0
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def compared(*words: str, into: Path) -> dict:
    assert main(["compare", *words, "--output_dir", str(into)]) == 0
    return json.loads((into / "compared.json").read_text())


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "flags"), [("second", ()), ("chars", ("--part", "test")), ("second", ("--block_size", "20"))]
)
def test_both_figures_are_those_of_evaluate(here: Path, tmp_path: Path, capsys, second: str, flags) -> None:
    found = compared("first", second, *flags, into=tmp_path / "out")
    expected = [evaluated(capsys, f"runs/{name}", *flags) for name in ("first", second)]
    assert found["bytes"] == expected[0]["bytes"] == expected[1]["bytes"]
    assert [found["score"]["first"], found["score"]["second"]] == pytest.approx(
        [each["bits_per_byte"] for each in expected], rel=1e-5
    )
    assert found["loss"] == pytest.approx([each["loss"] for each in expected], rel=1e-5)
    assert found["labels"] == [each["tokens"] for each in expected]
    assert found["bytes_apart"] == 0


def test_other_data_is_read_with_the_flags_of_evaluate(here: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "set.csv").write_text("id,answer\n" + "".join(f"{i},A sentence of number {i}.\n" for i in range(9)))
    data = ["--data", str(tmp_path / "set.csv"), "--text_column", "answer"]
    found = compared("first", "elsewhere", *data, into=tmp_path / "out")
    expected = [evaluated(capsys, f"runs/{name}", *data) for name in ("first", "elsewhere")]
    assert found["score"]["count"] == 9
    assert [found["score"]["first"], found["score"]["second"]] == pytest.approx(
        [each["bits_per_byte"] for each in expected], rel=1e-5
    )


def test_the_answers_to_a_task_are_those_of_evaluate_row_by_row(here: Path, tmp_path: Path, capsys) -> None:
    found = compared("mha", "gdn", into=tmp_path / "out")
    expected = [evaluated(capsys, f"runs/{name}", "--part", "test") for name in ("mha", "gdn")]
    assert found["kind"] == "task"
    assert [found["score"]["first"], found["score"]["second"]] == pytest.approx([each["accuracy"] for each in expected])
    assert found["loss"] == pytest.approx([each["loss"] for each in expected], rel=1e-5)
    with (tmp_path / "out" / "rows.csv").open() as file:
        rows = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    asked, first, second = (sum(row[at] for row in rows) for at in (1, 2, 3))
    assert (second - first) / asked == pytest.approx(found["score"]["difference"][0])
    assert len(rows) == found["score"]["count"]
    assert all(right <= row[1] for row in rows for right in row[2:])
    assert found["whole_rows"]["first"] == sum(row[2] == row[1] > row[3] for row in rows)
    assert found["whole_rows"]["neither"] == sum(max(row[2:]) < row[1] for row in rows)
    assert sum(found["whole_rows"].values()) == len(rows)


def test_costs_tokens_and_settings_are_those_of_the_runs(here: Path, tmp_path: Path) -> None:
    found = compared("first", "second", into=tmp_path / "out")
    for side in found["runs"]:
        model, _ = load(Path(side["folder"]))
        assert side["costs"]["total_parameters"] == sum(p.numel() for p in model.parameters())
        assert side["tokens"] == 6 * 2 * 32
        assert side["training_flops"] == side["tokens"] * side["costs"]["flops"]
        records = (Path(side["folder"]) / "metrics.jsonl").read_text().splitlines()
        assert side["tokens"] == max(json.loads(line).get("tokens", 0) for line in records)
    assert found["differing"]["train.lr"]["second"] == 0.01
    assert found["differing"]["model.pattern"] == {"first": ["mha"], "second": ["gdn"]}
    assert "train.seed" not in found["differing"]


def test_only_equal_tokenizers_have_tokens_to_set_against_each_other(here: Path, tmp_path: Path) -> None:
    same = compared("first", "second", into=tmp_path / "same")
    assert same["tokens"]["better"] or same["tokens"]["worse"]
    assert (tmp_path / "same" / "tokens.csv").exists()
    other = compared("first", "chars", into=tmp_path / "other")
    assert other["tokens"] is other["positions"] is None
    assert other["curves"]["unit"] == "bits per byte"
    assert sorted(file.name for file in (tmp_path / "other").iterdir()) == [
        "compared.json",
        "documents.csv",
        "report.html",
    ]


def test_that_a_checkpoint_was_chosen_by_the_held_out_loss_is_said_where_it_is_not_the_last(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(
        "the best of its evaluations" in text for text in compared("first", "second", into=tmp_path)["not_said"]
    )
    monkeypatch.setattr(compare_runs, "list_checkpoints", lambda folder: [folder / "step-6", folder / "step-9"])
    for words, count in (([], 2), (["--checkpoint", "latest"], 0)):
        found = compared("first", "second", *words, into=tmp_path)
        told = [text for text in found["not_said"] if "the best of its evaluations by held-out loss" in text]
        assert len(told) == count
        assert all(", step 6 is compared" in text and "not its last, 9" in text for text in told)
    assert not any("evaluations" in text for text in compared("mha", "gdn", into=tmp_path / "task")["not_said"])


def test_the_screen_has_the_verdict_and_what_it_does_not_say(here: Path, tmp_path: Path, capsys) -> None:
    found = compared("first", "second", into=tmp_path / "out")
    told = " ".join(capsys.readouterr().out.split())
    for text in (*found["verdict"], *found["not_said"], "train.lr: ", "report.html: open it in a browser"):
        assert " ".join(text.split()) in told
    assert compared("first", "second", into=tmp_path / "out") == found  # over its own report, the same again


# ---- text that a run has learned ------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("swamla: error: ")
    return error


def test_what_one_run_was_trained_on_is_refused_though_it_is_held_out_for_the_other(here: Path, capsys) -> None:
    trained(here, "less", "--held_out_fraction", "0.1")
    assert re.search(r"rows\.jsonl: less was trained on \d+ of these \d+ documents", refused(capsys, "first", "less"))
    assert "first was trained on" in refused(
        capsys, "first", "elsewhere", "--data", "rows.jsonl", "--text_column", "body"
    )
    assert not (here / "compared" / "first-vs-less").exists()
    # What is held out for the smaller share is held out for the larger one, too.
    assert main(["compare", "less", "first", "--output_dir", "nested"]) == 0


def test_an_only_document_of_which_a_run_held_out_less_is_refused(here: Path, capsys) -> None:
    (here / "book.txt").write_text("".join(f"Sentence {i} of the book, {i * i} words in. " for i in range(200)))
    for name, share in (("half", "0.5"), ("tenth", "0.1")):
        trained(here, name, "--held_out_fraction", share, source="book.txt")
    assert "tenth was trained on a part of one of its documents" in refused(capsys, "half", "tenth")
    assert main(["compare", "tenth", "half", "--output_dir", "book"]) == 0
    assert json.loads((here / "book" / "compared.json").read_text())["answer"] == "no interval"


def test_weights_that_another_run_began_with_count_as_learned(here: Path, capsys) -> None:
    trained(here, "further", "--init_from", str(here / "runs" / "first"), source="other.jsonl")
    told = refused(capsys, "elsewhere", "further", "--data", "rows.jsonl", "--text_column", "body")
    assert f"{here / 'runs' / 'first'}, whose weights further began with, was trained on" in told


# ---- imported models ------------------------------------------------------------------------------------------------


def test_an_imported_model_is_compared_on_the_other_runs_text(here: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", "runs/first", str(tmp_path / "folder")]) == 0
    assert main(["import", str(tmp_path / "folder"), "runs/imported"]) == 0
    assert "name the other run first" in refused(capsys, "imported", "second")
    found = compared("first", "imported", into=tmp_path / "out")
    assert found["score"]["second"] == pytest.approx(found["score"]["first"], rel=1e-3)  # bf16
    assert found["runs"][1]["tokens"] is None
    assert all(setting.startswith("model.") for setting in found["differing"])
    assert any("imported was imported" in text for text in found["not_said"])
    assert "imported has no record of its training" in (tmp_path / "out" / "report.html").read_text()


# ---- runs or arms ---------------------------------------------------------------------------------------------------


def test_two_words_are_runs_only_if_both_are(here: Path) -> None:
    assert names_runs(["first", "runs/second"], study=False)
    assert names_runs(["mha", "gdn"], study=False)  # patterns, and runs
    assert not names_runs(["mha", "gdn"], study=True)
    assert not names_runs(["mha", "mla"], study=False)
    assert not names_runs(["mha", "gdn", "mla"], study=False)
    assert not names_runs(["swa swa mla", "mha"], study=False)
    assert not names_runs(["study.toml"], study=False)
    assert names_runs(["first", "second"], study=True)
    for words in (["first"], ["first", "second", "chars"], ["first", "nowhere"], ["mla", "first"]):
        with pytest.raises(UsageError, match="compare takes two runs, or arms"):
            names_runs(words, study=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("first mha", "mha was trained on task:mqar"),
        ("first runs/first", "are the same run"),
        ("first second chars", "3 runs: compare takes two runs, or arms"),
        ("first second --seeds 3", "unknown flag --seeds; it is for arms, and these are two runs"),
        ("first second --held_out", "--held_out needs --data"),
        ("first second --data task:mqar", "both runs were trained on text"),
        ("first second --data chat:x", "runs are compared on text"),
        ("mha gdn --data rows.jsonl", "both runs were trained on a task"),
        ("mha gdn --part test", "--part is for texts"),
        ("mha gdn --data task:mqar?pairs=2&length=16&vocabulary=50", "compare takes two runs of the same task"),
        ("first second --checkpoint 77", "no checkpoint of step 77"),
        ("first second --block_size -1", "--block_size -1: must be > 0"),
        ("first second --output_dir runs", "--output_dir runs: exists and holds no such report"),
        ("first damaged", "has no checkpoint"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(here: Path, capsys, words: str, told: str) -> None:
    damaged = here / "runs" / "damaged"
    damaged.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (damaged / name).write_bytes((here / "runs" / "first" / name).read_bytes())
    assert told in refused(capsys, *words.split())


def test_the_help_says_how_runs_are_told_from_arms(here: Path, capsys) -> None:
    for words, text in (
        (["--help"], "swamla compare RUN RUN"),
        (["--help"], "Shipped studies: hybrid-or-not, latent-moe"),
        (["first", "second", "--help"], "Compare two finished"),
    ):
        with pytest.raises(SystemExit):
            main(["compare", *words])
        assert text in " ".join(capsys.readouterr().out.split())


def test_a_stop_leaves_nothing_behind(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(two_runs.HeldOutRows, "batches", stopped)
    assert main(["compare", "first", "second", "--output_dir", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()
