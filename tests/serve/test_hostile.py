"""Whatever is sent, the server answers below 500, loses no slot, and goes on."""

import importlib.util
from collections import Counter
from collections.abc import Iterator

import pytest

from swamla.text import encode_prompt

from .helpers import TOKENIZER, alone, model_of
from .hostile import Attack, Attacker, schemathesis
from .servers import Limits, Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running([("plain", model_of(), TOKENIZER)], limits=Limits(body_seconds=2.0)) as found:
        yield found


def answers_as_before(server: Running) -> None:
    server.wait_idle()
    status, found = server.post("/v1/completions", prompt="abc", max_tokens=10, temperature=0)
    assert status == 200
    assert found["choices"][0]["text"] == alone(server.engine.model, encode_prompt(TOKENIZER, "abc"), 10)[0]


def test_three_hundred_hostile_requests_change_nothing(server: Running) -> None:
    attacker, statuses = Attacker(server.port, seed=1), Counter[Attack]()
    for _ in range(300):
        statuses[attacker.attack()] += 1
    slow = attacker.wait_for_slow()
    assert slow
    assert set(slow) <= {408, 0}  # 0: the answer was there, and a byte sent after it reset the connection
    assert 408 in slow
    assert {kind for kind, _ in statuses} == set(attacker.kinds)
    assert [attack for attack in statuses if attack[1] >= 500] == []
    assert sum(count for (_, status), count in statuses.items() if status == 400) > 50
    assert server.engine.counters.failed == 0
    answers_as_before(server)


@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="needs schemathesis: make interop installs it"
)
def test_schemathesis_finds_no_answer_that_the_openapi_document_does_not_have(server: Running) -> None:
    done = schemathesis(server.url, 15)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    answers_as_before(server)
