"""The progress of preparing data: a line that changes on a terminal, occasional lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from swamla.cli.console import say
from swamla.cli.info_tables import short
from swamla.data.shards import Progress
from swamla.train.tracking.display import time_left

REFRESH = 0.1  # seconds between changes of the line
FIRST, INTERVAL = 2.0, 10.0  # seconds to the first of the occasional lines, and between two

_clock = time.monotonic


@contextmanager
def shown_progress(console: Console) -> Iterator[Progress]:
    """A function that shows the progress of preparing data."""
    if not console.is_interactive:
        yield _Reports(lambda line: say(console, line), FIRST, INTERVAL)
        return
    with Live(Text("reading …"), console=console, auto_refresh=False, transient=True) as live:
        yield _Reports(lambda line: live.update(Text(line, overflow="ellipsis"), refresh=True), 0, REFRESH)


class _Reports:
    """Passes on a line after `first` seconds, and then one per `interval`."""

    def __init__(self, show: Callable[[str], None], first: float, interval: float) -> None:
        self._show, self._interval = show, interval
        self._stage, self._begin, self._last = "", 0.0, _clock()
        self._due = self._last + first

    def __call__(self, stage: str, documents: int, n_bytes: int, share: float | None) -> None:
        """A `Progress`."""
        now, kind = _clock(), stage.partition(",")[0]
        if kind != self._stage:
            self._stage, self._begin = kind, self._last
        self._last = now
        if now >= self._due:
            self._due = now + self._interval
            self._show(progress_line(stage, documents, n_bytes, share, now - self._begin))


def progress_line(stage: str, documents: int, n_bytes: int, share: float | None, seconds: float) -> str:
    """A stage's progress with its total and the time left: "encoding: 42 % of about 10.7 MB, 573 documents, 0:05 left".

    seconds: since the stage began.
    """
    done = f"{documents:,} document{'s' * (documents > 1)}" if documents else ""
    if share is None:
        return f"{stage}: {short(n_bytes, 'B')}, {done} …" if documents else f"{stage} …"
    total = f" of about {short(n_bytes / share, 'B')}" if n_bytes and share else ""
    left = time_left(share, seconds) if share else ""
    return f"{stage}: {share:.0%}{total}{''.join(f', {text}' for text in (done, left) if text)}"
