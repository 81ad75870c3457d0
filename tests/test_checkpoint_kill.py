"""A process killed while it saves, in either way, leaves what it had saved, and the best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swamla import checkpoint as ckpt

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from swamla.checkpoint import Saver, best_step, latest_checkpoint, load_checkpoint, step_name

torch.set_num_threads(1)  # a child forked after OpenMP has started its threads hangs at the first parallel loop
directory, background, rng = Path(sys.argv[1]), sys.argv[2] == "background", random.Random(0)

def save_for_ever(step):
    w = torch.zeros(50_000)
    best = best_step(directory)
    saver = Saver(directory, keep_last=2, background=background, best=None if best is None else (best, 1 / best))
    while True:
        step += 1
        w.fill_(step)  # also while it is being written
        tensors = {"model": {"w": w}, "optimizer": {"w/m": w}}
        saver.save(step, tensors=tensors, state={}, best_loss=1 / step if step % 3 == 0 else None)
        assert all(saved.error is None for saved in saver.saved())

def newest_name(directory):
    return max((path.name for path in directory.glob("step-*")), default="")

reached, good = 0, 0
for trial in range(12):
    child = os.fork()
    if child == 0:
        save_for_ever(reached)
    end = time.monotonic() + 300
    while newest_name(directory) <= step_name(reached) and time.monotonic() < end:  # as long as a slow machine takes
        time.sleep(0.005)
    time.sleep(0.1 * rng.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = latest_checkpoint(directory)
    step = found.step if found else 0
    assert step >= reached, (step, reached)
    for group, name in [("model", "w"), ("optimizer", "w/m")] if found else []:
        assert bool((found.tensors(group)[name] == step).all())
    best = best_step(directory)
    if best is not None:
        assert best % 3 == 0
        assert bool((load_checkpoint(directory / step_name(best)).tensors("model")["w"] == best).all())
    reached, good = step, good + 1
assert reached > 5, reached
print(f"{good}/12")
"""


@pytest.mark.parametrize("way", ["at once", "background"])
def test_kill_9_at_random_moments_of_saving_and_pruning_leaves_the_newest_and_the_best_whole(tmp_path, way):
    environment = os.environ | {"PYTHONPATH": str(Path(ckpt.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLER, str(tmp_path), way],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "12/12\n", done.stderr
