"""A run is enough for all that needs no text of its data: raw files and cache may be gone."""

import shlex
import shutil
from pathlib import Path

import pytest

import swamla
from swamla.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a GPT-2, and nothing of what it was trained on."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 60)
    flags = "--width 16 --n_heads 2 --n_layers 1 --learned_positions 32 --batch_size 1 --block_size 16 --steps 2"
    where = f"--data {folder}/text.txt --tokenizer bpe:270 --cache_dir {folder}/cache --output_dir {folder}/run"
    assert main(["train", "gpt2", *shlex.split(f"{flags} --max_minutes none {where}")]) == 0
    (folder / "text.txt").unlink()
    shutil.rmtree(folder / "cache")
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "generate run --prompt be --max_new_tokens 5",
        "export run exported",
        "runs run",
        "runs run --json",
        "plot run",
        "checkpoint list run --verify",
        "checkpoint convert run converted --weights_only",
        "info run",
    ],
)
def test_a_command_that_needs_no_text_works_without_the_data(line, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(shlex.split(line)) == 0, capsys.readouterr().err
    assert "broken" not in capsys.readouterr().out


def test_the_library_loads_it_too(home):
    model, tokenizer = swamla.load(home / "run")
    assert swamla.generate_text(model, tokenizer, ["be"], 3).completions[0].tokens
