"""`swamla info`: what it prints is what the accounting says, in 80 columns, and as one JSON object."""

import json
import math
import re
from pathlib import Path

import pytest

from swamla.cli import main
from swamla.cli.info_tables import short
from swamla.cli.original import translate
from swamla.errors import UsageError
from swamla.model.accounting import count_parameters, parameter_specs, state_bytes, training_flops_per_token
from swamla.recipes import recipe_names

from .test_overrides import resolve


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["info", *arguments]) == 0
    shown, errors = capsys.readouterr()
    assert errors == ""
    return shown


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    return json.loads(told(capsys, *arguments, "--json"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_told_in_80_columns_with_its_exact_count(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = told(capsys, name)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "…" not in shown, "a cell was cut off"
    found = facts(capsys, name)
    assert f"{found['parameters']['total']:,}" in shown
    drawn = "".join(line.removeprefix("mixers") for line in shown.splitlines() if line.startswith("mixers")).split()
    letter = {"swa": "S", "gdn": "G", "mla": "M", "mha": "A", "latent": "L"}
    assert drawn == [letter[found["blocks"][block]["mixer"]["kind"]] for block in found["pattern"]]


def test_the_json_holds_what_the_accounting_says(capsys: pytest.CaptureFixture[str]) -> None:
    model = resolve("", "small").model
    found, counted = facts(capsys, "small"), count_parameters(model)
    assert found["parameters"]["total"] == counted.total == 213_018_624
    assert found["parameters"]["by_component"] == counted.by_component
    assert found["state_bytes"] == [state_bytes(model, n) for n in found["lengths"]]
    assert found["all_mha_state_bytes"][1] == 12 * 2 * 1024 * 1024 * 4


def test_training_flops_are_those_of_the_accounting_and_of_the_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    model, found = resolve("", "small").model, facts(capsys, "small")
    assert found["training_flops_per_token"] == [training_flops_per_token(model, n) for n in found["lengths"]]
    products = 6 * found["parameters"]["total"]  # 2 forward, 4 backward for each weight; pairs are the rest
    assert 1 < found["training_flops_per_token"][0] / products < 1.05


def test_the_copies_of_the_weights_in_bf16_count_as_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def activations(precision: str, rows: int) -> int:
        told = facts(capsys, "small", "--precision", precision, "--batch_size", str(rows))
        return told["training"]["bytes"]["activations_estimate"]

    shapes = parameter_specs(resolve("", "small").model)
    matrices = sum(math.prod(shape) for name, shape, _ in shapes if name.startswith("blocks.") and len(shape) >= 2)
    assert 2 * activations("bf16", 8) - activations("bf16", 16) == 2 * matrices  # what does not grow with the tokens
    assert 2 * activations("fp32", 8) - activations("fp32", 16) == 0


def test_widths_that_follow_from_the_models_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    def ffn(*arguments: str) -> dict[str, int]:
        return facts(capsys, *arguments)["blocks"]["mla"]["ffn"]

    assert ffn("small")["hidden"] == 2752
    assert "hidden 2752" in told(capsys, "small")
    experts = ffn("small", "--mla_ffn", "latent_moe")
    assert (experts["latent"], experts["expert_hidden"], experts["shared_hidden"]) == (256, 704, 704)
    halved = ffn("small", "--mla_ffn", "latent_moe", "--no_latent_moe_preserve_expert_dim")
    assert (halved["latent"], halved["expert_hidden"], halved["shared_hidden"]) == (256, 176, 704)
    plain = ffn("small", "--mla_ffn", "moe", "--moe_n_shared", "0")
    assert plain["expert_hidden"] == 960
    assert not plain.keys() & {"latent", "shared_hidden"}
    assert "expert_hidden 704" in (shown := " ".join(told(capsys, "small", "--mla_ffn", "latent_moe").split()))
    assert "latent 256" in shown


def test_a_model_without_ffns_is_drawn_and_counted_as_its_mixers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    whole, bare = facts(capsys, "small"), facts(capsys, "small", "--ffn", "none")
    assert {block["ffn"]["kind"] for block in bare["blocks"].values()} == {"none"}
    counted = dict(whole["parameters"]["by_component"])
    ffns = counted.pop("dense")
    counted["norms"] -= 12 * 1024
    assert bare["parameters"]["by_component"] == counted
    assert bare["parameters"]["total"] == whole["parameters"]["total"] - ffns - 12 * 1024
    saved = [a - b for a, b in zip(*(x["training_flops_per_token"] for x in (whole, bare)), strict=True)]
    assert saved == pytest.approx([6 * ffns] * len(saved))
    assert bare["state_bytes"] == whole["state_bytes"]
    shown = told(capsys, "small", "--ffn", "none")
    assert re.search(r"^FFNs +(- ){12}", shown, re.MULTILINE)
    mixed = facts(capsys, "small", "--ffn", "none", "--mla_ffn", "moe")["blocks"]
    assert {name: block["ffn"]["kind"] for name, block in mixed.items()} == {"swa": "none", "mla": "moe"}


def test_what_stands_around_every_mixer_is_told_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    plain, found = facts(capsys, "small"), facts(capsys, "small", "--conv", "4")
    assert {block["conv"] for block in found["blocks"].values()} == {4}
    assert found["parameters"]["by_component"]["convolution"] == 12 * 4 * 1024
    assert found["state_bytes"] == [size + 12 * 3 * 1024 * 4 for size in plain["state_bytes"]]
    assert "block: conv 4" in " ".join(told(capsys, "small", "--conv", "4").split())
    assert "block: norm_place post" in " ".join(told(capsys, "small", "--norm_place", "post").split())
    assert "block:" not in told(capsys, "small")


def test_a_mixer_that_a_flag_brings_has_the_surroundings_of_the_recipes_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "convolved.toml"
    recipe.write_text(
        "[model]\nwidth = 64\nvocab_size = 300\npattern = ['swa']\n"
        "[model.blocks.swa]\nconv = 3\nffn = 'none'\nmixer = { kind = 'swa', n_heads = 2 }\n"
        "[data]\nsource = 'stdlib'\n[train]\nsteps = 5\n"
    )
    blocks = facts(capsys, str(recipe), "--pattern", "swa gdn mha")["blocks"]
    assert list(blocks) == ["swa", "gdn", "mha"]
    assert {(block["conv"], block["ffn"]["kind"]) for block in blocks.values()} == {(3, "none")}


def test_training_memory_follows_the_training_section(capsys: pytest.CaptureFixture[str]) -> None:
    def memory(*flags: str) -> dict[str, int]:
        return facts(capsys, "small", "--precision", "bf16", *flags)["training"]["bytes"]

    whole, total = memory(), count_parameters(resolve("", "small").model).total
    shapes = parameter_specs(resolve("", "small").model)
    assert whole["weights"] == whole["gradients"] == 4 * total
    assert whole["optimizer_state"] == 8 * total + 4 * len(shapes)
    assert whole["sum"] == sum(size for name, size in whole.items() if name != "sum")
    assert memory("--optimizer", "lion", "--lion_moments", "bf16")["optimizer_state"] == 2 * total + 4 * len(shapes)
    assert memory("--accumulation", "8")["activations_estimate"] < whole["activations_estimate"] / 5
    assert memory("--checkpointing", "all")["activations_estimate"] < whole["activations_estimate"] / 4
    assert memory("--ema", "0.999")["averaged_weights"] == 4 * total


def test_two_models_stand_side_by_side_whichever_way_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "base", "--compare", "small")
    assert told(capsys, "--compare", "base", "small") == shown
    assert re.search(r"parameters, total +│ +756\.6 M │ +213\.0 M │ +3\.55", shown)
    both = json.loads(told(capsys, "--compare", "base", "small", "--json"))
    assert both == [facts(capsys, "base"), facts(capsys, "small")]


def test_flags_change_the_first_of_two_models(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = json.loads(told(capsys, "base", "--local_mixer", "gdn", "--compare", "base", "--json"))
    assert first["parameters"]["total"] == 795_195_264
    assert second == facts(capsys, "base")


def test_a_size_is_a_recipe_and_medium_is_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys, "medium") == facts(capsys, "base") | {"name": "medium"}
    assert translate(["--size", "medium"])[0] == ["medium"]
    assert translate(["base", "--size", "medium"])[0] == ["base"]
    with pytest.raises(UsageError, match="the recipe base and --size small are two models"):
        translate(["base", "--size", "small"])
    assert main(["info", "--size", "medium"]) == 2
    assert "unknown flag --size; a recipe has no flag of its own: swamla train medium" in capsys.readouterr().err


def test_a_run_is_told_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from swamla.config import to_plain

    config = {"format_version": 1, **to_plain(resolve("--vocab_size 300"))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert facts(capsys, str(tmp_path)) | {"name": ""} == facts(capsys, "--vocab_size", "300") | {"name": ""}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (999_499, "999.5 k"),
        (756_559_360, "756.6 M"),
        (1_478_480_128, "1.48 G"),
    ],
)
def test_short_numbers_have_four_digits_at_most(number: int, text: str) -> None:
    assert short(number) == text


def test_choices_other_than_the_default_and_tables_of_ngrams_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "quickstart"])
    told = capsys.readouterr().out
    assert "4,096 and 16,384 rows of n-grams" in " ".join(told.split())
    assert "qk_norm head" in told
    main(["info", "quickstart", "--swa_qk_norm", "none", "--ngram_buckets", "9"])
    told = capsys.readouterr().out
    assert "9 rows of n-grams" in " ".join(told.split())
    assert "qk_norm" not in told


