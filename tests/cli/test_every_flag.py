"""Every flag, generated or of the original project, changes the config it resolves to, and only where it says."""

import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from swamla.cli.flags import Flag, parse
from swamla.cli.original import CYCLE, NO_EFFECT, OTHERS, RENAMED, SWITCHES, refusal, translate
from swamla.cli.original import EXPERTS as EXPERT_FLAGS
from swamla.cli.overrides import flags
from swamla.cli.reshape import SHAPE
from swamla.cli.run_config import read_recipe
from swamla.cli.train import Arguments as Train
from swamla.config import options_of, to_plain
from swamla.errors import ConfigError, UsageError
from swamla.model import MixerConfig
from swamla.registry import members_of

from .test_overrides import Arguments, differences

EVERYTHING = """
[model]
vocab_size = 300
width = 64
pattern = ["mha", "swa", "mla", "gdn", "kda", "latent"]

[model.blocks.mha]
mixer = { kind = "mha", n_heads = 4 }
[model.blocks.swa]
mixer = { kind = "swa", n_heads = 4 }
ffn = { kind = "moe", n_experts = 8, n_activated = 2 }
[model.blocks.mla]
mixer = { kind = "mla", n_heads = 4, kv_lora_rank = 32 }
ffn = { kind = "latent_moe", n_experts = 16, n_activated = 4, ratio = 2 }
[model.blocks.gdn]
mixer = { kind = "gdn", n_heads = 4 }
[model.blocks.kda]
mixer = { kind = "kda", n_heads = 4 }
[model.blocks.latent]
mixer = { kind = "latent", n_heads = 4 }

[data]
source = "stdlib"
tokenizer = "bpe:4096"

[train]
steps = 1000
batch_size = 8
accumulation = 2
block_size = 1024
wandb_project = "p"
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe with every kind of mixer and FFN."""
    recipe = tmp_path_factory.mktemp("recipes") / "everything.toml"
    recipe.write_text(EVERYTHING)
    return str(recipe)


ORIGINAL_NAMES = {*RENAMED, *SWITCHES, *CYCLE, *EXPERT_FLAGS, *OTHERS, *NO_EFFECT}
# Of the flags of the original those that are swamla's own.
SAME = (
    *("batch_size", "block_size", "dropout", "weight_decay", "grad_clip", "seed"),
    *("log_interval", "eval_interval", "save_interval", "wandb_project", "wandb_run_name", "swa_window", "hf_repo_id"),
    *("mla_q_lora_rank", "mla_kv_lora_rank", "mla_qk_nope_head_dim", "mla_qk_rope_head_dim", "mla_v_head_dim"),
)


def resolve(recipe: str, line: str) -> Any:
    """The config of a recipe with the flags of a command line, perhaps the original's."""
    (named, *ours), notes, _ = translate([recipe, *line.split()])
    assert named == recipe
    for note in notes:
        print(f"swamla: {note}", file=sys.stderr)
    _, given = parse(Arguments, ours, command="swamla train", more=flags(), refusal=refusal)
    return to_plain(read_recipe(recipe, given))


def quickly(recipe: str, line: str) -> Any:
    """The same, of a line of our own flags."""
    _, given = parse(Arguments, line.split(), command="swamla train", more=flags())
    return to_plain(read_recipe(recipe, given))


def changed(recipe: str, base: str, line: str) -> set[str]:
    """Dotted fields that `line` changes beyond what `base` says, a block's name as *."""
    original = re.search(rf"--(no_)?({'|'.join(ORIGINAL_NAMES)})\b", f"{base} {line}")
    read = resolve if original else quickly
    found = differences(read(recipe, base), read(recipe, f"{base} {line}"))
    return {re.sub(r"^model\.blocks\.\w+\.", "model.blocks.*.", field) for field in found}


MEANT_OF = {  # what these say more about, which has to be there
    "wandb_run_name": "--wandb_project p",
    "init_checkpoint": "--init_from run",
    "lora_alpha": "--lora 4",
    "template": "--data chat:x --tokenizer byte",
    "on_long_row": "--data chat:x --tokenizer byte",
    "hub_config": "--data hf:owner/name",
    "hub_revision": "--data hf:owner/name",
    "hub_split": "--data hf:owner/name",
    "swa_sink_logit": "--swa_sinks 0",
    "lr_head": "--no_tied_head",
    "weight_decay_head": "--no_tied_head",
    "moe_groups_used": "--moe_groups 4",
    "latent_moe_groups_used": "--latent_moe_groups 4",
    "tokenizer": "--vocab_size 5000",  # else another takes its own
}


