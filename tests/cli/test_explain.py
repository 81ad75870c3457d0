"""`swamla explain`: a report of a run, of a folder of transformers, of a given text; one line for what cannot be."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from swamla.checkpoint import load
from swamla.cli import main
from swamla.cli.explain import _subject_of_run, rows_of
from swamla.data.shards import Split
from swamla.data.tokenizer import IdTokenizer, make_tokenizer
from swamla.interop import load_pretrained, save_pretrained
from swamla.interop.architectures.llama import Mistral
from swamla.interop.tokenizer import save_tokenizer
from swamla.interpret import Subject, ablated, explained, induction, repeated_rows
from tests.interop.cases import CASES, VOCABULARY

TRAINED = (
    "--data text.txt --tokenizer byte --held_out_fraction 0.3 --width 16 --n_heads 2 --mla_kv_lora_rank 8 "
    "--mla_qk_nope_head_dim 4 --mla_qk_rope_head_dim 4 --mla_v_head_dim 8 --swa_window 8 --batch_size 2 "
    "--block_size 64 --steps 2 --max_minutes none --eval_seconds none --threads 1"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run on text, and two folders of transformers: with and without a tokenizer."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines = (f"line {i}, which is {i * i} and whose cube is {i**3}: as long as a row\n" * 2 for i in range(80))
        Path("text.txt").write_text("\n".join(lines))
        assert main(["train", *shlex.split(TRAINED), "--output_dir", "a-run"]) == 0
        model = Mistral.example().language_model().build(seed=0)
        save_pretrained(model, "ids")
        save_pretrained(model, "bytes")
        tokenizer = make_tokenizer("char", ["abc de\n"], ["abc de\n"])
        save_tokenizer(tokenizer, Path("bytes"))
    return folder


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    """Few repeats, and no pictures, which tests/interpret/test_page.py looks at."""
    monkeypatch.chdir(home)
    monkeypatch.setattr("swamla.interpret.explaining.REPEAT_ROWS", 4)
    monkeypatch.setattr("swamla.interpret.page.report.write_figures", lambda data, folder: None)


def plain(folder: str | Path) -> dict:
    return json.loads(Path(folder, "explain.json").read_text(encoding="utf-8"))


def alike(one, two) -> None:
    """The same report: words but for the figures in them, whole numbers to one, others to what fp32 rounds.

    Two computations of the same need not add in one order.
    """
    if isinstance(two, dict):
        assert one.keys() == two.keys()
        for name, each in two.items():
            if name != "text":  # a verdict's sentence, of the figures beside it
                alike(one[name], each)
    elif isinstance(two, list):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            alike(*pair)
    elif isinstance(two, float | int) and not isinstance(two, bool):
        assert one == pytest.approx(two, rel=1e-3, abs=1.0 if isinstance(two, int) else 1e-5)
    else:
        assert one == two


def refused(line: str, capsys) -> str:
    """The one line of an error."""
    assert main(["explain", *shlex.split(line)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    return last.removeprefix("swamla: error: ")


def test_a_run_is_explained_on_its_held_out_text_and_the_verdicts_are_printed(capsys) -> None:
    assert main(["explain", "a-run"]) == 0
    shown, found = capsys.readouterr().out, plain("a-run/explain")
    assert shown.splitlines()[-1] == "a-run/explain/report.html: open it in a browser"
    for verdict in found["verdicts"]:
        assert verdict["question"] in shown
    assert found["about"]["source"] == "held-out text of text.txt"
    assert found["about"]["name"] == "a-run"
    assert "and whose cube is" in "".join(found["texts"][0]["tokens"])
    assert [layer["mixer"] for layer in found["layers"]].count("gdn") == 2
    assert Path("a-run/explain/report.html").stat().st_size < 3e6


def test_a_second_report_of_the_run_replaces_the_first_and_is_the_same(capsys) -> None:
    assert main(["explain", "a-run"]) == 0
    first = plain("a-run/explain")
    Path("a-run/explain/report.html").write_text("an old one")
    assert main(["explain", "a-run"]) == 0
    alike(plain("a-run/explain"), first)
    assert Path("a-run/explain/report.html").stat().st_size > 50_000
    assert main(["explain", "a-run", "--seed", "1", "-o", "other"]) == 0
    other = plain("other")
    with pytest.raises(AssertionError):
        alike(first["repeats"], other["repeats"])
    alike(first["worth"], other["worth"])


def test_random_repeats_are_of_ids_that_the_run_has_seen(capsys) -> None:
    assert main(["explain", "a-run"]) == 0
    seen = set(Path("text.txt").read_text()) | {"⟨start⟩"}
    assert set(plain("a-run/explain")["texts"][1]["tokens"]) <= seen


@pytest.mark.parametrize("text", [None, "line 7, which is 49"])
def test_random_repeats_are_no_longer_than_rows_of_training(text) -> None:
    """A model knows nothing of positions that it never saw."""
    assert _subject_of_run(Path("a-run"), *load(Path("a-run")), text).longest == 64


def test_rows_of_a_run_on_given_ids_are_no_longer_than_its_training_had(tmp_path) -> None:
    run = tmp_path / "on-ids"
    shutil.copytree("a-run", run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = "token_ids"
    (run / "config.json").write_text(json.dumps(config))
    subject = _subject_of_run(run, *load(Path("a-run")), "line 7, which is 49" * 20)
    assert subject.longest == subject.rows_BT.shape[1] == len(subject.text) == 64
    assert _subject_of_run(run, *load(Path("a-run")), None).longest == 64


def test_rows_of_one_document_are_known_as_pieces_of_it() -> None:
    subject = _subject_of_run(Path("a-run"), *load(Path("a-run")), None)
    assert len(subject.texts) == len(subject.rows_BT)
    assert subject.texts == [0] * len(subject.texts)  # the held-out end of a single text


def test_a_given_text_is_measured_and_drawn_instead(capsys) -> None:
    assert main(["explain", "a-run", "--text", "line 7, which is 49 and whose cube is 343", "-o", "given"]) == 0
    found = plain("given")
    assert found["texts"][0]["name"] == found["about"]["source"] == "the given text"
    assert "".join(found["texts"][0]["tokens"]) == "⟨start⟩line 7, which is 49 and whose cube is 343"
    assert found["patterns"]["tokens"] == 42
    few = "The text has only 41 tokens: the figures on text are those of this text, and may be chance."
    assert found["about"]["notes"] == [few]
    assert f"Note: {few}" in " ".join(capsys.readouterr().out.split())


def test_a_long_file_is_measured_in_rows_no_longer_than_training_had_and_its_beginning_is_drawn(capsys) -> None:
    assert main(["explain", "a-run", "--file", "text.txt", "-o", "file"]) == 0
    found = plain("file")
    assert len(found["texts"][0]["tokens"]) == 64
    assert found["positions"]["last"][-1] == 63
    assert re.match(r"Of the text's [\d,]+ tokens [\d,]+ were read", found["about"]["notes"][0])
    assert found["about"]["notes"][1] == "Its first 64 tokens are drawn: rows of the model are no longer."
    assert "there are no rows of 500" in found["verdicts"][4]["text"]


def test_a_long_text_for_a_folder_which_tells_no_length_of_rows_is_read_in_rows_of_512(capsys) -> None:
    assert main(["explain", "ids", "--text", " ".join(str(i * i % 95) for i in range(3000)), "-o", "long"]) == 0
    found = plain("long")
    assert found["positions"]["last"][-1] == 511
    assert len(found["texts"][0]["tokens"]) == 96
    assert found["texts"][0]["note"] == "Only the first 96 tokens are drawn."


def test_a_folder_of_transformers_is_explained_as_its_model_is(capsys) -> None:
    assert main(["explain", "ids", "--text", " ".join(str(i * i % 95) for i in range(30))]) == 0
    found = plain("ids-explained")
    model = load_pretrained("ids")
    tokens = torch.tensor([[95, *(i * i % 95 for i in range(30))]])
    for layer, expected in zip(found["worth"]["layers"], ablated(model, tokens).layers, strict=True):
        assert layer["heads"] == pytest.approx(expected.heads, rel=1e-2, abs=1e-6)
    repeats = induction(model, repeated_rows(range(95), 95, length=found["about"]["repeat_length"], rows=4))
    assert found["repeats"]["second_loss"] == pytest.approx(repeats.second_loss, rel=1e-3)
    assert "The model came without a tokenizer: its texts are ids." in found["about"]["notes"]


def test_a_folder_without_a_text_has_random_repeats_only_and_says_so(capsys) -> None:
    assert main(["explain", "bytes", "-o", "alone"]) == 0
    found = plain("alone")
    assert found["worth"] is None
    assert found["about"]["notes"] == ["No text was given (--text, --file): only random repeats were measured."]


def test_an_imported_run_is_explained_as_the_folder_that_it_came_from(capsys) -> None:
    assert main(["import", "bytes", "imported"]) == 0
    for source, out in (("imported", "one"), ("bytes", "two")):
        assert main(["explain", source, "--text", "abc de\nabc", "-o", out]) == 0
    one, two = plain("one"), plain("two")
    assert one.pop("about")["name"] == "imported"
    two.pop("about")
    alike(one, two)


@pytest.mark.parametrize(("name", "mixers"), [("qwen3_5", {"gdn", "mha"}), ("kimi_linear", {"kda", "mla"})])
def test_a_random_open_hybrid_of_transformers_is_imported_and_explained_exactly(name, mixers, tmp_path, capsys) -> None:
    """transformers makes and saves it; its folder, and the run that `swamla import` makes of it, have one report."""
    folder, run = tmp_path / "theirs", tmp_path / "run"
    CASES[name].model().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == {"qwen3_5": "qwen3_5_text"}.get(name, name)
    assert main(["import", str(folder), str(run)]) == 0
    ids = " ".join(str(i * i % VOCABULARY) for i in range(1, 40))
    for source, out in ((folder, "of-theirs"), (run, "of-run")):
        assert main(["explain", str(source), "--text", ids, "-o", str(tmp_path / out)]) == 0
        assert (tmp_path / out / "report.html").stat().st_size > 50_000
    one, two = plain(tmp_path / "of-theirs"), plain(tmp_path / "of-run")
    assert one["about"]["exact_to"] <= 1e-6
    assert {layer["mixer"] for layer in one["layers"]} == mixers
    assert {layer["mixer"] for layer in one["layers"] if layer["signed"]} == mixers & {"gdn", "kda"}
    assert (one["about"].pop("name"), two["about"].pop("name")) == ("theirs", "run")
    alike(one, two)
    model, subject = load_pretrained(folder, dtype=torch.float64).eval(), Subject(name="in fp64", ids=range(95))
    assert explained(model, IdTokenizer(VOCABULARY - 1), subject).about.exact_to <= 1e-12


def test_the_run_of_a_task_has_no_text(home, tmp_path, capsys) -> None:
    run = tmp_path / "task"
    shutil.copytree("a-run", run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = "task:mqar?pairs=8"
    (run / "config.json").write_text(json.dumps(config))
    what = "was trained on task:mqar?pairs=8, which has no text: leave out --text and --file"
    assert refused(f"{run} --text abc", capsys) == f"{run}: {what}"
    assert main(["explain", str(run), "-o", "of-task"]) == 0
    assert "only random repeats were measured" in plain("of-task")["about"]["notes"][0]
    assert plain("of-task")["about"]["repeat_length"] == 31


@pytest.fixture(scope="module")
def chat_run(home) -> Path:
    """A run on conversations, whose prompts have no letter outside a to h."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        rows = ({"prompt": f"{a}{b}", "completion": f"{b}{a}"} for a in "abcdefgh" for b in "abcdefgh")
        Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = TRAINED.replace("text.txt", "chat:talk.jsonl").replace("--block_size 64", "--block_size 40")
        assert main(["train", *shlex.split(line), "--output_dir", "a-chat"]) == 0
    return home / "a-chat"


