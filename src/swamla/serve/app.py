"""The server's routes: OpenAI's API, health, metrics and the page, as an ASGI application."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from swamla.errors import MissingBackendError, SwamlaError
from swamla.serve.answers import Chat, Collected, Completion, Exchange, Served, chunks, error_body, to_json
from swamla.serve.engine import Job
from swamla.serve.explaining import Explainer, Late
from swamla.serve.metrics import metrics
from swamla.serve.page import page
from swamla.serve.requests import Event, Failed, QueueFull, Read, TooLong
from swamla.serve.schema import CHAT, COMPLETION, EXPLANATION, Invalid, Schema, check, openapi
from swamla.serve.worker import Worker
from swamla.version import __version__

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise MissingBackendError(f"the server needs starlette: pip install 'swamla[serve]' ({error})") from error

CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OPEN = ("/", "/health", "/favicon.ico")  # without a key
LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may take: bytes of its body, seconds to send it, and seconds until it has its answer."""

    body_bytes: int = 1 << 20
    body_seconds: float = 20.0
    seconds: float = 600.0


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.status, self.param, self.code = status, param, code
        super().__init__(message)


def make_app(
    served: Sequence[Served],
    worker: Worker,
    *,
    key: str = "",
    hosts: Sequence[str] = LOCAL,
    limits: Limits | None = None,
) -> ASGIApp:
    """The application, whose engines `worker` runs.

    key: what "Authorization: Bearer" has to have; "" for nothing.  hosts: names by which the server may be called,
    which keeps web pages from reaching a local server by a name of their own; empty for any.
    """
    routes = Routes(served, worker, limits or Limits(), bool(key))
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/favicon.ico", routes.no_icon),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/explain", routes.explain, methods=["POST"]),
        ],
        exception_handlers={Refused: _on_refused, HTTPException: _on_http_error, Exception: _on_bug},
    )
    return Guard(app, key, hosts)