def candidates(flag: Flag) -> list[str]:
    """Values to try, as text: one of them is sure to be allowed, and another than what the config has."""
    found: list[str] = []
    for option in options_of(flag.annotation):
        if get_origin(option) is Literal:
            found += [str(value) for value in get_args(option)]
        elif get_origin(option) is tuple:
            found += ["64,128"] if get_args(option)[0] is int else ["0.7,0.8"]
        elif option is int:
            found += ["2", "1", "16", "64", "512", "2048"]
        elif option is float:
            found += ["0.125", "0.5", "3e-3", "3"]
        elif option is str:
            found += ["reference", "byte", "512:1M,1024:inf", "2:0.5,8:inf", "me/mine", "latest"]
    return found


def lines(flag: Flag) -> list[str]:
    if flag.annotation is bool:
        return [f"--{flag.name}", f"--no_{flag.name}"]
    return [f"--{flag.name} {value}" for value in candidates(flag)]


def chosen_first(flag: Flag) -> str:
    """What has to be said before a flag means something, as --optimizer lion before --lion_moments."""
    if flag.name in MEANT_OF:
        return MEANT_OF[flag.name]
    _section, name, *rest = flag.field.split(".")
    kind = flag.name.removesuffix(f"_{rest[-1]}") if rest else ""
    return f"--{name} {kind}" if rest and name != "blocks" and rest != ["kind"] else ""


@pytest.mark.parametrize("name", [name for name in flags() if name not in SHAPE])
def test_a_generated_flag_changes_its_field_and_nothing_else(name: str, everything: str) -> None:
    flag = flags()[name]
    tried: dict[str, set[str]] = {}
    for line in lines(flag):
        try:
            tried[line] = changed(everything, chosen_first(flag), line)
        except (ConfigError, UsageError):
            continue
    expected = flag.field.removesuffix(".kind")
    hits = [fields for fields in tried.values() if fields]
    if name == "width":  # ranks scale with a smaller one
        ranks = {f"model.blocks.*.mixer.{rank}" for mixer in members_of(MixerConfig).values() for rank in mixer.ranks}
        hits = [fields - ranks for fields in hits]
    assert hits, f"no value changes anything: {tried}"
    assert all(field == expected or field.startswith(f"{expected}.") for fields in hits for field in fields), tried


def test_the_parser_takes_every_flag_at_once_and_knows_which_were_given() -> None:
    words = {name: lines(flag)[0].replace(" ", "=", 1) for name, flag in flags().items()}
    _, given = parse(Arguments, list(words.values()), command="swamla train", more=flags())
    assert given.keys() == flags().keys()


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("1", 1), ("7", 7)])
def test_workers_are_processes_that_tokenize(text: str, count: int) -> None:
    assert translate(["--num_workers", text])[0] == [f"--workers={count}"]
    assert translate([])[0] == []
    with pytest.raises(UsageError, match="--num_workers many: must be a whole number"):
        translate(["--num_workers", "many"])
    with pytest.raises(UsageError, match="--num_workers -1: must be a whole number >= 0"):
        translate(["--num_workers", "-1"])


