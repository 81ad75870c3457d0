"""The shipped recipes: each resolves, counts as it says, and rebuilds itself from what a run stores."""

import json
from pathlib import Path

import pytest

from swamla.cli.run_config import resolve, with_vocabulary
from swamla.config import from_plain, load_file, to_plain
from swamla.errors import UsageError
from swamla.model.accounting import count_parameters
from swamla.recipes import recipe_names, recipe_path
from swamla.train.config import RunConfig

PRESETS = [name for name in recipe_names() if load_file(recipe_path(name))[0]["model"].get("vocab_size")]


def read(name: str, vocab_size: int) -> RunConfig:
    data, place = load_file(recipe_path(name))
    data.pop("spare", None)
    data["model"]["vocab_size"] = vocab_size
    return from_plain(RunConfig, data, origin=place)


def test_both_recipes_are_shipped() -> None:
    assert {"quickstart", "shakespeare-char"} <= set(recipe_names())


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - set(PRESETS)))  # test_presets.py has the others
def test_a_recipe_resolves_builds_and_comes_back_from_its_stored_form(name: str) -> None:
    config = read(name, vocab_size=300)
    assert from_plain(RunConfig, json.loads(json.dumps(to_plain(config)))) == config
    built = sum(parameter.numel() for parameter in config.model.build().parameters())
    assert built == count_parameters(config.model).total


def test_quickstart_is_a_hybrid_of_three_mixers_and_three_million_parameters_beside_its_tables() -> None:
    config = read("quickstart", vocab_size=4096)
    assert {block.mixer.kind for block in config.model.layers} == {"gdn", "swa", "mla"}
    assert 3e6 <= count_parameters(config.model).non_embedding <= 4e6
    assert count_parameters(config.model).total < 1e7
    assert config.train.max_minutes == 3
    assert config.data.source == "stdlib"


def test_servable_has_nothing_that_qwen3_next_has_not() -> None:
    config = read("servable", vocab_size=4096)
    plain = {"ngram_buckets": (), "logit_cap": 0.0, "learned_positions": 0, "mup_base_width": None}
    assert {name: getattr(config.model, name) for name in plain} == plain
    assert [block.mixer.kind for block in config.model.layers] == ["gdn", "gdn", "gdn", "mha"]
    assert {type(block.ffn).__name__ for block in config.model.layers} == {"DenseConfig"}
    assert count_parameters(config.model).total == 4_474_456
    assert config.train.max_minutes == read("quickstart", vocab_size=4096).train.max_minutes


TOYS = {
    # total parameters, length of a row, spare blocks
    "toy-mqar": (25_024, 64, {"mla", "swa", "gdn"}),
    "toy-induction": (37_120, 64, {"mla", "latent", "gdn"}),
    "toy-state-tracking": (21_540, 32, {"mha"}),
}


@pytest.mark.parametrize("name", TOYS)
def test_the_toys_are_small_models_of_a_task_without_ffns_and_with_larger_initial_weights(name: str) -> None:
    """Half of 1/√width, as at 0.02 the toys do not learn in 400 steps; every spare block counts and builds too."""
    total, length, spare = TOYS[name]
    config = resolve(name, {}).config
    task = config.data.task
    assert task is not None
    assert task.length == config.train.block_size == length
    model = with_vocabulary(config.model, config.data)
    assert (model.width, model.init_std, model.vocab_size) == (64, 0.5 / 64**0.5, task.vocab_size + 1)
    assert all(block.ffn.is_absent for block in model.layers)
    assert (config.train.lr, config.train.optimizer.kind, config.train.precision) == (4e-3, "adamw", "fp32")
    assert count_parameters(model).total == total
    assert set(load_file(recipe_path(name))[0]["spare"]) == spare
    for block in spare:
        other = with_vocabulary(resolve(name, {"pattern": block}).config.model, config.data)
        assert [each.ffn.is_absent for each in other.layers] == [True]
        assert count_parameters(other).total == sum(p.numel() for p in other.build().parameters())


def test_shakespeare_char_has_nano_gpts_cpu_settings_at_twice_its_learning_rate() -> None:
    config = read("shakespeare-char", vocab_size=65)
    model, train = config.model, config.train
    assert (model.depth, model.width, model.learned_positions, model.dropout) == (4, 128, 64, 0.0)
    assert {(block.mixer.kind, block.mixer.n_heads, block.mixer.rope) for block in model.layers} == {("mha", 4, None)}
    assert (train.batch_size, train.block_size, train.steps, train.warmup * train.steps) == (12, 64, 2000, 100)
    assert (train.lr, train.lr * train.min_lr_ratio, train.optimizer.betas) == (2e-3, 2e-4, (0.9, 0.99))
    # nanoGPT's count for these settings: 0.80 M, of which the positions are 8,192
    assert count_parameters(model).total - 64 * 128 == 795_904


def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='no recipe of that name; did you mean "quickstart"'):
        recipe_path("quikstart")
    with pytest.raises(UsageError, match=r"there are: base, gpt2, .*, medium"):
        recipe_path("zzz")
    with pytest.raises(UsageError, match=r"gone\.toml: no such file"):
        recipe_path(str(tmp_path / "gone.toml"))


def test_a_users_own_file_is_a_recipe_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("")
    assert recipe_path(str(file)) == file
