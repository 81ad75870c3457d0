"""OpenAI's own client library, as its users call it, against a server of ours."""

from collections.abc import Iterator
from typing import Any

import pytest

from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.text import encode_prompt
from tests.waiting import PATIENCE

from .helpers import TOKENIZER, alone, model_of
from .servers import Running, running
from .test_app import chatty, slowed

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
PROMPT = "class A:\n"
MESSAGES = [{"role": "system", "content": "Count."}, {"role": "user", "content": "One, two?"}]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return model_of()


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Running]:
    talks = chatty()
    models = [("plain", model, TOKENIZER), ("talker", model_of("gdn", tokenizer=talks), talks)]
    with running(models, key="k") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=PATIENCE)


def text_of(model: LanguageModel, count: int, n: int = 1, **settings: Any) -> list[str]:
    return alone(model, encode_prompt(TOKENIZER, PROMPT), count, Sampling(**({"temperature": 0} | settings)), n=n)


def test_models(client: Any) -> None:
    assert [each.id for each in client.models.list()] == ["plain", "talker"]
    assert client.models.retrieve("talker").owned_by == "swamla"


def test_completions(client: Any, model: LanguageModel) -> None:
    found = client.completions.create(model="plain", prompt=PROMPT, max_tokens=20, temperature=0)
    assert found.choices[0].text == text_of(model, 20)[0]
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (10, 20)


def test_n_and_seed(client: Any, model: LanguageModel) -> None:
    found = client.completions.create(model="plain", prompt=PROMPT, max_tokens=10, temperature=0.7, seed=11, n=3)
    assert [choice.text for choice in found.choices] == text_of(model, 10, n=3, temperature=0.7, seed=11)


def test_stop(client: Any, model: LanguageModel) -> None:
    text = text_of(model, 30)[0]
    found = client.completions.create(model="plain", prompt=PROMPT, max_tokens=30, temperature=0, stop=[text[4:6]])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text[: text.index(text[4:6])], "stop")


def test_logprobs_and_echo(client: Any) -> None:
    found = client.completions.create(model="plain", prompt=PROMPT, max_tokens=2, logprobs=3, echo=True)
    told = found.choices[0].logprobs
    assert told.tokens[: len(PROMPT)] == list(PROMPT)
    assert len(told.token_logprobs) == len(told.text_offset) == len(PROMPT) + 2
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == logprob <= max(top.values()) <= 0


def test_a_stream_of_completions(client: Any, model: LanguageModel) -> None:
    stream = client.completions.create(
        model="plain", prompt=PROMPT, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text_of(model, 20)[0]
    assert chunks[-1].usage.completion_tokens == 20
    assert chunks[-2].choices[0].finish_reason == "length"


def test_chat(client: Any) -> None:
    settings = {"model": "talker", "messages": MESSAGES, "max_completion_tokens": 15, "seed": 2, "temperature": 0.8}
    found = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    choice = found.choices[0]
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == 15
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**settings, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content


def test_the_clients_stream_helper_puts_a_chat_together(client: Any) -> None:
    settings = {"model": "talker", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    with client.chat.completions.stream(**settings) as stream:
        events = [event.type for event in stream]
        last = stream.current_completion_snapshot
    assert {"chunk", "content.delta", "content.done"} <= set(events)
    whole = client.chat.completions.create(**settings)
    assert last.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"model": "gpt-9"}, "NotFoundError"),
        ({"temperature": 5}, "BadRequestError"),
        ({"prompt": "x" * 500}, "BadRequestError"),
        ({"extra_body": {"nonsense": 1}}, "BadRequestError"),
        ({"extra_headers": {"Authorization": "Bearer other"}}, "AuthenticationError"),
    ],
)
def test_errors_are_the_clients_own(client: Any, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(getattr(openai, error)) as raised:
        client.completions.create(**({"model": "plain", "prompt": "a"} | settings))
    assert raised.value.body["message"]


def test_a_model_without_a_template_is_a_bad_request(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="plain has no chat template"):
        client.chat.completions.create(model="plain", messages=MESSAGES)


def test_a_stream_that_is_closed_frees_its_slot(client: Any, server: Running) -> None:
    before = server.engine.counters.cancelled
    with slowed(server.engine):
        stream = client.completions.create(model="plain", prompt=PROMPT, max_tokens=190, stream=True)
        next(iter(stream))
        stream.close()
        server.wait_idle()
    assert server.engine.counters.cancelled == before + 1  # it was not written to its end
