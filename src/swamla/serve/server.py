"""Runs the application: a socket, a thread for the engines, and an end in which nothing is lost."""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from swamla.data.tokenizer import Tokenizer
from swamla.errors import MissingBackendError, UsageError
from swamla.model.language_model import LanguageModel
from swamla.serve.answers import Served
from swamla.serve.app import LOCAL, Limits, make_app
from swamla.serve.chat import chat_template
from swamla.serve.engine import Engine
from swamla.serve.worker import Worker
from swamla.signal_notice import handled

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise MissingBackendError(f"the server needs uvicorn: pip install 'swamla[serve]' ({error})") from error

HEADER_SECONDS = 10.0  # for a request's headers, from the connection's beginning or KEPT_SECONDS after an answer
KEPT_SECONDS = 20  # that a connection is kept without a byte after an answer
CONNECTIONS = 1000


class PatientProtocol(H11Protocol):
    """HTTP whose connections end when no whole request comes: uvicorn waits for the rest of its headers for ever."""

    def connection_made(self, transport: Any) -> None:
        """Called for a new connection."""
        super().connection_made(transport)
        self._patience = self._end_later(HEADER_SECONDS)

    def on_response_complete(self) -> None:
        """Called after an answer; whoever still sends its body has that time, too."""
        if not self.transport.is_closing():
            self._patience.cancel()
            self._patience = self._end_later(KEPT_SECONDS + HEADER_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called at its end, after which no timer must keep its buffers: uvicorn leaves one of a broken connection."""
        self._patience.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def _end_later(self, seconds: float) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self._end_unless_asked, self.cycle)

    def _end_unless_asked(self, last: object) -> None:
        """End the connection if no request came after `last`."""
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """A server that drains when it is told to stop: it takes no new connection, and answers the requests it has.

    A second signal ends it without waiting.
    """

    should_exit: bool
    force_exit: bool

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGTERM and SIGINT."""
        self.force_exit = self.should_exit
        self.should_exit = True
        said = "stopping at once" if self.force_exit else "no new requests; those under way are answered"
        print(f"swamla: {signal.Signals(sig).name}: {said}", file=sys.stderr, flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals here; unlike uvicorn's, it does not raise them again after the server has ended."""
        with handled(self.handle_exit, signal.SIGINT, signal.SIGTERM):
            yield


def named_engines(
    models: Sequence[tuple[str, LanguageModel, Tokenizer]],
    *,
    decoding: Callable[[LanguageModel], str] = lambda model: "eager",
    **settings: Any,
) -> tuple[list[Served], Worker]:
    """An engine for each (name, model, tokenizer), and the worker that runs them.

    decoding: of a model, as of `Engine`.  settings: others of `Engine`, of all of them.
    Raises `UsageError` for two models of one name.
    """
    names = [name for name, _, _ in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two runs are called {twice}: requests could not tell them apart")
    created = int(time.time())
    served = [
        Served(name, Engine(model, tokenizer, decoding=decoding(model), **settings), chat_template(tokenizer), created)
        for name, model, tokenizer in models
    ]
    return served, Worker([each.engine for each in served])


def make_server(
    served: Sequence[Served], worker: Worker, *, host: str, key: str = "", limits: Limits | None = None, drain: float
) -> Server:
    """A server that has no socket yet. drain: seconds that requests under way have when it is told to stop."""
    hosts = LOCAL if host in ("127.0.0.1", "localhost", "::1") else ()
    config = uvicorn.Config(
        make_app(served, worker, key=key, hosts=hosts, limits=limits),
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEPT_SECONDS,
        timeout_graceful_shutdown=max(1, round(drain)),
    )
    return Server(config)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises `UsageError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(256)
    except (OSError, OverflowError) as error:
        listening.close()
        raise UsageError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from None
    return listening
