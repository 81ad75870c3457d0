"""The presets: their exact sizes, and small models of the same make that train, every weight of them, and resume."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swamla.cli.flags import parse
from swamla.cli.overrides import flags
from swamla.cli.run_config import read_recipe
from swamla.config import load_file
from swamla.data.dataset import Dataset
from swamla.errors import Interrupted
from swamla.model.accounting import count_parameters
from swamla.model.language_model import LanguageModelConfig
from swamla.recipes import recipe_names, recipe_path
from swamla.train import RunConfig
from swamla.train import loop as loop_module
from swamla.train.run_folder import resolve_vocabulary

from .cli.test_overrides import Arguments
from .train.helpers import losses, run, tiny_dataset, weights

# Total and active parameters, with the recipe's own local mixer and with gated DeltaNet in its place.
SIZES = {
    ("small", "swa"): (213_018_624, 213_018_624),
    ("small", "gdn"): (221_637_760, 221_637_760),
    ("small-768", "swa"): (130_076_416, 130_076_416),
    ("small-768", "gdn"): (134_943_584, 134_943_584),
    ("base", "swa"): (756_559_360, 756_559_360),
    ("base", "gdn"): (795_195_264, 795_195_264),
    ("large", "swa"): (1_478_480_128, 1_478_480_128),
    ("large", "gdn"): (1_559_887_072, 1_559_887_072),
    ("xl", "swa"): (6_439_574_016, 6_439_574_016),
    ("xl", "gdn"): (6_815_525_504, 6_815_525_504),
    ("moe-1b", "swa"): (787_638_272, 285_894_656),
    ("moe-1b", "gdn"): (779_480_192, 277_736_576),
    ("moe-2b", "swa"): (1_492_687_360, 397_974_016),
    ("moe-2b", "gdn"): (1_505_616_064, 410_902_720),
    ("gpt2", ""): (124_439_808, 124_439_808),
    ("gpt2-mla", ""): (115_656_960, 115_656_960),
    ("gpt2-latent", ""): (115_587_840, 115_587_840),
    ("shakespeare-char", ""): (804_224, 804_224),
    ("shakespeare-char-mla", ""): (755_328, 755_328),
    ("shakespeare-char-latent", ""): (722_304, 722_304),
}
BY_MIXER = {
    "swa": "--swa_window 8 --swa_sinks 2",
    "gdn": "--gdn_head_k_dim 8 --gdn_head_v_dim 8",
    "mla": "--mla_kv_lora_rank 16 --mla_qk_nope_head_dim 8 --mla_qk_rope_head_dim 4 --mla_v_head_dim 8",
}
BY_FFN = {
    "dense": "--dense_hidden 32",
    "latent_moe": "--latent_moe_n_experts 8 --latent_moe_n_activated 4 --latent_moe_expert_hidden 16 "
    "--latent_moe_shared_hidden 16",
}
TINY = (
    "--n_layers 3 --width 32 --n_heads 2 --vocab_size 300 --steps 10 --batch_size 4 --block_size 32 --warmup 2 "
    "--eval_interval none --save_interval none --precision fp32 --device cpu --lr 1e-2"
)


def resolve(name: str, local: str, line: str = "") -> RunConfig:
    """A preset with its local mixer and further flags."""
    said = f"{line} --local_mixer {local}" if local else line
    _, given = parse(Arguments, said.split(), command="swamla train", more=flags())
    return read_recipe(name, given)


def scaled_down(name: str, local: str) -> RunConfig:
    """The preset at width 32, three layers deep: its blocks, norms and positions, its optimizer and schedule."""
    layers = resolve(name, local, "--n_layers 3 --vocab_size 300").model.layers
    kinds = {block.mixer.kind for block in layers}
    ffns = {block.ffn.kind for block in layers}
    sizes = [BY_MIXER[kind] for kind in BY_MIXER if kind in kinds] + [BY_FFN[kind] for kind in BY_FFN if kind in ffns]
    head_dim = "--swa_head_dim 16" if name == "moe-1b" and local == "swa" else ""
    return resolve(name, local, " ".join([TINY, *sizes, head_dim]))


def on_meta(model: LanguageModelConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return model.build()


def test_every_preset_is_pinned_here_and_medium_is_base() -> None:
    # test_recipes.py has these: trained by minutes and not steps, or on tasks.
    others = {"quickstart", "servable", "toy-induction", "toy-mqar", "toy-state-tracking"}
    assert {name for name, _ in SIZES} == set(recipe_names()) - others
    assert recipe_path("medium") == recipe_path("base")
    with_spare = {name for name in set(recipe_names()) - others if "spare" in load_file(recipe_path(name))[0]}
    assert with_spare == {name for name, local in SIZES if local == "gdn"}


@pytest.mark.parametrize(("name", "local"), SIZES)
def test_a_preset_has_its_exact_size_counted_and_built(name: str, local: str) -> None:
    model = resolve(name, local, "" if "shakespeare" not in name else "--vocab_size 66").model
    counted = count_parameters(model)
    assert (counted.total, counted.active) == SIZES[name, local]
    assert sum(parameter.numel() for parameter in on_meta(model).parameters()) == counted.total


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("name", "local"), SIZES)
def test_every_parameter_of_a_scaled_down_preset_gets_a_gradient(name: str, local: str) -> None:
    torch.manual_seed(0)
    config = scaled_down(name, local).model
    full = resolve(name, local, "--vocab_size 300").model
    assert {block.mixer.kind for block in config.layers} == {block.mixer.kind for block in full.layers}
    assert {block.ffn.kind for block in config.layers} == {block.ffn.kind for block in full.layers}
    model = config.build()
    tokens = torch.arange(600).view(20, 30).remainder(300)  # every id, so that every embedding is met
    nats, statistics = model.loss(tokens, tokens.roll(-1, dims=1))
    (nats + sum(value for key, value in statistics.items() if key.startswith("loss/"))).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        experts = parameter.grad if parameter.ndim == 3 else parameter.grad[None]
        untouched = [index for index, gradient in enumerate(experts) if not gradient.any()]
        assert not untouched, f"{parameter_name}: {untouched}"


@pytest.mark.parametrize(("name", "local"), SIZES)
def test_a_scaled_down_preset_trains_ten_steps_and_resumes_exactly(
    name: str, local: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "plot_losses", lambda *args, **options: None)  # most of these runs' time
    config = scaled_down(name, local)
    whole = run(config, tmp_path / "whole", dataset)
    assert whole.step == 10
    real = loop_module.training_step

    def terminated(state, *arguments):  # type: ignore[no-untyped-def]
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "training_step", terminated)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "cut", dataset)
    assert [step for step, _ in losses(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    torch.manual_seed(99)
    resumed = run(config, tmp_path / "cut", dataset, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    expected = weights(whole)
    assert all(torch.equal(weight, expected[key]) for key, weight in weights(resumed).items())


def test_a_model_may_have_more_ids_than_its_tokenizer(dataset: Dataset) -> None:
    config = scaled_down("small", "swa")
    assert resolve_vocabulary(config, dataset).model.vocab_size == 300 > dataset.tokenizer.vocab_size
    grown = replace(config, model=replace(config.model, vocab_size=0))
    assert resolve_vocabulary(grown, dataset).model.vocab_size == dataset.tokenizer.vocab_size
