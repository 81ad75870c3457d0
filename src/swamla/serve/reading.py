"""Prompts on their way into a state: in pieces, from the longest prefix that is known."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swamla.data.tokenizer import Tokenizer
from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState
from swamla.serve.prefixes import PrefixCache, cut, names
from swamla.serve.requests import Request
from swamla.serve.slots import room_for
from swamla.serve.writing import Token, Writer, likeliest, log_softmax


@dataclass(eq=False)
class Reading:
    """A prompt of which some pieces are read into `state`.

    names: of the prefixes that end with each piece; empty without a cache.  read: pieces.  cached: tokens that came
        from the cache.  writer: where log p of the prompt is asked for.  told: its tokens with that.
    before: log p after the last token that was read.
    """

    request: Request
    pieces: list[tuple[int, int]]
    state: ModelState
    names: list[bytes] = field(default_factory=list)
    read: int = 0
    cached: int = 0
    writer: Writer | None = None
    told: list[Token] = field(default_factory=list)
    before: Tensor | None = None

    @property
    def tokens_left(self) -> int:
        """Tokens that are to be read."""
        return self.pieces[-1][1] - self.pieces[self.read][0]

    @property
    def next_size(self) -> int:
        """Tokens of the next piece."""
        begin, end = self.pieces[self.read]
        return end - begin


class Reader:
    """Reads prompts with a model, in pieces of at most `piece` tokens, and keeps states that other prompts may share.

    limit: tokens that a state may reach.  To be used under `torch.inference_mode()`.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, prefixes: PrefixCache, *, piece: int, limit: int
    ) -> None:
        self.model, self.tokenizer, self.prefixes = model, tokenizer, prefixes
        self.piece, self.limit = piece, limit

    def begin(self, request: Request) -> Reading:
        """Cut a prompt, and start from the longest prefix that is known."""
        pieces = cut(len(request.tokens), self.piece, request.marks)
        reading = Reading(request, pieces, self.model.init_state(1, room_for(len(request.tokens), self.limit)))
        if request.echo and request.top is not None:
            reading.writer = Writer(self.tokenizer)
        if not self.prefixes.capacity:
            return reading
        reading.names = names(request.tokens, pieces)
        # The last piece is always read, for the logits after it; with log p of the prompt, all pieces are.
        found = None if reading.writer else self.prefixes.longest(reading.names[:-1])
        if found is not None:
            reading.read, prefix = found
            reading.cached = pieces[reading.read - 1][1]
            reading.state.copy_row(0, prefix)
            reading.state = reading.state.first(1)
        return reading

    def read(self, reading: Reading) -> Tensor | None:
        """Read the next piece. After the last one, the logits (V,) of the first token of an answer."""
        begin, end = reading.pieces[reading.read]
        tokens = reading.request.tokens[begin:end]
        x_1TD = self.model.step_hidden(torch.tensor([tokens], device=self.model.device), reading.state)
        if reading.writer is not None:
            self._echo(reading, reading.writer, tokens, x_1TD[0])
        if reading.names and self._is_shared(reading.request, end):
            self._remember(reading.names[reading.read], reading.state)
        reading.read += 1
        if reading.read < len(reading.pieces):
            return None
        if reading.writer is not None:
            reading.told += reading.writer.finish().tokens
        return self.model.logits(x_1TD[:, -1])[0, : self.tokenizer.vocab_size]

    def _is_shared(self, request: Request, end: int) -> bool:
        """Whether another prompt may be cut there."""
        return end % self.piece == 0 or end in request.marks

    def _remember(self, name: bytes, state: ModelState) -> None:
        if name not in self.prefixes:
            kept = self.model.init_state(1, state.longest)
            kept.copy_row(0, state)
            self.prefixes.put(name, kept)

    def _echo(self, reading: Reading, writer: Writer, tokens: Sequence[int], x_TD: Tensor) -> None:
        """Add the log p of a piece's tokens, of which the first follows on the piece before."""
        logp_TV = log_softmax(self.model.logits(x_TD)[:, : self.tokenizer.vocab_size])
        for index, token in enumerate(tokens):
            before = logp_TV[index - 1] if index else reading.before
            if before is None:
                reading.told += writer.push(token).tokens
            else:
                reading.told += writer.push(token, *likeliest(before, token, reading.request.top or 0)).tokens
        reading.before = logp_TV[-1].clone()