FFN = "model.blocks.*.ffn"
MLA_MOE = "--use_latent_moe"
ORIGINAL: dict[str, tuple[str, str, set[str]]] = {  # flag: (said before, line, fields it changes)
    "optimizer_type": ("", "--optimizer_type fp8_adamw", {"train.optimizer.moments"}),
    "use_moe": ("", "--use_moe", {FFN}),
    "use_latent_moe": ("", "--use_latent_moe", {FFN}),
    "no_moe": ("", "--no_moe", {FFN}),
    "learning_rate": ("", "--learning_rate 1e-4", {"train.lr"}),
    "max_iters": ("", "--max_iters 500", {"train.steps"}),
    "warmup_iters": ("", "--warmup_iters 7", {"train.warmup"}),
    "min_lr": ("--learning_rate 1e-3", "--min_lr 2e-4", {"train.min_lr_ratio"}),
    "beta1": ("", "--beta1 0.8", {"train.optimizer.betas"}),
    "beta2": ("", "--beta2 0.99", {"train.optimizer.betas"}),
    "gradient_accumulation_steps": ("", "--gradient_accumulation_steps 4", {"train.accumulation", "train.batch_size"}),
    "gradient_checkpointing": ("", "--gradient_checkpointing", {"train.checkpointing"}),
    "compile_mode": ("", "--compile_mode max-autotune", {"train.compile"}),
    "use_fp8": ("", "--use_fp8", {"train.precision"}),
    "tokenizer_name": ("", "--tokenizer_name some/name", {"data.tokenizer", "model.vocab_size"}),
    "use_ema": ("", "--use_ema", {"train.ema"}),
    "ema_decay": ("", "--ema_decay 0.99", {"train.ema"}),
    "use_progressive": ("", "--use_progressive", {"train.curriculum"}),
    "progressive_schedule": ("", "--progressive_schedule 512:1M,2048:inf", {"train.curriculum"}),
    "swa_sink_size": ("", "--swa_sink_size 8", {"model.blocks.*.mixer.sinks"}),
    "swa_layers_per_cycle": ("", "--swa_layers_per_cycle 3", {"model.pattern"}),
    "local_layers_per_cycle": ("", "--local_layers_per_cycle 1", {"model.pattern"}),
    "mla_layers_per_cycle": ("", "--mla_layers_per_cycle 2", {"model.pattern"}),
    "use_gated_deltanet": ("", "--use_gated_deltanet", {"model.pattern", "model.blocks.swa", "model.blocks.gdn"}),
    "deltanet_latent_dim": (
        "--use_gated_deltanet",
        "--deltanet_latent_dim 64",
        {"model.blocks.*.mixer.latent_dim"},
    ),
    "deltanet_share_qk": ("--use_gated_deltanet", "--deltanet_share_qk", {"model.blocks.*.mixer.share_qk"}),
    "latent_ratio": (MLA_MOE, "--latent_ratio 8", {f"{FFN}.{name}" for name in ("ratio", "n_experts", "n_activated")}),
    "n_experts": (MLA_MOE, "--n_experts 16", {f"{FFN}.n_experts"}),
    "n_activated": (MLA_MOE, "--n_activated 2", {f"{FFN}.n_activated"}),
    "latent_dim": (MLA_MOE, "--latent_dim 128", {f"{FFN}.{name}" for name in ("ratio", "n_experts", "n_activated")}),
    "latent_n_experts": (MLA_MOE, "--latent_n_experts 100", {f"{FFN}.n_experts"}),
    "latent_n_activated": (MLA_MOE, "--latent_n_activated 5", {f"{FFN}.n_activated"}),
    "n_shared_experts": (MLA_MOE, "--n_shared_experts 2", {f"{FFN}.n_shared"}),
    "expert_dim": (MLA_MOE, "--expert_dim 512", {f"{FFN}.expert_hidden"}),
    "router_z_loss_coef": (MLA_MOE, "--router_z_loss_coef 1e-3", {f"{FFN}.z_loss"}),
    "latent_preserve_expert_dim": (MLA_MOE, "--no_latent_preserve_expert_dim", {f"{FFN}.preserve_expert_dim"}),
    "use_tensorboard": ("", "--use_tensorboard", {"train.tensorboard"}),
}


def test_every_flag_of_the_original_is_tried_below_or_said_to_change_nothing() -> None:
    assert set(ORIGINAL) | set(NO_EFFECT) | {"num_workers", "size", "resume_from"} == ORIGINAL_NAMES
    assert set(SAME) | set(RENAMED.values()) - {"resume"} <= set(flags())
    assert set(CYCLE) <= ORIGINAL_NAMES


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_flag_of_the_original_changes_its_fields_and_nothing_else(name: str) -> None:
    before, line, expected = ORIGINAL[name]
    recipe = "moe-1b" if name == "no_moe" else "small"
    found = changed(recipe, before, line)
    if expected == {FFN}:
        assert found
        assert all(field.startswith(f"{FFN}.") for field in found)
    else:
        assert found == expected


