"""Flags are the configs' own fields, and each changes exactly what it says."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from swamla.cli.flags import parse
from swamla.cli.overrides import flags
from swamla.cli.run_config import read_recipe
from swamla.config import field_types, to_plain
from swamla.data.config import DataConfig
from swamla.errors import ConfigError, UsageError
from swamla.model import MixerConfig, count_parameters
from swamla.recipes import recipe_names
from swamla.registry import members_of
from swamla.train.config import RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Nothing of its own."""


OURS = [kind for kind, mixer in members_of(MixerConfig).items() if mixer.__module__.startswith("swamla.")]
ADAMW = "--optimizer adamw"  # whatever the recipe has


def resolve(line: str, recipe: str = "quickstart") -> RunConfig:
    _, given = parse(Arguments, line.split(), command="swamla train", more=flags())
    return read_recipe(recipe, given)


def differences(a: Any, b: Any, path: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return {d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{path}.{key}")}
    return set() if a == b else {path.removeprefix(".")}


def changed(line: str) -> set[str]:
    return differences(to_plain(resolve(ADAMW)), to_plain(resolve(f"{ADAMW} {line}")))


def test_every_field_of_training_and_data_has_its_flag() -> None:
    names = set(flags())
    assert set(field_types(TrainConfig)) <= names
    assert set(field_types(DataConfig)) - {"source", "mixture"} | {"data"} <= names  # tables are for recipes


def test_every_flag_says_what_it_is_for_and_nothing_else() -> None:
    helps = {name: flag.help for name, flag in flags().items()}
    assert [name for name, text in helps.items() if not text] == []
    assert helps["swa_sinks"].endswith("it sees as well")  # the last label of its docstring, before those it inherits
    assert helps["swa_n_heads"] == helps["mha_n_heads"]


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("--lr 1e-4", {"train.lr"}),
        ("--tensorboard", {"train.tensorboard"}),
        ("--wandb_project p --wandb_run_name n", {"train.wandb_project", "train.wandb_run_name"}),
        ("--steps 7 --max_minutes none", {"train.steps", "train.max_minutes"}),
        ("--data notes.txt", {"data.source"}),
        ("--tokenizer byte", {"data.tokenizer"}),
        ("--width 512", {"model.width"}),
        ("--no_tied_head", {"model.tied_head"}),
        ("--no-tied-head", {"model.tied_head"}),
        ("--adamw_betas 0.8,0.9", {"train.optimizer.betas"}),
        ("--swa_window 99", {"model.blocks.swa.mixer.window"}),
        ("--ngram_buckets none", {"model.ngram_buckets"}),
        ("--ngram_buckets 8,16", {"model.ngram_buckets"}),
        ("--gdn_bias", None),
        ("--dense_hidden 640", {f"model.blocks.{name}.ffn.hidden" for name in ("gdn", "swa", "mla")}),
        ("--n_heads 2", {f"model.blocks.{name}.mixer.n_heads" for name in ("gdn", "swa", "mla")}),
        ("--norm rmsnorm", set()),
        ("", set()),
    ],
)
def test_a_flag_changes_its_field_and_nothing_else(line: str, fields: set[str] | None) -> None:
    if fields is None:
        with pytest.raises(UsageError, match="unknown flag --gdn_bias"):
            resolve(line)
    else:
        assert changed(line) == fields


def test_another_kind_of_choice_takes_that_kinds_defaults() -> None:
    train = resolve("--optimizer muon --muon_momentum 0.9 --lr 1e-2", "shakespeare-char").train
    assert to_plain(train.optimizer) == {
        "kind": "muon",
        "momentum": 0.9,
        **{k: v for k, v in to_plain(type(train.optimizer)()).items() if k not in ("kind", "momentum")},
    }
    assert resolve("--norm dyt").model.norm.kind == "dyt"


def test_a_choice_that_a_recipe_names_by_its_kind_alone_takes_flags_too(tmp_path: Path) -> None:
    recipe = tmp_path / "short.toml"
    recipe.write_text(
        "[model]\nwidth = 64\npattern = ['a']\nnorm = 'dyt'\n[model.blocks.a]\nmixer = { kind = 'mha', n_heads = 2 }\n"
        "ffn = 'dense'\n[data]\n[train]\nsteps = 5\noptimizer = 'muon'\n"
    )
    config = resolve("--muon_momentum 0.7 --dense_hidden 32 --dyt_alpha 0.25 --pattern a,swa", str(recipe))
    assert config.train.optimizer.momentum == 0.7
    assert config.model.norm.alpha == 0.25
    assert {name: block.ffn.hidden for name, block in config.model.blocks.items()} == {"a": 32, "swa": 32}
    with pytest.raises(UsageError, match=r"train\.optimizer is muon; add --optimizer adamw"):
        resolve("--adamw_eps 1e-9", str(recipe))


