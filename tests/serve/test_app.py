"""The routes: OpenAI's shapes, one-line errors, limits, the key, and clients that leave."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest

from swamla.data.tokenizer import HFTokenizer, Tokenizer
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.serve.chat import asked_ids, chat_template
from swamla.serve.engine import Engine
from swamla.serve.worker import Worker
from swamla.text import encode_prompt
from tests.waiting import PATIENCE, until

from .helpers import TOKENIZER, alone, model_of
from .servers import Limits, Running, running

PROMPT = "def f(x):"
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def chatty() -> Tokenizer:
    """Bytes, with the special ids of ChatML."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(TOKENIZER.library_json())
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return HFTokenizer(library.to_str())


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return model_of()


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Running]:
    talks = chatty()
    with running([("plain", model, TOKENIZER), ("talker", model_of("gdn", "mla", tokenizer=talks), talks)]) as found:
        yield found


@contextmanager
def slowed(engine: Engine) -> Iterator[None]:
    """A token takes a twentieth of a second."""
    step = engine.slots.step
    engine.slots.step = lambda tokens: (time.sleep(0.05), step(tokens))[1]  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.slots.step = step  # type: ignore[method-assign]


def wait_active(engine: Engine) -> None:
    until(lambda: engine.n_active)


def greedy(model: LanguageModel, prompt: str, count: int) -> str:
    return alone(model, encode_prompt(TOKENIZER, prompt), count)[0]


def test_a_completion_is_the_librarys_own_text(server: Running, model: LanguageModel) -> None:
    status, found = server.post("/v1/completions", model="plain", prompt=PROMPT, max_tokens=20, temperature=0)
    assert status == 200
    assert found["object"] == "text_completion"
    assert found["choices"] == [
        {"index": 0, "text": greedy(model, PROMPT, 20), "logprobs": None, "finish_reason": "length"}
    ]
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 20, 30)
    assert usage["swamla"]["state_bytes"] > 0
    assert usage["swamla"]["tokens_per_second"] > 0


def test_several_prompts_and_answers_come_in_their_order(server: Running, model: LanguageModel) -> None:
    settings = {"temperature": 0.9, "top_p": 0.8, "seed": 3}
    prompts = [PROMPT, "", "é€𝄞"]
    _, found = server.post("/v1/completions", prompt=prompts, max_tokens=9, n=2, **settings)
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    for index, prompt in enumerate(prompts):
        expected = alone(model, encode_prompt(TOKENIZER, prompt), 9, Sampling(**settings), n=2)
        assert [choice["text"] for choice in found["choices"][2 * index : 2 * index + 2]] == expected


def test_a_prompt_of_ids_is_taken_as_it_is(server: Running, model: LanguageModel) -> None:
    ids = TOKENIZER.encode("abc")
    _, found = server.post("/v1/completions", prompt=ids, max_tokens=9, temperature=0)
    assert found["choices"][0]["text"] == alone(model, ids, 9)[0]
    assert found["usage"]["prompt_tokens"] == 3
    _, both = server.post("/v1/completions", prompt=[ids, ids], max_tokens=9, temperature=0)
    assert [choice["text"] for choice in both["choices"]] == [found["choices"][0]["text"]] * 2


