"""Out of memory is told with what a step needs and what each change would save, as the accounting has it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swamla.cli import main
from swamla.errors import OutOfMemory
from swamla.model.accounting import count_parameters
from swamla.train import loop as loop_module
from swamla.train import memory_advice
from swamla.train.memory_advice import Place, advice, training_bytes
from swamla.train.optim import AdamWConfig, LionConfig, MuonConfig

from .helpers import model_of, run, tiny_config

HERE = Place(precision="fp32")
MODEL = model_of("mha", "mha")
CONFIG = tiny_config(model=replace(MODEL, vocab_size=4096))
CUDA_WORDS = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB\nmore"
CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
ERRORS = [torch.OutOfMemoryError(CUDA_WORDS), RuntimeError(CPU_WORDS), MemoryError()]


def saves(config, settings: str) -> int:
    (found,) = [entry.saves for entry in advice(config, HERE) if entry.settings == settings]
    return found


def test_what_a_step_needs_is_weights_gradients_moments_and_activations():
    weights = 4 * count_parameters(CONFIG.model).total
    needs = training_bytes(CONFIG, HERE)
    assert (needs["weights"], needs["gradients"], needs["averaged_weights"]) == (weights, weights, 0)
    assert needs["optimizer_state"] >= 2 * weights
    assert training_bytes(changed(ema=0.9), HERE)["averaged_weights"] == weights
    assert training_bytes(CONFIG, Place(precision="bf16"))["activations_estimate"] < needs["activations_estimate"]


def changed(**settings):
    return replace(CONFIG, train=replace(CONFIG.train, **settings))


@pytest.mark.parametrize(
    ("before", "settings", "after"),
    [
        ({}, "accumulation = 2", {"accumulation": 2}),
        ({}, "accumulation = 4", {"accumulation": 4}),
        ({}, "checkpointing = all", {"checkpointing": "all"}),
        ({"checkpointing": "attention"}, "checkpointing = all", {"checkpointing": "all"}),
        ({}, "adamw_moments = bf16", {"optimizer": AdamWConfig(moments="bf16")}),
        ({}, "adamw_moments = 8bit", {"optimizer": AdamWConfig(moments="8bit")}),
        ({"optimizer": LionConfig()}, "lion_moments = bf16", {"optimizer": LionConfig(moments="bf16")}),
        ({"ema": 0.9}, "ema = none", {"ema": None}),
        ({"accumulation": 4}, "block_size = 16", {"block_size": 16}),
    ],
)
def test_a_change_saves_what_the_accounting_says_it_does(before, settings, after):
    first, second = (sum(training_bytes(changed(**kw), HERE).values()) for kw in (before, before | after))
    assert saves(changed(**before), settings) == first - second > 0


def test_bf16_is_advised_where_the_machine_has_it_and_changes_that_keep_the_numbers_come_first(monkeypatch):
    for has, expected in ((True, True), (False, False)):
        monkeypatch.setattr(memory_advice, "has_bf16", lambda device, has=has: has)
        assert ("precision = bf16" in [entry.settings for entry in advice(CONFIG, HERE)]) == expected
    found = advice(CONFIG, HERE)
    exact = [entry.settings.startswith(("accumulation", "checkpointing")) for entry in found]
    assert exact == sorted(exact, reverse=True)


def test_of_several_processes_each_has_its_rows_and_may_hold_a_part_of_the_model():
    four = replace(HERE, ranks=4)
    whole, ranks = training_bytes(CONFIG, HERE), training_bytes(CONFIG, four)
    assert ranks["activations_estimate"] == whole["activations_estimate"] / 4
    assert ranks["weights"] == whole["weights"]
    parts = training_bytes(CONFIG, replace(four, shards=4))
    for name in ("weights", "gradients", "optimizer_state"):
        assert parts[name] == whole[name] // 4
    (found,) = [entry for entry in advice(CONFIG, four) if entry.settings == "parallel = fsdp"]
    assert found.saves == sum(ranks.values()) - sum(parts.values())
    flags = [entry.settings for entry in advice(CONFIG, replace(four, shards=4))]
    assert not [flag for flag in flags if flag.startswith(("accumulation", "parallel"))]  # one row each: no less


def test_copies_that_accumulate_hold_the_gradient_twice_and_those_that_do_not_hold_it_once():
    weights = 4 * count_parameters(CONFIG.model).total
    two = replace(HERE, ranks=2)
    assert training_bytes(CONFIG, two)["gradients"] == weights
    assert training_bytes(changed(accumulation=2), two)["gradients"] == 2 * weights
    assert training_bytes(changed(accumulation=2), replace(two, shards=2))["gradients"] == weights
    assert training_bytes(changed(accumulation=2), HERE)["gradients"] == weights


def test_nothing_is_advised_that_is_done_already_or_saves_nothing():
    least = changed(
        accumulation=4, checkpointing="all", optimizer=MuonConfig(), block_size=1, curriculum="", precision="bf16"
    )
    assert advice(least, Place(precision="bf16")) == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_that_runs_out_of_memory_ends_with_the_advice(error, dataset, tmp_path, monkeypatch):
    def step(*_):
        raise error

    monkeypatch.setattr(loop_module, "training_step", step)
    with pytest.raises(OutOfMemory) as caught:
        run(tiny_config(MODEL), tmp_path / "run", dataset)
    assert str(caught.value).startswith("out of memory on cpu: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    need, *found = caught.value.__notes__
    assert need.startswith("a training step needs about ")
    assert {"accumulation", "checkpointing"} <= {line.split()[0] for line in found}
    assert all("saves about" in line for line in found)


def test_another_error_is_left_as_it_is(dataset, tmp_path, monkeypatch):
    def step(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop_module, "training_step", step)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        run(tiny_config(), tmp_path / "run", dataset)


def test_the_command_line_says_it_without_a_traceback_and_takes_the_advice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"line {i} and its square {i * i}\n" for i in range(300)))
    real, failed = loop_module.training_step, []

    def step(state, batch, config, *rest):
        if config.checkpointing == "none":
            failed.append(state.step)
            raise torch.OutOfMemoryError(CUDA_WORDS)
        return real(state, batch, config, *rest)

    monkeypatch.setattr(loop_module, "training_step", step)
    line = (
        "train quickstart --data text.txt --tokenizer byte --cache_dir cache --pattern swa,swa --width 16 --n_heads 2 "
        "--batch_size 2 --block_size 32 --max_minutes none --steps 1 --threads 1 --output_dir"
    )
    assert main([*line.split(), "run"]) == 2
    first, *notes = capsys.readouterr().err.splitlines()
    assert first.startswith("swamla: error: out of memory on cpu: CUDA out of memory. Tried to allocate 20.00 GiB")
    assert all(note.startswith("swamla: ") for note in notes)
    assert any(note.startswith("swamla: --checkpointing all ") for note in notes)
    assert main([*line.split(), "again", "--checkpointing", "all"]) == 0
    assert failed == [0]


@pytest.mark.gpu
def test_on_cuda_a_profiled_run_leaves_a_snapshot_of_its_allocations(dataset, tmp_path, monkeypatch):
    def step(state, *_):
        torch.empty(1 << 50, dtype=torch.uint8, device=state.device)

    monkeypatch.setattr(loop_module, "training_step", step)
    with pytest.raises(OutOfMemory) as caught:
        run(tiny_config(device="cuda", profile=True), tmp_path / "run", dataset)
    file = tmp_path / "run/profile/out-of-memory.pickle"
    assert file.stat().st_size > 0
    assert str(file) in caught.value.__notes__[-1]
    torch.cuda.memory._record_memory_history(enabled=None)
