"""The rank watchdog: names a rank that hangs or is cut off, and ends the run instead of letting it stall.

A thread of each rank writes a heartbeat to the store of the process group and reads the next rank's. So it notices a
stopped process, a lost machine or a broken network, whatever call the ranks wait in. A rank whose own step does not end
reports where it is. Saving takes all ranks, so the process ends at once without saving, and torchrun restarts all of
them (--max-restarts) from the last checkpoint.
"""

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from swamla import distributed

BEATS = 8  # heartbeats within the time limit of a silent rank


class RankWatch:
    """Context, to be entered by all ranks, in which a rank without a heartbeat for `minutes` ends them all.

    A step may not take longer either, except the process's first, which may compile. `begin` and `end` report where the
    run is. A single process is not watched.
    """

    def __init__(self, minutes: float) -> None:
        self._limit = 60 * minutes
        self._over = threading.Event()
        self._place, self._since, self._steps = "before the first step", 0.0, 0
        self._thread: threading.Thread | None = None

    def begin(self, place: str, *, limited: bool = False) -> None:
        """Report that a phase begins, e.g. "step 18". limited: it may take at most `minutes`."""
        self._steps += limited
        self._place, self._since = place, time.monotonic() if limited and self._steps > 1 else 0.0

    def end(self) -> None:
        """Report that the phase has ended."""
        self._since = 0.0

    def __enter__(self) -> Self:
        if distributed.world_size() > 1:
            self._store, self._main = distributed.own_store("signs of life"), threading.get_ident()
            self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join(self._limit)

    def _watch(self) -> None:
        rank, count = distributed.rank(), distributed.world_size()
        neighbour, number, heard, at = (rank + 1) % count, 0, b"", time.monotonic()
        while number == 0 or not self._over.wait(self._limit / BEATS):
            number += 1
            said = self._exchange(rank, neighbour, f"{number} {self._place}")
            now = time.monotonic()
            if said != heard or said == b"over":
                heard, at = said, now
            elif now - at > self._limit:
                last = heard.decode().partition(" ")[2] or "never"
                self._fail(
                    f"rank {neighbour} hangs or is cut off: silent for {now - at:.0f} s, last {last}; "
                    f"rank {rank} is in {self._place}"
                )
            if self._since and now - self._since > self._limit:
                where = self._where()
                self._fail(f"{self._place} takes more than {now - self._since:.0f} s: {where}")
        self._store.set(str(rank), "over")

    def _exchange(self, rank: int, neighbour: int, sign: str) -> bytes:
        """Write this rank's heartbeat and read the neighbour's; empty if there is none yet."""
        lost = (
            f"the process at MASTER_ADDR, which stores the heartbeats, hangs or is cut off from rank {rank}, "
            f"which is in {self._place}"
        )
        late = threading.Timer(self._limit, self._fail, [lost])  # a call to the store could wait for ever
        late.daemon = True
        late.start()
        try:
            self._store.set(str(rank), sign)
            return self._store.get(str(neighbour)) if self._store.check([str(neighbour)]) else b""
        except Exception as error:
            self._fail(f"{lost} ({error})")
            raise
        finally:
            late.cancel()

    def _where(self) -> str:
        """The line that every rank is at. Ranks that wait are in a collective; the rank that they wait for is not."""
        self._store.set(f"at {distributed.rank()}", _innermost(sys._current_frames().get(self._main)))
        # The other ranks, which began the step at about the same time, report in these seconds too.
        time.sleep(2 * self._limit / BEATS)
        found: dict[str, list[str]] = {}
        for rank in range(distributed.world_size()):
            known = self._store.check([f"at {rank}"])
            found.setdefault(self._store.get(f"at {rank}").decode() if known else "elsewhere", []).append(str(rank))
        time.sleep(self._limit / BEATS)  # until the others have read it: the store may end with this process
        return "; ".join(f"rank {', '.join(ranks)} at {place}" for place, ranks in found.items())

    def _fail(self, message: str) -> None:
        print(f"swamla: error: {message}; start again with --resume", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may wait in a collective for ever


def _innermost(frame: FrameType | None) -> str:
    """The innermost line of a thread outside Python's and torch's own code."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not {"site-packages", "lib"}.intersection(Path(file).parts) or "swamla" in Path(file).parts:
            return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "an unknown place"
