"""`swamla sft`: fine-tuning as an ordinary run, all weights or adapters: resumed exactly, evaluated, exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import swamla.interop.transformers  # noqa: F401 - registers the class
from swamla import load
from swamla.checkpoint import find_checkpoint
from swamla.cli import main
from swamla.data.chat import END, START, template_of
from swamla.files import read_json
from swamla.text import answer
from swamla.train.tracking.metrics import read_metrics
from tests.model.helpers import assert_close
from tests.train.ranks import on_ranks

QUESTIONS = [
    {"prompt": f"say {word}", "completion": f"<{word}>"} for word in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")
]
SMALL = ("--block_size", "64", "--batch_size", "4", "--eval_interval", "none", "--precision", "fp32", "--epochs", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with conversations, and a hybrid run of two steps on bytes."""
    place = tmp_path_factory.mktemp("sft")
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (place / "text.txt").write_text("say ab <cd>\n" * 400)
    base = ("--pattern", "gdn mla", "--width", "32", "--n_heads", "2", "--ngram_buckets", "31", "--block_size", "64")
    settings = ("--steps", "2", "--batch_size", "2", "--precision", "fp32", "--optimizer", "adamw", "--ema", "0.9")
    data = ("--data", str(place / "text.txt"), "--tokenizer", "byte")
    assert main(["train", "quickstart", *base, *settings, *data, "--output_dir", str(place / "base")]) == 0
    return place


def sft(folder: Path, out: Path, *more: str) -> int:
    return main(["sft", str(folder / "base"), "--data", str(folder / "chat.jsonl"), "--output_dir", str(out), *more])


def tensors(run: Path) -> dict[str, Tensor]:
    checkpoint = find_checkpoint(run, "latest")
    groups = [group for group in ("model", "adapters") if checkpoint.has(group)]
    return {name: tensor for group in groups for name, tensor in checkpoint.tensors(group).items()}