def events_of(raw: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up_to_the_answer(server: Running, echo: bool) -> None:
    body = {"prompt": "é", "max_tokens": 30, "temperature": 1.5, "seed": 1, "logprobs": 2, "n": 2, "echo": echo}
    _, whole = server.post("/v1/completions", **body)
    status, raw = server.call(
        "POST", "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert status == 200
    *events, last = events_of(raw)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        pieces = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces][-1] == choice["finish_reason"]
        for name in ("tokens", "text_offset"):
            told = [value for piece in pieces for value in piece["logprobs"][name]]
            assert told == choice["logprobs"][name]


def test_echoed_tokens_begin_with_the_text_and_say_where_they_stand(server: Running) -> None:
    _, found = server.post("/v1/completions", prompt="ab", max_tokens=0, echo=True, logprobs=1)
    choice = found["choices"][0]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 1]
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"])
    _, ids = server.post("/v1/completions", prompt=[256, 97, 98], max_tokens=0, echo=True, logprobs=1)
    told = ids["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [None, *choice["logprobs"]["token_logprobs"]]
    assert told["tokens"] == ["<|endoftext|>", "a", "b"]


def test_names_of_tokens_differ_also_of_parts_of_characters(server: Running) -> None:
    _, found = server.post("/v1/completions", prompt="é", max_tokens=0, echo=True, logprobs=20)
    told = found["choices"][0]["logprobs"]
    assert told["tokens"] == ["token_id:195", "token_id:169"]
    assert all(len(top) >= 20 for top in told["top_logprobs"])


def test_a_stop_string_is_left_out(server: Running, model: LanguageModel) -> None:
    text = greedy(model, PROMPT, 30)
    stop = text[5:7]
    for given in (stop, ["never to be seen", stop]):
        _, found = server.post("/v1/completions", prompt=PROMPT, max_tokens=30, temperature=0, stop=given)
        choice = found["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


# -- chat


def test_a_chat_is_a_conversation_in_chatml(server: Running) -> None:
    talker = server.served[1]
    assert talker.template is not None
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]
    ids, marks = asked_ids(talker.template, messages)
    start, end = talker.template.special_ids
    plain = talker.tokenizer.encode
    system = [256, start, *plain("system\nBe brief."), end, *plain("\n")]
    user = [start, *plain("user\nHi <|im_end|>"), end, *plain("\n")]
    assert ids == [*system, *user, start, *plain("assistant\n")]
    assert marks == (len(system),)
    body = {"model": "talker", "messages": messages, "max_tokens": 12, "seed": 4, "logprobs": True, "top_logprobs": 2}
    status, found = server.post("/v1/chat/completions", **body)
    assert status == 200
    choice = found["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["logprobs"]["content"]) == 12
    assert all(len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])
    _, raw = server.call("POST", "/v1/chat/completions", {**body, "stream": True})
    deltas = [event["choices"][0]["delta"] for event in events_of(raw)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]


def test_a_system_prompt_is_read_once(server: Running) -> None:
    for question, cached in (("One?", 0), ("Two?", 102)):
        messages = [{"role": "system", "content": "x" * 91}, {"role": "user", "content": question}]
        _, found = server.post("/v1/chat/completions", model="talker", messages=messages, max_tokens=1)
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


def test_content_in_parts_is_their_text(server: Running) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = [
        server.post("/v1/chat/completions", model="talker", messages=[{"role": "user", "content": content}], seed=1)[1]
        for content in (parts, "ab")
    ]
    assert found[0]["choices"] == found[1]["choices"]


def test_a_model_without_a_template_refuses_to_chat(server: Running) -> None:
    status, found = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}])
    assert status == 400
    assert found["error"]["message"].startswith("plain has no chat template, as its tokenizer has no special ids")
    assert chat_template(TOKENIZER) is None


# -- errors


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"temprature": 1}, "temprature: there is no such setting; did you mean 'temperature'?", "temprature"),
        ({"temperature": 3}, "temperature: 3 must be <= 2", "temperature"),
        ({"temperature": "hot"}, "temperature: 'hot' must be number or null", "temperature"),
        ({"n": True}, "n: True must be integer or null", "n"),
        ({"n": 9}, "n = 9: must be 1 … 4, the number of slots", None),
        ({"top_p": 0}, "top_p: 0 must be > 0", "top_p"),
        ({"prompt": ["a", 3]}, "prompt[1]: 3 must be string", "prompt[1]"),
        ({"prompt": []}, "prompt: an array must have 1 items at least", "prompt"),
        ({"prompt": [999]}, "token 999 is outside the vocabulary of 257", None),
        ({"prompt": "a\0b"}, "the prompt has a NUL character at position 1: remove it", None),
        ({"prompt": "\ud800"}, "the prompt has a lone surrogate at position 0: it is not valid Unicode text", None),
        ({"stop": ["x"] * 17}, "stop: an array must have 16 items at most", "stop"),
        ({"stop": ""}, "stop: '' must have 1 characters at least", "stop"),
        ({"max_tokens": 0}, "max_tokens = 0: must be > 0, or with echo = true, for the log p of the prompt", None),
        ({"suffix": "x"}, "suffix: 'x' must be None", "suffix"),
        ({"presence_penalty": 0.5}, "presence_penalty: 0.5 must be None or 0", "presence_penalty"),
        ({"stream_options": {"x": 1}}, "stream_options.x: there is no such setting", "stream_options.x"),
    ],
)
def test_a_bad_setting_is_an_error_that_says_what_is_allowed(
    server: Running, body: dict[str, Any], message: str, param: str | None
) -> None:
    status, found = server.post("/v1/completions", **body)
    assert (status, found["error"]["message"], found["error"]["param"]) == (400, message, param)
    assert found["error"]["type"] == "invalid_request_error"