@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_flag_that_changes_nothing_says_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert changed("small", "", f"--{name}") == set()
    error = capsys.readouterr().err
    assert error.startswith(f"swamla: --{name} changes nothing: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("--learning_rate 2e-4 --min_lr 1e-5", {"lr": 2e-4, "min_lr_ratio": 0.05}),
        ("--beta1 0.8 --beta2 0.9", {"optimizer.betas": [0.8, 0.9]}),
        ("--batch_size 4 --gradient_accumulation_steps 8", {"batch_size": 32, "accumulation": 8}),
        ("--optimizer_type fp8_lion", {"optimizer.kind": "lion", "optimizer.moments": "bf16"}),
        ("--optimizer_type muon --muon_momentum 0.9", {"optimizer.kind": "muon", "optimizer.momentum": 0.9}),
        ("--use_ema --ema_decay 0.99", {"ema": 0.99}),
        ("--use_progressive --progressive_schedule 512:1M,2048:inf", {"curriculum": "512:1M,2048:inf"}),
        ("--gradient_checkpointing", {"checkpointing": "all"}),
        ("--compile", {"compile": "default"}),
        ("--compile max-autotune", {"compile": "max-autotune"}),
        ("--compile --compile_mode reduce-overhead", {"compile": "reduce-overhead"}),
        ("--use_fp8", {"precision": "fp8"}),
    ],
)
def test_training_flags_of_the_original_mean_what_they_meant(line: str, fields: dict[str, Any]) -> None:
    train = resolve("small", line)["train"]
    for path, value in fields.items():
        found = train
        for part in path.split("."):
            found = found[part]
        assert found == (pytest.approx(value) if isinstance(value, float) else value), path


def test_a_bare_compile_takes_no_recipe_for_its_mode(tmp_path: Path) -> None:
    def read(*words: str) -> tuple[str, str]:
        arguments, given = parse(Train, words, command="swamla train", more=flags())
        return given["compile"], arguments.recipe

    assert read("--compile") == ("default", "")
    assert read("--compile", "small") == ("default", "small")
    assert read("--compile", str(tmp_path)) == ("default", str(tmp_path))
    assert read("--compile", "--lr", "1") == ("default", "")
    assert read("--compile", "default", "small") == ("default", "small")
    with pytest.raises(
        ConfigError, match=r"train.compile = 'fast' \(--compile\): must be one of auto, none, default, "
    ):
        read("--compile", "fast", "small")


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("--n_layers 6 --swa_layers_per_cycle 3 --mla_layers_per_cycle 1", "swa swa swa mla swa swa"),
        ("--n_layers 5 --local_layers_per_cycle 1 --mla_layers_per_cycle 2", "swa mla mla swa mla"),
        ("--n_layers 3 --mla_layers_per_cycle 0", "swa swa swa"),
        ("--n_layers 3 --swa_layers_per_cycle 0", "mla mla mla"),
        ("--n_layers 3 --use_gated_deltanet", "gdn gdn mla"),
        ("--n_layers 4 --use_gated_deltanet --local_layers_per_cycle 1", "gdn mla gdn mla"),
        ("--pattern mla --n_layers 4 --swa_layers_per_cycle 1", "swa mla swa mla"),
        ("--pattern gdn,mha,swa --local_mixer swa", "swa mha swa"),
    ],
)
def test_cycles_and_local_mixers_are_patterns(line: str, pattern: str) -> None:
    model = resolve("small", line)["model"]
    assert model["pattern"] == pattern.split()
    assert set(model["blocks"]) == set(pattern.split())


def test_gated_deltanet_comes_with_the_heads_that_the_recipe_keeps_ready_for_it() -> None:
    for line in ("--local_mixer gdn", "--pattern gdn,gdn,mla", "--use_gated_deltanet"):
        mixer = resolve("base", line)["model"]["blocks"]["gdn"]["mixer"]
        assert (mixer["n_heads"], mixer["head_k_dim"], mixer["head_v_dim"]) == (12, 128, 128)