@pytest.mark.parametrize("lora", [(), ("--lora", "4")], ids=["all weights", "adapters"])
def test_a_stopped_fine_tuning_resumes_to_the_bit(folder: Path, tmp_path: Path, lora: tuple[str, ...]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    planned = (*SMALL[:-2], *lora)
    assert sft(folder, whole, *planned, "--steps", "6") == 0
    assert sft(folder, parts, *planned, "--steps", "3", "--schedule_steps", "6") == 0
    assert main(["sft", "--resume", str(parts), "--steps", "6"]) == 0
    first, second = tensors(whole), tensors(parts)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    states = [find_checkpoint(run, "latest").state for run in (whole, parts)]
    assert states[0]["sample"] == states[1]["sample"] == 24


def twice(folder: Path, out: Path, planned: tuple[str, ...]) -> None:
    """On every rank: six steps at once, and in two parts."""
    assert sft(folder, out / "two", *planned, "--steps", "6") == 0
    assert sft(folder, out / "parts", *planned, "--steps", "3", "--schedule_steps", "6") == 0
    assert main(["sft", "--resume", str(out / "parts"), "--steps", "6"]) == 0


@pytest.mark.parametrize("lora", [(), ("--lora", "4")], ids=["all weights", "adapters"])
def test_two_processes_fine_tune_as_one_does_with_the_same_batch_and_resume_to_the_bit(
    folder: Path, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    """Half of each batch's rows each, with other numbers of learned tokens: the mean is over those of both."""
    planned = (*SMALL[:-2], *lora)
    assert sft(folder, tmp_path / "one", *planned, "--steps", "6") == 0
    on_ranks(2, twice, folder, tmp_path, planned)
    one, two, parts = (tensors(tmp_path / name) for name in ("one", "two", "parts"))
    assert one.keys() == two.keys() == parts.keys()
    for name, tensor in one.items():
        assert torch.equal(parts[name], two[name]), name
        assert_close(two[name], tensor, 1e-5, name)
    first, second = (
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r] for name in ("one", "two")
    )
    assert second == pytest.approx(first, rel=1e-5)
    states = [find_checkpoint(tmp_path / name, "latest").state["sample"] for name in ("one", "two", "parts")]
    assert states == [24, 24, 24]
    assert load(tmp_path / "two")[1].specials.keys() >= {START, END}


def test_the_vocabulary_grows_by_the_special_ids_whose_rows_begin_as_the_mean(folder: Path, tmp_path: Path) -> None:
    assert sft(folder, tmp_path / "run", *SMALL, "--lr", "1e-12") == 0
    before, _ = load(folder / "base")
    model, tokenizer = load(tmp_path / "run")
    assert (before.config.vocab_size, model.config.vocab_size, tokenizer.vocab_size) == (257, 259, 259)
    old, new = before.embedding.weight, model.embedding.weight
    assert torch.allclose(new[:257], old, atol=1e-6)
    assert torch.allclose(new[257:], old.double().mean(dim=0).float().expand(2, -1), atol=1e-6)
    assert model.head.weight is model.embedding.weight
    assert json.loads((tmp_path / "run" / "initialized_from.json").read_text())["folder"] == str(folder / "base")


def test_adapters_alone_are_trained_and_the_run_is_the_merged_model_everywhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert sft(folder, run, *SMALL, "--lora", "4", "--lora_alpha", "6") == 0
    assert "lora: adapters of rank 4 and the rows of the special ids are trained" in " ".join(
        capsys.readouterr().out.split()
    )
    before, _ = load(folder / "base")
    checkpoint = find_checkpoint(run)
    fixed, adapters = checkpoint.tensors("model"), checkpoint.tensors("adapters")
    for name, tensor in before.state_dict().items():
        assert torch.equal(fixed[name][: len(tensor)] if tensor.ndim else fixed[name], tensor), name
    assert all(float(t) == 1.5 for name, t in adapters.items() if name.endswith(".scale"))
    assert any(float(t.abs().max()) > 0 for name, t in adapters.items() if name.endswith(".b"))
    model, tokenizer = load(run)
    assert not any("lora" in name for name in model.state_dict())
    assert main(["export", str(run), str(out)]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out)
    prompt = [{"role": "user", "content": "say ab"}]
    ids = AutoTokenizer.from_pretrained(out).apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert ids == template_of(tokenizer).prompt(prompt)
    with torch.no_grad():
        difference = theirs(torch.tensor([ids])).logits - model(torch.tensor([ids]))
    assert difference.abs().max() < 1e-5
    ended = theirs.generation_config.eos_token_id
    assert set(ended) == {tokenizer.eos_id, tokenizer.specials[END]}
    assert main(["evaluate", str(run), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = read_json(run / "checkpoints" / "best.json", inside=run)["loss"]
    assert scored["loss"] == pytest.approx(best, abs=1e-4)  # with adapters then, merged now
    assert main(["checkpoint", "convert", str(run), str(tmp_path / "plain"), "--weights_only"]) == 0
    plain, _ = load(tmp_path / "plain")
    for name, tensor in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
    again = ("--data", str(folder / "chat.jsonl"), "--output_dir", str(tmp_path / "second"), "--lr", "1e-12")
    assert main(["sft", str(run), *again, *SMALL]) == 0  # from a run that has adapters
    second, _ = load(tmp_path / "second")
    assert torch.allclose(second.blocks[0].mixer.qkvz_proj.weight, model.blocks[0].mixer.qkvz_proj.weight, atol=1e-6)
    assert second.config.vocab_size == 259


def test_an_imported_folder_is_fine_tuned_too(folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(folder / "base"), str(tmp_path / "exported")]) == 0
    data = ("--data", str(folder / "chat.jsonl"), "--output_dir", str(tmp_path / "run"))
    assert main(["sft", str(tmp_path / "exported"), *data, *SMALL]) == 0
    assert load(tmp_path / "run")[1].specials.keys() >= {START, END}


def test_a_model_with_learned_positions_answers_as_far_as_they_go(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--pattern", "swa", "--width", "16", "--n_heads", "2", "--block_size", "64", "--learned_positions", "64")
    data = ("--data", str(folder / "text.txt"), "--tokenizer", "byte", "--output_dir", str(tmp_path / "base"))
    assert main(["train", "quickstart", *base, "--steps", "1", "--batch_size", "2", *data]) == 0
    chat = ("--data", str(folder / "chat.jsonl"), "--output_dir", str(tmp_path / "run"))
    assert main(["sft", str(tmp_path / "base"), *chat, *SMALL[:-2], "--steps", "1"]) == 0
    assert "=== the model's ===" in capsys.readouterr().out


LEARN = ("--block_size", "64", "--batch_size", "4", "--eval_interval", "none", "--precision", "fp32", "--lr", "2e-2")


def test_a_model_learns_to_answer(folder: Path, tmp_path: Path) -> None:
    assert sft(folder, tmp_path / "run", *LEARN, "--steps", "120") == 0
    model, tokenizer = load(tmp_path / "run", "latest")
    answers = [answer(model, tokenizer, [{"role": "user", "content": row["prompt"]}], 12) for row in QUESTIONS]
    right = sum(found == row["completion"] for found, row in zip(answers, QUESTIONS, strict=True))
    assert right >= len(QUESTIONS) - 2, answers  # one at least was held out


def test_adapters_learn_even_beside_weights_that_know_nothing(folder: Path, tmp_path: Path) -> None:
    assert sft(folder, tmp_path / "run", *LEARN, "--steps", "60", "--lora", "16") == 0
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": (("--data", "chat.jsonl"), "sft needs a model to start from"),
    "no data": (("base",), "sft needs conversations: --data chat.jsonl"),
    "two starts": (("base", "--init_from", "base", "--data", "chat.jsonl"), "both name the start: give one"),
    "two lengths": (("base", "--data", "chat.jsonl", "--steps", "2", "--epochs", "1"), "both say how long to train"),
    "no epoch": (("base", "--data", "chat.jsonl", "--epochs", "0"), "--epochs 0.0: must be > 0"),
    "too long": (
        ("base", "--data", "chat.jsonl", "--block_size", "16"),
        "tokens, more than --block_size 16: must fit a row",
    ),
    "average": (
        ("base", "--data", "chat.jsonl", "--lora", "2", "--ema", "0.9"),
        "adapters are not averaged: leave --ema and --ema_width out",
    ),
    "alpha alone": (
        ("base", "--data", "chat.jsonl", "--lora_alpha", "2"),
        "is for adapters: give --lora too, e.g. --lora 8",
    ),
    "missing file": (("base", "--data", "none.jsonl"), "none.jsonl: no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line_and_leaves_no_folder(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words, message = REFUSED[case]
    assert main(["sft", *words, "--output_dir", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.splitlines()[-1].startswith("swamla: error: ")
    assert shown.count("swamla: error") == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_changed_conversations_and_another_rank_are_refused_on_resuming(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text((folder / "chat.jsonl").read_text())
    out: Any = str(tmp_path / "run")
    assert main(["sft", str(folder / "base"), "--data", str(chat), "--output_dir", out, *SMALL, "--lora", "2"]) == 0
    assert main(["sft", "--resume", out, "--lora", "4"]) == 2
    assert "the run to resume had 2" in capsys.readouterr().err
    chat.write_text(chat.read_text().replace("<ab>", "<ba>"))
    assert main(["sft", "--resume", out, "--steps", "20", "--schedule_steps", "20"]) == 2
    assert "the data changed since the checkpoint" in capsys.readouterr().err
