"""A run's folder is one process's from the command's start; what did not become a run is in nobody's way."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from swamla.cli import main, running
from swamla.errors import SwamlaError, UsageError
from swamla.train import loop, run_folder
from swamla.train.claims import claim_new, claim_numbered, claim_run, is_running, is_unsaved

from .helpers import losses, run, tiny_config

START = shlex.split(
    "train quickstart --data text.txt --tokenizer byte --cache_dir cache --pattern swa --width 16 --n_heads 2 "
    "--steps 2 --max_minutes none --batch_size 1 --block_size 16"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text, which we are in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 100)
    return tmp_path


def test_starts_at_the_same_time_each_have_a_folder_of_their_own(tmp_path):
    together = Barrier(8)

    def start(_):
        together.wait()
        return claim_numbered(tmp_path / "runs" / "name")

    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(start, range(8)))
    expected = {"name", *(f"name-{n}" for n in range(2, 9))}
    assert {claim.path.name for claim in claims} == expected == {p.name for p in (tmp_path / "runs").iterdir()}
    for claim in claims:
        claim.release()
    assert list(tmp_path.glob("runs/*")) == [], "what was only claimed is gone"


def test_of_starts_in_one_named_folder_the_first_has_it_and_the_others_are_told_before_they_prepare(here, monkeypatch):
    prepared, said = [], io.StringIO()
    real = running.prepare

    def second_start(*args, **options):
        prepared.append(1)
        if len(prepared) == 1:
            with contextlib.redirect_stderr(said):
                assert main([*START, "--output_dir", "mine"]) == 2
        return real(*args, **options)

    monkeypatch.setattr(running, "prepare", second_start)
    assert main([*START, "--output_dir", "mine"]) == 0
    assert prepared == [1]
    assert said.getvalue() == "swamla: error: mine: another process is training in it: wait for it, or stop it first\n"


def test_two_starts_of_one_recipe_take_two_folders_though_the_first_has_written_nothing_yet(here, monkeypatch):
    real, seen = running.prepare, []

    def second_start(*args, **options):
        seen.append(sorted(path.name for path in (here / "runs").iterdir()))
        if len(seen) == 1:
            assert main(START) == 0
        return real(*args, **options)

    monkeypatch.setattr(running, "prepare", second_start)
    assert main(START) == 0
    assert seen == [["quickstart"], ["quickstart", "quickstart-2"]]
    assert all((here / "runs" / name / "checkpoints").is_dir() for name in seen[1])


def test_a_run_that_is_being_resumed_is_taken_before_its_data_is_prepared(here, monkeypatch, capsys):
    assert main([*START, "--output_dir", "mine"]) == 0
    with claim_run(Path("mine")):
        assert is_running(Path("mine"))
        monkeypatch.setattr(running, "prepare", None)
        assert main(["train", "--resume", "mine", "--steps", "3"]) == 2
    assert "another process is training in it" in capsys.readouterr().err
    assert not is_running(Path("mine"))


@pytest.mark.parametrize("flags", ["--data nothing.txt", "--data empty.txt", "--lr=-1", "--mla_n_heads 3"])
@pytest.mark.parametrize("where", ["", "--output_dir mine", "--output_dir deep/er/mine"])
def test_a_start_that_is_refused_leaves_no_folder_behind(here, capsys, flags, where):
    (here / "empty.txt").touch()
    argv = [word for word in START if word not in ("--data", "text.txt")]
    assert main([*argv, *(flags if "--data" in flags else f"{flags} --data text.txt").split(), *where.split()]) == 2
    assert {path.name for path in here.iterdir()} <= {"text.txt", "empty.txt", "cache"}, capsys.readouterr().err


def test_a_folder_of_the_users_own_stays_when_its_start_is_refused(here):
    (here / "mine").mkdir()
    argv = [word if word != "text.txt" else "nothing.txt" for word in START]
    assert main([*argv, "--output_dir", "mine"]) == 2
    assert list((here / "mine").iterdir()) == []


@pytest.mark.parametrize("named", [True, False])
def test_the_empty_folder_of_a_start_that_was_killed_is_taken_by_the_next(tmp_path, named):
    folder = tmp_path / "name"
    code = f"""
