"""Requests and answers in the shapes of OpenAI's API."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from secrets import randbelow
from typing import Any, ClassVar

from swamla.data.chat import Chatml
from swamla.data.tokenizer import Tokenizer
from swamla.errors import UsageError
from swamla.inference.sampling import Sampling
from swamla.model.accounting import state_bytes
from swamla.serve.chat import asked_ids, require_template
from swamla.serve.engine import Engine
from swamla.serve.requests import Ended, Event, Read, Request, Written
from swamla.serve.schema import MAX_EXPLAINED, MAX_SEED
from swamla.serve.writing import Token
from swamla.text import encode_prompt

COMPLETION_TOKENS, CHAT_TOKENS = 16, 256  # where a request does not say; the first is OpenAI's
LEAST_LOGP = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class Served:
    """A model that answers, by the name that requests use. created: seconds since 1970."""

    name: str
    engine: Engine
    template: Chatml | None
    created: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its texts."""
        return self.engine.tokenizer

    @property
    def explained_tokens(self) -> int:
        """The tokens of the longest text whose attention is told: `MAX_EXPLAINED`, or the learned positions."""
        return min(MAX_EXPLAINED, self.engine.config.learned_positions or MAX_EXPLAINED)

    def described(self) -> dict[str, Any]:
        """Its entry in /v1/models."""
        engine = self.engine
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "swamla",
            "swamla": {
                "pattern": " ".join(engine.config.pattern),
                "decoding": engine.decoding,
                "chat": self.template is not None,
                "max_tokens": engine.limit,
                "explained_tokens": self.explained_tokens,
            },
        }


@dataclass
class Prompt:
    """One prompt of an HTTP request and what is known of its answers. first: the index of the first of them.

    begun: whether `tokens` begin with the document's start, which is not part of the text.
    """

    text: str
    tokens: list[int]
    first: int
    begun: bool
    marks: tuple[int, ...] = ()
    read: Read | None = None
    ended: dict[int, Ended] = field(default_factory=dict)


