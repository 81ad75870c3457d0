"""Small models, and an engine whose rounds a test runs by hand."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from swamla.data.tokenizer import ByteTokenizer, Tokenizer
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.serve.engine import Engine, Job
from swamla.serve.requests import Ended, Event, Failed, Read, Request, Written
from tests.model.helpers import build_model, hybrid_config

TOKENIZER = ByteTokenizer()
GREEDY = Sampling(temperature=0)


def model_of(*pattern: str, seed: int = 0, tokenizer: Tokenizer = TOKENIZER, **changes: Any) -> LanguageModel:
    """A model of bytes with scrambled weights; without a pattern it has gdn, swa, mla and mha."""
    config = hybrid_config(pattern=pattern) if pattern else hybrid_config()
    model = build_model(replace(config, vocab_size=tokenizer.vocab_size, **changes), seed).eval()
    model.known_ids = tokenizer.vocab_size
    return model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """A document's start and random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return [TOKENIZER.eos_id, *torch.randint(256, (length - 1,), generator=generator).tolist()]


def alone(
    model: LanguageModel,
    tokens: list[int],
    count: int,
    sampling: Sampling = GREEDY,
    n: int = 1,
    decoding: str = "eager",
) -> list[str]:
    """The texts that the library's own decoder gives."""
    rows = Decoder(model, decoding).generate([tokens] * n, count, sampling=sampling, stop_id=TOKENIZER.eos_id)
    return [TOKENIZER.decode(row) for row in rows]


class Heard:
    """The events of a request."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def text(self, answer: int = 0) -> str:
        return "".join(event.piece.text for event in self.of(Written) if event.answer == answer)

    def tokens(self, answer: int = 0) -> list[Any]:
        return [token for event in self.of(Written) if event.answer == answer for token in event.piece.tokens]

    @property
    def reasons(self) -> list[str]:
        return [event.reason for event in sorted(self.of(Ended), key=lambda event: event.answer)]

    @property
    def error(self) -> Failed | None:
        return next(iter(self.of(Failed)), None)

    @property
    def read(self) -> Read:
        return self.of(Read)[0]


def engine_of(model: LanguageModel, tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> Engine:
    return Engine(model, tokenizer, **({"slots": 4, "limit": 200, "piece": 16} | settings))


def ask(engine: Engine, tokens: Iterable[int], count: int, **settings: Any) -> tuple[Job, Heard]:
    heard = Heard()
    request = Request(tokens=list(tokens), max_new_tokens=count, **({"sampling": GREEDY} | settings))
    return engine.submit(request, heard), heard


def run(engine: Engine, each_round: Callable[[int], None] = lambda number: None, rounds: int = 2000) -> int:
    """Rounds until nothing is left to do."""
    for number in range(rounds):
        each_round(number)
        if not engine.step():
            return number
    raise AssertionError(f"not done after {rounds} rounds")
