"""`swamla export RUN OUT --quantize`: scored before it is written; the table of `evaluate --quantize`."""

import json
import math
import re
from pathlib import Path

import pytest

import swamla
from swamla.checkpoint import find_checkpoint, quantized_bytes
from swamla.cli import main
from tests.test_readme import TINY


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of bytes."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    flags = TINY.replace("--steps 1", "--steps 30").replace("--pattern swa", "--pattern 'gdn mla'").split("'")
    words = [*flags[0].split(), flags[1], *flags[2].split()]
    where = ["--data", f"{folder}/text.txt", "--tokenizer", "byte", "--cache_dir", f"{folder}/cache"]
    more = ["--precision", "fp32", "--output_dir", str(folder / "run")]
    assert main(["train", "quickstart", *words, *where, *more]) == 0
    return folder


def evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["bits_per_byte"]


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_is_printed_before_writing_is_what_evaluating_the_result_gives(
    format: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(home / "run"), str(out), "--quantize", format]) == 0
    said = capsys.readouterr().out
    before, after = map(float, re.findall(r"(\d\.\d{4}) (?:before|in int)", said))
    assert evaluated(home / "run", capsys) == pytest.approx(before, abs=5e-5)
    assert evaluated(out, capsys) == pytest.approx(after, abs=5e-5)
    size = float(re.findall(rf"{format}, ([\d.]+) MB", said)[0])
    assert size == pytest.approx((find_checkpoint(out).path / "model.safetensors").stat().st_size / 1e6, abs=0.005)
    assert main(["generate", str(out), "--prompt", "line", "--max_new_tokens", "4", "--stats"]) == 0
    assert "fp32, int8, state" in capsys.readouterr().err


@pytest.fixture(scope="module", params=["conversations", "a task"])
def answering(request: pytest.FixtureRequest, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose held-out part is answers."""
    folder = tmp_path_factory.mktemp("answering")
    if request.param == "conversations":
        rows = [{"prompt": f"{i} + 1?", "completion": f"{i + 1}"} for i in range(40)]
        (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["sft", str(home / "run"), "--data", str(folder / "chat.jsonl"), "--lora", "2", "--block_size", "64"]
    else:
        flags = ["--pattern", "gdn mla", "--width", "16", "--n_heads", "2", "--batch_size", "2"]
        words = ["train", "quickstart", *flags, "--data", "task:mqar?length=16&pairs=2&vocabulary=16"]
        words += ["--block_size", "16", "--max_minutes", "none"]
    assert main([*words, "--steps", "3", "--precision", "fp32", "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_the_loss_of_a_run_without_held_out_text_is_that_of_its_answers(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", str(answering), str(out), "--quantize", "int4", "--max_loss"]
    assert main([*words, "-1"]) == 2
    assert re.search(r"int4 adds -?\d.\d{4} nats per label; .*not written", capsys.readouterr().err)
    assert not out.exists()
    assert main([*words, "1"]) == 0
    (told,) = re.findall(r"nats per label (\d+\.\d{4}) before, (\d+\.\d{4}) in int4", capsys.readouterr().out)
    for run, loss in zip((answering, out), map(float, told), strict=True):
        assert main(["evaluate", str(run), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(loss, abs=5e-5)
    assert main(["evaluate", str(answering), "--quantize", "int4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["loss"] for row in rows] == pytest.approx([*map(float, told)], abs=5e-5)
    assert main(["evaluate", str(answering), "--quantize", "int4"]) == 0
    assert "nats per label computed in fp32" in " ".join(capsys.readouterr().out.split())


def test_a_loss_above_the_bound_is_refused_and_nothing_written(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(home / "run"), str(tmp_path / "out"), "--quantize", "int4", "--max_loss"]
    assert main([*words, "-1"]) == 2
    assert re.search(r"--max_loss -1.0: int4 adds -?\d.\d{4} bits per byte; .*not written", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert main([*words, "1"]) == 0


def test_the_table_has_sizes_scores_and_speeds_of_every_format(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(home / "run"), "--quantize", "int8,int4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    model, _ = swamla.load(home / "run")
    weights = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    expected = [4 * weights, *(quantized_bytes(model.config, format) for format in ("int8", "int4"))]
    assert [row["bytes"] for row in rows] == expected
    assert [row["weights"] for row in rows] == ["fp32", "int8", "int4"]
    assert [row["decoding"] for row in rows] == ["eager", "int8", "int8"]
    assert rows[0]["bits_per_byte"] == pytest.approx(evaluated(home / "run", capsys), rel=1e-6)
    assert all(row["tokens_per_s"] > 0 and math.isfinite(row["bits_per_byte"]) for row in rows)
    assert main(["evaluate", str(home / "run"), "--quantize", "int8"]) == 0
    shown = capsys.readouterr().out
    assert f"{rows[1]['bits_per_byte']:.4f}" in shown
    assert f"{rows[1]['bytes'] / 1e6:.2f} MB" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "RUN", "out", "--max_loss", "1"], "--max_loss needs --quantize"),
        (
            ["export", "RUN", "out.gguf", "--quantize", "int8"],
            "--quantize int8 is for a run's folder or ONNX, not out.gguf",
        ),
        (
            ["export", "RUN", "out", "--quantize", "int8", "--to", "llama"],
            "--to llama is for other outputs: with --quantize int8 out is a run of swamla",
        ),
        (["evaluate", "RUN", "--quantize", "int3"], "--quantize int3: must be of int8, int4"),
        (["export", "RUN", "RUN", "--quantize", "int8"], "exists and is not empty"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    words: list[str], said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(home / "run") if word == "RUN" else word for word in words]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in shown
