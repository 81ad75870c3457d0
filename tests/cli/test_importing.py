"""`swamla import`: a folder of transformers becomes a run that generates, evaluates, exports and begins other runs."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import swamla
from swamla.cli import main
from swamla.interop import load_pretrained, save_pretrained
from swamla.interop.architectures.llama import Mistral


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Mistral in bf16, without a tokenizer."""
    where = tmp_path_factory.mktemp("home") / "mistral"
    save_pretrained(Mistral.example().language_model().build(seed=0).bfloat16(), where)
    return where


def test_the_run_has_the_same_weights_in_their_dtype_and_says_what_it_is(folder, tmp_path, capsys) -> None:
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "mistral, layers swa swa, " in shown
    assert "no tokenizer.json" in shown
    model, tokenizer = swamla.load(tmp_path / "run")
    expected = load_pretrained(folder).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    (file,) = (tmp_path / "run/checkpoints").glob("step-*/model.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert tokenizer.vocab_size == 96


def test_the_run_generates_scores_a_text_is_written_again_and_begins_another(folder, tmp_path, capsys) -> None:
    run, text = str(tmp_path / "run"), tmp_path / "ids.txt"
    text.write_text(" 3 1 4 1 5 9 2 6 5 3 5\n\n" * 40, encoding="utf-8")
    assert main(["import", str(folder), run]) == 0
    assert main(["generate", run, "--prompt", " 3 1 4", "--max_new_tokens", "4"]) == 0
    assert re.search(r" 3 1 4( \d+){4}", capsys.readouterr().out)
    assert main(["evaluate", run, "--data", str(text)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["export", run, str(tmp_path / "again")]) == 0
    first, second = (load_pretrained(where).state_dict() for where in (folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))["model"]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"model": model, "train": {"steps": 2}}), encoding="utf-8")
    line = f"train {recipe} --init_from {run} --data {text} --batch_size 2 --block_size 16 --output_dir {tmp_path}/next"
    assert main(line.split()) == 0


def test_without_a_recipe_an_imported_run_trains_on_as_the_folder_that_it_came_from_does(folder, tmp_path) -> None:
    run, text = tmp_path / "run", tmp_path / "ids.txt"
    text.write_text(" 3 1 4 1 5 9 2 6 5 3 5\n\n" * 400, encoding="utf-8")
    assert main(["import", str(folder), str(run)]) == 0
    settings = []
    for number, origin in enumerate((folder, run)):
        out = tmp_path / f"next-{number}"
        line = f"train --init_from {origin} --data {text} --tokenizer ids:95 --steps 2 --max_minutes none"
        assert main([*line.split(), "--batch_size", "2", "--block_size", "16", "--output_dir", str(out)]) == 0
        plain = json.loads((out / "config.json").read_text(encoding="utf-8"))
        assert plain["train"].pop("init_from") == str(origin)
        settings.append((plain["model"], plain["train"], plain["data"]["held_out_fraction"]))
    assert settings[0] == settings[1]
    assert settings[0][2] < 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
        (lambda f: (f / "model.safetensors").unlink(), "has no *.safetensors"),
        (lambda f: (f / "tokenizer.model").write_text(""), "AutoTokenizer.from_pretrained"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "model_type = 'bert': must be one of"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(spoil, message, folder, tmp_path, capsys) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    spoil(tmp_path / "copy")
    assert main(["import", str(tmp_path / "copy"), str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_no_folder_of_transformers_is_told_apart(folder, tmp_path, capsys) -> None:
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    for source, message in (
        (tmp_path / "absent", "absent: no such folder"),
        (folder / "config.json", "config.json: a file: must be a folder"),
        (tmp_path / "run", "run: a run already: "),
    ):
        assert main(["import", str(source), str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_a_folder_with_something_in_it_is_left_alone(folder, tmp_path, capsys) -> None:
    (tmp_path / "mine").write_text("thesis")
    assert main(["import", str(folder), str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_imported_run_without_data_says_how_to_name_some(folder, tmp_path, capsys) -> None:
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "an imported model has no data: name a file or another source" in capsys.readouterr().err


def test_a_tokenizer_whose_end_has_no_usual_name_keeps_the_models_ids(folder, tmp_path, capsys) -> None:
    from tokenizers import Tokenizer, decoders, models

    shutil.copytree(folder, tmp_path / "copy")
    end = "<｜end▁of▁sentence｜>"
    vocabulary = {chr(32 + i): i for i in range(95)} | {end: 95}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.decoder = decoders.Fuse()
    library.add_special_tokens([end])
    library.save(str(tmp_path / "copy/tokenizer.json"))
    assert main(["import", str(tmp_path / "copy"), str(tmp_path / "run")]) == 2
    assert "has 97 ids, the model 96" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "copy/tokenizer_config.json").write_text(json.dumps({"eos_token": end}), encoding="utf-8")
    assert main(["import", str(tmp_path / "copy"), str(tmp_path / "run")]) == 0
    _, tokenizer = swamla.load(tmp_path / "run")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (96, 95)
    assert main(["generate", str(tmp_path / "run"), "--prompt", "ab", "--max_new_tokens", "3"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again/config.json").read_text(encoding="utf-8"))["eos_token_id"] == 95
    assert main(["import", str(tmp_path / "again"), str(tmp_path / "second")]) == 0
    assert swamla.load(tmp_path / "second")[1].fingerprint == tokenizer.fingerprint


def test_a_snapshot_in_the_hubs_cache_which_is_links_is_read(folder, tmp_path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert main(["import", str(snapshot), str(tmp_path / "run")]) == 0
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert main(["import", str(snapshot), str(tmp_path / "other")]) == 3  # links that leave the model's folder