def test_too_many_tokens_and_unknown_models_have_openais_codes(server: Running) -> None:
    status, found = server.post("/v1/completions", prompt="a" * 300)
    assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
    status, found = server.post("/v1/completions", model="gpt\ud800")
    assert (status, found["error"]["code"]) == (404, "model_not_found")
    assert server.call("GET", "/v1/models/other")[0] == 404
    assert json.loads(server.call("GET", "/v1/models/talker")[1])["swamla"]["chat"] is True
    models = json.loads(server.call("GET", "/v1/models")[1])
    assert [each["id"] for each in models["data"]] == ["plain", "talker"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"\xff{}", 400),
        ("POST", "/v1/completions", b'{"temperature": NaN}', 400),
        ("POST", "/v1/completions", b'{"temperature": 1e999}', 400),
        ("POST", "/v1/completions", b'{"seed": ' + b"9" * 5000 + b"}", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"x" * ((1 << 20) + 1), 413),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/nowhere", b"{}", 404),
        ("POST", "/health", b"{}", 405),
    ],
)
def test_what_is_no_request_is_refused(server: Running, method: str, path: str, body: bytes, status: int) -> None:
    found, raw = server.call(method, path, body)
    assert found == status
    assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}


def test_other_content_types_and_other_names_of_the_server_are_refused(server: Running) -> None:
    assert server.call("POST", "/v1/completions", b"{}", {"content-type": "text/plain"})[0] == 415
    assert server.call("GET", "/health", headers={"host": "evil.example"})[0] == 403
    assert server.call("GET", "/health", headers={"host": f"localhost:{server.port}"})[0] == 200


def test_a_key_is_asked_for_where_there_is_one(model: LanguageModel) -> None:
    with running([("plain", model, TOKENIZER)], key="s3cret") as server:
        assert server.call("GET", "/v1/models")[0] == 200
        for wrong in ("", "Bearer", "Bearer s3cre", "Bearer s3crets", "Basic s3cret", "Bearer \xff"):
            status, raw = server.call("GET", "/v1/models", headers={"authorization": wrong})
            assert (status, json.loads(raw)["error"]["code"]) == (401, "invalid_api_key")
            assert server.call("GET", "/metrics", headers={"authorization": wrong})[0] == 401
            assert server.call("GET", "/health", headers={"authorization": wrong})[0] == 200


def test_a_full_queue_is_429(model: LanguageModel) -> None:
    done: list[int] = []
    with running([("plain", model, TOKENIZER)], slots=1, queue=0) as server, slowed(server.engine):
        thread = threading.Thread(target=lambda: done.append(server.post("/v1/completions", max_tokens=60)[0]))
        thread.start()
        wait_active(server.engine)
        status, found = server.post("/v1/completions", max_tokens=1)
        thread.join(60)
    assert (status, found["error"]["code"]) == (429, "queue_full")
    assert done == [200]


def test_a_late_answer_is_504(model: LanguageModel) -> None:
    body = {"max_tokens": 190, "temperature": 0}
    with running([("plain", model, TOKENIZER)], limits=Limits(seconds=0.3)) as server, slowed(server.engine):
        status, found = server.post("/v1/completions", **body)
        assert (status, found["error"]["code"]) == (504, "timeout")
        raw = server.call("POST", "/v1/completions", {**body, "stream": True})[1]
        assert json.loads(raw.decode().rstrip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_without_engines_requests_are_refused_and_health_says_so(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "alive", False)
    status, found = server.post("/v1/completions", prompt=PROMPT)
    assert (status, found["error"]["type"]) == (503, "server_error")
    assert server.call("GET", "/health")[0] == 503


# -- clients that leave, or are slow


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(server: Running, stream: bool) -> None:
    before = server.engine.counters.cancelled
    body = json.dumps({"max_tokens": 190, "temperature": 0, "stream": stream}).encode()
    head = f"{HEAD}content-length: {len(body)}\r\n\r\n"
    with slowed(server.engine), socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + body)
        wait_active(server.engine)
        if stream:
            assert b"200 OK" in client.recv(100)
        client.close()
        server.wait_idle()
    assert server.engine.counters.cancelled == before + 1
    assert server.call("GET", "/health")[0] == 200


