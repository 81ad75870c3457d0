"""What an engine is asked, and what it tells: requests, the events of their answers, and the errors of asking."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swamla.errors import SwamlaError, UsageError
from swamla.inference.sampling import Sampling
from swamla.serve.writing import Piece, Token


class QueueFull(SwamlaError):
    """As many requests wait as may."""


class TooLong(UsageError):
    """A prompt and its answer have more tokens than a slot has room for."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    tokens: the prompt's ids, at least one.  max_new_tokens: of each answer; 0 to read the prompt only.
    n: answers, each sampled by a seed of its own as rows of a batch are (see `Sampling`).
    stops: strings, none of them empty, that end an answer and are left out.
    ends: ids that end an answer besides the document's end.
    top: how many likeliest tokens are told with every token's log p; None: no log p.
    echo: whether log p of the prompt's tokens is told too.
    marks: lengths of prefixes that other prompts may share, such as that of a system prompt.
    seconds: after which it fails if it has not ended.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stops: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    top: int | None = None
    echo: bool = False
    marks: tuple[int, ...] = ()
    seconds: float = math.inf


@dataclass(frozen=True)
class Read:
    """The prompt is read. cached: tokens of it that came from the cache.  prompt: its tokens, if `echo` was asked."""

    cached: int
    prompt: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Written:
    """More of an answer."""

    answer: int
    piece: Piece


@dataclass(frozen=True)
class Ended:
    """An answer has ended: "stop" by the document's end or a stop string, "length" after the last token asked for.

    tokens: generated, the document's end included.  seconds_to_first: from submission to the answer's first token.
    seconds: from there to its last.
    """

    answer: int
    reason: str
    tokens: int
    seconds_to_first: float
    seconds: float


@dataclass(frozen=True)
class Failed:
    """The request has ended with an error, all of its answers. late: it ran out of time."""

    message: str
    late: bool = False


Event = Read | Written | Ended | Failed
Listener = Callable[[Event], None]
