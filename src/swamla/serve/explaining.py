"""The attention of a text, for the page: what one of its tokens reads of every earlier one, in every layer and head.

Weights are those of `swamla.interpret`, of the model that reads prompts. They take memory by the square of the tokens,
so a text has at most 512, or as many as a model has learned positions; the first tokens of a longer one have the same
weights without the rest.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from swamla.errors import SwamlaError, UsageError
from swamla.interpret.drawn import token_texts
from swamla.interpret.sections import as_plain
from swamla.interpret.tracing import walk
from swamla.serve.answers import Served, ids_of
from swamla.serve.requests import QueueFull, TooLong

WAITING = 8  # texts that may wait for the one before


class Late(SwamlaError):
    """It took longer than it may."""


class Explainer:
    """Explains one text at a time, in a thread of its own: meanwhile the engines write.

    seconds: that a text may take, with its wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.count = 0  # texts that are explained or wait
        self._thread = ThreadPoolExecutor(1, "swamla-explain")

    async def explain(self, served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a body that fits its schema. Cancelled, it ends before the next layer.

        Raises `QueueFull`, `TooLong`, `Late`, and `UsageError` for an id outside the vocabulary, for a token outside
        the text, and for a mixer that has no `explain`.
        """
        if self.count > WAITING:
            raise QueueFull(f"{WAITING} texts wait to be explained, and no more may: try again later")
        given_up, until = threading.Event(), time.monotonic() + self.seconds
        work = partial(_explained, served, body, lambda: given_up.is_set() or time.monotonic() > until)
        self.count += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except Late:
            raise Late(f"not explained within {self.seconds:g} s") from None
        finally:
            given_up.set()
            self.count -= 1


def _explained(served: Served, body: Mapping[str, Any], is_over: Callable[[], bool]) -> dict[str, Any]:
    tokens, given = ids_of(served.tokenizer, body["prompt"]), body.get("token")
    if len(tokens) > served.explained_tokens:
        raise TooLong(f"the text has {len(tokens)} tokens: at most {served.explained_tokens} are explained")
    token = len(tokens) - 1 if given is None else int(given)
    if token >= len(tokens):
        raise UsageError(f"token = {token}: must be 0 … {len(tokens) - 1}, one of the text's tokens")
    return {
        "object": "explanation",
        "model": served.name,
        "tokens": token_texts(served.tokenizer, tokens),
        "token": token,
        "layers": list(_layers(served, tokens, token, is_over)),
    }


@torch.inference_mode()
def _layers(served: Served, tokens: Sequence[int], token: int, is_over: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """What one token reads in each layer, by head. Raises `Late` once it is over."""
    engine = served.engine
    blocks = zip(engine.config.pattern, engine.config.layers, strict=True)
    for layer in walk(engine.model, torch.tensor([tokens], device=engine.model.device)):
        weight_HTS = layer.mixer.weight_BHTS[0]
        name, block = next(blocks)
        yield {
            "block": name,
            "mixer": block.mixer.kind,
            "signed": bool((weight_HTS < 0).any()),
            "heads": as_plain(weight_HTS[:, token, : token + 1]),
        }
        if is_over():
            raise Late