def test_a_body_that_does_not_arrive_is_given_up(model: LanguageModel) -> None:
    with running([("plain", model, TOKENIZER)], limits=Limits(body_seconds=0.3)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
            client.sendall(HEAD.encode() + b"content-length: 1000\r\n\r\n{")
            assert b"408" in client.recv(1000)
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
            client.sendall(HEAD.encode() + b"transfer-encoding: chunked\r\n\r\n")
            with_size = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            answered = b""
            try:
                for _ in range(20):
                    client.sendall(with_size)
                answered = client.recv(1000)
            except OSError:  # it has closed the connection
                pass
            assert answered == b"" or b"413" in answered
        assert server.call("GET", "/health")[0] == 200


def test_a_server_that_is_told_to_stop_answers_what_it_has_and_takes_no_more(
    model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[tuple[int, Any]] = []
    with running([("plain", model, TOKENIZER)], slots=1, drain=PATIENCE) as server, slowed(server.engine):

        def ask() -> None:
            found.append(server.post("/v1/completions", prompt=PROMPT, max_tokens=15, temperature=0))

        threads = [threading.Thread(target=ask) for _ in range(2)]  # one of them waits for the slot
        for thread in threads:
            thread.start()
        wait_active(server.engine)
        until(lambda: server.engine.n_waiting)
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: is_refused(server))
        for thread in threads:
            thread.join(PATIENCE)
    assert [status for status, _ in found] == [200, 200]
    assert {answer["choices"][0]["text"] for _, answer in found} == {greedy(model, PROMPT, 15)}
    assert "SIGTERM: no new requests; those under way are answered" in capsys.readouterr().err


def is_refused(server: Running) -> bool:
    try:
        server.call("GET", "/health")
    except ConnectionError:  # refused, or accepted while the listener closes and ended without an answer
        return True
    return False


def test_a_connection_without_a_whole_request_is_ended(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swamla.serve.server.HEADER_SECONDS", 0.2)
    monkeypatch.setattr("swamla.serve.server.KEPT_SECONDS", 1)

    def sent(request: bytes, rest: bytes = b"") -> bytes:
        """What is answered until the connection's end, which may come while it is still written to."""
        answered = b""
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client,
            suppress(ConnectionError),
        ):
            client.sendall(request)
            while part := client.recv(1000):
                answered += part
                client.sendall(rest)  # what follows never comes
                rest = b""
        return answered

    with running([("plain", model, TOKENIZER)]) as server:
        assert sent(b"GET /health HT") == b""
        head = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
        for request, rest in ((head + b"\r\n", b"GET /hea"), (head + b"content-length: 9\r\n\r\n", b"{")):
            answered = partial(lambda *parts: b"200 OK" in sent(*parts), request, rest)
            until(answered)  # at the second attempt where a slow machine needs longer than HEADER_SECONDS


def test_metrics_count_what_was_done(model: LanguageModel) -> None:
    with running([('a "b"', model, TOKENIZER)]) as server:
        for n in (1, 2):
            status, answer = server.post("/v1/completions", prompt="a" * 40, max_tokens=5, n=n)
            assert (status, answer["usage"]["completion_tokens"]) == (200, 5 * n)
        text = server.call("GET", "/metrics")[1].decode()
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
        assert 'swamla_slots{model="a \\"b\\""} 4' in text
        assert found["swamla_requests_total"] == found["swamla_requests_ended_total"] == 2
        assert found["swamla_prompt_tokens_total"] == 82
        assert found["swamla_cached_tokens_total"] == 32
        assert found["swamla_generated_tokens_total"] == 15
        assert found["swamla_active"] == found["swamla_waiting"] == 0


def test_the_page_and_the_openapi_document_are_served(server: Running) -> None:
    status, page = server.call("GET", "/")
    assert status == 200
    assert b"http://" not in page.replace(b"http://www.w3.org/", b"")
    assert b"https://" not in page
    document = json.loads(server.call("GET", "/openapi.json")[1])
    assert set(document["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/v1/models"}
