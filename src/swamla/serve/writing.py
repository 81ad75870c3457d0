"""The text of a sequence as its tokens arrive: whole characters, up to the first stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.data.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of an answer or an echoed prompt. offset: of its text, in characters.

    logprob: None if it was not asked for, or if nothing comes before.  top: the likeliest ids with their log p.
    """

    id: int
    text: str
    offset: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What has become certain of a text: characters, and the tokens that they end."""

    text: str = ""
    tokens: tuple[Token, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class Writer:
    """Turns ids into pieces. Text that may begin a stop string is held back until that is decided."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), offset: int = 0) -> None:
        self.stopped = False
        self._decoder, self._stops = StreamDecoder(tokenizer), stops
        self._held = ""
        self._sent = self._read = offset  # characters: given out, and decoded
        self._tokens: list[tuple[Token, int]] = []  # not given out, with the offset of their end

    @property
    def length(self) -> int:
        """Characters of the text up to the last token, those that are held back included."""
        return self._read

    def push(self, id: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> Piece:
        """Add a token. Sets `stopped` if its text completes a stop string, which is left out."""
        text = self._decoder.push(id)
        token = Token(id=id, text=text, offset=self._read, logprob=logprob, top=top)
        self._read += len(text)
        self._tokens.append((token, self._read))
        self._held += text
        if self._cut():
            return self._last()
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        given, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._sent += len(given)
        whole = sum(end <= self._sent for _, end in self._tokens)
        tokens, self._tokens = self._tokens[:whole], self._tokens[whole:]
        return Piece(text=given, tokens=tuple(token for token, _ in tokens))

    def finish(self) -> Piece:
        """The rest: what was held back, and an incomplete character as U+FFFD. May set `stopped` as `push` does."""
        if self.stopped:
            return Piece()
        self._held += self._decoder.flush()
        self._cut()
        return self._last()

    def _cut(self) -> bool:
        """End the text before the first stop string, if it has one."""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, self._held[: min(found)]
        return self.stopped

    def _last(self) -> Piece:
        """All that is held; after a stop string no token that begins with or after it."""
        end = self._sent + len(self._held)
        tokens = tuple(token for token, _ in self._tokens if not self.stopped or token.offset < end)
        return Piece(text=self._held, tokens=tokens)


def log_softmax(logits: Tensor) -> Tensor:
    """log p over the last dimension, in fp32 at least."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def likeliest(logp_V: Tensor, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log p of a token, and the `top` likeliest ids with theirs."""
    found = logp_V.topk(min(top, len(logp_V)))
    return float(logp_V[token]), tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
