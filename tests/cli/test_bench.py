"""`swamla bench` as a user runs it: on a tiny model, in seconds, with nothing but what is on the machine."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swamla.bench import feeding, generation, training
from swamla.bench import recipe as bench_recipe
from swamla.bench.recipe import measure_start_up
from swamla.bench.results import Results, Row
from swamla.cli import bench, main
from swamla.cli.bench_tables import COLUMNS, Screen, line
from swamla.cli.console import Console
from swamla.cli.run_config import with_vocabulary
from swamla.data.tokenizer import make_tokenizer
from swamla.model.accounting import count_parameters, state_bytes, training_flops_per_token
from swamla.model.language_model import LanguageModelConfig
from tests.waiting import PATIENCE, after_start, running

from .test_overrides import resolve

TINY = """
[model]
width = 32
pattern = ["swa", "gdn", "mla"]
[model.blocks.swa]
mixer = { kind = "swa", n_heads = 2, window = 16 }
[model.blocks.gdn]
mixer = { kind = "gdn", n_heads = 2 }
ffn = { kind = "moe", n_experts = 4, n_activated = 2 }
[model.blocks.mla]
mixer = { kind = "mla", n_heads = 2, kv_lora_rank = 16, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 16 }
[data]
source = "nowhere.txt"
tokenizer = "byte"
[train]
steps = 10
batch_size = 4
accumulation = 2
block_size = 32
"""
CEILINGS = {"fp32_flops": 1e11, "bf16_flops": 2e11, "copy_bytes": 1e10}
LINE = ("bench", "tiny.toml", "--lengths", "16,64", "--prompts", "8,40", "--precision", "fp32", "--out", "found.json")
NO_MORE = ("--lengths", "none", "--prompts", "none")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where we are, with a recipe in it; few rounds, ceilings that need no measuring, a program that ends at once."""
    programs = {"nothing": ("-S", "-c", "")}
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tiny.toml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        for module in (training, generation, feeding):
            patch.setattr(module, "_ROUNDS", 2)
        patch.setattr(bench, "ceilings", lambda device, seconds: CEILINGS)
        patch.setattr(bench_recipe, "measure_start_up", lambda limit: measure_start_up(programs, limit=limit))
        patch.chdir(folder)
        yield folder


def measured(*line: str) -> tuple[dict[str, Any], list[str]]:
    """What the file holds, and the lines shown. There is more time than is needed, unless the line says otherwise."""
    minutes = () if "--minutes" in line else ("--minutes", "60")
    shown, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
        assert main([*line, *minutes, "--out", "found.json"]) == 0, errors.getvalue()
    assert errors.getvalue() == ""
    return json.loads(Path("found.json").read_text()), shown.getvalue().splitlines()


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """All of the recipe."""
    return measured(*LINE[:-2])


@pytest.fixture(scope="module")
def tables(whole: tuple[dict[str, Any], list[str]]) -> dict[str, list[dict[str, Any]]]:
    return whole[0]["tables"]


def tiny_model() -> LanguageModelConfig:
    config = resolve("", "tiny.toml")
    return with_vocabulary(config.model, config.data)


def test_a_recipe_is_measured_from_training_to_start_up_and_kept_as_json(
    whole: tuple[dict[str, Any], list[str]], tables: dict[str, list[dict[str, Any]]]
) -> None:
    found, shown = whole
    assert tables.keys() == {"model", *COLUMNS}
    assert tables["model"][0]["parameters"] == count_parameters(tiny_model()).total
    assert [row["name"] for row in tables["training"]] == ["4 × 32 in 2 packed", "1 × 16", "1 × 64"]
    generated = [(row["prompt"], row["decoding"]) for row in tables["generation"]]
    assert generated == [(8, "eager"), (8, "int8"), (40, "eager"), (40, "int8")]
    assert [row["name"] for row in tables["data"]] == ["loader, 4 × 32", "tokenizer, byte"]
    assert [row["name"] for row in tables["start-up"]] == ["nothing"]
    assert [row for rows in tables.values() for row in rows if "error" in row] == []
    told = [line(name, row) for name, rows in tables.items() if name != "model" for row in rows]
    assert [text for text in shown if text in told] == told
    assert found["command"].startswith("swamla bench tiny.toml --lengths 16,64")
    assert found["ceilings"] == CEILINGS