import os, signal
from pathlib import Path
from swamla.train.claims import claim_new, claim_numbered
claim = {"claim_new" if named else "claim_numbered"}(Path({str(folder)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert folder.is_dir()
    with claim_new(folder) if named else claim_numbered(folder) as claim:
        assert claim.path == folder


@pytest.fixture
def unsaved(tmp_path, dataset):
    """A run that was killed after a step, before its first checkpoint."""
    run(tiny_config(), tmp_path / "run", dataset)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "loss.png").unlink()
    return tmp_path / "run"


def test_a_new_run_replaces_one_that_never_came_to_a_checkpoint_and_says_so(unsaved, dataset):
    assert is_unsaved(unsaved)
    with pytest.warns(UserWarning, match="replaced a run that ended before its first checkpoint"):
        run(tiny_config(batch_size=8, steps=3), unsaved, dataset)
    assert [step for step, _ in losses(unsaved)] == [1, 2, 3]
    assert not is_unsaved(unsaved)


def test_a_numbered_start_passes_by_what_never_came_to_a_checkpoint(unsaved):
    with claim_numbered(unsaved) as claim:
        assert claim.path.name == "run-2"


@pytest.mark.parametrize(
    "own", ["notes.txt", "checkpoints/step-00000002/manifest.json", "checkpoints/damaged-step-00000002/x"]
)
def test_nothing_that_is_the_users_or_was_saved_is_ever_replaced(unsaved, dataset, own):
    (unsaved / own).parent.mkdir(parents=True, exist_ok=True)
    (unsaved / own).write_text("precious")
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(tiny_config(), unsaved, dataset)
    assert (unsaved / own).read_text() == "precious"
    assert len(losses(unsaved)) == 6


def test_a_folder_with_a_tokenizer_of_the_users_is_none_of_ours(tmp_path, dataset):
    dataset.tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(tiny_config(), tmp_path, dataset)


@pytest.mark.parametrize(
    ("config", "data"),
    [
        ('{"model": {}, "data": {}, "train": {}}', "a row"),  # a recipe, and text
        ('{"model": {}, "data": {}, "train": {}}', '[{"fingerprint": "a", "raw": "b"}]'),
        ('{"format_version": 1, "model": {}, "data": {}, "train": {}}', '[{"text": "a row"}]'),
        ('{"format_version": 1, "model": {}, "data": {}, "train": {}}', '{"text": "a row"}'),
        ("[]", "[]"),
        ("", "[3]"),
    ],
)
def test_files_of_the_users_that_are_called_as_ours_are_never_replaced(tmp_path, dataset, config, data):
    for name, text in (("config.json", config), ("data.json", data)):
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(tiny_config(), tmp_path, dataset)
    assert [(tmp_path / name).read_text() for name in ("config.json", "data.json")] == [config, data]


def test_a_new_run_that_fails_before_its_first_step_leaves_nothing_and_a_later_one_its_record(
    tmp_path, dataset, monkeypatch
):
    real = loop.training_step

    def fail_in(step):
        def failing(state, *args):
            if state.step + 1 == step:
                raise SwamlaError("no")
            return real(state, *args)

        return failing

    monkeypatch.setattr(loop, "training_step", fail_in(1))
    with pytest.raises(SwamlaError, match="no"):
        run(tiny_config(), tmp_path / "run", dataset)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(loop, "training_step", fail_in(3))
    with pytest.raises(SwamlaError, match="no"):
        run(tiny_config(), tmp_path / "run", dataset)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


def test_a_run_resumed_before_its_first_checkpoint_keeps_its_folder_whatever_happens(unsaved, dataset, monkeypatch):
    monkeypatch.setattr(run_folder, "fresh_state", lambda *args, **options: 1 / 0)
    before = json.loads((unsaved / "config.json").read_text())
    with pytest.warns(UserWarning, match="holds no checkpoint yet"), pytest.raises(ZeroDivisionError):
        run(tiny_config(), unsaved, dataset, resume=True)
    assert json.loads((unsaved / "config.json").read_text()) == before


def test_a_run_in_the_making_is_no_run_for_anybody_else(tmp_path, dataset, monkeypatch):
    real = run_folder.fresh_state

    def slow(*args, **options):
        with pytest.raises(UsageError, match="another process is training in it"):
            claim_new(tmp_path / "run")
        return real(*args, **options)

    monkeypatch.setattr(run_folder, "fresh_state", slow)
    run(tiny_config(), tmp_path / "run", dataset)
