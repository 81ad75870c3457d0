"""A new run that begins with another's weights: those that were judged, all of them, and nothing else of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import swamla
from swamla.cli import main
from swamla.errors import UsageError
from swamla.train import loop
from swamla.train.init_from import origin_of

from .helpers import MODEL, losses, model_of, run, tiny_config, tiny_dataset

PADDED = replace(MODEL, vocab_size=300)


@pytest.fixture(scope="module")
def base(tmp_path_factory, dataset):
    """A run of a padded vocabulary with averaged weights, whose best moment is not its last."""
    folder, scores = tmp_path_factory.mktemp("base") / "run", iter([3.0, 1.0, 2.0])
    config = tiny_config(PADDED, ema=0.9, eval_interval=2, save_interval=2, keep_last=9)
    run(config, folder, dataset, evaluate=lambda model: {"loss": next(scores)})
    return folder


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def start(config, folder, dataset) -> dict[str, torch.Tensor]:
    """The weights that a run begins with."""
    found = []
    run(config, folder, dataset, on_start=lambda state: found.append(weights(state.model)))
    return found[0]


@pytest.mark.parametrize(
    ("which", "step", "where"),
    [("best", 4, ""), ("latest", 6, ""), ("2", 2, ""), ("best", 2, "checkpoints/step-00000002")],
    ids=["best", "latest", "a step", "a folder of a checkpoint"],
)
def test_it_begins_with_the_weights_that_load_gives_and_says_which(base, tmp_path, dataset, which, step, where):
    config = tiny_config(PADDED, steps=2, seed=3, init_from=str(base / where), init_checkpoint=which)
    began = start(config, tmp_path / "run", dataset)
    expected = weights(swamla.load(base, str(step))[0])
    assert all(torch.equal(began[name], tensor) for name, tensor in expected.items())
    record = json.loads((tmp_path / "run" / "initialized_from.json").read_text())
    assert (record["folder"], record["step"], record["weights"]) == (str(base), step, "averaged")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["init_from"] == str(base / where)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


def test_nothing_else_of_the_run_is_taken(base, tmp_path, dataset):
    seen = []
    config = tiny_config(PADDED, steps=1, init_from=str(base))
    run(
        config,
        tmp_path / "run",
        dataset,
        on_start=lambda state: seen.append((state.plain(), state.optimizer.state_tensors())),
    )
    plain, optimizer = seen[0]
    counters = ("step", "sample", "tokens", "skipped", "best_step", "evaluated_step")
    assert {name: plain[name] for name in counters} == dict.fromkeys(counters[:4], 0) | dict.fromkeys(counters[4:])
    assert all(not tensor.any() for tensor in optimizer.values())


def test_it_resumes_as_any_run_does_without_the_other_ones_weights(base, tmp_path, dataset, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    config = tiny_config(PADDED, steps=4, init_from=str(tmp_path / "base"), save_interval=2)
    run(config, tmp_path / "whole", dataset)
    real = loop.training_step
    monkeypatch.setattr(loop, "training_step", lambda state, *args: 1 / 0 if state.step == 2 else real(state, *args))
    with pytest.raises(ZeroDivisionError):
        run(config, tmp_path / "run", dataset)
    monkeypatch.setattr(loop, "training_step", real)
    shutil.rmtree(tmp_path / "base")
    run(config, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_other_shapes_are_named_five_of_them_and_nothing_is_written(base, tmp_path, dataset):
    wider = replace(PADDED, width=32)
    with pytest.raises(UsageError) as caught:
        run(tiny_config(wider, init_from=str(base)), tmp_path / "run", dataset)
    said = str(caught.value)
    assert (
        f"init_from = {base}: its weights do not fit this model: embedding.weight: got (300, 16), expected (300, 32)"
        in said
    )
    assert said.count("got ") == 5
    assert "more" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"got nothing, expected|, expected nothing"):
        run(tiny_config(replace(model_of("gdn"), vocab_size=300), init_from=str(base)), tmp_path / "run", dataset)


def test_another_vocabulary_is_refused_though_as_many_ids_fit(base, tmp_path):
    with pytest.raises(
        UsageError, match=r"its weights were trained with another vocabulary \(257 ids, .* use tokenizer = '.*json'"
    ):
        run(tiny_config(PADDED, init_from=str(base)), tmp_path / "run", tiny_dataset(tmp_path, "char"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_from": "/nonexistent"}, "no such folder; give a run"),
        ({"init_from": "/usr"}, "not a run folder"),
        ({"init_from": "BASE", "init_checkpoint": "99"}, "no checkpoint of step 99; there are: 2, 4, 6"),
        (
            {"init_from": "BASE/checkpoints/step-00000002", "init_checkpoint": "latest"},
            "chooses one of a run's checkpoints",
        ),
    ],
)
def test_what_holds_no_weights_is_refused(base, tmp_path, dataset, settings, message):
    settings = {name: value.replace("BASE", str(base)) for name, value in settings.items()}
    with pytest.raises(UsageError, match=message):
        run(tiny_config(PADDED, **settings), tmp_path / "run", dataset)


@pytest.mark.parametrize("which", ["worst", "-1", ""])
def test_a_checkpoint_that_cannot_be_is_refused(which):
    with pytest.raises(ValueError, match=r"init_checkpoint = .*must be best, latest or a step"):
        tiny_config(init_from="x", init_checkpoint=which)
    with pytest.raises(ValueError, match="chooses a checkpoint of init_from"):
        tiny_config(init_checkpoint="latest")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:
    """A folder with that run in runs/base, and other text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "runs" / "base")
    (tmp_path / "other.txt").write_text("some other text, of other words\n" * 60)
    return tmp_path


