"""A time-boxed recipe fitted to the machine's speed: the measured size, told, and never against what a flag says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from swamla.cli import fitting
from swamla.cli.fitting import CHOSEN, SIZES, fitted, size_for
from swamla.cli.run_config import resolve
from swamla.data.preparing import prepare
from swamla.model.accounting import count_parameters
from swamla.train import speed
from swamla.train.speed import tokens_per_second

RECIPE = resolve("quickstart", {}).config


def dataset_of(tmp_path: Path) -> Any:
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"document {index} " * 60, encoding="utf-8")
    flags = {
        "source": str(tmp_path),
        "tokenizer": "byte",
        "cache_dir": str(tmp_path / "cache"),
        "held_out_fraction": 0.2,
    }
    return prepare(resolve("quickstart", flags).config.data)


def test_sizes_begin_at_any_speed_and_grow_with_it() -> None:
    assert SIZES[0].tokens == 0
    assert [size.tokens for size in SIZES] == sorted({size.tokens for size in SIZES})
    parameters = [
        count_parameters(resolve("quickstart", {"vocab_size": 4096, **size.flags}).config.model).total for size in SIZES
    ]
    assert parameters == sorted(set(parameters))
    assert any("width" not in size.flags for size in SIZES)  # the recipe's own


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size.tokens))
def test_the_size_changes_where_it_was_measured_to(size: fitting.Size) -> None:
    assert size_for(size.tokens) is size
    assert size_for(size.tokens + 1) is size
    if size.tokens:
        assert size_for(size.tokens - 1) is SIZES[SIZES.index(size) - 1]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size.tokens))
def test_a_machine_of_a_speed_gets_its_size_and_is_told(
    size: fitting.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = size.tokens + 30_000
    monkeypatch.setattr(fitting, "tokens_per_second", lambda *_: tokens / 180)
    said: list[str] = []
    config = fitted(RECIPE, "quickstart", {}, None, said.append)  # type: ignore[arg-type]
    assert config == resolve("quickstart", {**size.flags, **fitting.NORMUON}).config
    assert len(said) == 1
    assert f"{tokens / 180:,.0f} tokens a second" in said[0]
    for name, value in {**size.flags, **fitting.NORMUON}.items():
        assert f"--{name} {value}" in said[0]


@pytest.mark.parametrize("flag", sorted(CHOSEN))
def test_a_size_that_was_chosen_stays(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "tokens_per_second", lambda *_: pytest.fail("measured"))
    given: dict[str, Any] = {
        "pattern": "swa mla",
        "local_mixer": "gdn",
        "n_layers": 2,
        "width": 64,
        "n_heads": 2,
        "block_size": 64,
        "accumulation": 2,
        "steps": 5,
    }
    given = {flag: given.get(flag, 2)}
    config = RECIPE if flag == "init_from" else resolve("quickstart", given).config  # there is no run to begin from
    assert fitted(config, "quickstart", given, None, pytest.fail) is config  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"optimizer": "adamw"}, {"muon_normuon": None}], ids=str)
def test_what_the_user_said_of_the_optimizer_stays(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "tokens_per_second", lambda *_: 1000.0)
    config = resolve("quickstart", given).config
    said: list[str] = []
    found = fitted(config, "quickstart", given, None, said.append)  # type: ignore[arg-type]
    assert found.train == config.train
    assert found.model.width == SIZES[0].flags["width"]
    assert "normuon" not in said[0]


def test_another_time_is_predicted_from_the_same_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "tokens_per_second", lambda *_: SIZES[-1].tokens / 180)
    said: list[str] = []
    slow, fast = (
        fitted(resolve("quickstart", given).config, "quickstart", given, None, said.append)  # type: ignore[arg-type]
        for given in ({"max_minutes": 0.1}, {"max_minutes": 30.0})
    )
    assert slow.model.width == SIZES[0].flags["width"]
    assert fast.model == resolve("quickstart", {"max_minutes": 30.0, **SIZES[-1].flags}).config.model
    assert fast.train.max_minutes == 30.0


def test_the_speed_is_of_training_steps_and_leaves_random_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(tmp_path)
    flags = {"width": 32, "n_heads": 2, "batch_size": 2, "block_size": 32, "device": "cpu", "precision": "fp32"}
    config = resolve("quickstart", flags).config
    clock, step = [0.0], speed.training_step

    def timed(*arguments: Any, **named: Any) -> Any:
        result = step(*arguments, **named)
        clock[0] += 5.0 if len(clock) == 1 else 0.5  # the first takes longer
        clock.append(0.0)
        return result

    monkeypatch.setattr(speed, "training_step", timed)
    monkeypatch.setattr(speed.time, "monotonic", lambda: clock[0])
    before = torch.random.get_rng_state()
    assert tokens_per_second(config, dataset) == pytest.approx(2 * 32 / 0.5)
    assert torch.equal(before, torch.random.get_rng_state())
