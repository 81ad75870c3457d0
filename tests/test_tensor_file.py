"""Files of tensors: nothing that is no safetensors file is opened as one, and nothing in a file is ever run."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swamla import tensor_file
from swamla.checkpoint import save_checkpoint, save_shards
from swamla.checkpoint.shards import Shard
from swamla.errors import CorruptError
from swamla.files import new_folder


@pytest.mark.parametrize("header", [2**63, 200_000_000, 4096])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", header) + b"{}")
    with pytest.raises(CorruptError, match=f"header of {header} bytes"):
        tensor_file.read_tensors(file)


def test_a_broken_header_is_a_named_error(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 4) + b"nope")
    with pytest.raises(CorruptError, match=str(file)):
        tensor_file.read_tensors(file)


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("make", ["pickle", "torch"])
def test_a_pickle_is_refused_and_nothing_in_it_runs(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.safetensors"
    if make == "pickle":
        file.write_bytes(pickle.dumps(_Bomb()))
    else:
        torch.save({"w": _Bomb()}, file)
    with pytest.raises(CorruptError, match="is a pickle: refused"):
        tensor_file.read_tensors(file)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("aliases", ["{", "[]", json.dumps({"a": "nothing"}), "3"])
def test_aliases_that_lead_nowhere_are_a_corrupt_artefact(tmp_path, aliases):
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, file, metadata={"aliases": aliases})
    with pytest.raises(CorruptError, match=str(file)):
        tensor_file.read_tensors(file)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_are_readable_as_any_new_file_is(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path, 1, tensors={"model": {"w": torch.zeros(2)}}, state={})
        save_shards(tmp_path / "shard", {"w": Shard(tensor=torch.zeros(2), shape=(4,), offset=(0,))})
        staging = new_folder(tmp_path, ".staging-")
        (tmp_path / "plain").touch()
        (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)
    plain, folder = ((tmp_path / name).stat().st_mode for name in ("plain", "folder"))
    files = [*(tmp_path / "step-00000001").iterdir(), tmp_path / "shard"]
    assert {file.name for file in files} == {"manifest.json", "model.safetensors", "state.json", "shard"}
    assert {file.stat().st_mode for file in files} == {plain}
    assert staging.stat().st_mode == folder