def test_another_source_takes_nothing_over_of_what_the_recipe_said_of_its_own() -> None:
    assert resolve("", "small").data.hub_config == "CC-MAIN-2024-10"
    assert resolve("", "small").data.stream > 0
    elsewhere = resolve("--data stdlib", "small").data
    assert (elsewhere.source, elsewhere.hub_config, elsewhere.stream) == ("stdlib", "", 0)
    assert resolve("--stream 3 --data stdlib", "small").data.stream == 3


def test_another_tokenizer_takes_its_own_vocabulary_unless_told_otherwise() -> None:
    def vocabulary(line: str) -> int:
        return resolve(line, "small").model.vocab_size

    assert vocabulary("--tokenizer byte") == 0
    assert vocabulary("--tokenizer gpt2") == vocabulary("") == 50304  # the recipe's own, rounded up
    assert vocabulary("--tokenizer byte --vocab_size 300") == 300
    assert "vocab_size" in flags()["tokenizer"].help


@pytest.mark.parametrize(
    ("recipe", "line", "warns"),
    [
        ("gpt2", "--pattern latent --n_layers 2", False),
        ("gpt2", "--pattern latent --n_layers 2 --learned_positions 0", True),
        ("gpt2", "--learned_positions 0", True),
        ("gpt2", "--pattern gpt2,swa --learned_positions 0", False),
        ("small", "--pattern latent", True),
        ("small", "--pattern latent,mla", False),
        ("small", "--pattern mha", False),
    ],
)
def test_a_model_that_cannot_tell_the_order_of_its_tokens_is_warned_of(
    recipe: str, line: str, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(line, recipe)
    warning = "swamla: warning: no layer of this model sees the order of tokens: "
    error = capsys.readouterr().err
    assert error.startswith(warning) == warns
    assert error.count("\n") == warns


@pytest.mark.parametrize("mixer", ["latent", "mha", "swa"])
def test_a_block_made_for_a_pattern_has_biases_where_its_neighbour_has(mixer: str) -> None:
    assert resolve(f"--pattern gpt2,{mixer}", "gpt2").model.blocks[mixer].mixer.bias
    assert not resolve(f"--pattern mla,{mixer}", "small").model.blocks[mixer].mixer.bias
    assert resolve("--pattern gpt2,gdn", "gpt2").model.blocks["gdn"].mixer.n_heads == 12


def test_a_pattern_takes_blocks_and_mixers_and_drops_what_it_does_not_name() -> None:
    model = resolve("--pattern 'swa,mha' --n_layers 5".replace("'", "")).model
    assert model.pattern == ("swa", "mha", "swa", "mha", "swa")
    assert set(model.blocks) == {"swa", "mha"}
    assert model.blocks["mha"].mixer.n_heads == model.blocks["swa"].mixer.n_heads
    assert model.blocks["swa"].mixer.window == resolve("").model.blocks["swa"].mixer.window


def test_a_depth_repeats_or_cuts_the_recipes_pattern() -> None:
    pattern = resolve("").model.pattern
    assert resolve("--n_layers 6").model.pattern == (pattern * 2)[:6]
    assert resolve("--n_layers 1").model.pattern == pattern[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lr -1", "train.lr = -1.0 (--lr): must be > 0"),
        ("--lr 0", "train.lr = 0.0 (--lr): must be > 0"),
        ("--lr nan", "train.lr = nan (--lr): must be a finite number"),
        ("--lr 1e400", "train.lr = inf (--lr): must be a finite number"),
        ("--lr fast", "train.lr = 'fast' (--lr): must be a number"),
        ("--batch_size 1.5", "train.batch_size = '1.5' (--batch_size): must be a whole number"),
        ("--steps 10 --warmup 11", "train.warmup = 11.0 (--warmup): must not exceed steps = 10"),
        ("--accumulation 3", "train.accumulation = 3 (--accumulation): must divide batch_size"),
        ("--keep_last 0", "train.keep_last = 0 (--keep_last): must be >= 1"),
        (f"{ADAMW} --adamw_betas 0.9", "train.optimizer.betas = [0.9] (--adamw_betas): must have 2 items"),
        ("--ngram_buckets []", "model.ngram_buckets = '[]' (--ngram_buckets): must be like 8, or none"),
        ("--swa_window 0", "model.blocks.swa.mixer.window = 0 (--swa_window): must be > 0"),
        ("--swa_sinks -1", "model.blocks.swa.mixer.sinks = -1 (--swa_sinks): must be >= 0"),
        ("--precision fp4", "train.precision = 'fp4' (--precision): must be one of auto, fp32, bf16, fp8"),
        ("--held_out_fraction 1.5", "data.held_out_fraction = 1.5 (--held_out_fraction): must be between 0 and 1"),
        ("--tokenizer bpe:3", "data.tokenizer = 'bpe:3' (--tokenizer): vocabulary must be"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_and_flag(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(line)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--n_heads 3", "must divide the width 256"),
        ("--mla_kv_lora_rank 300", "a rank larger than the width 256 compresses nothing"),
        ("--n_layers 0", "--n_layers 0: must be a whole number > 0"),
        ("--n_layers two", "--n_layers two: must be a whole number"),
        ("--pattern gdm", "--pattern: no block or mixer is called 'gdm'; there are: gdn, swa, mla, kda, latent, mha"),
        ("--mha_bias", "--mha_bias: no block of the model has the mixer mha"),
        (f"{ADAMW} --muon_momentum 0.5", "--muon_momentum 0.5: train.optimizer is adamw; add --optimizer muon"),
        ("--swa_windw 3", "unknown flag --swa_windw; did you mean --swa_window?"),
        ("--source notes.txt", "unknown flag --source; did you mean --data?"),
        ("--learning_rate 1", "unknown flag --learning_rate; did you mean --lr?"),
        ("--zzzzzzz 3", "unknown flag --zzzzzzz; --help all lists them"),
        ("--lr 1 --lr 2", "--lr is given twice"),
        ("--lr=1 --lr 2", "--lr is given twice"),
        ("--tied_head --no_tied_head", "--tied_head is given twice"),
        ("--lr", "--lr: expected one argument"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(line: str, message: str) -> None:
    with pytest.raises((ConfigError, UsageError)) as caught:
        resolve(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if "gpt2" not in name])
@pytest.mark.parametrize("share", [1, 2, 4])
def test_a_narrower_model_has_ranks_that_fit_unless_they_are_chosen(recipe: str, share: int) -> None:
    whole = resolve("", recipe)
    narrow = resolve(f"--width {whole.model.width // share}", recipe)
    for name, block in whole.model.blocks.items():
        for field in block.mixer.ranks:
            rank, now = getattr(block.mixer, field), getattr(narrow.model.blocks[name].mixer, field)
            assert now == (rank // share if rank else rank)
    assert count_parameters(replace(narrow.model, vocab_size=64)).total > 0


def test_a_rank_that_is_chosen_is_taken_or_refused_as_it_was_given() -> None:
    assert resolve("--width 64 --mla_kv_lora_rank 48").model.blocks["mla"].mixer.kv_lora_rank == 48
    with pytest.raises(ConfigError, match=r"kv_lora_rank = 96 \(--mla_kv_lora_rank\): a rank larger than the width 64"):
        resolve("--width 64 --mla_kv_lora_rank 96")
    assert resolve("--width 1024").model.blocks["mla"].mixer.kv_lora_rank == 128


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(("line", "recipe"), [("", "shakespeare-char"), ("--width 64", "quickstart")])
def test_a_mixer_that_a_flag_adds_fits_the_width_of_the_model(line: str, recipe: str, kind: str) -> None:
    model = resolve(f"{line} --pattern {kind}", recipe).model
    block = next(iter(model.blocks.values())).mixer
    assert block.kind == kind
    assert all((getattr(block, field) or 0) <= model.width for field in block.ranks)
    assert count_parameters(replace(model, vocab_size=64)).total > 0


def test_an_added_mla_has_the_sizes_that_the_recipes_chose_for_these_widths() -> None:
    added = resolve("--pattern swa,swa,mla", "shakespeare-char").model.blocks["mla"].mixer
    chosen = resolve("", "shakespeare-char-mla").model.blocks["mla"].mixer
    sizes = ("n_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    assert [getattr(added, name) for name in sizes] == [getattr(chosen, name) for name in sizes]


def test_a_size_that_does_not_fit_the_base_model_of_mup_names_that_model() -> None:
    said = r"kv_lora_rank = 128 .*larger than the width 64 .*mup_base_width = 64"
    with pytest.raises(ConfigError, match=said) as caught:
        resolve("--mup_base_width 64")
    assert caught.value.field == "model.blocks.mla.mixer.kv_lora_rank"
    assert resolve("--width 128 --n_heads 2 --mup_base_width 64").model.mup_base_width == 64
