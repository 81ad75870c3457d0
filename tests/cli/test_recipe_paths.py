"""A recipe's relative paths are relative to it, a flag's to the folder we are in; a run knows where both were."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.cli import main
from swamla.cli.run_config import read_recipe
from swamla.data.reading import Notes
from swamla.data.sources import open_source
from swamla.data.tokenizer import ByteTokenizer
from swamla.errors import DataError

MODEL = """
[model]
width = 16
pattern = ["a"]
[model.blocks.a]
ffn = { kind = 'dense', hidden = 32 }
mixer = { kind = "mha", n_heads = 2 }
[train]
steps = 1
batch_size = 1
block_size = 16
"""
DATA = {
    "source": "[data]\nsource = 'texts/here.txt'\ntokenizer = 'byte'\ncache_dir = '../cache'\n",
    "a folder": "[data]\nsource = 'texts'\ntokenizer = 'byte'\ncache_dir = '../cache'\nheld_out_fraction = 0.5\n",
    "tokenizer": "[data]\nsource = 'texts/here.txt'\ntokenizer = 'texts/tokenizer.json'\ncache_dir = '../cache'\n",
    "mixture": "[data]\nsource = 'mixture'\ntokenizer = 'byte'\ncache_dir = '../cache'\n"
    "[[data.mixture]]\nsource = 'texts/here.txt'\nweight = 1\n[[data.mixture]]\nsource = '../other.txt'\nweight = 2\n",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """recipes/run.toml beside recipes/texts/, other.txt and a folder elsewhere, in which we are."""
    for name in ("recipes/texts/here.txt", *(f"recipes/texts/{n}.txt" for n in range(20)), "other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"this is the text of {name}\n" * 40)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize("kind", DATA)
def test_what_stands_in_a_recipe_is_found_beside_it_and_found_again_from_anywhere(here, monkeypatch, capsys, kind):
    if kind == "tokenizer":
        ByteTokenizer().save(here / "recipes/texts/tokenizer.json")
    (here / "recipes/run.toml").write_text(DATA[kind] + MODEL)
    assert main(["train", "../recipes/run.toml", "--output_dir", "run"]) == 0, capsys.readouterr().err
    plain = json.loads((here / "elsewhere/run/config.json").read_text())["data"]
    named = [plain["source"], *(part["source"] for part in plain["mixture"])]
    assert all(Path(path).is_absolute() and Path(path).exists() for path in named if path != "mixture")
    assert plain["cache_dir"] == str(here / "cache")
    assert (here / "cache").is_dir()
    monkeypatch.chdir(here)
    assert main(["train", "--resume", "elsewhere/run", "--steps", "2", "--schedule", "constant"]) == 0
    assert main(["evaluate", "elsewhere/run"]) == 0


def test_a_flags_path_is_where_we_are_though_the_recipe_has_one_of_that_name(here, capsys):
    (here / "recipes/run.toml").write_text(DATA["source"] + MODEL)
    (here / "elsewhere/texts").mkdir()
    (here / "elsewhere/texts/here.txt").write_text("another text\n" * 60)
    assert main(["train", "../recipes/run.toml", "--output_dir", "run", "--data", "texts/here.txt"]) == 0
    plain = json.loads((here / "elsewhere/run/config.json").read_text())["data"]
    assert plain["source"] == str(here / "elsewhere/texts/here.txt")


def test_files_before_a_path_makes_it_one_whatever_it_is_called(here: Path) -> None:
    (here / "recipes/run.toml").write_text(DATA["source"].replace("texts/here.txt", "files:stdlib") + MODEL)
    (here / "recipes/stdlib").write_text("to be or not to be\n" * 60)
    (here / "elsewhere/stdlib").write_text("another text\n" * 60)
    assert read_recipe("../recipes/run.toml", {}).data.source == f"files:{here}/recipes/stdlib"
    given = read_recipe("../recipes/run.toml", {"data": "files:stdlib"}).data
    assert given.source == f"files:{here}/elsewhere/stdlib"
    source = open_source(given, here / "cache")
    assert list(source.documents(Notes())) == ["another text\n" * 60]
    with pytest.raises(DataError, match=r"data\.source = 'gone\.txt': no such file"):
        open_source(replace(given, source="files:gone.txt"), here / "cache")


@pytest.mark.parametrize("command", [["train"], ["prepare"]])
@pytest.mark.parametrize("field", ["source", "tokenizer"])
def test_what_is_here_but_not_beside_the_recipe_is_not_taken_for_it(here, capsys, command, field):
    (here / "elsewhere/mine").write_text("to be or not to be\n" * 60)
    data = {"source": str(here / "other.txt"), "tokenizer": "byte"} | {field: "mine"}
    lines = "".join(f"{name} = '{value}'\n" for name, value in data.items())
    (here / "recipes/run.toml").write_text(f"[data]\n{lines}{MODEL}")
    assert main([*command, "../recipes/run.toml"]) == 2
    line = list(data).index(field) + 2
    assert capsys.readouterr().err == (
        f"swamla: error: data.{field} = 'mine' (../recipes/run.toml:{line}): paths in a recipe are relative to it, and "
        f"there is no {here}/recipes/mine: write the path relative to the recipe\n"
    )


def test_a_name_that_leads_nowhere_is_refused_as_it_was_written(here, capsys):
    (here / "recipes/run.toml").write_text("[data]\nsource = 'stdlb'\ntokenizer = 'byte'\n" + MODEL)
    assert main(["train", "../recipes/run.toml"]) == 2
    assert "--data stdlb: no such file or folder; did you mean 'stdlib'?" in capsys.readouterr().err
