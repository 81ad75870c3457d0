"""A server on a free port of this machine, in a thread, and plain requests to it."""

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'swamla[serve]'")
pytest.importorskip("starlette", reason="needs starlette: pip install 'swamla[serve]'")

from swamla.data.tokenizer import Tokenizer
from swamla.model.language_model import LanguageModel
from swamla.serve.answers import Served
from swamla.serve.app import Limits
from swamla.serve.engine import Engine
from swamla.serve.server import Server, bound_socket, make_server, named_engines
from tests.waiting import PATIENCE, until


@dataclass
class Running:
    """A server under test."""

    port: int
    served: Sequence[Served]
    server: Server
    key: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        return self.served[0].engine

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of a request; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        known = {"content-type": "application/json"} if raw is not None else {}
        if self.key:
            known["authorization"] = f"Bearer {self.key}"
        try:
            connection.request(method, path, raw, {**known, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        status, raw = self.call("POST", path, body)
        return status, json.loads(raw)

    def wait_idle(self) -> None:
        """Wait until no request is under way; for ever where a slot was lost."""
        until(lambda: not any(each.engine.n_active or each.engine.n_waiting for each in self.served))


@contextmanager
def running(
    models: Sequence[tuple[str, LanguageModel, Tokenizer]],
    *,
    key: str = "",
    limits: Limits | None = None,
    drain: float = 10.0,
    **settings: Any,
) -> Iterator[Running]:
    """A server for these models while the context lasts."""
    served, worker = named_engines(models, **({"slots": 4, "limit": 200, "piece": 16} | settings))
    server = make_server(served, worker, host="127.0.0.1", key=key, limits=limits, drain=drain)
    listening = bound_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    worker.start()
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(listening.getsockname()[1], served, server, key)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        worker.close()
        listening.close()
    assert not thread.is_alive()
