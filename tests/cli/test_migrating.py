"""docs/migrating.md: each of our commands that it puts beside one of the former projects can be given as it stands.

A command that trains is resolved to the run's config; a launcher is run with a stand-in for Python, and what it would
have started is resolved; any other command is parsed by its own parser. Nothing trains, nothing is fetched.
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from swamla.cli.flags import parse
from swamla.cli.original import translate
from swamla.cli.overrides import flags
from swamla.cli.run_config import read_recipe, resolve
from swamla.cli.running import resumed_folder
from swamla.cli.train import Arguments, _is_from_hub, named_folder
from swamla.config import to_plain
from swamla.errors import UsageError
from swamla.model import count_parameters
from swamla.train.config import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
RUNS = {"out-mla": "gpt2-latent", "runs/before": "moe-2b"}  # that commands of the page continue, and their recipes


def cells(first: str) -> list[list[str]]:
    """The rows of all tables whose first column is called so."""
    rows: list[list[str]] = []
    inside = False
    for line in PAGE.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(row) and (inside or row[0] == first)
        if inside and row[0] != first and not set(row[0]) <= set("- "):
            rows.append(row)
    return rows


def ours(row: list[str]) -> list[str]:
    """The commands of a row's second cell; "as it is" is the first cell's."""
    theirs, here = row[0].strip("`"), row[1]
    return [theirs if part == "as it is" else part.strip("`") for part in here.split("<br>")]


ROWS = cells("there")
KEYS = cells("key")
# What its train_mla.py sets, and a config file or the command line may override.
NANOGPT = {
    *("out_dir", "eval_interval", "log_interval", "eval_iters", "eval_only", "always_save_checkpoint", "init_from"),
    *("wandb_log", "wandb_project", "wandb_run_name", "dataset", "gradient_accumulation_steps", "batch_size"),
    *("block_size", "n_layer", "n_head", "n_embd", "n_latent", "dropout", "bias", "learning_rate", "max_iters"),
    *("weight_decay", "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr"),
    *("backend", "device", "dtype", "compile"),
}
PAIRS = [(row[0].strip("`"), command) for row in ROWS for command in ours(row)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs that the page continues, and a Python that writes its words into a file."""
    for name, recipe in RUNS.items():
        flags_given = {"local_mixer": "gdn"} if recipe == "moe-2b" else {}
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(to_plain(read_recipe(recipe, flags_given))))
        (tmp_path / name / "checkpoints").mkdir()
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "${0%/*}/words"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Resolved(Exception):
    """Raised in place of the work of a command whose words were accepted; holds what they mean."""


def stopping(made: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*arguments: Any, **settings: Any) -> Any:
        raise Resolved(made(*arguments, **settings))

    return stop


def resolved(command: str, home: Path) -> Any:
    """What a command of ours means: the config of the run that it trains; of others what their parser gives."""
    words = shlex.split(command)
    environment = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=.*", word))
    program, *rest = words[len(environment) :]
    if program == "torchrun":
        launch = get_args_parser().parse_args(rest)
        assert (launch.module, launch.training_script) == (True, "swamla")
        config = resolved(shlex.join(["swamla", *launch.training_script_args]), home)
        processes = int(launch.nproc_per_node) * int(launch.nnodes.partition(":")[0])
        assert config.train.batch_size % (processes * config.train.accumulation) == 0
        return config
    if program.startswith("scripts/"):
        stands_in = {"PYTHON": str(home / "python"), "GPUS": "1", "HF_TOKEN": "x"}
        environment = os.environ | stands_in | environment
        subprocess.run([str(ROOT / program), *rest], env=environment, check=True)
        script, *rest = (home / "words").read_bytes().decode().split("\0")[:-1]
        assert Path(script).resolve() == ROOT / "train.py"
        return train_config(translate(rest)[0])
    if program == "python":
        assert rest[0] == "train.py"
        return train_config(translate(rest[1:])[0])
    assert program == "swamla"
    name, *rest = rest
    return train_config(rest) if name == "train" else arguments_of(name, rest)


