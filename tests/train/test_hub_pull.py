"""A run taken up from the hub is the one on the disk; what is not as its manifest says is refused, no pickle read."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from swamla.checkpoint import find_checkpoint, load, save_checkpoint
from swamla.checkpoint.shards import Shard
from swamla.cli import main
from swamla.errors import CorruptError, UsageError
from swamla.hub.pull import Pulled, pull
from swamla.hub.push import Pushes
from swamla.hub.staging import stage
from swamla.tensor_file import read_tensors
from swamla.train.tracking.metrics import read_metrics

from .helpers import held_out, losses, run, tiny_config
from .hub_stub import Hub
from .test_resume import digests

REPO = "me/mine"
STEP = "checkpoints/step-00000003/"


@pytest.fixture(scope="module")
def half(tmp_path_factory, dataset) -> Path:
    """The first three steps of six, on the disk."""
    folder = tmp_path_factory.mktemp("half") / "run"
    run(tiny_config(steps=3, schedule="constant"), folder, dataset, evaluate=held_out(dataset))
    return folder


@pytest.fixture
def pushed(hub: Hub, half: Path, tmp_path: Path) -> dict[str, bytes]:
    """The same on the hub: its files there, as a push leaves them."""
    staged = tmp_path / "staged"
    stage(half, staged, REPO)
    files = {path.relative_to(staged).as_posix(): path.read_bytes() for path in staged.rglob("*") if path.is_file()}
    hub.repos[REPO] = [files]
    return files


def test_a_run_resumed_from_the_hub_is_to_the_bit_the_one_resumed_from_the_disk(hub, half, dataset, tmp_path):
    with Pushes(REPO, half, private=True, say=print, stop_requested=lambda: False):
        pass
    local, remote = tmp_path / "local", tmp_path / "remote"
    shutil.copytree(half, local)
    assert pull(REPO, remote) == Pulled(repo_id=REPO, commit=hub.commit_id(1), step=3)
    assert json.loads((remote / "resumed_from_hub.json").read_text()) == {
        "repo_id": REPO,
        "commit": hub.commit_id(1),
        "step": 3,
    }
    fetched = {path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()}
    assert fetched - {"resumed_from_hub.json"} < {path.relative_to(half).as_posix() for path in half.rglob("*")}
    config = tiny_config(steps=6, schedule="constant")
    for folder in (local, remote):
        run(config, folder, dataset, evaluate=held_out(dataset), resume=True)
    assert losses(remote) == losses(local)
    assert len(losses(remote)) == 6
    assert digests(remote) == digests(local)
    scores = [
        [r["held_out_loss"] for r in read_metrics(f / "metrics.jsonl") if "held_out_loss" in r] for f in (local, remote)
    ]
    assert scores[0] == scores[1]


def test_a_checkpoint_in_pieces_travels_too_and_its_root_has_the_whole_weights(hub, half, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(half, folder)
    checkpoint = find_checkpoint(folder)
    whole = {group: checkpoint.tensors(group) for group in ("model", "optimizer", "rng")}
    pieces = {n: Shard(tensor=t, shape=tuple(t.shape), offset=(0,) * t.ndim) for n, t in whole["model"].items()}
    save_checkpoint(folder / "checkpoints", 3, tensors=whole | {"model": pieces}, state=checkpoint.state)
    with Pushes(REPO, folder, private=True, say=print, stop_requested=lambda: False):
        pass
    pull(REPO, tmp_path / "run")
    assert list((tmp_path / "run" / STEP / "model").glob("shard-*.safetensors"))
    (tmp_path / "root.safetensors").write_bytes(hub.repos[REPO][-1]["model.safetensors"])
    root, expected = read_tensors(tmp_path / "root.safetensors"), load(half)[0].state_dict()
    for found in (root, load(tmp_path / "run")[0].state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_command_line_pushes_and_takes_up_again_at_a_pinned_commit(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"line {i} and its square {i * i}\n" for i in range(300)))
    flags = (
        "--data text.txt --tokenizer byte --cache_dir cache --pattern swa --width 16 --n_heads 2 --batch_size 2 "
        "--block_size 32 --max_minutes none --eval_seconds none --eval_interval none --save_interval none --threads 1"
    )
    command = f"train quickstart {flags} --steps 2 --output_dir run --hf_repo_id {REPO}"
    assert main(command.split()) == 0
    assert main(["train", "--resume", "run", "--steps", "4", "--schedule_steps", "4"]) == 0
    first = next(n for n, files in enumerate(hub.repos[REPO]) if "checkpoints/step-00000002/state.json" in files)
    assert "checkpoints/step-00000004/state.json" in hub.repos[REPO][-1]
    capsys.readouterr()
    again = f"train --resume_from_hf --hf_repo_id {REPO} --hf_revision {hub.commit_id(first)} --steps 3"
    assert main(again.split()) == 0
    out = capsys.readouterr().out
    assert f"{REPO} at commit {hub.commit_id(first)}, step 2, is in runs/mine" in out
    assert "resumed after step 2" in out
    assert [step for step, _ in losses(Path("runs/mine"))] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--resume_from_hf", "needs a repository: --hf_repo_id USER/NAME"),
        ("--resume_from_hf --hf_repo_id me/mine --resume run", "takes the recipe and the run from the hub"),
        ("small --resume_from_hf --hf_repo_id me/mine", "takes the recipe and the run from the hub"),
        ("--hf_repo_id me/mine --hf_revision main", "--hf_revision selects a revision for --resume_from_hf"),
        ("--resume_from_hf --hf_repo_id me/mine --output_dir .", ".: exists and is not empty"),
    ],
)
def test_a_resumption_that_names_no_run_or_several_is_refused(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("something").touch()
    assert main(["train", *line.split()]) == 2
    assert message in capsys.readouterr().err


def refused(error: type[Exception], folder: Path, revision: str = "") -> str:
    """What `pull` says; it leaves nothing behind."""
    with pytest.raises(error) as caught:
        pull(REPO, folder / "run", revision=revision)
    assert "\n" not in str(caught.value)
    assert list(folder.glob("*run*")) == []
    assert list(folder.glob(".*")) == []
    return str(caught.value)


def test_an_altered_file_is_refused(pushed, tmp_path):
    name = STEP + "model.safetensors"
    pushed[name] = pushed[name][:-1] + bytes([pushed[name][-1] ^ 1])
    assert f"{name}: SHA-256 differs from the manifest" in refused(CorruptError, tmp_path)


def test_a_missing_file_is_refused(pushed, tmp_path):
    del pushed[STEP + "rng.safetensors"]
    assert STEP + "rng.safetensors: missing" in refused(CorruptError, tmp_path)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def listing(pushed: dict[str, bytes], name: str, data: bytes) -> None:
    """Put a file into the checkpoint, as if it had always been there."""
    manifest = json.loads(pushed[STEP + "manifest.json"])
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    pushed[STEP + "manifest.json"] = json.dumps(manifest).encode()
    pushed[STEP + name] = data


def test_a_pickle_is_not_even_fetched(pushed, hub, tmp_path):
    evil = pickle.dumps(Evil(tmp_path / "pwned"))
    names = ["pytorch_model.bin", STEP + "optimizer.pt", STEP + ".metadata"]
    pushed |= dict.fromkeys(names, evil)
    pull(REPO, tmp_path / "run")
    assert [request for request in hub.seen if any(name in request for name in names)] == []
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "../../../evil.json", ".metadata", "a\\b.json", "/etc/evil.json"])
def test_a_manifest_that_lists_what_is_no_plain_data_is_refused(name, pushed, tmp_path):
    listing(pushed, name, pickle.dumps(Evil(tmp_path / "pwned")))
    assert "not a safetensors or JSON file: refused" in refused(CorruptError, tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_by_another_name_is_refused_when_it_is_read(pushed, dataset, tmp_path):
    listing(pushed, "model.safetensors", pickle.dumps(Evil(tmp_path / "pwned")))
    pull(REPO, tmp_path / "run")
    with pytest.raises(CorruptError, match="is a pickle: refused"):
        load(tmp_path / "run")
    with pytest.raises(CorruptError, match="is a pickle: refused"):
        run(tiny_config(steps=6, schedule="constant"), tmp_path / "run", dataset, resume=True)
    assert not (tmp_path / "pwned").exists()


def test_what_is_not_there_is_said_in_one_line(hub, tmp_path):
    assert refused(UsageError, tmp_path).startswith(f"{REPO}: no such repository on the hub")
    hub.repos[REPO] = [{"README.md": b"hello"}]
    assert "has no run of swamla" in refused(UsageError, tmp_path)
    assert refused(UsageError, tmp_path, revision="v9") == (
        f"{REPO}: has no revision 'v9': give a branch, a tag or a commit"
    )


def test_a_hub_that_is_unwell_or_away_is_said_in_one_line(hub, tmp_path, monkeypatch):
    hub.repos[REPO] = [{}]
    hub.status = 503
    assert refused(UsageError, tmp_path).startswith(f"{REPO}: cannot be downloaded from the hub (")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in refused(UsageError, tmp_path)
