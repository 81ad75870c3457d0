"""A place where a run can be killed on purpose, to see what survives it: SWAMLA_FAULT=point:step.

The points of a step are `begin`, `accumulation` (after a micro-batch that is not the last), `step` (after the last one,
before the update) and `update` (after the weights have changed, before anything is counted). The others are
`evaluation` (after it, before its result is reported), `save-staging` (a checkpoint's tensors are written),
`save-manifest` (all its files are), `save-rename` (it is in place) and `prune` (a checkpoint is renamed for deletion
but not deleted yet). The step is the current one or, between steps, the last one. `@rank` after it chooses one of
several processes, by default all. Processes that torchrun has restarted are not killed.
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
