"""Checkpoints that several processes wrote: one protocol, any cut, DCP's own files, and nothing that is damaged."""

import json
import pickle
import struct
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swamla.checkpoint import (
    Shard,
    ShardReader,
    WriterGroup,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    prune,
    save_checkpoint,
    save_shards,
    verify,
)
from swamla.checkpoint.shards import SHARDING, shard_name
from swamla.errors import CorruptError, SwamlaError, UsageError

WHOLE = {
    "matrix": torch.arange(35.0).reshape(7, 5),
    "experts": torch.arange(24, dtype=torch.bfloat16).reshape(4, 2, 3),
    "short": torch.tensor([3.0]),  # less than there are processes
    "codes": torch.arange(9, dtype=torch.uint8),
}
PLAIN = {"bias": torch.tensor([1.0, 2.0]), "step": torch.tensor(7.0), "none": torch.zeros(0, 3)}


def cut(whole: Tensor, rank: int, ranks: int, dim: int = 0) -> Shard:
    """What fully_shard gives a rank: ceil(n / ranks) rows, the last ranks less or nothing."""
    size = -(-whole.shape[dim] // ranks)
    begin = min(rank * size, whole.shape[dim])
    part = whole.narrow(dim, begin, min(size, whole.shape[dim] - begin)).clone()
    offset = tuple(begin if d == dim else 0 for d in range(whole.ndim))
    return Shard(tensor=part, shape=tuple(whole.shape), offset=offset)


class Threads(WriterGroup):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, ranks: int, shared: dict[str, Any]) -> None:
        self.rank, self._ranks, self._shared = rank, ranks, shared

    def together(self, work: Callable[[], Any]) -> list[Any]:
        error = mine = None
        try:
            mine = work()
        except Exception as caught:
            error = caught
        found = self._shared["found"]
        found[self.rank] = (mine, error)
        self._shared["barrier"].wait(10)
        results = [found[rank] for rank in range(self._ranks)]
        self._shared["barrier"].wait(10)
        if error is not None:
            raise error
        for _, other in results:
            if other is not None:
                raise SwamlaError(f"elsewhere: {other}")
        return [result for result, _ in results]