class Routes:
    """The functions behind the paths."""

    def __init__(self, served: Sequence[Served], worker: Worker, limits: Limits, has_key: bool) -> None:
        self.served = {each.name: each for each in served}
        self.worker, self.limits, self.has_key = worker, limits, has_key
        self._explainer = Explainer(limits.seconds)
        self._page = page()

    async def page(self, request: Request) -> Response:
        """The page, which needs nothing but this server."""
        headers = {"content-security-policy": CONTENT_POLICY, "x-content-type-options": "nosniff"}
        return Response(self._page, media_type="text/html; charset=utf-8", headers=headers)

    async def no_icon(self, request: Request) -> Response:
        """Browsers ask for it."""
        return Response(status_code=204)

    async def health(self, request: Request) -> Response:
        """Whether requests are answered: 200, or 503."""
        alive = self.worker.alive
        models = {
            name: {"active": each.engine.n_active, "waiting": each.engine.n_waiting, "slots": each.engine.n_slots}
            for name, each in self.served.items()
        }
        return _json({"status": "ok" if alive else "stopped", "models": models}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus's text format."""
        return Response(metrics(self.served.values()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """The description of this API."""
        return _json(openapi(__version__, key=self.has_key))

    async def models(self, request: Request) -> Response:
        """The models."""
        return _json({"object": "list", "data": [each.described() for each in self.served.values()]})

    async def model(self, request: Request) -> Response:
        """One model."""
        return _json(self._named(request.path_params["name"]).described())

    async def completions(self, request: Request) -> Response:
        """Texts continued."""
        return await self._answer(request, COMPLETION, Completion)

    async def chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        return await self._answer(request, CHAT, Chat)

    async def explain(self, request: Request) -> Response:
        """The attention of a text."""
        served, body = await self._asked(request, EXPLANATION)
        with _refusals():
            return await _unless_left(request, self._explained(served, body))

    async def _explained(self, served: Served, body: dict[str, Any]) -> Response:
        found = await self._explainer.explain(served, body)
        return await asyncio.to_thread(_json, found)

    async def _answer(self, request: Request, schema: Schema, kind: type[Exchange]) -> Response:
        served, body = await self._asked(request, schema)
        with _refusals():
            exchange = await asyncio.to_thread(kind, served, body, self.limits.seconds)
            answers = Answers(exchange)
        if exchange.streams:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(answers.stream(), media_type="text/event-stream", headers=headers)
        return await answers.whole(request)

    async def _asked(self, request: Request, schema: Schema) -> tuple[Served, dict[str, Any]]:
        """The model that a body names, and the body. Raises `Refused` for one that does not fit the schema."""
        if not self.worker.alive:
            raise Refused(503, "the engines have stopped: the server must be started again")
        body = await self._body(request)
        try:
            await asyncio.to_thread(check, body, schema)  # half a second for a MiB of ids
        except Invalid as error:
            raise Refused(400, str(error), param=error.where or None) from None
        return self._named(body.get("model")), body

    def _named(self, name: str | None) -> Served:
        if name is None:
            return next(iter(self.served.values()))
        if name not in self.served:
            known = ", ".join(self.served)
            raise Refused(
                404, f"there is no model {name!r:.80}; there are: {known}", param="model", code="model_not_found"
            )
        return self.served[name]

    async def _body(self, request: Request) -> dict[str, Any]:
        """The body's JSON object. Raises `Refused` for one that is too large or too slow, or is none."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site cannot send it without asking
            raise Refused(415, f"content-type {kind!r:.40} must be application/json")
        if int(request.headers.get("content-length", 0)) > self.limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                raw = bytearray()
                async for part in request.stream():
                    raw += part
                    if len(raw) > self.limits.body_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.limits.body_seconds:g} s") from None
        except ClientDisconnect:
            raise Refused(400, "the client left") from None
        return parse_object(bytes(raw))

    def _too_large(self) -> Refused:
        return Refused(413, f"the body must have {self.limits.body_bytes} bytes at most")


class Answers:
    """The answers to one HTTP request, which the engine's thread hands over to the server's.

    Raises what `Engine.submit` does. Whatever ends the HTTP request ends the engine's work for it.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        requests = exchange.requests()
        self.jobs: list[Job] = exchange.served.engine.submit_all(
            [(request, self._listener(prompt)) for prompt, request in enumerate(requests)]
        )

    def _listener(self, prompt: int) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed, and the client gone
                self.loop.call_soon_threadsafe(self.events.put_nowait, (prompt, event))

        return hear

    def cancel(self) -> None:
        """Free the slots of answers that have not ended."""
        for job in self.jobs:
            job.cancel()

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events. A client that leaves ends this generator."""
        exchange = self.exchange
        try:
            while not exchange.is_done:
                arrived = [await self.events.get()]
                while not self.events.empty():  # what came meanwhile is sent together
                    arrived.append(self.events.get_nowait())
                told = b""
                for prompt, event in arrived:
                    if isinstance(event, Failed):
                        yield told + _event(_failure(event)[1])
                        return
                    if isinstance(event, Read) and (event.prompt or exchange.tells_ids):  # all of the prompt's tokens
                        told += await asyncio.to_thread(self._told, prompt, event)
                    else:
                        told += self._told(prompt, event)
                yield told
            if exchange.tells_usage:
                yield _event(exchange.chunk([], exchange.usage()))
            yield b"data: [DONE]\n\n"
        finally:
            self.cancel()

    def _told(self, prompt: int, event: Event) -> bytes:
        return b"".join(map(_event, chunks(self.exchange, prompt, event)))

    async def whole(self, request: Request) -> Response:
        """All answers at once."""
        try:
            return await _unless_left(request, self._collect())
        finally:
            self.cancel()

    async def _collect(self) -> Response:
        collected = Collected(self.exchange)
        while not self.exchange.is_done:
            prompt, event = await self.events.get()
            if isinstance(event, Failed):
                status, body = _failure(event)
                return _json(body, status)
            collected.add(prompt, event)
        return await asyncio.to_thread(lambda: _json(collected.response()))


class Guard:
    """Lets requests pass that name this server, and have the key where one is needed."""

    def __init__(self, app: ASGIApp, key: str, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, tuple(hosts)
        self.expected = f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            with suppress(asyncio.CancelledError):  # the server stops without waiting
                await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self.hosts and name.lower() not in self.hosts:
            message = f"this server is {' or '.join(self.hosts)}, not {name!r:.80}: `host` opens it to others"
            return _json(error_body(message, "invalid_request_error", code="host"), 403)
        if self.expected and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not secrets.compare_digest(given, self.expected):
                message = "the API key is missing or wrong: Authorization: Bearer KEY"
                return _json(error_body(message, "authentication_error", code="invalid_api_key"), 401)
        return None


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises `Refused` for anything else: bytes that are no UTF-8, NaN, a depth of 1000."""
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is no UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {str(error) or type(error).__name__}"[:200]) from None
    if not isinstance(found, dict):
        raise Refused(400, "the body must be a JSON object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _failure(event: Failed) -> tuple[int, dict[str, Any]]:
    """Status and body of a request that the engine gave up."""
    if event.late:
        return 504, error_body(event.message, "timeout_error", code="timeout")
    return 500, error_body(event.message, "server_error")


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns an error of the library, which says what is wrong with a request, into an answer."""
    try:
        yield
    except QueueFull as error:
        raise Refused(429, str(error), code="queue_full") from None
    except TooLong as error:
        raise Refused(400, str(error), code="context_length_exceeded") from None
    except Late as error:
        raise Refused(504, str(error), code="timeout") from None
    except SwamlaError as error:
        raise Refused(400, str(error)) from None


async def _unless_left(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """The answer; if the client leaves before, it is cancelled."""
    answer = asyncio.create_task(answering)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=499)  # nobody reads it
    finally:
        answer.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status_code=status, media_type="application/json", headers=headers)


def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    kinds = {404: "not_found_error", 429: "rate_limit_error", 503: "server_error", 504: "timeout_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    headers = {"retry-after": "1"} if error.status == 429 else None
    return _json(error_body(str(error), kind, error.param, error.code), error.status, headers)


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(error_body(error.detail, "invalid_request_error"), error.status_code, error.headers)


def _on_bug(request: Request, error: Exception) -> Response:
    return _json(error_body(f"{type(error).__name__}: {error}", "server_error"), 500)
