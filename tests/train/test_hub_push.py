"""A run's checkpoints reach the hub whole, and whatever the hub does costs the run one warning and no bit."""

import importlib.util
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import swamla
from swamla.checkpoint import find_checkpoint
from swamla.errors import ConfigError, Interrupted, MissingBackendError, UsageError
from swamla.hub import push, staging
from swamla.hub.push import Pushes
from swamla.hub.staging import complete, stage
from swamla.model.accounting import count_parameters
from swamla.tensor_file import read_tensors
from swamla.train import TrainConfig, TrainState, train
from tests.waiting import until

from .helpers import held_out, losses, run, tiny_config, weights
from .hub_stub import CANARY
from .test_resume import stop_after

REPO = "me/mine"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, dataset):
    """The tiny run without a hub: (losses, weights)."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    state = run(tiny_config(eval_interval=3), folder, dataset, evaluate=held_out(dataset))
    return losses(folder), weights(state)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset) -> Path:
    """A run with averaged weights and two checkpoints, of which the first is the best."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    scores = iter([1.0, 2.0])
    config = tiny_config(eval_interval=3, ema=0.5)
    run(config, folder, dataset, evaluate=lambda model: {"loss": next(scores)})
    return folder


def shown(folder: Path, dataset, **settings: Any) -> tuple[list[str], TrainState]:
    """What a run prints about the hub, and its end."""
    out = io.StringIO()
    config = tiny_config(**({"hf_repo_id": REPO, "eval_interval": 3} | settings))
    state = train(config, folder, dataset=dataset, evaluate=held_out(dataset), console=Console(file=out, width=500))
    return [line for line in out.getvalue().splitlines() if "Hugging Face Hub" in line], state


def same(state: TrainState, folder: Path, undisturbed: Any) -> bool:
    found = weights(state)
    equal = all(torch.equal(found[name], tensor) for name, tensor in undisturbed[1].items())
    return equal and losses(folder) == undisturbed[0]


def test_what_arrives_is_the_run_as_it_lies_on_the_disk(hub, dataset, tmp_path, undisturbed):
    folder = tmp_path / "run"
    lines, state = shown(folder, dataset, keep_last=1)
    assert same(state, folder, undisturbed)
    assert lines[-1] == f"Hugging Face Hub: step 6 is in {hub.url}/{REPO} (commit {hub.files(REPO)[0][:12]})"
    assert hub.private == {REPO: True}
    assert CANARY in hub.tokens
    _, files = hub.files(REPO)
    assert files.pop(".gitattributes") == b""
    card = files.pop("README.md").decode()
    assert files.pop("model.safetensors") == (folder / "checkpoints/step-00000006/model.safetensors").read_bytes()
    on_disk = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == on_disk
    assert f"| parameters | {count_parameters(state.model.config).total:,} |" in card
    assert f"| data fingerprint | `{dataset.fingerprint}` |" in card
    assert f"| held-out loss | {state.best_loss:.4f} nats per token, after step 6 |" in card
    assert len(hub.uploads) == len(set(hub.uploads))  # the same bytes under two names travel once
    everything = [*on_disk.values(), *files.values(), card.encode(), *hub.objects.values()]
    assert [data for data in everything if CANARY.encode() in data] == []


def test_a_public_repository_is_made_only_where_that_is_asked_for(hub, dataset, tmp_path):
    shown(tmp_path / "run", dataset, hf_private=False, steps=1, eval_interval=None)
    assert hub.private == {REPO: False}


def test_the_commit_holds_the_best_and_the_newest_checkpoint_and_none_besides(hub, finished):
    hub.repos[REPO] = [{"notes.md": b"mine", "checkpoints/step-00000001/state.json": b"{}"}]
    said: list[str] = []
    with pushes(finished, said):
        pass
    _, files = hub.files(REPO)
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {
        *("best.json", "step-00000003", "step-00000006")
    }
    assert files["notes.md"] == b"mine"
    assert hub.messages == ["Step 6"]
    assert json.loads(files["checkpoints/best.json"])["step"] == 3


def pushes(folder: Path, said: list[str], stop_requested: bool = False) -> Pushes:
    return Pushes(REPO, folder, private=True, say=said.append, stop_requested=lambda: stop_requested)


def test_the_weights_at_the_root_are_those_that_load_gives_averages_where_there_are_any(finished, tmp_path):
    assert stage(finished, tmp_path / "staged", REPO) == 6
    assert not (tmp_path / "staged/model.safetensors").exists()  # training does not wait for that
    complete(tmp_path / "staged")
    model, _ = swamla.load(tmp_path / "staged")
    expected, _ = swamla.load(finished)
    root = read_tensors(tmp_path / "staged/model.safetensors")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(root[name], tensor)
        assert torch.equal(model.state_dict()[name], tensor)
    raw = find_checkpoint(finished).tensors("model")
    assert any(not torch.equal(root[name], raw[name]) for name in raw)


