"""Continuation of texts by a trained model, streamed as it is generated."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swamla.data.chat import Message, template_of
from swamla.data.tokenizer import StreamDecoder, Tokenizer
from swamla.errors import UsageError, require
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.accounting import state_bytes
from swamla.model.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One prompt's continuation. tokens: its ids.  ended: whether the model ended the document."""

    prompt: str
    text: str
    tokens: list[int]
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Generation:
    """All completions of a batch, and their cost.

    seconds_to_first: prefill and one token per row.  tokens_per_second: the rate after that, over all rows; 0 if no
    further token was generated.  decoding: as `Decoder.description`.
    """

    completions: list[Completion]
    seconds_to_first: float
    tokens_per_second: float
    state_bytes: int
    decoding: str


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The document start token and the prompt's tokens; of a task, whose rows have no start, the tokens alone.

    Raises `UsageError` for NUL, invalid Unicode, and an empty prompt of a task.
    """
    require_text(prompt)
    ids = [*tokenizer.start, *tokenizer.encode(prompt)]
    if not ids:
        raise UsageError("the prompt is empty: a row of a task begins with a token of its own: give it the row so far")
    return ids


def require_text(prompt: str) -> None:
    """Raise `UsageError` for NUL and for invalid Unicode."""
    if "\0" in prompt:
        raise UsageError(f"the prompt has a NUL character at position {prompt.index(chr(0))}: remove it")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt has a lone surrogate at position {error.start}: it is not valid Unicode text"
        ) from error


def room(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> int | None:
    """How many tokens can follow the longest of the encoded prompts; None without a limit.

    Raises `UsageError` for a prompt that leaves no room for a token.
    """
    positions = model.config.learned_positions
    if not positions:
        return None
    longest = max(map(len, prompts))
    if longest > positions:
        raise UsageError(
            f"the prompt has {longest} tokens, the document's start included, and the model {positions} learned "
            f"positions: shorten it by {longest - positions}, or --crop, which reads its last {positions}"
        )
    return positions - longest + 1  # the last token is not fed back


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    max_new_tokens: int = 256,
    *,
    sampling: Sampling | None = None,
    on_text: Callable[[int, str], None] | None = None,
    decoding: str = "eager",
    crop: bool = False,
) -> Generation:
    """Continue each prompt, or a single one, by at most `max_new_tokens`; an empty one starts a new document.

        print(generate_text(model, tokenizer, "import os", 32).completions[0].text)

    A row ends where the model ends its document. sampling: by default `Sampling()`, at temperature 0.8.
    on_text(row, piece): streams complete characters.  decoding: see `Decoder`.  crop: for learned positions: a text
    longer than they are is continued from as many of its last tokens as fit (`context` of `Decoder.generate`). Raises
    `UsageError` without a prompt, for invalid Unicode, for `crop` without learned positions, and as `Decoder.generate`
    does.
    """
    positions = model.config.learned_positions
    require(bool(positions) or not crop, "crop", crop, "is for learned positions; this model reads texts of any length")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts:
        raise UsageError("prompts = []: must have one text at least; an empty text starts a new document")
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    streams = [StreamDecoder(tokenizer) for _ in prompts]
    times: list[float] = []

    def on_token(row: int, token: int) -> None:
        times.append(time.perf_counter())
        piece = streams[row].push(token)
        if on_text and piece:
            on_text(row, piece)

    start = time.perf_counter()
    decoder = Decoder(model, decoding)
    produced = decoder.generate(
        ids,
        max_new_tokens,
        sampling=sampling,
        stop_id=tokenizer.eos_id,
        known_ids=tokenizer.vocab_size,
        context=positions if crop else None,
        on_token=on_token,
    )
    if on_text:
        for row, stream in enumerate(streams):
            if rest := stream.flush():
                on_text(row, rest)
    first_round = sum(1 for tokens in produced if tokens)
    later = times[first_round:]
    elapsed = later[-1] - times[first_round - 1] if later else 0.0
    longest = max(map(len, ids)) + max_new_tokens - 1
    longest = min(longest, positions) if crop else longest
    return Generation(
        completions=[
            Completion(prompt=prompt, text=tokenizer.decode(tokens), tokens=tokens, ended=len(tokens) < max_new_tokens)
            for prompt, tokens in zip(prompts, produced, strict=True)
        ],
        seconds_to_first=times[first_round - 1] - start if times else 0.0,
        tokens_per_second=len(later) / elapsed if elapsed else 0.0,
        state_bytes=state_bytes(
            model.config, longest, batch=len(prompts), element_bytes=model.embedding.weight.element_size()
        ),
        decoding=decoder.description,
    )


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_new_tokens: int = 256,
    *,
    template: str = "chatml",
    sampling: Sampling | None = None,
) -> str:
    """The model's answer to a conversation, e.g. [{"role": "user", "content": "…"}]; greedy by default.

    It ends where the message ends, or the document, or the learned positions.

    template: that the model was fine-tuned with, see `DataConfig`. Raises `UsageError` for a tokenizer without the
    special ids of conversations, and as `Decoder.generate` does.
    """
    chosen = template_of(tokenizer, template)
    sampling = sampling or Sampling(temperature=0.0)
    prompt = chosen.prompt(messages)
    if positions := model.config.learned_positions:
        max_new_tokens = min(max_new_tokens, max(1, positions - len(prompt) + 1))  # the last token is not fed back
    (tokens,) = Decoder(model).generate(
        [prompt],
        max_new_tokens,
        sampling=sampling,
        stop_id=chosen.stop_id,
        on_token=lambda _, token: token == tokenizer.eos_id,
    )
    return tokenizer.decode(tokens[:-1] if tokens[-1:] == [tokenizer.eos_id] else tokens)
