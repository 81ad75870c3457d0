"""The thread in which engines work."""

import logging
import threading
from collections.abc import Sequence

from swamla.serve.engine import Engine

LOG = logging.getLogger(__name__)


class Worker:
    """A thread that runs the rounds of engines in turn: they share the processor's cores."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.wake = threading.Event()
        for engine in engines:
            engine.wake = self.wake
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="swamla-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current round; requests that have not ended fail."""
        self._closed = True
        self.wake.set()
        self._thread.join()
        for engine in self.engines:
            engine.fail_all("the server stops")

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._closed:
            self.wake.clear()
            goes_on = [self._step(engine) for engine in self.engines]  # all of them, whoever has more to do
            if not any(goes_on) and not self._closed:
                self.wake.wait()

    @staticmethod
    def _step(engine: Engine) -> bool:
        try:
            return engine.step()
        except Exception as error:  # a bug: the requests under way fail, and those to come are answered
            LOG.exception("a round failed")
            engine.fail_all(f"{type(error).__name__}: {error}")
            return True