def test_a_model_of_transformers_is_told_from_its_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    config.save_pretrained(tmp_path / "llama")
    found = facts(capsys, str(tmp_path / "llama"))
    n_parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert found["parameters"]["total"] == n_parameters
    assert found["pattern"] == ["mha"] * 3
    assert (
        found["state_bytes"][0] == 3 * 2 * found["lengths"][0] * 2 * 8 * 4
    )  # layers · (k, v) · T · heads · width · fp32
    assert f"{n_parameters:,}" in told(capsys, str(tmp_path / "llama"))
    assert "parameters, total" in told(capsys, str(tmp_path / "llama"), "--compare", "quickstart")
    assert (
        facts(capsys, str(tmp_path / "llama"), "--mha_n_kv_heads", "1")["state_bytes"][0] * 2 == found["state_bytes"][0]
    )


@pytest.mark.parametrize("command", ["generate {folder}", "evaluate {folder} --data x", "train {folder}/config.json"])
def test_commands_that_need_a_run_say_what_makes_one_of_a_model_of_transformers(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert main(command.format(folder=tmp_path).split()) == 2
    message = capsys.readouterr().err
    assert "a model of transformers" in message
    assert f"swamla import {tmp_path} RUN" in message or f"--init_from {tmp_path} " in message