def train(*words: str) -> int:
    return main(["train", *words])


def test_the_command_takes_model_and_tokenizer_from_the_run_and_all_else_from_flags(here, capsys):
    assert (
        train("--init_from", "runs/base", "--data", "other.txt", "--steps", "1", "--ema", "none", "--lr", "1e-4") == 0
    )
    said = capsys.readouterr()
    assert f"weights from {here}/runs/base, step 4 (best), averaged" in said.out
    assert f"model and tokenizer are those of {here}/runs/base" in said.err
    made = json.loads((here / "runs/base-2/config.json").read_text())
    assert made["model"] == json.loads((here / "runs/base/config.json").read_text())["model"]
    assert made["data"]["source"] == str(here / "other.txt")
    assert made["data"]["tokenizer"] == str(here / "runs/base/tokenizer.json")
    assert (made["train"]["lr"], made["train"]["ema"]) == (1e-4, None)


def test_a_recipe_with_another_model_is_refused_before_any_folder_and_one_without_takes_the_runs(here, capsys):
    assert train("quickstart", "--init_from", "runs/base", "--data", "other.txt") == 2
    said = capsys.readouterr().err
    assert "its weights do not fit this model: " in said
    assert said.endswith("; without a recipe the model is theirs\n")
    (here / "recipes").mkdir()
    (here / "recipes/more.toml").write_text(
        "[data]\nsource = '../other.txt'\n[train]\nsteps = 1\nbatch_size = 1\nblock_size = 16\n"
        "init_from = '../runs/base'\ninit_checkpoint = '2'\n"
    )
    assert [path.name for path in (here / "runs").iterdir()] == ["base"]
    assert train("recipes/more.toml") == 0
    assert "step 2, averaged" in capsys.readouterr().out
    assert train("--resume", "runs/more", "--steps", "2", "--schedule", "constant") == 0


def test_to_resume_and_to_begin_with_weights_exclude_each_other(here, capsys):
    assert train("--resume", "runs/base", "--init_from", "runs/base") == 2
    assert "--init_from starts a new run from another's weights, --resume continues one" in capsys.readouterr().err


def test_a_tokenizer_of_ones_own_must_be_the_runs(here, capsys):
    flags = ("--init_from", "runs/base", "--data", "other.txt", "--steps", "1", "--vocab_size", "300", "--tokenizer")
    assert train(*flags, "char") == 2
    assert "its weights were trained with another vocabulary" in capsys.readouterr().err
    assert train(*flags, "byte") == 0


@pytest.mark.parametrize(("to", "recipe"), [("gpt2", "gpt2"), ("swamla", "quickstart")])
@pytest.mark.parametrize("tokenizer", ["bpe:300", "byte"])
def test_an_exported_folder_gives_its_weights_and_its_tokenizer(tmp_path, monkeypatch, capsys, to, recipe, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 100)
    model = ["--width", "16", "--n_heads", "2", "--n_layers", "1", "--batch_size", "1", "--block_size", "16"]
    model += ["--learned_positions", "32"] if to == "gpt2" else ["--pattern", "swa"]
    small = [*model, "--data", "text.txt", "--steps", "1", "--max_minutes", "none"]
    assert train(recipe, *small, "--tokenizer", tokenizer, "--output_dir", "a") == 0, capsys.readouterr().err
    assert main(["export", "a", "exported", "--to", "auto"]) == 0
    plain = json.loads((tmp_path / "exported/config.json").read_text())
    assert (plain["model_type"], plain.get("max_position_embeddings", 16)) == (to, 16)
    flags = ["--batch_size", "1", "--block_size", "16", "--steps", "1", "--max_minutes", "none"]
    assert train("--init_from", "exported", "--data", "text.txt", *flags, "--output_dir", "b") == 0, (
        capsys.readouterr().err
    )
    assert f"weights from {tmp_path}/exported, as exported" in capsys.readouterr().out
    named = ["--tokenizer", "byte" if tokenizer == "byte" else "exported/swamla_tokenizer.json", "--output_dir", "c"]
    assert train("--init_from", "exported", "--data", "text.txt", *flags, *named) == 0, capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [300, 305], ids=["in the padding", "beyond it"])
def test_rows_of_new_ids_begin_as_the_mean_of_the_known_ones_and_all_others_stay(dataset, tmp_path, tied, size) -> None:
    known, new = 257, range(257, 259)
    before = replace(PADDED, tied_head=tied)
    run(tiny_config(before, steps=1), tmp_path / "run", dataset)
    theirs = swamla.load(tmp_path / "run")[0].state_dict()
    model = replace(before, vocab_size=size).build()
    origin_of(str(tmp_path / "run")).fill(model, new)
    assert (model.head.weight is model.embedding.weight) == tied
    for name, tensor in model.state_dict().items():
        if name not in ("embedding.weight", "head.weight"):
            assert torch.equal(tensor, theirs[name])
            continue
        mean = theirs[name][:known].double().mean(dim=0).float()
        expected = torch.cat([theirs[name], mean.expand(size - 300, -1)])
        expected[[*new]] = mean
        assert torch.equal(tensor, expected)