@dataclass
class Exchange(ABC):
    """An HTTP request for texts: what is asked, and the answers as they come. Subclasses have the two shapes.

    kind, id_prefix: of the response.
    """

    kind: ClassVar[str]
    id_prefix: ClassVar[str]

    served: Served
    body: Mapping[str, Any]
    seconds: float
    prompts: list[Prompt] = field(init=False)
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.prompts = list(self.read_prompts())

    @abstractmethod
    def read_prompts(self) -> Iterator[Prompt]:
        """The prompts of the body."""

    @property
    @abstractmethod
    def top(self) -> int | None:
        """How many alternatives are told with each token; None for no log p."""

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """Tokens of each answer."""

    @abstractmethod
    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def piece(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        """A piece of a streamed answer."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a streamed answer begins with."""
        return None

    @property
    def streams(self) -> bool:
        """Whether the answer is sent as it is written."""
        return bool(self.body.get("stream"))

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return int(self.body.get("n") or 1)

    @property
    def echoes(self) -> bool:
        """Whether answers begin with the prompt."""
        return bool(self.body.get("echo"))

    @property
    def tells_ids(self) -> bool:
        """Whether ids are told beside texts."""
        return bool(self.body.get("return_token_ids"))

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer besides the document's end."""
        return ()

    @cached_property
    def sampling(self) -> Sampling:
        """How tokens are chosen. Raises `UsageError` for a value that does not fit."""
        body = self.body
        seed = body.get("seed")
        return Sampling(
            temperature=float(_or(body.get("temperature"), 1.0)),
            top_k=int(body.get("top_k") or 0),
            top_p=float(_or(body.get("top_p"), 1.0)),
            seed=randbelow(MAX_SEED) if seed is None else int(seed),
        )

    def requests(self) -> list[Request]:
        """What the engine is asked, one for each prompt."""
        stop = self.body.get("stop") or ()
        return [
            Request(
                tokens=prompt.tokens,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                n=self.n,
                stops=(stop,) if isinstance(stop, str) else tuple(stop),
                ends=self.ends,
                top=self.top,
                echo=self.echoes,
                marks=prompt.marks,
                seconds=self.seconds,
            )
            for prompt in self.prompts
        ]

    def note(self, prompt: int, event: Event) -> None:
        """Take down what the usage tells later."""
        if isinstance(event, Read):
            self.prompts[prompt].read = event
        elif isinstance(event, Ended):
            self.prompts[prompt].ended[event.answer] = event

    @property
    def is_done(self) -> bool:
        """Whether all answers have ended."""
        return all(len(prompt.ended) == self.n for prompt in self.prompts)

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The response with all answers."""
        head = {"id": self.id, "object": self.kind, "created": self.created, "model": self.served.name}
        return {**head, "choices": choices, "usage": self.usage()}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """One event of a stream."""
        chunk = {"id": self.id, "object": self.stream_object, "created": self.created, "model": self.served.name}
        chunk["choices"] = choices
        if self.tells_usage:
            chunk["usage"] = usage
        return chunk

    @property
    def stream_object(self) -> str:
        """The kind of a stream's events."""
        return self.kind

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    def usage(self) -> dict[str, Any]:
        """Tokens read and written; under "swamla" the largest state, the latest first token and the lowest rate."""
        ended = [each for prompt in self.prompts for each in prompt.ended.values()]
        read = sum(len(prompt.tokens) for prompt in self.prompts)
        written = sum(each.tokens for each in ended)
        rates = [(each.tokens - 1) / each.seconds for each in ended if each.seconds > 0 and each.tokens > 1]
        config, elements = self.served.engine.config, self.served.engine.model.embedding.weight.element_size()
        longest = max(  # the last token is not fed back
            len(prompt.tokens) + max((each.tokens - 1 for each in prompt.ended.values() if each.tokens), default=0)
            for prompt in self.prompts
        )
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(p.read.cached for p in self.prompts if p.read)},
            "swamla": {
                "state_bytes": state_bytes(config, longest, batch=1, element_bytes=elements),
                "seconds_to_first_token": max((each.seconds_to_first for each in ended), default=0.0),
                "tokens_per_second": min(rates, default=0.0),
            },
        }

    def prompt_ids(self, index: int) -> dict[str, Any]:
        """The ids of an answer's prompt, where they are told."""
        return {"prompt_token_ids": self.prompts[index // self.n].tokens} if self.tells_ids else {}

    def ids(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The ids of tokens, where they are told."""
        return {"token_ids": [token.id for token in tokens]} if self.tells_ids else {}

    def token_name(self, id: int) -> str:
        """The text of a token, "token_id:N" for one that is no whole character: names of different tokens differ."""
        return token_name(self.served.tokenizer, id)


class Completion(Exchange):
    """/v1/completions: texts continued."""

    kind: ClassVar[str] = "text_completion"
    id_prefix: ClassVar[str] = "cmpl"

    def read_prompts(self) -> Iterator[Prompt]:
        given = self.body.get("prompt")
        prompts = [given] if _is_one(given) else given
        assert isinstance(prompts, list)
        for index, prompt in enumerate(prompts):
            begun = not isinstance(prompt, list)
            tokens = ids_of(self.served.tokenizer, prompt)
            text = prompt or "" if begun else self.served.tokenizer.decode(tokens)
            yield Prompt(text, tokens, index * self.n, begun)

    @property
    def top(self) -> int | None:
        return None if self.body.get("logprobs") is None else int(self.body["logprobs"])

    @property
    def max_new_tokens(self) -> int:
        given = self.body.get("max_tokens")
        count = COMPLETION_TOKENS if given is None else int(given)
        if not count and not self.echoes:
            raise UsageError("max_tokens = 0: must be > 0, or with echo = true, for the log p of the prompt")
        return count

    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        prompt = self.prompts[index // self.n]
        shift = 0
        if self.echoes:
            text, shift = prompt.text + text, len(prompt.text)
        told = None if self.top is None else _joined(self._echoed(prompt), self._told(tokens, shift))
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    def piece(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        shift = len(self.prompts[index // self.n].text) if self.echoes else 0
        told = None if self.top is None else self._told(tokens, shift)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self.choice(index, "", (), None) if self.echoes else None

    def _echoed(self, prompt: Prompt) -> dict[str, list[Any]]:
        """The prompt's tokens. The document's start is no part of a text, but what its first token follows on."""
        tokens = prompt.read.prompt if prompt.read else ()
        if not prompt.begun or not tokens:
            return self._told(tokens, 0)
        return self._told(tokens[1:], -tokens[1].offset if len(tokens) > 1 else 0)

    def _told(self, tokens: Sequence[Token], shift: int) -> dict[str, list[Any]]:
        name = self.token_name
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": [
                None
                if token.logprob is None
                else {name(id): _finite(logp) for id, logp in (*token.top, (token.id, token.logprob))}
                for token in tokens
            ],
            "text_offset": [token.offset + shift for token in tokens],
        }


class Chat(Exchange):
    """/v1/chat/completions: the next message of a conversation."""

    kind: ClassVar[str] = "chat.completion"
    id_prefix: ClassVar[str] = "chatcmpl"

    @property
    def template(self) -> Chatml:
        """The model's template. Raises `UsageError` if it has none."""
        return require_template(self.served.template, self.served.name)

    def read_prompts(self) -> Iterator[Prompt]:
        messages = [
            {"role": message["role"], "content": _content(message["content"])} for message in self.body["messages"]
        ]
        tokens, marks = asked_ids(self.template, messages)
        yield Prompt("", tokens, 0, begun=True, marks=marks)

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.template.stop_id,)

    @property
    def top(self) -> int | None:
        if not self.body.get("logprobs"):
            if self.body.get("top_logprobs") is not None:
                raise UsageError("top_logprobs needs logprobs = true")
            return None
        return int(self.body.get("top_logprobs") or 0)

    @property
    def max_new_tokens(self) -> int:
        """By default as many as there is room for, at most `CHAT_TOKENS`."""
        given = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        room = self.served.engine.limit - len(self.prompts[0].tokens) + 1
        return int(given) if given else max(1, min(CHAT_TOKENS, room))

    @property
    def stream_object(self) -> str:
        return "chat.completion.chunk"

    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": self._told(tokens), "finish_reason": reason}

    def piece(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._told(tokens), "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _told(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        content = [
            {**self._one(token.id, token.logprob), "top_logprobs": [self._one(*each) for each in token.top]}
            for token in tokens
        ]
        return {"content": content}

    def _one(self, id: int, logprob: float | None) -> dict[str, Any]:
        text = text_of(self.served.tokenizer, id)
        whole = None if text is None else list(text.encode())
        return {"token": self.token_name(id), "logprob": _finite(logprob or 0.0), "bytes": whole}


class Collected:
    """The answers of an exchange that is not streamed."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        count = len(exchange.prompts) * exchange.n
        self.texts: list[list[str]] = [[] for _ in range(count)]
        self.tokens: list[list[Token]] = [[] for _ in range(count)]

    def add(self, prompt: int, event: Event) -> None:
        """Add an event of one of the prompts."""
        self.exchange.note(prompt, event)
        if isinstance(event, Written):
            index = prompt * self.exchange.n + event.answer
            self.texts[index].append(event.piece.text)
            self.tokens[index].extend(event.piece.tokens)

    def response(self) -> dict[str, Any]:
        """The response with all answers, once they have ended."""
        exchange = self.exchange
        reasons = [each.reason for prompt in exchange.prompts for _, each in sorted(prompt.ended.items())]
        answers = zip(self.texts, self.tokens, reasons, strict=True)
        return exchange.whole(
            [
                {**exchange.choice(i, "".join(text), tokens, reason), **exchange.prompt_ids(i), **exchange.ids(tokens)}
                for i, (text, tokens, reason) in enumerate(answers)
            ]
        )


def chunks(exchange: Exchange, prompt: int, event: Event) -> Iterator[dict[str, Any]]:
    """The events of a stream for one of the engine."""
    exchange.note(prompt, event)
    first = prompt * exchange.n
    if isinstance(event, Read):
        for index in range(first, first + exchange.n):
            opening = exchange.opening(index)
            if exchange.tells_ids:
                opening = {**(opening or exchange.piece(index, "", (), None)), **exchange.prompt_ids(index)}
            if opening is not None:
                yield exchange.chunk([opening])
    elif isinstance(event, Written):
        piece = exchange.piece(first + event.answer, event.piece.text, event.piece.tokens, None)
        yield exchange.chunk([{**piece, **exchange.ids(event.piece.tokens)}])
    elif isinstance(event, Ended):
        yield exchange.chunk([exchange.piece(first + event.answer, "", (), event.reason)])


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_json(value: Any) -> bytes:
    """JSON in ASCII: what a client sent may be no Unicode, and is quoted in errors."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def ids_of(tokenizer: Tokenizer, prompt: str | Sequence[int] | None) -> list[int]:
    """The ids of a text, behind the document's start; or ids, as they are. Raises `UsageError` for an unknown id."""
    if isinstance(prompt, str | None):
        return encode_prompt(tokenizer, prompt or "")
    if max(prompt) >= tokenizer.vocab_size:
        raise UsageError(f"token {max(prompt)} is outside the vocabulary of {tokenizer.vocab_size}")
    return [int(id) for id in prompt]


def text_of(tokenizer: Tokenizer, id: int) -> str | None:
    """The text of a token in the middle of a text; None if it is no whole character."""
    before = tokenizer.decode([tokenizer.eos_id])
    text = tokenizer.decode([tokenizer.eos_id, id])[len(before) :]
    return None if not text or "\ufffd" in text else text


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """See `Exchange.token_name`."""
    text = text_of(tokenizer, id)
    return f"token_id:{id}" if text is None else text


def _is_one(prompt: Any) -> bool:
    return not isinstance(prompt, list) or not isinstance(prompt[0], list | str)


def _content(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _joined(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: values + other[name] for name, values in one.items()}


def _finite(logp: float) -> float:
    return max(logp, LEAST_LOGP)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
