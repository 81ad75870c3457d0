"""/v1/explain: the weights of `swamla.interpret`, one text at a time, while the engines go on."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from swamla.interpret.tracing import LayerTrace, walk
from swamla.model.language_model import LanguageModel
from swamla.model.mixers.mha import MHA
from swamla.model.mixers.mixer import Mixer
from swamla.serve import explaining
from swamla.serve.explaining import Explainer
from swamla.serve.requests import QueueFull
from swamla.serve.schema import EXPLANATION, MAX_EXPLAINED, check, openapi
from swamla.text import encode_prompt
from tests.waiting import until

from .helpers import TOKENIZER, model_of, prompt_of
from .servers import Limits, Running, running
from .test_app import PROMPT, chatty, events_of, greedy

HEAD = "POST /v1/explain HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return model_of("gdn", "swa", "kda", "mla", "mha")


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Running]:
    talks = chatty()
    with running([("plain", model, TOKENIZER), ("talker", model_of("gdn", tokenizer=talks), talks)]) as found:
        yield found


@pytest.mark.parametrize("token", [None, 0, 7])
def test_weights_are_those_of_interpret(server: Running, model: LanguageModel, token: int | None) -> None:
    ids = prompt_of(25, seed=3)
    status, found = server.post("/v1/explain", prompt=ids, token=token)
    assert status == 200
    at = 24 if token is None else token
    assert (found["object"], found["model"], found["token"]) == ("explanation", "plain", at)
    assert [layer["block"] for layer in found["layers"]] == list(model.config.pattern)
    for told, layer in zip(found["layers"], walk(model, torch.tensor([ids])), strict=True):
        weight_HTS = layer.mixer.weight_BHTS[0]
        torch.testing.assert_close(torch.tensor(told["heads"]), weight_HTS[:, at, : at + 1], rtol=1e-4, atol=1e-6)
        assert told["signed"] == bool((weight_HTS < 0).any()) == (told["mixer"] in ("gdn", "kda"))


def test_a_text_begins_a_document_and_its_tokens_are_told(server: Running) -> None:
    _, text = server.post("/v1/explain", prompt="aé")
    _, ids = server.post("/v1/explain", prompt=encode_prompt(TOKENIZER, "aé"))
    assert text == ids
    assert text["tokens"] == ["⟨start⟩", "a", "⟨195⟩", "⟨169⟩"]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_tell_the_ids_to_explain(server: Running, model: LanguageModel, stream: bool) -> None:
    body = {"prompt": [PROMPT, "é"], "n": 2, "max_tokens": 30, "temperature": 1.5, "seed": 1, "return_token_ids": True}
    raw = server.call("POST", "/v1/completions", {**body, "stream": stream})[1]
    events = events_of(raw) if stream else [json.loads(raw)]
    choices = [choice for event in events for choice in event["choices"]]
    for index in range(4):
        mine = [choice for choice in choices if choice["index"] == index]
        prompts = [choice["prompt_token_ids"] for choice in mine if "prompt_token_ids" in choice]
        assert prompts == [encode_prompt(TOKENIZER, PROMPT if index < 2 else "é")]
        ids = [id for choice in mine for id in choice.get("token_ids", [])]
        assert TOKENIZER.decode(ids) == "".join(choice["text"] for choice in mine)
    without = server.call("POST", "/v1/completions", {**body, "stream": stream, "return_token_ids": False})[1]
    assert b"token_ids" not in without


def test_a_chats_ids_are_those_of_the_whole_conversation(server: Running) -> None:
    talker = server.served[1]
    assert talker.template is not None
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "talker", "messages": messages, "max_tokens": 9, "return_token_ids": True}
    raw = server.call("POST", "/v1/chat/completions", {**body, "stream": True})[1]
    choices = [choice for event in events_of(raw) for choice in event["choices"]]
    assert choices[0]["prompt_token_ids"] == talker.template.prompt(messages)
    ids = [id for choice in choices for id in choice.get("token_ids", [])]
    assert talker.tokenizer.decode(ids) == "".join(choice["delta"].get("content", "") for choice in choices)
    status, found = server.post("/v1/explain", model="talker", prompt=[*choices[0]["prompt_token_ids"], *ids])
    assert status == 200
    assert len(found["tokens"]) == len(found["layers"][0]["heads"][0])


@pytest.mark.parametrize(
    ("body", "status", "message", "code"),
    [
        ({}, 400, "prompt: is missing", None),
        ({"prompt": None}, 400, "prompt: None must be string or array", None),
        ({"prompt": ["a"]}, 400, "prompt[0]: 'a' must be integer", None),
        ({"prompt": []}, 400, "prompt: an array must have 1 items at least", None),
        ({"prompt": [257]}, 400, "token 257 is outside the vocabulary of 257", None),
        ({"prompt": "\0"}, 400, "the prompt has a NUL character at position 0: remove it", None),
        ({"prompt": "ab", "token": 3}, 400, "token = 3: must be 0 … 2, one of the text's tokens", None),
        ({"prompt": "ab", "token": -1}, 400, "token: -1 must be >= 0", None),
        ({"prompt": "ab", "tokens": 1}, 400, "tokens: there is no such setting; did you mean 'token'?", None),
        ({"prompt": "a" * 512}, 400, "the text has 513 tokens: at most 512 are explained", "context_length_exceeded"),
        ({"prompt": "a", "model": "x"}, 404, "there is no model 'x'; there are: plain, talker", "model_not_found"),
    ],
)
def test_a_bad_request_is_an_error_of_openais_shape(
    server: Running, body: dict[str, Any], status: int, message: str, code: str | None
) -> None:
    found, error = server.post("/v1/explain", **body)
    assert (found, error["error"]["message"], error["error"]["code"]) == (status, message, code)


def test_the_longest_text_is_explained(server: Running) -> None:
    status, found = server.post("/v1/explain", prompt=prompt_of(MAX_EXPLAINED), token=1)
    assert (status, len(found["tokens"])) == (200, MAX_EXPLAINED)
    described = json.loads(server.call("GET", "/v1/models")[1])["data"][0]["swamla"]
    assert described["explained_tokens"] == MAX_EXPLAINED


def test_a_text_is_explained_up_to_learned_positions() -> None:
    with running([("few", model_of("gdn", learned_positions=32), TOKENIZER)]) as server:
        described = json.loads(server.call("GET", "/v1/models")[1])["data"][0]["swamla"]
        assert described["explained_tokens"] == described["max_tokens"] == 32
        assert server.post("/v1/explain", prompt=prompt_of(32))[0] == 200
        status, found = server.post("/v1/explain", prompt=prompt_of(33))  # a prompt and an answer that fill a slot
    assert (status, found["error"]["code"]) == (400, "context_length_exceeded")


def test_the_answer_has_the_shape_of_the_openapi_document(server: Running) -> None:
    document = openapi("1", key=False)["paths"]["/v1/explain"]["post"]
    assert document["requestBody"]["content"]["application/json"]["schema"] == EXPLANATION
    shape = document["responses"]["200"]["content"]["application/json"]["schema"]
    check(server.post("/v1/explain", prompt="abc")[1], shape)


def test_a_mixer_that_cannot_be_taken_apart_is_an_error(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MHA, "explain", Mixer.explain)  # of SWA too
    status, found = server.post("/v1/explain", prompt="abc")
    assert (status, found["error"]["message"].partition(":")[0]) == (400, "SWA has no `explain`")


class Held:
    """Makes texts that are explained wait before every layer. texts: tokens of each that began.  layers: explained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[int] = []
        self.layers = 0
        self.go_on = threading.Event()
        monkeypatch.setattr(explaining, "walk", self._walk)

    def _walk(self, model: LanguageModel, tokens_BT: torch.Tensor) -> Iterator[LayerTrace]:
        self.texts.append(tokens_BT.numel())
        for layer in walk(model, tokens_BT):
            self.go_on.wait(20)
            self.layers += 1
            yield layer

    def wait_until_begun(self) -> None:
        until(lambda: bool(self.texts))


