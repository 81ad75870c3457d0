"""A place where a run can be killed on purpose, to see what survives it: SWAMLA_FAULT=point:step.

The points of a step are `begin`, `accumulation` (after a micro-batch that is not the last), `step` (after the last
one; nothing is updated yet) and `update` (the weights have changed, nothing is counted yet); then `evaluation` (it has
its result, which is told to nobody yet), `save-staging` (a checkpoint's tensors are written), `save-manifest` (all its
files are), `save-rename` (it has its name) and `prune` (a checkpoint lost its name, and is not deleted yet). The step
is the number of the one under way or, between steps, of the last one. `@rank` behind it chooses one of several
processes, which all are meant otherwise. What torchrun has started again is spared.
"""

import os
import signal


def fault(point: str, step: int) -> None:
    """End this process as a power cut would, if SWAMLA_FAULT names this very point and step; else do nothing."""
    asked = os.environ.get("SWAMLA_FAULT")
    if asked is None:
        return
    place, _, rank = asked.partition("@")
    mine = rank in ("", os.environ.get("RANK", "0"))
    if place == f"{point}:{step}" and mine and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