def train_config(words: list[str]) -> RunConfig:
    """The config of `swamla train` with these words."""
    arguments, given = parse(Arguments, words, command="swamla train", more=flags())
    if _is_from_hub(arguments, given):
        return resolve("quickstart", given).config  # that of the run that is fetched, in truth
    if "resume" not in given:
        return resolve(arguments.recipe or "quickstart", given, new=True).config
    folder = resumed_folder(arguments.resume, *named_folder(arguments, arguments.recipe or "quickstart"))
    return resolve(str(folder / "config.json"), given).config


def arguments_of(name: str, words: list[str]) -> Any:
    """What a command's own call of `parse` makes of the words; of `prepare` the config of the data it would read."""
    module = import_module(f"swamla.cli.{name}")
    with pytest.MonkeyPatch.context() as patch:
        if name == "prepare":
            patch.setattr(module, "read_data", stopping(lambda config, *_, **__: config))
        else:
            patch.setattr(module, "parse", stopping(parse))
        with pytest.raises(Resolved) as caught:
            module.main(words)
    return caught.value.args[0]


@pytest.mark.parametrize("command", sorted({command for _, command in PAIRS}))
def test_each_of_our_commands_resolves(command: str, home: Path) -> None:
    assert resolved(command, home) is not None


COMMANDS_BEFORE = [
    "train_swa_mla.sh",
    "train_swa_mla_latent_deltanet.sh",
    "train.py",
    "test_setup.py",
    "data/shakespeare_char/prepare.py",
    "data/openwebtext/prepare.py",
    "train_mla.py config/train_gpt2_mla.py",
    "sample_mla.py",
    "test_shakespeare_quick.py",
    "find_induction_heads.py",
]


@pytest.mark.parametrize("program", COMMANDS_BEFORE)
def test_every_command_of_the_former_projects_has_a_row(program: str) -> None:
    assert any(re.search(rf"(^|[\s/]){re.escape(program)}\b", row[0].strip("`")) for row in ROWS)


SAME = [ours(row) for row in ROWS if "the two are the same run" in row[2]]


@pytest.mark.parametrize("commands", SAME, ids=lambda commands: commands[-1][:40])
def test_two_commands_called_the_same_run_have_one_config(commands: list[str], home: Path) -> None:
    first, second = (resolved(command, home) for command in commands)
    assert first == second
    assert first != resolved("swamla train small", home)


def test_there_are_commands_called_the_same_run() -> None:
    assert [len(commands) for commands in SAME] == [2, 2, 2]


LAUNCHED = [pair for pair in PAIRS if pair[0].startswith("torchrun") and " train.py " in pair[0]]


@pytest.mark.parametrize(("theirs", "command"), LAUNCHED)
def test_a_launch_of_train_py_has_as_many_rows_a_step_as_it_had(theirs: str, command: str, home: Path) -> None:
    launch = get_args_parser().parse_args(shlex.split(theirs)[1:])
    words = launch.training_script_args
    said = dict(pairwise(words))
    accumulation = int(said.get("--gradient_accumulation_steps", 1))
    before, now = train_config(translate(words)[0]), resolved(command, home)
    assert now.train.batch_size == int(said["--batch_size"]) * accumulation * int(launch.nproc_per_node)
    assert now.train.accumulation == accumulation
    assert now.train == replace(before.train, batch_size=now.train.batch_size)
    assert now.data == before.data


@pytest.mark.parametrize(
    ("program", "processes", "accumulation"),
    [("python train_mla", 1, 80), ("--standalone", 8, 10), ("--nnodes=2", 16, 5)],
)
def test_gpt2_with_latent_attention_has_the_settings_of_its_config_file(
    program: str, processes: int, accumulation: int, home: Path
) -> None:
    (command,) = (c for theirs, c in PAIRS if program in theirs and theirs.endswith("config/train_gpt2_mla.py"))
    config = resolved(command, home)
    train, optimizer, model = config.train, config.train.optimizer, config.model
    assert train.batch_size == 6 * 80
    assert train.batch_size // (train.accumulation * processes) == 6
    assert train.accumulation == accumulation
    assert (train.steps, train.warmup, train.lr) == (600_000, 2000, 6e-4)
    assert train.min_lr_ratio * train.lr == pytest.approx(6e-5)
    assert (optimizer.kind, optimizer.betas, train.weight_decay, train.grad_clip) == ("adamw", (0.9, 0.95), 0.1, 1.0)
    assert (train.schedule, train.block_size, train.eval_interval, train.log_interval) == ("cosine", 1024, 1000, 10)
    assert (train.save_interval, train.compile) == (1000, "none")
    assert (train.wandb_project, train.wandb_run_name) == ("gpt2mla", "gpt2-124M-mla")
    assert (model.width, len(model.pattern), model.vocab_size, model.learned_positions) == (768, 12, 50257, 1024)
    (block,) = model.blocks.values()
    mixer = block.mixer
    assert (mixer.kind, mixer.n_heads, mixer.latent_dim(768), mixer.bias) == ("latent", 12, 384, False)
    assert (block.ffn.activation, block.ffn.bias, model.norm.bias, model.dropout) == ("gelu", False, False, 0.0)
    assert (config.data.source, config.data.tokenizer, config.data.stream) == ("hf:Skylion007/openwebtext", "gpt2", 0)