def test_others_are_written_to_while_a_text_is_explained(
    server: Running, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, statuses = Held(monkeypatch), list[int]()
    asking = threading.Thread(target=lambda: statuses.append(server.post("/v1/explain", prompt="abc")[0]))
    asking.start()
    held.wait_until_begun()
    _, found = server.post("/v1/completions", prompt=PROMPT, max_tokens=10, temperature=0)
    assert found["choices"][0]["text"] == greedy(model, PROMPT, 10)
    assert held.layers == 0
    held.go_on.set()
    asking.join(30)
    assert statuses == [200]


def test_texts_are_explained_one_at_a_time_and_few_may_wait(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = Held(monkeypatch), explaining.WAITING + 1

    async def ask() -> None:
        explainer = Explainer(60.0)
        bodies = [{"prompt": prompt_of(length)} for length in range(1, most + 1)]
        tasks = [asyncio.create_task(explainer.explain(server.served[0], body)) for body in bodies]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="8 texts wait to be explained, and no more may: try again later"):
            await explainer.explain(server.served[0], {"prompt": "a"})
        await asyncio.to_thread(held.wait_until_begun)
        assert held.texts == [1]
        held.go_on.set()
        answers = await asyncio.gather(*tasks)
        assert [len(answer["tokens"]) for answer in answers] == held.texts == list(range(1, most + 1))
        assert explainer.count == 0

    asyncio.run(ask())


def test_a_late_explanation_is_504_and_ends_at_its_layer(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    monkeypatch.setattr(held, "go_on", threading.Event())
    monkeypatch.setattr(held.go_on, "wait", lambda seconds: time.sleep(0.3))
    with running([("plain", model, TOKENIZER)], limits=Limits(seconds=0.2)) as server:
        status, found = server.post("/v1/explain", prompt="abc")
    assert (status, found["error"]["code"], found["error"]["type"]) == (504, "timeout", "timeout_error")
    assert found["error"]["message"] == "not explained within 0.2 s"
    assert held.layers == 1


def test_a_client_that_leaves_is_not_explained_further(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held, made = Held(monkeypatch), list[Explainer]()

    class Kept(Explainer):
        def __init__(self, seconds: float) -> None:
            super().__init__(seconds)
            made.append(self)

    monkeypatch.setattr("swamla.serve.app.Explainer", Kept)
    with running([("plain", model, TOKENIZER)]) as server:
        body = b'{"prompt": "abc"}'
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body)
            held.wait_until_begun()
        until(lambda: made[0].count == 0)
        held.go_on.set()
        assert server.post("/v1/explain", prompt="ab")[0] == 200
    assert held.texts == [4, 3]
    assert held.layers == 1 + len(model.config.pattern)
