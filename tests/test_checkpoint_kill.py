"""A process killed while it saves leaves what it had saved."""

import os
import subprocess
import sys
from pathlib import Path

from swamla import checkpoint as ckpt

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np, torch
from swamla.checkpoint import latest_checkpoint, prune, save_checkpoint

directory, rng = Path(sys.argv[1]), random.Random(0)

def save_for_ever(step):
    while True:
        step += 1
        w = torch.from_numpy(np.full(50_000, step, dtype=np.float32))
        save_checkpoint(directory, step, tensors={"model": {"w": w}, "optimizer": {"w/m": w}}, state={})
        prune(directory, keep_last=2)

reached, good = 0, 0
for trial in range(12):
    child = os.fork()
    if child == 0:
        save_for_ever(reached)
    time.sleep(0.03 + 0.1 * rng.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = latest_checkpoint(directory)
    step = found.step if found else 0
    assert step >= reached, (step, reached)
    for group, name in [("model", "w"), ("optimizer", "w/m")] if found else []:
        assert bool((found.tensors(group)[name] == step).all())
    reached, good = step, good + 1
assert reached > 5, reached
print(f"{good}/12")
"""


def test_kill_9_at_random_moments_of_saving_and_pruning_always_leaves_the_newest_checkpoint_whole(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(ckpt.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLER, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "12/12\n", done.stderr