def test_the_state_is_what_the_accounting_says(tables: dict[str, list[dict[str, Any]]]) -> None:
    for row in tables["generation"]:
        expected = state_bytes(tiny_model(), row["prompt"] + bench.NEW - 1)
        assert row["state_bytes"] == row["accounted_state_bytes"] == expected


def test_the_share_of_the_matmul_rate_is_by_the_accountings_operations(
    tables: dict[str, list[dict[str, Any]]],
) -> None:
    for row in tables["training"]:
        whole_rows = training_flops_per_token(tiny_model(), row["length"]) * row["length"] * row["rows"]
        packed = row["name"].endswith("packed")  # of documents, which may end within a row
        assert row["flops"] <= whole_rows if packed else row["flops"] == pytest.approx(whole_rows)
        assert row["tokens_per_s"] == pytest.approx(row["rows"] * row["length"] / row["median_s"])
        assert row["matmul_share"] * row["median_s"] * CEILINGS["fp32_flops"] == pytest.approx(row["flops"])
    loaded = tables["data"][0]
    assert loaded["tokens_per_s"] * loaded["median_s"] == pytest.approx(4 * 32)
    assert loaded["times_training"] * tables["training"][0]["tokens_per_s"] == pytest.approx(loaded["tokens_per_s"])


def test_rates_of_generation_and_text_are_those_of_their_times(tables: dict[str, list[dict[str, Any]]]) -> None:
    for row in tables["generation"]:
        assert row["prefill_tokens_per_s"] * row["first_token_s"] == pytest.approx(row["prompt"])
        assert row["decode_tokens_per_s"] * row["token_s"] == pytest.approx(1)
    text = sum(len(part.encode()) for part in feeding.library_text())
    row = tables["data"][1]
    assert row["text_bytes_per_s"] * row["median_s"] == pytest.approx(text)
    assert row["tokens_per_s"] == pytest.approx(row["text_bytes_per_s"])  # a token is a byte


def test_padding_is_not_counted_as_tokens_trained_on_or_loaded() -> None:
    lines = ("--batch_size", "2", "--accumulation", "1", "--block_size", "1500", "--buffer_docs", "10")
    tables = measured("bench", "tiny.toml", *NO_MORE, *lines)[0]["tables"]
    trained, loaded = tables["training"][0], tables["data"][0]
    for row in (trained, loaded):
        assert 0.3 * 2 * 1500 < row["tokens_per_s"] * row["median_s"] < 0.99 * 2 * 1500


def test_ceilings_are_told_in_the_units_they_have(whole: tuple[dict[str, Any], list[str]]) -> None:
    told = "large matrix products run at fp32 100 GFLOP/s and bf16 200 GFLOP/s, copies at 10 GB/s"
    assert told in whole[1]


def test_every_part_of_a_step_takes_time_and_memory_is_more_than_weights_and_moments(
    tables: dict[str, list[dict[str, Any]]],
) -> None:
    for row in tables["training"]:
        assert min(row["forward_s"], row["backward_s"], row["optimizer_s"]) > 0
        assert max(row["forward_s"], row["backward_s"], row["optimizer_s"]) < row["high_s"]
        assert row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["peak_bytes"] > 3 * 4 * tables["model"][0]["parameters"]


def test_flags_change_the_recipe_that_is_measured() -> None:
    lines = (
        "--pattern",
        "swa",
        "--batch_size",
        "2",
        "--accumulation",
        "1",
        "--tokenizer",
        "hub:nobody/nothing",
        "--vocab_size",
        "99",
    )
    tables = measured("bench", "tiny.toml", *NO_MORE, *lines)[0]["tables"]
    assert tables["training"][0]["name"] == "2 × 32 packed"
    assert tables["model"][0]["backends"].startswith("attention: ")
    assert "delta rule" not in tables["model"][0]["backends"]
    error = "hub:nobody/nothing is on the hub, and has not been downloaded"
    assert tables["data"][1] == {"name": "tokenizer, hub:nobody/nothing", "error": error}