def test_averages_become_whole_weights_in_the_process_that_pushes_and_not_in_the_one_that_trains(
    hub, finished, tmp_path, monkeypatch
):
    stage(finished, tmp_path / "staged", REPO)
    complete(tmp_path / "staged")

    def here(*_: Any) -> None:
        raise AssertionError("training waits for this")

    monkeypatch.setattr(staging, "save_tensors", here)
    monkeypatch.setattr(staging.Checkpoint, "tensors", here)
    with pushes(finished, []):
        pass
    assert hub.files(REPO)[1]["model.safetensors"] == (tmp_path / "staged/model.safetensors").read_bytes()


@pytest.mark.parametrize(("status", "reason"), [(500, "500"), (401, "401"), (0, "it took too long")])
def test_a_hub_that_fails_costs_one_warning_and_no_bit_of_the_run(
    status, reason, hub, dataset, tmp_path, undisturbed, monkeypatch
):
    hub.status = status
    if status == 0:
        monkeypatch.setattr(push, "END_SECONDS", 1.5)
    (line,), state = shown(tmp_path / "run", dataset)
    assert not hub.answered_late  # the run did not wait for a hub that hangs
    assert line.startswith(f"warning: Hugging Face Hub: nothing pushed to {REPO} (")
    assert reason in line
    assert CANARY not in line
    assert same(state, tmp_path / "run", undisturbed)
    tried = [request for request in hub.seen if request == "GET /"]
    assert status == 0 or len(tried) >= 2  # with a best, and again at the end; one that hangs may have no time for it
    assert not list((tmp_path / "run").glob(".*"))


def test_a_hub_that_comes_back_gets_the_run_at_the_end(hub, finished):
    hub.status = 500
    said: list[str] = []
    with pushes(finished, said) as found:
        found.push()
        attend_until(found, said, 1)
        found.push()
        hub.status = None
    assert [line.startswith("warning: ") for line in said][:1] == [True]
    assert sum(line.startswith("warning: ") for line in said) == 1
    assert f"step 6 is in {hub.url}/{REPO}" in said[-1]


def attend_until(found: Pushes, said: list[str], lines: int) -> None:
    def attended() -> bool:
        found.attend()
        return len(said) >= lines

    until(attended)


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process in the pusher's place, which notes its beginning in the file returned and ends when `go` is there."""
    script = tmp_path / "slow.py"
    script.write_text(
        f"import json, pathlib, sys, time\nwith open({str(tmp_path / 'begun')!r}, 'a') as file:\n"
        "    file.write(sys.argv[4] + '\\n')\n"
        f"while not pathlib.Path({str(tmp_path / 'go')!r}).exists():\n    time.sleep(0.02)\n"
        'print(json.dumps({"url": "there", "commit": "0123456789abcdef"}))\n'
    )
    monkeypatch.setattr(push.pusher, "__file__", str(script))
    return tmp_path / "begun"


def test_what_comes_while_a_push_is_under_way_waits_and_only_the_newest_goes(slow, finished, tmp_path):
    said: list[str] = []
    with pushes(finished, said) as found:
        for _ in range(5):
            found.push()
        until(slow.exists)
        assert said == []
        (tmp_path / "go").touch()
        attend_until(found, said, 2)
        assert len(slow.read_text().splitlines()) == 2
    assert said == ["Hugging Face Hub: step 6 is in there (commit 0123456789ab)"] * 3  # the third is the end's


def test_a_push_beyond_its_time_is_ended_and_training_hardly_waits(slow, finished, monkeypatch):
    monkeypatch.setattr(push, "PUSH_SECONDS", 0.3)
    monkeypatch.setattr(push, "STOP_SECONDS", 0.2)
    said: list[str] = []
    with pushes(finished, said, stop_requested=True) as found:
        found.push()
        process = found._process
        found.attend()  # comes back, though the process never ends by itself
        attend_until(found, said, 1)
        assert process.returncode == -signal.SIGKILL
    (line,) = said
    assert "(it took too long)" in line


def test_a_run_that_fails_pushes_nothing_new(slow, finished):
    with pytest.raises(RuntimeError), pushes(finished, []):
        raise RuntimeError("a bug")
    assert not slow.exists()


def test_a_run_that_is_stopped_pushes_its_last_state(hub, dataset, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        shown(tmp_path / "run", dataset)
    assert "checkpoints/step-00000002/optimizer.safetensors" in hub.files(REPO)[1]


def test_what_cannot_be_staged_is_told_and_costs_nothing_else(finished, tmp_path):
    said: list[str] = []
    with pushes(tmp_path, said) as found:
        found.push()
    (line,) = said
    assert "has no checkpoint to push" in line


@pytest.mark.parametrize("missing", ["token", "client"])
def test_a_push_that_cannot_even_be_tried_is_refused_before_anything_is_written(
    missing, dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "" if missing == "token" else CANARY)
    if missing == "client":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = {
        "token": (UsageError, r"pushing needs HF_TOKEN in the environment"),
        "client": (MissingBackendError, r"pip install 'swamla\[hub\]'"),
    }
    error, message = wanted[missing]
    with pytest.raises(error, match=message):
        shown(tmp_path / "run", dataset)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mine", "me/mine/too", "/mine", "me/", "me/mi ne", "../mine", "me/.."])
def test_what_names_no_repository_is_refused(name):
    with pytest.raises(ConfigError, match="must be USER/NAME"):
        TrainConfig(steps=1, hf_repo_id=name)
