"""Continuous batching: requests join and leave one batch between two decoding steps.

A round (`Engine.step`) admits waiting requests to free slots, reads a piece of a prompt, or several short ones, and
gives every sequence in a slot one more token. So a long prompt delays the others by a piece at a time, and a finished
or cancelled sequence frees its slot at once.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swamla.data.tokenizer import Tokenizer
from swamla.errors import SwamlaError, UsageError, require
from swamla.inference.decoding import INT8_MAX_ROWS, Decoder
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState
from swamla.serve.prefixes import PrefixCache, cut, names
from swamla.serve.slots import Slots, room_for
from swamla.serve.writing import Piece, Token, Writer

LOG = logging.getLogger(__name__)
DECODINGS = ("eager", "int8")


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


@dataclass
class Counters:
    """What an engine has done since it was made. first_seconds: seconds to the first token of every request, summed."""

    requests: int = 0
    ended: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    firsts: int = 0
    first_seconds: float = 0.0


@dataclass(eq=False)
class _Answer:
    """One sequence of a request. last: its newest token, which the next step reads."""

    job: "Job"
    index: int
    generator: torch.Generator
    writer: Writer
    count: int = 0
    last: int = -1
    first_at: float = 0.0


@dataclass(eq=False)
class Job:
    """A request on its way through an engine. `cancel` may be called from any thread."""

    request: Request
    listener: Listener
    submitted: float
    cancelled: bool = False
    over: bool = False
    pieces: list[tuple[int, int]] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    read: int = 0  # pieces
    cached: int = 0  # tokens
    state: ModelState | None = None
    prompt: list[Token] = field(default_factory=list)
    writer: Writer | None = None
    before: Tensor | None = None  # log p after the last token of the prompt that was read
    open: int = 0  # answers that have not ended

    def cancel(self) -> None:
        """Free what the request uses, at the next round; its listener hears no more."""
        self.cancelled = True

    @property
    def tokens_left(self) -> int:
        """Tokens of the prompt that are to be read."""
        return self.pieces[-1][1] - self.pieces[self.read][0]


class Engine:
    """Answers requests with one model, in rounds. `submit` and `Job.cancel` may be called from any thread.

    slots: sequences that are decoded together.  queue: requests that may wait for a slot.
    limit: tokens of a prompt and its answer; at most the model's learned positions.
    piece: tokens of prompts that are read between two decoding steps.
    cache_bytes: of the prefix cache; 0 for none.
    decoding: "eager", or "int8": tokens after the first by weights of 8 bits, for at most 16 slots (see `Decoder`).
    A greedy text is that of the prompt alone but for rounding: the order of sums in fp32 depends on the number of rows.
    With the cache or without, a prompt's logits are the same to the bit.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        slots: int = 16,
        queue: int = 64,
        limit: int = 4096,
        piece: int = 128,
        cache_bytes: int = 256 << 20,
        decoding: str = "eager",
    ) -> None:
        require(slots > 0, "slots", slots, "must be > 0, e.g. 16")
        require(queue >= 0, "queue", queue, "must be >= 0 (0: a request that finds no slot is refused)")
        require(limit > 1, "limit", limit, "must be > 1, e.g. 4096")
        require(piece > 0, "piece", piece, "must be > 0, e.g. 128")
        require(cache_bytes >= 0, "cache_bytes", cache_bytes, "must be >= 0 (0: no cache)")
        if decoding not in DECODINGS:
            allowed = " or ".join(map(repr, DECODINGS))
            raise UsageError(f"decoding = {decoding!r}: must be {allowed} here, as sequences join and leave a batch")
        if decoding == "int8" and slots > INT8_MAX_ROWS:
            raise UsageError(f"slots = {slots}: must be {INT8_MAX_ROWS} at most with decoding = {decoding!r}")
        decoder = Decoder(model, decoding)
        self.model: LanguageModel = decoder.model  # type: ignore[assignment]
        self.decoding = decoding
        self.config, self.tokenizer = model.config, tokenizer
        self.limit = min(limit, model.config.learned_positions or limit)
        self.n_slots, self.queue, self.piece = slots, queue, piece
        self.slots = Slots(decoder.stepping, slots, self.limit)  # type: ignore[arg-type]
        self.prefixes = PrefixCache(cache_bytes)
        self.counters = Counters()
        self.wake = threading.Event()
        self._lock = threading.Lock()
        self._arrived: deque[Job] = deque()  # under the lock, as the queue's length is
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._answers: list[_Answer] = []  # by slot
        self._reads = 0

    @property
    def n_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._arrived) + len(self._waiting)

    @property
    def n_active(self) -> int:
        """Sequences that are decoded, or whose prompt is read.

        Requests enter the next list before they leave the one before, and the lists are read in that order: another
        thread may count one twice, but misses none.
        """
        reading = sum(job.request.n for job in self._reading if not job.over)
        return reading + sum(answer.last >= 0 for answer in self._answers)  # who has an answer may ask again

    def submit(self, request: Request, listener: Listener) -> Job:
        """Queue a request; the thread that runs the rounds tells `listener` what becomes of it.

        Raises `QueueFull`, `TooLong`, and `UsageError` for a request that no round could answer.
        """
        return self.submit_all([(request, listener)])[0]

    def submit_all(self, requests: Sequence[tuple[Request, Listener]]) -> list[Job]:
        """Queue several requests, or none of them."""
        if len(requests) > self.queue + self.n_slots:
            raise UsageError(f"{len(requests)} prompts at once: must be {self.queue + self.n_slots} at most")
        for request, _ in requests:
            self._check(request)
        jobs = [Job(request, listener, time.monotonic()) for request, listener in requests]
        with self._lock:
            waiting = self.n_waiting
            room = self.queue + max(0, self.n_slots - self.n_active)
            if waiting + len(jobs) > room:
                self.counters.refused += len(jobs)
                raise QueueFull(f"{waiting} requests are waiting, and {self.queue} may: try again later")
            self._arrived.extend(jobs)
            self.counters.requests += len(jobs)
        self.wake.set()
        return jobs

    def _check(self, request: Request) -> None:
        tokens, vocabulary = request.tokens, self.tokenizer.vocab_size
        if not tokens:
            raise UsageError("the prompt has no token: give at least the document's start")
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            outside = next(token for token in tokens if not 0 <= token < vocabulary)
            raise UsageError(f"token {outside} is outside the vocabulary of {vocabulary}")
        if not 1 <= request.n <= self.n_slots:
            raise UsageError(f"n = {request.n}: must be 1 … {self.n_slots}, the number of slots")
        if request.max_new_tokens < 0 or not all(request.stops):
            raise UsageError("max_new_tokens must be >= 0, and no stop string empty")
        needed = len(tokens) + max(0, request.max_new_tokens - 1)  # the last token is not fed back
        if needed > self.limit:
            raise TooLong(
                f"the prompt has {len(tokens)} tokens and {request.max_new_tokens} are asked for: together at most "
                f"{self.limit + 1 if request.max_new_tokens else self.limit}"
            )

    @torch.inference_mode()
    def step(self) -> bool:
        """One round. Returns whether there is more to do. An error in it fails the requests that it concerns."""
        with self._lock:
            self._waiting.extend(self._arrived)
            self._arrived.clear()
        self._drop_ended()
        self._admit()
        self._read_some()
        if self._answers and not self._guarded([answer.job for answer in self._answers], self._decode):
            self._answers = []
            self.slots.reset()
        return bool(self._waiting or self._reading or self._answers or self._arrived)

    def fail_all(self, message: str) -> None:
        """End every request with an error."""
        with self._lock:
            jobs = [*self._arrived, *self._waiting, *self._reading, *(answer.job for answer in self._answers)]
            self._arrived.clear()
        for job in jobs:
            self._fail(job, message)
        self._drop_ended()

    def _guarded(self, jobs: Sequence[Job], act: Callable[[], None]) -> bool:
        """Do one part of a round and return whether it went well; an error ends the requests that are part of it."""
        try:
            act()
        except Exception as error:
            if not isinstance(error, SwamlaError):
                LOG.exception("a request failed")
            for job in jobs:
                self._fail(job, str(error) if isinstance(error, SwamlaError) else f"{type(error).__name__}: {error}")
            return False
        return True

    # -- requests that end without an answer

    def _drop_ended(self) -> None:
        """Take out requests that were cancelled, failed or are late."""
        now = time.monotonic()
        for job in (*self._waiting, *self._reading, *{id(a.job): a.job for a in self._answers}.values()):
            if job.cancelled and not job.over:
                job.over = True
                self.counters.cancelled += 1
            elif not job.over and now - job.submitted > job.request.seconds:
                self._fail(job, f"not answered within {job.request.seconds:g} s", late=True)
        self._waiting = deque(job for job in self._waiting if not job.over)
        self._reading = [job for job in self._reading if not job.over]
        self._leave_where(lambda answer: answer.job.over)

    def _fail(self, job: Job, message: str, *, late: bool = False) -> None:
        if not job.over:
            job.over = True
            self.counters.failed += 1
            job.listener(Failed(message, late))

    def _leave_where(self, has_ended: Callable[[_Answer], bool]) -> None:
        """Free slots; as in the state, the last sequence takes a freed one's place."""
        for row in reversed(range(len(self._answers))):
            if has_ended(self._answers[row]):
                self.slots.leave(row)
                self._answers[row] = self._answers[-1]
                self._answers.pop()

    # -- prompts

    def _admit(self) -> None:
        """Move requests, in their order, to free slots."""
        while self._waiting and self.n_active + self._waiting[0].request.n <= self.n_slots:
            job = self._waiting[0]
            self._reading.append(job)
            self._waiting.popleft()
            self._guarded([job], partial(self._begin, job))
        self._reading = [job for job in self._reading if not job.over]

    def _begin(self, job: Job) -> None:
        """Cut the prompt, and start from the longest prefix that is known."""
        request = job.request
        job.pieces = cut(len(request.tokens), self.piece, request.marks)
        job.state = self.model.init_state(1, room_for(len(request.tokens), self.limit))
        if request.echo and request.top is not None:
            job.writer = Writer(self.tokenizer)
        if not self.prefixes.capacity:
            return
        job.names = names(request.tokens, job.pieces)
        # The last piece is always read, for the logits after it; with log p of the prompt, all pieces are.
        found = None if job.writer else self.prefixes.longest(job.names[:-1])
        if found is not None:
            job.read, prefix = found
            job.cached = job.pieces[job.read - 1][1]
            job.state.copy_row(0, prefix)
            job.state = job.state.first(1)

    def _read_some(self) -> None:
        """Read pieces of prompts, at least one and more while they have no more tokens than one may have."""
        room = self.piece
        while (job := self._next_to_read()) is not None:
            begin, end = job.pieces[job.read]
            if room < self.piece and end - begin > room:
                return
            room -= end - begin
            self._guarded([job], partial(self._read_piece, job))
            self._reading = [each for each in self._reading if not each.over]

    def _next_to_read(self) -> Job | None:
        """The request with the shortest rest of a prompt; every other time the oldest one, so that all come through."""
        self._reads += 1
        if not self._reading or self._reads % 2:
            return self._reading[0] if self._reading else None
        return min(self._reading, key=lambda job: job.tokens_left)

    def _read_piece(self, job: Job) -> None:
        """Read the next piece of a prompt; after the last one the answers begin."""
        assert job.state is not None
        begin, end = job.pieces[job.read]
        tokens = job.request.tokens[begin:end]
        x_1TD = self.model.step_hidden(torch.tensor([tokens], device=self.model.device), job.state)
        if job.writer is not None:
            self._echo(job, tokens, x_1TD[0])
        if job.names and self._is_shared(job, end):
            self._remember(job.names[job.read], job.state)
        job.read += 1
        if job.read == len(job.pieces):
            self._start_answers(job, self.model.logits(x_1TD[:, -1])[0, : self.tokenizer.vocab_size])
            self._reading.remove(job)

    def _is_shared(self, job: Job, end: int) -> bool:
        """Whether another prompt may be cut there."""
        return end % self.piece == 0 or end in job.request.marks

    def _remember(self, name: bytes, state: ModelState) -> None:
        if name not in self.prefixes:
            kept = self.model.init_state(1, state.longest)
            kept.copy_row(0, state)
            self.prefixes.put(name, kept)

    def _echo(self, job: Job, tokens: Sequence[int], x_TD: Tensor) -> None:
        """Add the log p of a piece's tokens, of which the first follows on the piece before."""
        assert job.writer is not None
        logp_TV = _log_softmax(self.model.logits(x_TD)[:, : self.tokenizer.vocab_size])
        for index, token in enumerate(tokens):
            before = logp_TV[index - 1] if index else job.before
            if before is None:
                job.prompt += job.writer.push(token).tokens
            else:
                job.prompt += job.writer.push(token, *_likeliest(before, token, job.request.top or 0)).tokens
        job.before = logp_TV[-1].clone()

    def _start_answers(self, job: Job, logits_V: Tensor) -> None:
        request = job.request
        if job.writer is not None:
            job.prompt += job.writer.finish().tokens
        self.counters.prompt_tokens += len(request.tokens)
        self.counters.cached_tokens += job.cached
        job.listener(Read(job.cached, tuple(job.prompt)))
        job.open = request.n
        for index, generator in enumerate(request.sampling.generators(request.n)):
            answer = _Answer(job, index, generator, Writer(self.tokenizer, request.stops))
            if not request.max_new_tokens:
                self._end(answer, "length")
                continue
            self._append(answer, None, logits_V)
            if answer.last >= 0:
                assert job.state is not None
                self.slots.join(job.state)
                self._answers.append(answer)
        job.state = None

    # -- answers

    def _decode(self) -> None:
        """One more token for every sequence in a slot."""
        logits_BV = self.slots.step([answer.last for answer in self._answers])[:, : self.tokenizer.vocab_size]
        self.counters.steps += 1
        best_B, index_B = logits_BV.max(dim=-1)
        rows = zip(self._answers, best_B.tolist(), index_B.tolist(), logits_BV, strict=True)
        for answer, best, index, logits_V in list(rows):
            if answer.job.over:
                continue
            greedy = math.isfinite(best) and answer.job.request.sampling.temperature == 0
            self._guarded([answer.job], partial(self._append, answer, index if greedy else None, logits_V))
        self._leave_where(lambda answer: answer.last < 0 or answer.job.over)

    def _append(self, answer: _Answer, token: int | None, logits_V: Tensor) -> None:
        """Write a token, by default one that is sampled here. If the answer ends with it, `last` is −1."""
        job, now = answer.job, time.monotonic()
        if token is None:
            token = job.request.sampling.choose(logits_V[None], [answer.generator])[0]
        if not answer.count:
            answer.first_at = now
            self.counters.firsts += not answer.index
            self.counters.first_seconds += 0.0 if answer.index else now - job.submitted
        answer.count += 1
        self.counters.generated_tokens += 1
        told = () if job.request.top is None else _likeliest(_log_softmax(logits_V), token, job.request.top)
        if token == self.tokenizer.eos_id or token in job.request.ends:
            self._end(answer, "stop", (token, *told) if told else None)
            return
        piece = answer.writer.push(token, *told)
        if piece:
            job.listener(Written(answer.index, piece))
        answer.last = token
        if answer.writer.stopped or answer.count == job.request.max_new_tokens:
            self._end(answer, "stop" if answer.writer.stopped else "length")

    def _end(self, answer: _Answer, reason: str, end: tuple[Any, ...] | None = None) -> None:
        """Close an answer. end: the document's end with its log p, which is told and has no text."""
        job, now = answer.job, time.monotonic()
        stopped = answer.writer.stopped
        piece = answer.writer.finish()
        if answer.writer.stopped and not stopped:  # by characters that were incomplete until now
            reason = "stop"
        elif end is not None:
            id, logprob, top = end
            token = Token(id=id, text="", offset=answer.writer.length, logprob=logprob, top=top)
            piece = Piece(text=piece.text, tokens=(*piece.tokens, token))
        if piece:
            job.listener(Written(answer.index, piece))
        first = answer.first_at or now
        answer.last = -1
        job.open -= 1
        if not job.open:  # before its listener can ask
            job.over = True
            self.counters.ended += 1
        job.listener(Ended(answer.index, reason, answer.count, first - job.submitted, now - first))


class Worker:
    """A thread that runs the rounds of engines in turn: they share the processor's cores."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.wake = threading.Event()
        for engine in engines:
            engine.wake = self.wake
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="swamla-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current round; requests that have not ended fail."""
        self._closed = True
        self.wake.set()
        self._thread.join()
        for engine in self.engines:
            engine.fail_all("the server stops")

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._closed:
            self.wake.clear()
            if not any(self._step(engine) for engine in self.engines) and not self._closed:
                self.wake.wait()

    @staticmethod
    def _step(engine: Engine) -> bool:
        try:
            return engine.step()
        except Exception as error:  # a bug: the requests under way fail, and those to come are answered
            LOG.exception("a round failed")
            engine.fail_all(f"{type(error).__name__}: {error}")
            return True


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _likeliest(logp_V: Tensor, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log p of a token, and the `top` likeliest ids with theirs."""
    found = logp_V.topk(min(top, len(logp_V)))
    return float(logp_V[token]), tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))
