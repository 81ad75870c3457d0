"""Checkpoints: whole or not at all, checked by their manifest, and never a pickle."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from swamla import checkpoint as ckpt
from swamla import tensor_file
from swamla.errors import CorruptError, SwamlaError, UsageError

GROUPS = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"w/step": torch.tensor(3.0)}}


def save(directory: Path, *steps: int) -> list[Path]:
    return [ckpt.save_checkpoint(directory, step, tensors=GROUPS, state={"note": step}) for step in steps]


def damage(path: Path, how: str) -> Path:
    file = path / "model.safetensors"
    if how == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    return file


def test_what_was_saved_is_what_is_loaded(tmp_path):
    (path,) = save(tmp_path, 7)
    loaded = ckpt.load_checkpoint(path)
    assert loaded.step == 7
    assert loaded.state["note"] == 7
    assert torch.equal(loaded.tensors("model")["w"], GROUPS["model"]["w"])
    assert loaded.tensors("optimizer")["w/step"].item() == 3


@pytest.mark.parametrize("how", ["truncated", "missing", "flipped"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, how):
    _, newest = save(tmp_path, 1, 2)
    file = damage(newest, how)
    with pytest.raises(CorruptError, match=r"model\.safetensors") as caught:
        ckpt.load_checkpoint(newest)
    assert caught.value.exit_status == 3
    with pytest.warns(UserWarning, match=str(file)):
        found = ckpt.latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_when_no_checkpoint_verifies_that_is_an_error_and_none_at_all_is_not(tmp_path):
    assert ckpt.latest_checkpoint(tmp_path / "nothing") is None
    damage(save(tmp_path, 1)[0], "missing")
    with (
        pytest.warns(UserWarning, match="damaged checkpoint"),
        pytest.raises(CorruptError, match="no checkpoint verifies"),
    ):
        ckpt.latest_checkpoint(tmp_path)


def test_files_are_on_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), real_fsync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(f"rename {a.name} {b.name}"), real_rename(a, b))[1])
    save(tmp_path, 1)
    renamed = events.index("rename .saving-step-00000001 step-00000001")
    written = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", ".saving-step-00000001"}
    assert written <= set(events[:renamed])
    assert events[renamed + 1 :] == [tmp_path.name]


def test_a_checkpoint_saved_again_at_its_step_replaces_the_old_one(tmp_path):
    damage(save(tmp_path, 1)[0], "truncated")
    save(tmp_path, 1)
    found = ckpt.latest_checkpoint(tmp_path)
    assert found is not None
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_pruning_keeps_the_newest_and_the_pinned(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5)
    ckpt.prune(tmp_path, keep_last=2, pinned=[1])
    assert [p.name[-1] for p in ckpt.list_checkpoints(tmp_path)] == ["1", "4", "5"]


def test_nothing_is_pruned_while_the_newest_does_not_verify(tmp_path):
    damage(save(tmp_path, 1, 2)[1], "flipped")
    with pytest.raises(CorruptError):
        ckpt.prune(tmp_path, keep_last=1)
    assert len(ckpt.list_checkpoints(tmp_path)) == 2


# The second is how safetensors words it: an error class of its own, with the system's number in its text.
NO_SPACE = {
    "json": OSError(errno.ENOSPC, "No space left on device"),
    "tensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("stage", NO_SPACE)
def test_a_full_disk_names_path_and_bytes_and_leaves_older_checkpoints_intact(tmp_path, monkeypatch, stage):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise NO_SPACE[stage]

    if stage == "tensors":
        monkeypatch.setattr(tensor_file, "save_file", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SwamlaError, match=r"step-00000002: disk full: needs 28 bytes") as caught:
        save(tmp_path, 2)
    assert str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    ckpt.verify(tmp_path / "step-00000001")


def test_tied_tensors_are_saved_once_and_loaded_as_one(tmp_path):
    w = torch.randn(64, 64)
    path = ckpt.save_checkpoint(tmp_path, 1, tensors={"model": {"embedding": w, "head": w, "view": w.T}}, state={})
    loaded = ckpt.load_checkpoint(path).tensors("model")
    assert loaded["embedding"] is loaded["head"]
    assert torch.equal(loaded["view"], w.T)  # another layout of the same storage is another tensor
    assert (path / "model.safetensors").stat().st_size < 2.2 * w.nbytes


def test_shape_mismatch_lists_the_first_five_got_and_expected():
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(7))
    wrong = {f"{i}.weight": torch.zeros(3, 2) for i in range(7)}
    with pytest.raises(CorruptError) as caught:
        ckpt.load_into(model, wrong, origin="here")
    assert "0.weight: got (3, 2), expected (2, 2)" in str(caught.value)
    assert "4.weight" in str(caught.value)
    assert "5.weight" not in str(caught.value)
    assert "and 2 more" in str(caught.value)


def test_missing_and_unexpected_names_are_both_listed():
    with pytest.raises(
        CorruptError, match=r"weight: got nothing, expected \(2, 2\); other: got \(1,\), expected nothing"
    ):
        ckpt.load_into(nn.Linear(2, 2, bias=False), {"other": torch.zeros(1)}, origin="here")


def test_a_newer_format_is_refused_with_the_way_to_mend_it_and_never_fallen_back_from(tmp_path):
    _, newest = save(tmp_path, 1, 2)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UsageError, match=r"format version 99.*pip install --upgrade"):
        ckpt.latest_checkpoint(tmp_path)


def test_a_symlink_that_escapes_is_refused(tmp_path):
    (path,) = save(tmp_path / "run", 1)
    outside = (path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (path / "model.safetensors").symlink_to(outside)
    with pytest.raises(CorruptError, match="leads outside"):
        ckpt.load_checkpoint(path)


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path):
    (path,) = save(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match="leads outside"):
        ckpt.load_checkpoint(path)


def test_a_run_is_found_by_best_latest_or_step(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, 1, 2, 3)
    assert ckpt.find_checkpoint(tmp_path).step == 3  # nothing was evaluated yet
    ckpt.mark_best(directory, 2, 1.5)
    assert ckpt.find_checkpoint(tmp_path).step == 2
    assert ckpt.find_checkpoint(tmp_path, "latest").step == 3
    assert ckpt.find_checkpoint(tmp_path, "1").step == 1
    with pytest.raises(UsageError, match=r"no checkpoint of step 9; there are: 1, 2, 3"):
        ckpt.find_checkpoint(tmp_path, "9")
    with pytest.raises(UsageError, match="must be"):
        ckpt.find_checkpoint(tmp_path, "newest")


def test_a_damaged_best_gives_the_latest_with_a_warning(tmp_path):
    paths = save(tmp_path / "checkpoints", 1, 2)
    ckpt.mark_best(tmp_path / "checkpoints", 1, 1.5)
    damage(paths[0], "flipped")
    with pytest.warns(UserWarning, match="best checkpoint is damaged"):
        assert ckpt.find_checkpoint(tmp_path).step == 2


def test_a_dtype_that_is_a_word_is_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"^dtype is 'bfloat16': must be a dtype of torch, e.g. torch.bfloat16$"):
        ckpt.load(tmp_path, dtype="bfloat16")


def test_what_is_no_run_folder_is_said(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        ckpt.load(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"\x80\x02")
    with pytest.raises(UsageError, match="pickles are never loaded"):
        ckpt.load(tmp_path / "model.pt")


def write_json(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(data if isinstance(data, str) else json.dumps(data))


@pytest.mark.parametrize("best", ["", "{", "[]", "{}", '{"step": "2"}', '{"step": true}', '{"step": 7}'])
def test_a_best_json_that_says_nothing_usable_gives_the_latest_with_a_warning(tmp_path, best):
    save(tmp_path / "checkpoints", 1, 2)
    write_json(tmp_path / "checkpoints" / "best.json", best)
    with pytest.warns(UserWarning, match="the best checkpoint is damaged, using the latest"):
        assert ckpt.find_checkpoint(tmp_path).step == 2


RUN = {"format_version": 1, "model": {}, "data": {}, "train": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, '"model" is None, expected a table'),
        ({"train": []}, r'"train" is \[\], expected a table'),
        ({"format_version": "2"}, "\"format_version\" is '2', expected a whole number"),
        ({"format_version": None}, '"format_version" is None'),
        ({"format_version": 0}, "invalid format version 0"),
    ],
)
def test_a_damaged_run_config_is_a_corrupt_artefact(tmp_path, change, message):
    write_json(tmp_path / "config.json", RUN | change)
    with pytest.raises(CorruptError, match=rf"config\.json: .*{message}"):
        ckpt.load(tmp_path)
    write_json(tmp_path / "config.json", RUN | {"format_version": 2})
    with pytest.raises(UsageError, match="format version 2, this swamla reads up to 1"):
        ckpt.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda manifest: manifest["files"]["state.json"].pop("bytes"), '"bytes" is None'),
        (lambda manifest: manifest["files"]["state.json"].pop("sha256"), '"sha256" is None'),
        (lambda manifest: manifest["files"].update({"state.json": 3}), '"bytes" is None'),
        (lambda manifest: manifest.update(files=[]), r'"files" is \[\]'),
        (lambda manifest: manifest.update(step="1"), "\"step\" is '1'"),
        (lambda manifest: manifest.update(format_version="1"), "\"format_version\" is '1'"),
    ],
)
def test_a_damaged_manifest_is_a_corrupt_artefact(tmp_path, edit, message):
    (path,) = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    write_json(path / "manifest.json", manifest)
    with pytest.raises(CorruptError, match=rf"manifest\.json: damaged: {message}"):
        ckpt.load_checkpoint(path)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, object()])
def test_a_state_that_cannot_be_written_leaves_no_staging_folder_behind(tmp_path, wrong):
    save(tmp_path, 1)
    with pytest.raises((ValueError, TypeError)):
        ckpt.save_checkpoint(tmp_path, 2, tensors=GROUPS, state={"loss": wrong})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