@pytest.mark.parametrize("line", ["--deltanet_latent_dim 256", "--deltanet_share_qk", "--use_gated_deltanet"])
def test_a_flag_of_deltanet_makes_it_the_local_mixer_unless_there_is_some(line: str) -> None:
    assert resolve("small", f"{line} --n_layers 3")["model"]["pattern"] == ["gdn", "gdn", "mla"]
    if "use" not in line:
        assert resolve("quickstart", line)["model"]["pattern"] == resolve("quickstart", "")["model"]["pattern"]
        assert resolve("small", f"--pattern gdn,swa,mla {line}")["model"]["pattern"] == ["gdn", "swa", "mla"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (
            "--use_gated_deltanet --swa_window 256 --swa_sink_size 4",
            "--swa_window and --swa_sink_size change nothing: ",
        ),
        ("--local_mixer gdn --swa_sink_size 4", "--swa_sink_size changes nothing: "),
        ("--deltanet_share_qk --swa_window 99", "--swa_window changes nothing: "),
        ("--pattern gdn,mla --use_gated_deltanet --swa_window 99", "--swa_window changes nothing: "),
    ],
)
def test_what_is_said_of_windows_where_deltanet_took_their_place_changes_nothing_and_says_so(
    line: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = resolve("small", line)["model"]
    error = capsys.readouterr().err
    assert error.startswith(f"swamla: {named}")
    assert error.count("\n") == 1
    assert {block["mixer"]["kind"] for block in model["blocks"].values()} == {"gdn", "mla"}


def experts(recipe: str, line: str) -> dict[str, Any]:
    return resolve(recipe, line)["model"]["blocks"]["mla"]["ffn"]


def test_expert_numbers_of_the_original_are_multiplied_by_the_ratio_of_a_latent_moe_only() -> None:
    ffn = experts("small", "--use_moe --use_latent_moe --latent_ratio 4 --n_experts 32 --n_activated 3")
    assert (ffn["kind"], ffn["ratio"], ffn["n_experts"], ffn["n_activated"]) == ("latent_moe", 4, 128, 12)
    ffn = experts("small", "--use_latent_moe --latent_ratio 2")
    assert (ffn["n_experts"], ffn["n_activated"]) == (64, 6)
    ffn = experts("small", "--use_moe --n_experts 16 --n_activated 2")
    assert (ffn["kind"], ffn["n_experts"], ffn["n_activated"]) == ("moe", 16, 2)
    ffn = experts("small", "--use_latent_moe --latent_dim 128 --latent_n_experts 100 --latent_n_activated 7")
    assert (ffn["ratio"], ffn["n_experts"], ffn["n_activated"]) == (8, 100, 7)
    ffn = experts("small", "--use_latent_moe --latent_dim 128 --n_experts 10 --n_activated 2 --width 512 --n_heads 8")
    assert (ffn["ratio"], ffn["n_experts"], ffn["n_activated"]) == (4, 40, 8)
    assert experts("moe-1b", "--use_moe")["kind"] == "latent_moe"
    assert experts("moe-1b", "--no_moe")["kind"] == "dense"
    assert resolve("small", "--use_latent_moe")["model"]["blocks"]["swa"]["ffn"]["kind"] == "dense"


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("gpt2", "gpt2"), ("openai-community/gpt2", "gpt2"), ("org/name", "hub:org/name"), ("bpe:512", "bpe:512")],
)
def test_tokenizer_names_are_ours_or_the_hubs(name: str, tokenizer: str) -> None:
    assert resolve("small", f"--tokenizer_name {name}")["data"]["tokenizer"] == tokenizer


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lr 1e-3 --learning_rate 1e-3", "--learning_rate and --lr say the same thing: give one of them"),
        ("--optimizer lion --optimizer_type lion", "--optimizer_type and --optimizer say the same thing"),
        ("--no_moe --use_moe", "--use_moe and --no_moe say the same thing"),
        ("--optimizer_type sgd", "--optimizer_type sgd: must be one of adamw, lion, muon, fp8_adamw, fp8_lion"),
        ("--learning_rate -1", "train.lr = -1.0 (--lr): must be > 0"),
        ("--learning_rate 1e-4 --min_lr 1", "--min_lr 1.0: must be a number between 0 and the learning rate, 0.0001"),
        ("--min_lr little", "--min_lr little: must be a number"),
        ("--beta1 2", "--beta1 2.0: must be a number of at least 0 and below 1"),
        ("--beta2 x", "--beta2 x: must be a number"),
        (
            "--gradient_accumulation_steps 0",
            "--gradient_accumulation_steps 0: must be a whole number > 0, e.g. 4",
        ),
        (
            "--batch_size 0 --gradient_accumulation_steps 4",
            "train.batch_size = 0 (--batch_size): must be >= 1",
        ),
        (f"{MLA_MOE} --latent_ratio 0", "--latent_ratio 0: must be a whole number > 0, e.g. 4"),
        (f"{MLA_MOE} --latent_dim 0", "--latent_dim 0: must be a whole number > 0"),
        (f"{MLA_MOE} --latent_dim 100", "--latent_dim 100: must divide the width 1024"),
        (f"{MLA_MOE} --latent_dim 256 --latent_ratio 4", "--latent_dim and --latent_ratio say the same thing"),
        (f"{MLA_MOE} --latent_n_experts 0", "--latent_n_experts 0: must be a whole number > 0"),
        ("--use_moe --latent_n_experts 9", "--latent_n_experts 9: no mla block of the model has such an FFN"),
        ("--compile fast", "train.compile = 'fast' (--compile): must be one of auto, none, default, reduce-"),
        ("--compile_mode fast", "train.compile = 'fast' (--compile_mode): must be one of auto, none, default"),
        (
            "--n_experts 8",
            "--n_experts 8: no mla block of the model has such an FFN; add --use_moe or --use_latent_moe",
        ),
        (
            "--use_moe --latent_ratio 8",
            "--latent_ratio 8: no mla block of the model has such an FFN; add --use_latent_moe",
        ),
        ("--pattern swa --use_moe", "MoE flags act on the FFNs of mla blocks, and the pattern has none"),
        ("--use_latent_moe --n_experts few", "--n_experts few: must be a whole number"),
        ("--mla_layers_per_cycle -1", "--mla_layers_per_cycle -1: must be a whole number >= 0"),
        ("--swa_layers_per_cycle 0 --mla_layers_per_cycle 0", "--mla_layers_per_cycle 0: a cycle without"),
        ("--local_mixer swa --deltanet_share_qk", "--gdn_share_qk: no block of the model has the mixer gdn"),
        (
            "--local_mixer swa --deltanet_latent_dim 64",
            "--gdn_latent_dim 64: no block of the model has the mixer gdn",
        ),
        ("--pattern mha --deltanet_latent_dim 64", "--local_mixer gdn: no layer of the pattern is local: mha"),
        ("--pattern mha --use_gated_deltanet", "--local_mixer gdn: no layer of the pattern is local: mha"),
        ("--pattern mla --swa_window 64", "--swa_window 64: no block of the model has the mixer swa"),
        ("--pattern mla --swa_sink_size 4", "--swa_sinks 4: no block of the model has the mixer swa"),
        ("--local_mixer mha", "--local_mixer mha: is no local kind of mixer; there are: gdn, kda, swa"),
        ("--pattern mha --local_mixer gdn", "--local_mixer gdn: no layer of the pattern is local: mha"),
        ("--hf_repo_id mine", "train.hf_repo_id = 'mine' (--hf_repo_id): must be USER/NAME, e.g. me/first-try"),
        ("--hf_repo_id hf_A1B2C3D4E5F6", "looks like a secret: keep it out of configs"),
        ("--hf_token secret", "unknown flag --hf_token; the token is read from HF_TOKEN in the environment"),
        ("--use_engram", "unknown flag --use_engram; swamla has no engram memory"),
        ("--use_triton_kernels", "unknown flag --use_triton_kernels; there is no switch for Triton"),
        ("--no_use_moe", "unknown flag --no_use_moe"),
        ("--use_moe --use_moe", "--use_moe is given twice"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(line: str, message: str) -> None:
    with pytest.raises((ConfigError, UsageError)) as caught:
        resolve("small", line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_spare_block_is_checked_even_when_no_flag_puts_it_to_use(everything: str, tmp_path: Path) -> None:
    recipe = tmp_path / "spare.toml"
    recipe.write_text(EVERYTHING + "\n[spare.local.mixer]\nkind = 'gdn'\nn_heads = 0\n")
    with pytest.raises(ConfigError, match=r"spare\.local\.mixer\.n_heads = 0 \(.*spare\.toml:\d+\): must be > 0"):
        resolve(str(recipe), "")
    recipe.write_text(EVERYTHING + "\n[spare.local.mixer]\nkind = 'gdn'\nn_heads = 3\n")
    assert "spare" not in resolve(str(recipe), "")
    with pytest.raises(ConfigError, match=r"n_heads = 3 \(.*spare\.toml:\d+\): must divide the width 64"):
        resolve(str(recipe), "--pattern local")
