"""A converted checkpoint is the same checkpoint, whatever its layout; rounded weights are weights alone."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import swamla
from swamla.checkpoint import convert_checkpoint, find_checkpoint, list_checkpoints
from swamla.checkpoint import folder as folder_module
from swamla.cli import main
from swamla.errors import CorruptError, SwamlaError, UsageError
from swamla.model.block import BlockConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.mixers.swa import SWAConfig

from .train.helpers import losses, model_of, run, tiny_config, tiny_dataset


def config_of(**settings):
    ffn = MoEConfig(n_experts=4, n_activated=2, expert_hidden=8, shared_hidden=8)
    swa = BlockConfig(mixer=SWAConfig(n_heads=2, window=8, sinks=2), ffn=ffn)
    model = replace(model_of("gdn", "swa"), blocks=model_of("gdn", "swa").blocks | {"swa": swa})
    return tiny_config(model, ema=0.9, save_interval=2, keep_last=9, eval_interval=4, **settings)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run of 6 steps, whose best is 4."""
    folder = tmp_path_factory.mktemp("home")
    dataset, scores = tiny_dataset(folder / "data"), iter([2.0, 3.0])
    run(config_of(), folder / "run", dataset, evaluate=lambda model: {"loss": next(scores)})
    return folder


def all_tensors(run_dir: Path, which: str) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(run_dir, which)
    return {f"{group}:{n}": t for group in checkpoint.groups() for n, t in checkpoint.tensors(group).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=0, equal_nan=True), name
        assert found[name].dtype == tensor.dtype


def test_there_and_back_again_every_tensor_and_the_state_are_the_same(home: Path, tmp_path: Path) -> None:
    folders = [home / "run", tmp_path / "3", tmp_path / "2", tmp_path / "1"]
    for (source, folder), shards in zip(pairwise(folders), (3, 2, 1), strict=True):
        convert_checkpoint(source, folder, shards=shards)
        found, expected = find_checkpoint(folder), find_checkpoint(home / "run", "best")
        assert found.step == expected.step == 4
        assert found.state == expected.state
        assert_equal(all_tensors(folder, "best"), all_tensors(home / "run", "best"))
        assert len(list_checkpoints(folder / "checkpoints")) == 1
        weights = sorted((found.path / "model").glob("*")) if shards > 1 else [found.path / "model.safetensors"]
        assert len(weights) == shards
    original = (find_checkpoint(home / "run").path / "model.safetensors").stat().st_size
    assert weights[0].stat().st_size == pytest.approx(original, abs=20_000)  # tied weights are still one


def test_a_converted_checkpoint_is_loaded_and_resumed_as_the_original(home: Path, tmp_path: Path) -> None:
    convert_checkpoint(home / "run", tmp_path / "new", which="4", shards=3)
    model, _ = swamla.load(tmp_path / "new")
    assert_equal(model.state_dict(), swamla.load(home / "run", "4")[0].state_dict())
    run(config_of(), tmp_path / "new", tiny_dataset(home / "data"), resume=True)
    assert losses(tmp_path / "new") == losses(home / "run")
    assert_equal(all_tensors(tmp_path / "new", "latest"), all_tensors(home / "run", "latest"))


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_alone_are_what_load_gives_and_bf16_halves_them(home: Path, tmp_path: Path, shards: int) -> None:
    expected = swamla.load(home / "run")[0].state_dict()
    for dtype in ("fp32", "bf16"):
        convert_checkpoint(home / "run", tmp_path / dtype, weights_only=True, dtype=dtype, shards=shards)
        found = swamla.load(tmp_path / dtype)[0].state_dict()
        rounded = {n: t.bfloat16().float() if dtype == "bf16" and t.ndim > 1 else t for n, t in expected.items()}
        assert_equal(found, rounded)
        assert find_checkpoint(tmp_path / dtype).groups() == ["model"]
    files = {dtype: (tmp_path / dtype / "checkpoints").rglob("*.safetensors") for dtype in ("bf16", "fp32")}
    bf16, fp32 = (sum(file.stat().st_size for file in found) for found in files.values())
    assert bf16 < 0.75 * fp32


def test_weights_alone_are_not_resumed(home: Path, tmp_path: Path) -> None:
    convert_checkpoint(home / "run", tmp_path / "new", weights_only=True)
    with pytest.raises(UsageError, match="holds converted weights only"):
        run(config_of(), tmp_path / "new", tiny_dataset(home / "data"), resume=True)


def test_it_is_a_command_which_says_what_it_wrote(home: Path, tmp_path: Path, capsys) -> None:
    argv = ["checkpoint", "convert", str(home / "run"), str(tmp_path / "new"), "--checkpoint", "6", "--shards", "2"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'new/checkpoints/step-00000006'}: ")
    assert out.endswith(", 2 shards, verified\n")
    assert not (tmp_path / "new/checkpoints/best.json").exists()  # the best was another
    assert main(["checkpoint", "verify", str(tmp_path / "new")]) == 0
    assert main(["generate", str(tmp_path / "new"), "--prompt", "the", "--max_new_tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "bf16"], "--dtype bf16 needs --weights_only"),
        (["--shards", "0"], "--shards 0: must be >= 1"),
        (["--checkpoint", "5"], "no checkpoint of step 5; there are: 2, 4, 6"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(home, tmp_path, capsys, flags, message) -> None:
    assert main(["checkpoint", "convert", str(home / "run"), str(tmp_path / "new"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_left_as_it_is(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not empty"):
        convert_checkpoint(home / "run", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_damaged_is_not_converted(home: Path, tmp_path: Path) -> None:
    convert_checkpoint(home / "run", tmp_path / "source", shards=2)
    shard = next(tmp_path.rglob("optimizer/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CorruptError, match=shard.name):
        convert_checkpoint(tmp_path / "source", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_where_it_cannot_be_written_nothing_is_left(home: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "save_shards", full)
    with pytest.raises(SwamlaError, match="disk full"):
        convert_checkpoint(home / "run", tmp_path / "new", shards=2)
    assert not (tmp_path / "new").exists()