def test_a_run_on_conversations_has_random_repeats_of_their_ids_and_says_so(chat_run, capsys) -> None:
    assert main(["explain", "a-chat"]) == 0
    found = plain("a-chat/explain")
    note = "It was trained on the conversations of talk.jsonl, which are no held-out text, and no text was given"
    assert found["about"]["notes"] == [f"{note} (--text, --file): only random repeats were measured."]
    assert found["worth"] is None
    assert found["about"]["repeat_length"] <= 19
    seen = set("abcdefgh\n") | set("system user assistant")
    assert set(found["texts"][0]["tokens"]) <= seen | {"⟨start⟩"}


def test_a_run_on_conversations_is_explained_on_a_given_text(chat_run, capsys) -> None:
    text = "abc def gh " * 30
    assert main(["explain", "a-chat", "--text", text, "-o", "chat-on-text"]) == 0
    found = plain("chat-on-text")
    assert found["about"]["source"] == "the given text"
    assert found["positions"]["last"][-1] == 39
    assert found["about"]["notes"][0] == (
        "It was trained on the conversations of talk.jsonl, which are no held-out text: the given text may be of "
        "another kind."
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a-run --text ''", "--text: the text is empty; it needs two tokens at least"),
        ("a-run --text '  '", "--text: the text is empty; it needs two tokens at least"),
        ("a-run --text a", "the text 'a' is a single token: two are needed at least"),
        ("a-run --text ab --file text.txt", "--text and --file exclude each other: give one of them"),
        ("a-run --file nowhere.txt", "nowhere.txt: No such file or directory"),
        ("a-run --file broken.bin", "--file broken.bin: is no UTF-8 text (invalid start byte at byte 0)"),
        ("a-run -o text.txt", "--output text.txt: exists and holds no report: choose another folder"),
        ("a-run -o .", "--output .: exists and holds no report: choose another folder"),
        ("nowhere", "nowhere: not a run folder (there is no such folder; swamla runs lists what is in runs/)"),
        ("text.txt", "text.txt: is a file; give the run folder (pickles are never loaded, only safetensors and JSON)"),
        ("ids --checkpoint 3", "--checkpoint is for runs; ids is a model of transformers, which has one"),
        ("a-run --checkpoint 9", "a-run: no checkpoint of step 9; there are: 2"),
        (
            "ids --text 'hello world'",
            "'hello' is no id: must be numbers from 0 to 94, spaces between them: this model came without a tokenizer",
        ),
        ("bytes --text xyz", "character 'x' at offset 0 is not among the 7 characters known"),
    ],
)
def test_what_cannot_be_explained_is_told_in_one_line(line: str, message: str, capsys) -> None:
    Path("broken.bin").write_bytes(b"\xff\xfe")
    assert refused(line, capsys) == message