def test_the_page_counts_both_models(home: Path) -> None:
    (command,) = (c for theirs, c in PAIRS if theirs == "python train_mla.py config/train_gpt2_mla.py")
    here = count_parameters(resolved(command, home).model).total
    width, latent, mlp = 768, 384, 4 * 768
    block = (
        3 * width * latent + 2 * width * width + 2 * width * mlp + 2 * width
    )  # latent, key, value; query, out; norms
    there = (50257 + 1024) * width + 12 * block + width
    assert f"has {here:,} parameters here and {there:,} there" in PAGE.replace("\n", " ")


def test_openwebtext_is_prepared_as_it_is_trained_on(home: Path) -> None:
    (prepare,) = (c for theirs, c in PAIRS if theirs == "python data/openwebtext/prepare.py")
    (train,) = (c for theirs, c in PAIRS if theirs == "python train_mla.py config/train_gpt2_mla.py")
    assert resolved(prepare, home) == resolved(train, home).data


def test_shakespeare_has_the_size_that_its_config_file_gave_it(home: Path) -> None:
    (command,) = (c for theirs, c in PAIRS if theirs.endswith("train_shakespeare_char_mla.py"))
    config = resolved(command, home)
    train, model = config.train, config.model
    assert (train.batch_size, train.block_size, train.steps, train.lr, train.warmup) == (64, 256, 5000, 1e-3, 100)
    assert (train.min_lr_ratio, train.optimizer.betas, train.eval_interval) == (0.1, (0.9, 0.99), 250)
    assert (len(model.pattern), model.width, model.dropout, model.learned_positions) == (6, 384, 0.2, 256)
    (block,) = model.blocks.values()
    assert (block.mixer.n_heads, block.mixer.latent_dim(384), block.mixer.bias, block.ffn.bias) == (
        6,
        192,
        False,
        False,
    )


@pytest.mark.parametrize("row", KEYS, ids=lambda row: row[0])
def test_what_stands_for_keys_of_nanogpt_are_flags_that_hold_beside_its_recipe(row: list[str]) -> None:
    words = shlex.split(row[1].strip("`"))
    _, given = parse(Arguments, words, command="swamla train", more=flags())
    assert len(given) == sum(word.startswith("--") for word in words) > 0
    assert train_config(["gpt2-latent", *words])


def test_every_key_of_nanogpts_training_is_on_the_page() -> None:
    named = {key for row in KEYS for key in re.findall(r"`(\w+)", row[0])}
    assert named | {"eval_only", "backend", "init_from"} == NANOGPT
    for key in ("`eval_only`", "`backend`", "--init_from=resume"):
        assert key in PAGE


@pytest.mark.parametrize("flag", ["use_engram", "use_wedlm", "use_mup", "use_neural_memory"])
def test_what_is_not_taken_over_is_refused_with_the_reason(flag: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown flag --{flag}; swamla has no"):
        translate([f"--{flag}"])


def test_train_py_without_a_size_is_quickstart(home: Path) -> None:
    assert train_config(translate(["--max_iters", "7"])[0]) == train_config(["quickstart", "--steps", "7"])


def test_the_page_names_no_file_that_is_not_there() -> None:
    for path in re.findall(r"`((?:scripts|docs|tests)/[\w/.]+)`", PAGE):
        assert (ROOT / path).is_file(), path
