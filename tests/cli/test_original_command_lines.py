"""The original project's command lines and scripts, scaled down, train as they are written."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swamla.cli import main
from swamla.cli.flags import parse
from swamla.cli.original import translate
from swamla.cli.overrides import flags
from swamla.cli.run_config import read_recipe
from swamla.cli.train import Arguments
from swamla.train.config import RunConfig
from tests.waiting import PATIENCE, after_start

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"line {i}: the square of {i} is {i * i}, its half is {i // 2}\n" for i in range(400))
SMALL = shlex.split(
    "--data text.txt --tokenizer byte --held_out_fraction 0.1 --vocab_size 257 --n_layers 3 --width 64 --n_heads 4 "
    "--mla_kv_lora_rank 16 --mla_qk_nope_head_dim 8 --mla_qk_rope_head_dim 8 --mla_v_head_dim 8 --max_minutes none "
    "--eval_tokens 512 --threads 1"
)
EXPERTS = ["--latent_moe_expert_hidden", "32", "--latent_moe_shared_hidden", "64"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def steps(folder: Path) -> list[int]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    "line",
    [
        "--size medium --batch_size 2 --block_size 64 --output_dir out --optimizer_type lion --learning_rate 1e-4 "
        "--max_iters 2 --warmup_iters 1 --grad_clip 1.0 --weight_decay 0.1 --gradient_accumulation_steps 2 "
        "--gradient_checkpointing --log_interval 1 --eval_interval 2 --save_interval 2 --num_workers 1 --beta1 0.9 "
        "--beta2 0.95 --min_lr 1e-5 --dropout 0.0 --swa_layers_per_cycle 2 --mla_layers_per_cycle 1 --swa_window 32 "
        "--swa_sink_size 2 --mla_q_lora_rank 0 --use_ema --ema_decay 0.99",
        "--size small --batch_size 2 --block_size 64 --output_dir out --optimizer_type fp8_adamw --max_iters 2 "
        "--warmup_iters 1 --use_gated_deltanet --deltanet_latent_dim 16 --deltanet_share_qk --use_moe --use_latent_moe "
        "--latent_ratio 2 --n_experts 4 --n_shared_experts 1 --n_activated 2 --expert_dim 32 "
        "--latent_preserve_expert_dim --router_z_loss_coef 1e-4",
        "moe-1b --batch_size 2 --block_size 64 --output_dir out --optimizer_type muon --max_iters 2 --warmup_iters 1 "
        "--no_moe --swa_head_dim 16",
    ],
    ids=["every training flag", "latent deltanet and experts", "without the experts of a preset"],
)
def test_a_command_line_of_the_original_trains_scaled_down(
    line: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line.split(), *SMALL], command="original") == 0, capsys.readouterr().err
    assert steps(home / "out") == [1, 2]
    shown = capsys.readouterr().out
    assert "Step 1 | Loss: " in shown or "log_interval" not in line


SCRIPT = (
    "--size medium --batch_size 8 --block_size 2048 --output_dir X --optimizer_type lion --learning_rate 1e-4 "
    "--weight_decay 0.1 --warmup_iters 400 --max_iters 100000 --grad_clip 1.0 --gradient_accumulation_steps 1 "
    "--num_workers 8 --swa_layers_per_cycle 2 --mla_layers_per_cycle 1 --swa_window 256 --swa_sink_size 4 "
    "--mla_q_lora_rank 0 --mla_kv_lora_rank 256 --mla_qk_nope_head_dim 128 --mla_qk_rope_head_dim 64 "
    "--mla_v_head_dim 128 --tokenizer_name openai-community/gpt2 --log_interval 10 --eval_interval 5000 "
    "--save_interval 20000 --use_fp8 --gradient_checkpointing --use_tensorboard"
)
LATENT = "--latent_ratio 4 --latent_preserve_expert_dim --n_experts 32 --n_activated 3"
TRAINING = {
    "batch_size": 8,
    "block_size": 2048,
    "lr": 1e-4,
    "weight_decay": 0.1,
    "warmup": 400,
    "steps": 100000,
    "accumulation": 1,
    "precision": "fp8",
    "checkpointing": "all",
    "tensorboard": True,
    "save_interval": 20000,
}


def taken(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[RunConfig, dict[str, Any], list[str]]:
    """What `swamla train` would train, what `swamla info` tells of it, and the lines that this says besides."""
    ours, said, _ = translate(line.split())
    assert main(["info", *ours, "--json"]) == 0
    told, warned = capsys.readouterr()
    assert warned == ""
    arguments, given = parse(Arguments, ours, command="swamla train", more=flags())
    return read_recipe(arguments.recipe, given), json.loads(told), [f"swamla: {note}" for note in said]


def test_the_body_of_the_originals_first_script_is_taken_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    config, told, said = taken(SCRIPT, capsys)
    assert said == []
    assert {name: config.train.__dict__[name] for name in TRAINING} == TRAINING
    assert config.train.optimizer.kind == "lion"
    assert config.data.tokenizer == "gpt2"
    assert config.model.pattern == ("swa", "swa", "mla") * 8
    assert told["parameters"]["total"] == 756_559_360  # the preset's own count


def test_the_body_with_deltanet_and_experts_is_taken_and_says_what_changes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = "--use_flash_attention --use_gated_deltanet --compile --use_moe --use_latent_moe"
    config, told, said = taken(f"{SCRIPT} {more} {LATENT}", capsys)
    assert [line.split(" change")[0] for line in said] == [
        "swamla: --use_flash_attention",
        "swamla: --swa_window and --swa_sink_size",
    ]
    assert config.train.compile == "default"
    assert config.model.pattern == ("gdn", "gdn", "mla") * 8
    ffn = told["blocks"]["mla"]["ffn"]
    assert (ffn["kind"], ffn["n_experts"], ffn["n_activated"], ffn["latent"]) == ("latent_moe", 128, 12, 384)


def test_the_body_of_the_second_script_has_deltanet_without_asking_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = SCRIPT.replace("--size medium", "--size moe-2b").replace("--mla_q_lora_rank 0", "--mla_q_lora_rank 256")
    more = "--deltanet_latent_dim 256 --deltanet_share_qk --compile --compile_mode max-autotune"
    config, told, said = taken(f"{line} {more} {LATENT}", capsys)
    assert len(said) == 1
    assert said[0].startswith("swamla: --swa_window and --swa_sink_size change nothing: ")
    assert config.train.compile == "max-autotune"
    assert config.model.pattern == ("gdn", "gdn", "mla") * 6
    assert told["blocks"]["gdn"]["mixer"]["latent_dim"] == 256
    assert told["blocks"]["gdn"]["mixer"]["share_qk"]
    assert told["blocks"]["mla"]["mixer"]["q_lora_rank"] == 256
    assert told["blocks"]["mla"]["ffn"]["n_experts"] == 128


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_the_first_script_trains_a_size_with_train_py_and_goes_on_with_it(home: Path) -> None:
    begun = ("train_swa_mla.sh", "medium", "2", "64", "a run")
    more = ["--", *SMALL, "--warmup_iters", "1"]
    done = script(*begun, *more, "--max_iters", "2", "--log_interval", "1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Step 1 \| Loss: \d\.\d{4} \| LR: 3\.00e-04 \| Tokens/sec: [\d,]+\b", done.stdout, re.MULTILINE)
    assert run_config(home / "a run")["train"]["optimizer"]["kind"] == "adamw"
    done = script(*begun, "true", "adamw", *more, "--max_iters", "3")
    assert done.returncode == 0, done.stderr
    assert steps(home / "a run") == [1, 2, 3]


def test_the_second_script_trains_latent_experts_over_compressed_deltanet_in_two_processes(home: Path) -> None:
    done = script(
        *("train_swa_mla_latent_deltanet.sh", "2", "64", "out", "false", "fp8_lion", "--", *SMALL, *EXPERTS),
        *("--max_iters", "2", "--warmup_iters", "1"),
        LATENT_RATIO="2",
        N_EXPERTS="4",
        DELTANET_LATENT_DIM="16",
        MLA_Q_LORA_RANK="16",
        GPUS="2",
    )
    assert done.returncode == 0, done.stderr
    config = run_config(home / "out")
    assert config["train"]["batch_size"] == 4
    blocks = config["model"]["blocks"]
    assert config["model"]["pattern"] == ["gdn", "gdn", "mla"]
    assert (blocks["gdn"]["mixer"]["latent_dim"], blocks["gdn"]["mixer"]["share_qk"]) == (16, True)
    assert blocks["mla"]["mixer"]["q_lora_rank"] == 16
    ffn = blocks["mla"]["ffn"]
    assert (ffn["kind"], ffn["ratio"], ffn["n_experts"], ffn["n_activated"]) == ("latent_moe", 2, 8, 6)
    assert (config["train"]["optimizer"]["kind"], config["train"]["optimizer"]["moments"]) == ("lion", "bf16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train_swa_mla.sh",), "usage: train_swa_mla.sh SIZE BATCH BLOCK"),
        (("train_swa_mla.sh", "small", "8"), "usage: train_swa_mla.sh SIZE BATCH BLOCK"),
        (("train_swa_mla.sh", "small", "8", "long"), "usage: train_swa_mla.sh SIZE BATCH BLOCK"),
        (("train_swa_mla.sh", "small", "0", "64"), "usage: train_swa_mla.sh SIZE BATCH BLOCK"),
        (("train_swa_mla.sh", *"1234567"), "usage: train_swa_mla.sh SIZE BATCH BLOCK"),
        (("train_swa_mla_latent_deltanet.sh", "8"), "usage: train_swa_mla_latent_deltanet.sh BATCH BLOCK"),
        (("train_swa_mla_latent_deltanet.sh", *"1234567"), "usage: train_swa_mla_latent_deltanet.sh BATCH BLOCK"),
    ],
)
def test_wrong_arguments_end_with_the_usage_and_status_2(arguments: tuple[str, ...], message: str, home: Path) -> None:
    done = script(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert after_start(done.stderr).startswith(message)


def test_a_repository_of_the_hub_without_a_token_is_refused_in_one_line(home: Path) -> None:
    done = script("train_swa_mla_latent_deltanet.sh", "8", "64", "out", "false", "adamw", "me/mine", HF_TOKEN="")
    assert done.returncode == 2
    assert "train.hf_repo_id: pushing needs HF_TOKEN in the environment" in done.stderr
    assert after_start(done.stderr).count("\n") == 1
    assert not (home / "out").exists()


def test_a_switch_that_is_neither_true_nor_false_is_refused(home: Path) -> None:
    done = script("train_swa_mla_latent_deltanet.sh", "8", "64", DELTANET_SHARE_QK="perhaps")
    assert (done.returncode, after_start(done.stderr)) == (2, "DELTANET_SHARE_QK=perhaps: must be true or false\n")
