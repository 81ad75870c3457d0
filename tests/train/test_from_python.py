"""A run that was started from Python is one that commands find and continue, from any folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.cli import main
from swamla.data.caching import remembered_runs
from swamla.data.config import DataConfig
from swamla.data.preparing import prepare
from swamla.evaluate import validation

from .helpers import model_of, run, tiny_config


def test_relative_paths_in_its_config_are_written_as_they_were_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text of which there is enough " * 99)
    data = DataConfig(source="text.txt", tokenizer="byte", cache_dir="cache")
    dataset = prepare(data)
    config = replace(tiny_config(model_of("swa"), steps=2), data=data)
    run(config, Path("run"), dataset, evaluate=validation(dataset, 32))
    stored = json.loads((tmp_path / "run/config.json").read_text())["data"]
    assert (stored["source"], stored["cache_dir"]) == (str(tmp_path / "text.txt"), str(tmp_path / "cache"))
    assert remembered_runs(tmp_path / "cache") == [tmp_path / "run"]
    run(replace(config, train=replace(config.train, schedule="constant", steps=3)), Path("run"), dataset, resume=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "bits per byte" in capsys.readouterr().out
