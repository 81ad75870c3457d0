"""A server on loopback for the tests of clients."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG = 60.0  # seconds for which a server that "does not answer" is silent, at most


class Loopback(ThreadingHTTPServer):
    """Answers with `handler` at `url`.

    Its threads print nothing when their client has left: they may outlive their test, and stderr is another's by then.
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def hang(self) -> bool:
        """Be silent for a minute, or until the server closes. Return whether a minute passed."""
        return not self.over.wait(HANG)


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[Loopback]:
    """Serve `handler` until the block ends."""
    server = Loopback(handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