def save_by(ranks: int, directory: Path, step: int, held: Callable[[int], dict[str, Any]]) -> list[Exception | None]:
    """Save as `ranks` processes, each what `held` gives it; returns what each raised."""
    shared = {"found": {}, "barrier": threading.Barrier(ranks)}
    errors: list[Exception | None] = [None] * ranks

    def one(rank: int) -> None:
        try:
            writers = Threads(rank, ranks, shared)
            save_checkpoint(directory, step, tensors=held(rank), state={"note": step}, writers=writers)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def share(rank: int, ranks: int) -> dict[str, Any]:
    """The groups of a checkpoint: one in pieces, one that is not."""
    pieces: dict[str, Any] = {name: cut(whole, rank, ranks) for name, whole in WHOLE.items()}
    tied = {"tied": pieces["matrix"]}
    plain = PLAIN if rank == 0 else {}
    return {"model": pieces | tied | plain, "rng": plain}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Step 1, of 3 processes."""
    assert save_by(3, tmp_path, 1, lambda rank: share(rank, 3)) == [None] * 3
    return tmp_path / "step-00000001"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
def test_what_any_number_of_processes_wrote_one_reads_whole(tmp_path: Path, ranks: int) -> None:
    assert save_by(ranks, tmp_path, 1, lambda rank: share(rank, ranks)) == [None] * ranks
    loaded = load_checkpoint(tmp_path / "step-00000001")
    found = loaded.tensors("model")
    assert found.keys() == {*WHOLE, *PLAIN, "tied"}
    for name, tensor in (WHOLE | PLAIN).items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert found["tied"] is found["matrix"]
    assert loaded.tensors("rng").keys() == PLAIN.keys()
    assert loaded.state["note"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(("writers", "readers"), list(product([1, 2, 4], [1, 2, 3])))
def test_any_number_of_processes_read_their_own_boxes_whoever_wrote_them(tmp_path, writers, readers) -> None:
    save_by(writers, tmp_path, 1, lambda rank: share(rank, writers))
    pieces = load_checkpoint(tmp_path / "step-00000001").reader("model")
    for name, dim, rank in product(WHOLE, (0, 1), range(readers)):
        if dim < WHOLE[name].ndim:
            expected = cut(WHOLE[name], rank, readers, dim)
            found = pieces.read(name, expected.offset, tuple(expected.tensor.shape))
            assert torch.equal(found, expected.tensor), (name, dim, rank)
            assert found.dtype == expected.tensor.dtype


def test_two_dimensions_may_be_cut_at_once(tmp_path: Path) -> None:
    whole, files = torch.arange(42.0).reshape(6, 7), []
    for rank, (i, j) in enumerate(product(range(2), range(2))):
        part = whole[3 * i : 3 * i + 3, 4 * j : 4 * j + 4].contiguous()
        files.append(tmp_path / shard_name(rank))
        save_shards(files[-1], {"w": Shard(tensor=part, shape=(6, 7), offset=(3 * i, 4 * j))})
    pieces = ShardReader(files)
    assert torch.equal(pieces.read("w"), whole)
    assert torch.equal(pieces.read("w", (2, 3), (3, 2)), whole[2:5, 3:5])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_reads_our_files_and_we_read_its_writers(checkpoint: Path, tmp_path: Path) -> None:
    into = {name: torch.full_like(tensor, 99) for name, tensor in WHOLE.items()}
    reader = dcp.HuggingFaceStorageReader(str(checkpoint / "model"))
    dcp.load(into, storage_reader=reader, no_dist=True)
    assert all(torch.equal(into[name], WHOLE[name]) for name in WHOLE)
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
    dcp.save(dict(WHOLE), storage_writer=writer, no_dist=True)
    pieces = ShardReader(sorted((tmp_path / "theirs").glob("*.safetensors")))
    assert all(torch.equal(pieces.read(name), WHOLE[name]) for name in WHOLE)


def test_each_process_writes_what_it_holds_and_nothing_twice(checkpoint: Path) -> None:
    files = [load_file(file) for file in sorted((checkpoint / "model").iterdir())]
    assert [set(file) & {"short", "bias", "matrix"} for file in files] == [
        {"short", "bias", "matrix"},
        {"matrix"},
        {"matrix"},
    ]
    assert sum(file["matrix"].numel() for file in files) == WHOLE["matrix"].numel()


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_process_cannot_write_all_fail_and_older_checkpoints_stay(checkpoint, monkeypatch, failing) -> None:
    from swamla.checkpoint import folder

    real = folder.save_shards

    def full(file: Path, held: Any) -> None:
        if file.name == shard_name(failing):
            raise OSError(28, "No space left on device")
        real(file, held)

    monkeypatch.setattr(folder, "save_shards", full)
    errors = save_by(3, checkpoint.parent, 2, lambda rank: share(rank, 3))
    for error in errors:  # the main process, which speaks, has the path and the bytes whoever failed
        assert "step-00000002: disk full: needs" in str(error)
    assert all(isinstance(error, SwamlaError) for error in errors)
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]
    verify(checkpoint)


@pytest.mark.parametrize("how", ["truncated", "missing", "flipped", "missing and unlisted"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_used(checkpoint: Path, how: str) -> None:
    save_by(3, checkpoint.parent, 2, lambda rank: share(rank, 3))
    newest = checkpoint.with_name("step-00000002")
    file = newest / "model" / shard_name(1)
    data = file.read_bytes()
    if how == "truncated":
        file.write_bytes(data[:-1])
    elif how == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        file.unlink()
    if how != "missing and unlisted":
        with pytest.warns(UserWarning, match=shard_name(1)):
            found = latest_checkpoint(checkpoint.parent)
        assert found is not None
        assert found.step == 1
        return
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"][f"model/{shard_name(1)}"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=r"model: matrix: its 2 shards have 20 elements, the whole has 35"):
        load_checkpoint(newest).tensors("model")


def test_a_file_that_the_manifest_does_not_list_is_not_read(checkpoint: Path) -> None:
    save_file({"evil": torch.zeros(1)}, checkpoint / "model" / shard_name(7))
    assert "evil" not in load_checkpoint(checkpoint).tensors("model")


def relisted(checkpoint: Path, file: Path) -> None:
    """Let the manifest vouch for a file that was changed."""
    from swamla.files import sha256_of

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][str(file.relative_to(checkpoint))] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


BAD_SHARDS = {
    "a pickle": (pickle.dumps(_Bomb()), "is a pickle: refused"),
    "a huge header": (struct.pack("<Q", 2**62) + b"{}", "header of"),
    "a header that is no JSON": (struct.pack("<Q", 4) + b"nope", "header is not JSON"),
}


@pytest.mark.parametrize("bad", BAD_SHARDS)
def test_a_shard_that_is_no_safetensors_file_is_refused_and_nothing_in_it_runs(checkpoint, monkeypatch, bad) -> None:
    monkeypatch.chdir(checkpoint)
    file = checkpoint / "model" / shard_name(1)
    file.write_bytes(BAD_SHARDS[bad][0])
    relisted(checkpoint, file)
    with pytest.raises(CorruptError, match=rf"{shard_name(1)}: .*{BAD_SHARDS[bad][1]}"):
        load_checkpoint(checkpoint).tensors("model")
    assert not (checkpoint / "exploded").exists()


def test_a_pickle_beside_the_shards_is_never_opened(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.chdir(checkpoint)
    (checkpoint / "model" / ".metadata").write_bytes(pickle.dumps(_Bomb()))
    load_checkpoint(checkpoint).tensors("model")
    assert not (checkpoint / "exploded").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"saved_offsets": [6, 0], "shape": [7, 5]}, "shards have"),  # beyond the end
        ({"saved_offsets": [0, 0], "shape": [7, 5]}, "shards have"),  # twice the same rows, others nowhere
        ({"saved_offsets": [-1, 0], "shape": [7, 5]}, "begins at"),
        ({"saved_offsets": [3], "shape": [7, 5]}, "begins at"),
        ({"saved_offsets": [3, 0], "shape": [8, 5]}, "is part of"),
        ({"saved_offsets": 3, "shape": [7, 5]}, shard_name(1)),
        ([], shard_name(1)),
    ],
)
def test_pieces_that_do_not_make_up_the_whole_are_a_corrupt_artefact(
    checkpoint: Path, place: Any, message: str
) -> None:
    file = checkpoint / "model" / shard_name(1)
    places = {"matrix": place, "experts": {"saved_offsets": [2, 0, 0]}, "codes": {"saved_offsets": [3]}}
    save_file(load_file(file), file, metadata={SHARDING: json.dumps(places)})
    relisted(checkpoint, file)
    with pytest.raises(CorruptError, match=message):
        load_checkpoint(checkpoint).tensors("model")


def test_a_symlink_that_escapes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model").rename(tmp_path / "outside")
    (checkpoint / "model").symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptError, match="leads outside"):
        load_checkpoint(checkpoint)


def test_a_newer_format_is_refused(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UsageError, match=r"format version 99.*pip install --upgrade"):
        load_checkpoint(checkpoint)


def test_a_missing_group_is_named(checkpoint: Path) -> None:
    assert not load_checkpoint(checkpoint).has("optimizer")
    with pytest.raises(CorruptError, match=r"optimizer\.safetensors: missing"):
        load_checkpoint(checkpoint).tensors("optimizer")


def test_shapes_that_do_not_fit_are_listed_got_and_expected(checkpoint: Path) -> None:
    module = nn.Module()
    module.register_parameter("matrix", nn.Parameter(torch.zeros(5, 7)))
    with pytest.raises(CorruptError, match=r"matrix: got \(7, 5\), expected \(5, 7\); "):
        load_into(module, load_checkpoint(checkpoint).tensors("model"), origin="here")


def test_pruning_takes_whole_checkpoints_of_shards_and_keeps_the_pinned(checkpoint: Path) -> None:
    for step in (2, 3, 4):
        save_by(2, checkpoint.parent, step, lambda rank: share(rank, 2))
    prune(checkpoint.parent, keep_last=1, pinned=[2])
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["step-00000002", "step-00000004"]
