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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swamla.data.tokenizer import Tokenizer
from swamla.errors import SwamlaError, UsageError, require
from swamla.inference.decoding import INT8_MAX_ROWS, Decoder
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.serve.prefixes import PrefixCache
from swamla.serve.reading import Reader, Reading
from swamla.serve.requests import Ended, Failed, Listener, QueueFull, Read, Request, TooLong, Written
from swamla.serve.slots import Slots
from swamla.serve.writing import Piece, Token, Writer, likeliest, log_softmax

LOG = logging.getLogger(__name__)
DECODINGS = ("eager", "int8")


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
    reading: Reading | None = None  # until its answers begin
    open: int = 0  # answers that have not ended

    def cancel(self) -> None:
        """Free what the request uses, at the next round; its listener hears no more."""
        self.cancelled = True


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
        piece: int = 256,
        cache_bytes: int = 256 << 20,
        decoding: str = "eager",
    ) -> None:
        require(slots > 0, "slots", slots, "must be > 0, e.g. 16")
        require(queue >= 0, "queue", queue, "must be >= 0 (0: a request that finds no slot is refused)")
        require(limit > 1, "limit", limit, "must be > 1, e.g. 4096")
        require(piece > 0, "piece", piece, "must be > 0, e.g. 256")
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
        self._reader = Reader(self.model, tokenizer, self.prefixes, piece=piece, limit=self.limit)
        self.counters = Counters()
        self.wake = threading.Event()
        self._lock = threading.Lock()
        self._arrived: deque[Job] = deque()  # under the lock, as the queue's length is
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._answers: list[_Answer] = []  # by slot
        self._oldest_first = False

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
        job.reading = self._reader.begin(job.request)

    def _read_some(self) -> None:
        """Read pieces of prompts, at least one and more while they have no more tokens than one may have.

        One round those of the requests with the shortest rests of prompts, the next those of the oldest, so that short
        prompts do not wait for long ones and long ones come through.
        """
        room = self.piece
        if self._reading:
            self._oldest_first = not self._oldest_first
        while (found := self._next_to_read()) is not None:
            job, reading = found
            if room < self.piece and reading.next_size > room:
                return
            room -= reading.next_size
            self._guarded([job], partial(self._read_piece, job, reading))
            self._reading = [each for each in self._reading if not each.over]

    def _next_to_read(self) -> tuple[Job, Reading] | None:
        """The request whose prompt is read next."""
        found = [(job, job.reading) for job in self._reading if job.reading is not None]
        if not found or self._oldest_first:
            return found[0] if found else None
        return min(found, key=lambda each: each[1].tokens_left)

    def _read_piece(self, job: Job, reading: Reading) -> None:
        """Read the next piece of a prompt; after the last one the answers begin."""
        logits_V = self._reader.read(reading)
        if logits_V is not None:
            self._start_answers(job, reading, logits_V)
            self._reading.remove(job)

    def _start_answers(self, job: Job, reading: Reading, logits_V: Tensor) -> None:
        request = job.request
        self.counters.prompt_tokens += len(request.tokens)
        self.counters.cached_tokens += reading.cached
        job.listener(Read(reading.cached, tuple(reading.told)))
        job.open = request.n
        for index, generator in enumerate(request.sampling.generators(request.n)):
            answer = _Answer(job, index, generator, Writer(self.tokenizer, request.stops))
            if not request.max_new_tokens:
                self._end(answer, "length")
                continue
            self._append(answer, None, logits_V)
            if answer.last >= 0:
                self.slots.join(reading.state)
                self._answers.append(answer)
        job.reading = None

    # -- answers

    def _decode(self) -> None:
        """One more token for every sequence in a slot."""
        logits_BV = self.slots.step([answer.last for answer in self._answers])[:, : self.tokenizer.vocab_size]
        self.counters.steps += 1
        chosen = self._chosen(logits_BV)
        for row, answer in enumerate(list(self._answers)):
            if not answer.job.over:
                self._guarded([answer.job], partial(self._append, answer, chosen.get(row), logits_BV[row]))
        self._leave_where(lambda answer: answer.last < 0 or answer.job.over)

    def _chosen(self, logits_BV: Tensor) -> dict[int, int]:
        """Row → its next token, sampled together with all rows of equal settings; none where logits are not finite."""
        best_B = logits_BV.amax(dim=-1).tolist()  # NaN if any logit is NaN
        alike: dict[Sampling, list[int]] = {}
        for row, answer in enumerate(self._answers):
            if math.isfinite(best_B[row]) and not answer.job.over:
                alike.setdefault(replace(answer.job.request.sampling, seed=0), []).append(row)
        found: dict[int, int] = {}
        for sampling, rows in alike.items():
            part_BV = logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]
            tokens = sampling.choose(part_BV, [self._answers[row].generator for row in rows])
            found |= dict(zip(rows, tokens, strict=True))
        return found

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
        told = () if job.request.top is None else likeliest(log_softmax(logits_V), token, job.request.top)
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
