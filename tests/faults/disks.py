"""Checkpoints that are damaged, and disks that are full."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from swamla.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from swamla.errors import CorruptError
from tests.faults import acts
from tests.faults.rows import Row
from tests.faults.stage import NotHere, Stage, assert_same_end, ending, newest, step_of
from tests.waiting import until


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    """Lose the last byte."""
    os.truncate(file, file.stat().st_size - 1)


DAMAGE: dict[str, Callable[[Path], None]] = {"flipped": flip, "truncated": truncate, "missing": Path.unlink}
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")


def damaged(stage: Stage, times: int) -> Iterator[None]:
    """Every file of the newest checkpoint, damaged in every way."""
    expected = stage.undisturbed(steps=6)
    for name, (how, damage) in list(product(FILES, DAMAGE.items()))[:times]:
        run_dir = stage.fresh()
        shutil.copytree(expected, run_dir)
        last = list_checkpoints(run_dir / "checkpoints")[-1]
        damage(last / name)
        named = last.name if name == "manifest.json" else f"{last.name}/{name}"  # which names what it does not fit
        with pytest.raises(CorruptError, match=named):
            load_checkpoint(last)
        with pytest.warns(UserWarning, match=named):
            found = latest_checkpoint(run_dir / "checkpoints")
        assert found is not None, how
        assert found.step == 4
        stage.start(run_dir, settings={"steps": 6}).expect(0)
        assert_same_end(run_dir, expected)
        yield


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of this size at `folder`."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise NotHere(f"mounting a small disk is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


AT_THREE = partial(acts.signal_in_step, signal.SIGTERM, step=3)
SLOWLY = partial(acts.slow_down, 0.15)


def full(stage: Stage, times: int) -> Iterator[None]:
    """A disk that fills while the run saves, and has room again later."""
    for on_save_error, async_save in list(product(("stop", "continue"), (False, True)))[:times]:
        settings = {"steps": 8, "async_save": async_save, "on_save_error": on_save_error}
        expected = stage.undisturbed(steps=8)
        with small_disk(stage.fresh("disk"), 4096) as disk:
            run_dir, ballast = disk / "run", disk / "ballast"
            stage.start(run_dir, settings=settings, twist=AT_THREE).expect(75)
            # Enough is left for the records, and too little for a checkpoint of some hundred kilobytes.
            free = shutil.disk_usage(disk).free
            ballast.write_bytes(bytes(free - 60_000))
            with ending([stage.start(run_dir, settings=settings, twist=SLOWLY)]) as (p,):
                if on_save_error == "stop":
                    said = p.expect(2)
                    assert step_of(newest(run_dir)) == 3
                    ballast.unlink()
                    stage.start(run_dir, settings=settings).expect(0)
                else:
                    until(lambda p=p: "was not saved" in p.said() or not p.alive())
                    assert step_of(newest(run_dir)) == 3
                    ballast.unlink()
                    said = p.expect(0)
                    assert "warning: the checkpoint of step 4 was not saved" in said
            assert "checkpoints/step-00000004: disk full: needs" in said, said
            assert "older checkpoints are intact" in said
            assert_same_end(run_dir, expected)
        yield


def quite_full(stage: Stage, times: int) -> Iterator[None]:
    """A disk without a byte left: not even a step's record can be written."""
    expected = stage.undisturbed(steps=8)
    for _ in range(times):
        with small_disk(stage.fresh("disk"), 4096) as disk:
            run_dir, ballast = disk / "run", disk / "ballast"
            stage.start(run_dir, settings={"steps": 8}, twist=AT_THREE).expect(75)
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
            process = stage.start(run_dir, settings={"steps": 8})
            assert process.wait() != 0
            assert "No space left on device" in process.said() or "disk full" in process.said(), process.said()
            assert step_of(newest(run_dir)) == 3
            ballast.unlink()
            stage.start(run_dir, settings={"steps": 8}).expect(0)
            assert_same_end(run_dir, expected)
        yield


ROWS = [
    Row(
        fault="a truncated, missing or flipped file of a checkpoint",
        expected="an error that names the file; the run goes on from the one before, to the same end",
        how="each of its five files: one byte less, removed, one bit changed",
        trials=damaged,
        short=3,
        long=len(FILES) * len(DAMAGE),
        tests=("tests/test_checkpoint.py::test_a_damaged_file_is_named_and_the_checkpoint_before_is_used",),
    ),
    Row(
        fault="disk full while saving, in the foreground and in the background",
        expected="older checkpoints intact; the error names the path and the bytes needed; the run stops, or goes on "
        "with a warning, as `on_save_error` says",
        how="a tmpfs of 4 MB, filled, later freed",
        trials=full,
        short=1,
        long=4,
        tests=("tests/test_checkpoint.py::test_a_full_disk_names_path_and_bytes_and_leaves_older_checkpoints_intact",),
    ),
    Row(
        fault="disk full to the last byte",
        expected="the run ends with an error; what was saved is whole, and the run goes on from it to the same end",
        how="the same, without room for a record",
        trials=quite_full,
        short=0,
        long=1,
    ),
]