def test_what_takes_too_long_or_too_much_memory_is_named_and_the_rest_goes_on() -> None:
    lines = ("--lengths", "16,1000000000000", "--prompts", "8,1000000000", "--minutes", "5")
    tables = measured("bench", "tiny.toml", *lines)[0]["tables"]
    told = {row["name"]: row.get("error", "") for name in ("training", "generation") for row in tables[name]}
    assert told["1 × 16"] == told["prompt 8"] == ""
    assert "are free" in told["1 × 1,000,000,000,000"]
    assert "would take about" in told["prompt 1,000,000,000"]


def test_a_step_that_is_too_slow_is_measured_with_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_recipe, "_EXPECTED", 5e-7)  # of the ceilings: 50 kFLOP/s
    lines = ("--minutes", "60", "--batch_size", "8", "--precision", "fp32")
    tables = measured("bench", "tiny.toml", *NO_MORE, *lines)[0]["tables"]
    recipes, smaller = tables["training"]
    assert recipes["name"] == "8 × 32 in 2 packed"
    assert "would take about" in recipes["error"]
    assert 1 <= smaller["rows"] < 8
    assert tables["data"][0]["times_training"] > 0


def test_a_run_is_measured_with_its_own_tokenizer() -> None:
    run = Path("run")
    run.mkdir()
    (run / "config.json").write_text(json.dumps(tomllib.loads(TINY)))
    make_tokenizer("bpe:270", ["abcde " * 100]).save(run / "tokenizer.json")
    tables = measured("bench", "run", *NO_MORE, "--tokenizer", "nowhere/tokenizer.json", "--vocab_size", "270")[0]
    assert [row["name"] for row in tables["tables"]["data"]][1] == "tokenizer, nowhere/tokenizer.json"
    assert "error" not in tables["tables"]["data"][1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope"], "nope: no recipe of that name"),
        (["tiny.toml", "--minutes", "0"], "--minutes 0.0: must be > 0"),
        (["tiny.toml", "--minutes", "nan"], "--minutes nan: must be > 0"),
        (["tiny.toml", "--lengths", "256,x"], "--lengths 256,x: must be numbers above 0"),
        (["tiny.toml", "--prompts", "0"], "--prompts 0: must be numbers above 0"),
        (["tiny.toml", "--lengths", "16", "--learned_positions", "8"], "must not exceed --learned_positions 8"),
        (["gpt2", "--prompts", "1000"], "--prompts 1000: the model's learned positions leave room for 992"),
        (["tiny.toml", "--out", "found.txt"], "must be the name of a .json file"),
        (["tiny.toml", "--out", "no/found.json"], "there is no folder no"),
        (["tiny.toml", "--out", "other.json"], "has no results of bench"),
        (["tiny.toml", "--lenghts", "16"], "did you mean --lengths?"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_measured(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.json").write_text("{}")
    assert main(["bench", *arguments]) == 2
    shown, errors = capsys.readouterr()
    assert shown == ""
    assert told in errors
    assert errors.count("\n") == 1
    assert Path("other.json").read_text() == "{}"


def test_ctrl_c_keeps_what_was_measured() -> None:
    with running(
        [sys.executable, "-m", "swamla", *LINE, "--minutes", "0.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout
        assert any(text.startswith("training") for text in process.stdout)  # reads on until there is a row
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert after_start(errors) == "swamla: interrupted; what was measured is in found.json\n"
    assert Results.load("found.json").rows["training"]


def test_a_terminal_gets_tables_in_80_columns(tables: dict[str, list[Row]], capsys: pytest.CaptureFixture[str]) -> None:
    long = {"name": "8 × 2,048 packed", "tokens_per_s": 987654.0, "median_s": 0.9, "low_s": 0.8, "high_s": 1.0}
    small = dict.fromkeys(("forward_s", "backward_s", "optimizer_s"), 0.000123)
    with Screen(Console(force_terminal=True, width=80, color_system=None)) as screen:
        for table in COLUMNS:
            for row in tables[table]:
                screen.row(table, row | (long | small if table == "training" else {}))
        screen.row("start-up", {"name": "other", "error": "no reason"})
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)  # without moves of the cursor
    shown = [text.strip() for text in plain.splitlines()]
    drawn = [text for text in shown if "measured" not in text]
    assert max(map(len, drawn)) <= 80
    assert "…" not in "".join(drawn)
    for name in ("8 × 2,048*", "987,654/s", "prompt 40", "loader, 4 × 32", "nothing"):
        assert name in "".join(drawn)
    assert "start-up: other: not measured: no reason" in shown
