"""Whatever is sent, the server answers below 500, loses no slot, and goes on."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from swamla.text import encode_prompt

from .helpers import TOKENIZER, alone, model_of
from .hostile import Attack, Attacker, faults, schemathesis
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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        (
            {"statuses": {("a huge body", 413): 9, ("other paths", 500): 1, ("a slow body", 503): 1}},
            ["answers of 500, 503"],
        ),
        ({"idle": False}, ["slots were lost"]),
        ({"memory": [1000, 900, 1021]}, ["memory grew by 2.1%"]),
        ({"memory": [1000, 1100, 1019]}, []),
        ({"schemathesis": 1}, ["schemathesis found something: exit status 1"]),
        ({"server": -9}, ["the server ended with status -9"]),
        ({"server": None, "idle": False}, ["slots were lost", "the server did not end"]),
    ],
)
def test_whatever_went_wrong_is_told(change: dict[str, Any], told: list[str]) -> None:
    fine = {"statuses": {("broken JSON", 400): 9}, "idle": True, "memory": [1000, 1000], "schemathesis": 0, "server": 0}
    assert faults(**(fine | change)) == told