@pytest.mark.parametrize("output", ["text.txt/report", "of-another"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(output, monkeypatch, capsys) -> None:
    Path("of-another").mkdir(exist_ok=True)
    monkeypatch.setattr("os.access", lambda path, mode: "another" not in str(path))
    monkeypatch.setattr("swamla.cli.explain.explained", lambda *args, **settings: pytest.fail("measured"))
    assert output in refused(f"a-run -o {output}", capsys)


def test_a_stop_leaves_no_empty_folder(monkeypatch, capsys) -> None:
    def stop(*arguments, **settings) -> None:
        assert Path("stopped").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("swamla.cli.explain.explained", stop)
    assert main(["explain", "a-run", "-o", "stopped"]) == 130
    assert not Path("stopped").exists()


def split(*lengths: int) -> Split:
    """Documents whose tokens are 100 · document + position."""
    tokens = np.concatenate([1000 * (n + 1) + np.arange(length) for n, length in enumerate(lengths)])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return Split(path=Path("x"), tokens=tokens, offsets=offsets, byte_counts=np.array(lengths), vocab_size=10**6)


def test_rows_are_the_first_pieces_of_all_documents_then_their_second_ones() -> None:
    rows, documents = rows_of(split(25, 9, 40), 7, 11)
    assert documents == [0, 2, 0, 2, 2, 2]
    assert rows[:, 0].tolist() == [7] * 6
    assert rows[:, 1].tolist() == [1000, 3000, 1010, 3010, 3020, 3030]
    assert rows[1].tolist() == [7, *range(3000, 3010)]


def test_of_many_documents_rows_are_spread_over_the_split() -> None:
    rows, told = rows_of(split(*[20] * 200), 7, 11)
    assert rows.shape == (64, 11)
    documents = rows[:, 1] // 1000 - 1
    assert documents.tolist() == told
    assert documents[0] == 0
    assert documents[-1] > 190
    assert (documents.diff() >= 3).all()


def test_rows_are_halved_while_there_are_few_and_a_text_too_short_for_one_gives_none() -> None:
    assert rows_of(split(1200), 7, 513)[0].shape == (4, 256)
    assert rows_of(split(150), 7, 129)[0].shape == (2, 64)
    assert rows_of(split(9, 9), 7, 11) is None
