"""What an answer says of its cost, and where long parts of it are built."""

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from swamla.model.accounting import state_bytes
from swamla.serve import app
from swamla.serve.answers import Completion, Exchange, Served, chunks, to_json
from swamla.serve.requests import Ended, Event, Read

from .helpers import TOKENIZER, engine_of, model_of
from .servers import running


def test_the_usage_has_the_worst_of_all_answers_and_the_state_of_a_prompt_with_its_own_answer() -> None:
    engine = engine_of(model_of("mha"))
    exchange = Completion(Served("plain", engine, None, 0), {"prompt": ["a" * 80, "b"], "n": 2}, 9.0)
    long, short = (len(prompt.tokens) for prompt in exchange.prompts)
    answers = {0: [(5, 0.5, 1.0), (1, 3.0, 0.0)], 1: [(40, 1.0, 13.0), (60, 2.0, 10.0)]}
    for prompt, given in answers.items():
        for index, (tokens, first, seconds) in enumerate(given):
            exchange.note(prompt, Ended(index, "length", tokens, first, seconds))
    assert (long, short) == (81, 2)
    expected = max(long + 5 - 1, short + 60 - 1)  # of no answer 81 + 60; the last token is not read
    assert exchange.usage()["swamla"] == {
        "state_bytes": state_bytes(engine.config, expected, batch=1, element_bytes=4),
        "seconds_to_first_token": 3.0,
        "tokens_per_second": 39 / 13.0,
    }


@pytest.mark.parametrize("more", [{"echo": True, "logprobs": 2}, {"return_token_ids": True}])
def test_a_prompts_tokens_are_written_down_beside_the_servers_own_thread(
    monkeypatch: pytest.MonkeyPatch, more: Mapping[str, Any]
) -> None:
    threads = defaultdict[type, set[int]](set)

    def noted(exchange: Exchange, prompt: int, event: Event) -> Iterator[dict[str, Any]]:
        threads[type(event)].add(threading.get_ident())
        return chunks(exchange, prompt, event)

    monkeypatch.setattr(app, "chunks", noted)
    with running([("plain", model_of("swa"), TOKENIZER)]) as server:
        status, raw = server.call(
            "POST", "/v1/completions", {"prompt": "ab" * 50, "max_tokens": 3, "stream": True, **more}
        )
        assert (status, raw.endswith(b"data: [DONE]\n\n")) == (200, True)
    assert not threads[Read] & threads[Ended]
    assert threads[Read]
    assert threads[Ended]


def test_whole_answers_and_explanations_become_json_beside_the_servers_own_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = dict[str, int]()

    def noted(value: dict[str, Any]) -> bytes:
        threads[value.get("object", "health")] = threading.get_ident()
        return to_json(value)

    monkeypatch.setattr(app, "to_json", noted)
    with running([("plain", model_of("swa"), TOKENIZER)]) as server:
        assert server.post("/v1/completions", prompt="ab", max_tokens=3)[0] == 200
        assert server.post("/v1/explain", prompt="ab")[0] == 200
        assert server.call("GET", "/health")[0] == 200
    own = threads.pop("health")
    assert threads.keys() == {"text_completion", "explanation"}
    assert own not in threads.values()
