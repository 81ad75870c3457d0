"""Choosing the next token, and generating token by token with a constant-size state."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swamla.errors import UsageError, require
from swamla.model.decoding import fast_linears, steps_for

if TYPE_CHECKING:
    from swamla.model.language_model import LanguageModel, ModelState

PREFILL_PIECE = 4096  # tokens of prompts taken at once: bounds the activations, of which accelerators hold more
ON_ACCELERATORS = 16  # times as many
SMALLEST = torch.finfo(torch.float32).tiny  # temperature that logits can be divided by
MASKED_PIECE = 512  # of a row, where some have ended: bounds the attention mask at 512 × prompt length


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw the next token. temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in.

    Row i of a batch draws from its own generator, seeded with seed + i, so that a prompt's continuation does not
    depend on the prompts beside it.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        require(finite, "temperature", self.temperature, "must be >= 0 (0: greedy), e.g. 0.8")
        require(self.top_k >= 0, "top_k", self.top_k, "must be >= 0 (0: all tokens), e.g. 50")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1], e.g. 0.95")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2**63)")

    def generators(self, batch: int) -> list[torch.Generator]:
        """One random generator a row, on the CPU."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(batch)]

    def choose(self, logits_BV: Tensor, generators: list[torch.Generator]) -> list[int]:
        """The next token of each row; `UsageError` for logits that are not numbers."""
        best_B, index_B = logits_BV.max(dim=-1)  # which is not a number as soon as one of them is none
        if not all(map(math.isfinite, best_B.tolist())):
            raise UsageError("the model's logits are not finite: its weights diverged, or are damaged")
        if self.temperature == 0:
            return index_B.tolist()
        probabilities_BV = self.probabilities(logits_BV).cpu()
        rows = zip(probabilities_BV, generators, strict=True)
        return [int(torch.multinomial(p, 1, generator=generator)) for p, generator in rows]

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What tokens are drawn from: temperature first, then the top_k likeliest, then the fewest that reach top_p.

        Of tokens that are equally likely top_p takes those of the lowest ids first.
        """
        logits_BV = logits_BV.float()
        # Largest first taken off, so that however small the temperature the likeliest token stays finite.
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / max(self.temperature, SMALLEST)
        if 0 < self.top_k < logits_BV.shape[-1]:
            top = logits_BV.topk(self.top_k, dim=-1)
            logits_BV = torch.full_like(logits_BV, -math.inf).scatter(-1, top.indices, top.values)
        probabilities_BV = logits_BV.softmax(dim=-1)
        if self.top_p < 1:
            sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
            before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV  # the likeliest token always stays
            dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= self.top_p)
            probabilities_BV = probabilities_BV.masked_fill(dropped_BV, 0.0)
        return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)


@torch.inference_mode()
def generate(
    model: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop_id: int | None = None,
    known_ids: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    decoding: str = "eager",
) -> list[list[int]]:
    """Continue each prompt (token ids, length >= 1) by at most `max_new_tokens`; returns the new tokens only.

    A row ends with `stop_id`, which is not returned. known_ids: ids from there on are never drawn; by default those
    that no text has, where the model knows (`LanguageModel.known_ids`). on_token(row, token) is called as soon as each
    token is known.
    decoding: how the tokens after the first are computed. "eager"; on CUDA "graph", recorded launches; on a CPU, for at
    most 16 prompts, "int8": linear layers multiply by weights rounded to 8 bits, which is faster but another function.
    Not rounded are routed experts, weights whose rows are no multiple of 16 numbers, and those that attention to
    latents folds into queries and outputs.
    A row's logits are those it has alone but for rounding: in fp32 that of sums in another order; with "int8", whose
    activations are bf16, about a percent, so that its greedy text may part where two tokens are that close.
    UsageError for an empty prompt, what is no token id of the vocabulary, more tokens than learned positions, or more
    prompts than "int8" is for.
    """
    prompts = _checked(model, prompts, max_new_tokens)
    known_ids = model.known_ids if known_ids is None else known_ids
    longest = max(len(prompt) for prompt in prompts)
    produced: list[list[int]] = [[] for _ in prompts]
    generators = sampling.generators(len(prompts))
    was_training = model.training
    model.eval()
    try:
        state = model.init_state(len(prompts), longest + max_new_tokens - 1)  # the last token is not read back
        step = steps_for(decoding, model, state)
        done = [False] * len(prompts)
        with fast_linears(model):
            logits_BV = prefill(model, prompts, state)
        with fast_linears(model, int8=decoding == "int8"):
            for count in range(1, max_new_tokens + 1):
                chosen = sampling.choose(logits_BV[:, :known_ids], generators)
                for row, token in enumerate(chosen):
                    done[row] = done[row] or token == stop_id
                    if not done[row]:
                        produced[row].append(token)
                        if on_token:
                            on_token(row, token)
                if all(done) or count == max_new_tokens:
                    break
                logits_BV = step(chosen)
        return produced
    finally:
        model.train(was_training)


def prefill(model: "LanguageModel", prompts: Sequence[Sequence[int]], state: "ModelState") -> Tensor:
    """Read prompts of unequal lengths into an empty state; returns the logits (B, V) after each one's last token."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = int(lengths_B.max())
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    tokens_BT = tokens_BT.to(model.device)
    valid_BT = torch.arange(longest, device=model.device) < lengths_B[:, None]
    last_BD = torch.zeros(len(prompts), model.config.width, dtype=model.embedding.weight.dtype, device=model.device)
    at_once = PREFILL_PIECE * (1 if model.device.type == "cpu" else ON_ACCELERATORS)
    for begin, end in _pieces(int(lengths_B.min()), longest, max(1, at_once // len(prompts))):
        x_BTD = model.read(tokens_BT[:, begin:end], state, valid_BT[:, begin:end])
        index_B = lengths_B - 1 - begin
        ends_here_B = (index_B >= 0) & (index_B < x_BTD.shape[1])
        found_BD = x_BTD[torch.arange(len(prompts), device=model.device), index_B.clamp(0, x_BTD.shape[1] - 1)]
        last_BD = torch.where(ends_here_B[:, None], found_BD, last_BD)
    return model.head(last_BD)


def _pieces(shortest: int, longest: int, large: int) -> Iterator[tuple[int, int]]:
    """Where prompts are cut: large pieces as long as no row has ended, and then small ones, which need masks."""
    for begin in range(0, shortest, large):
        yield begin, min(begin + large, shortest)
    small = min(large, MASKED_PIECE)
    for begin in range(shortest, longest, small):
        yield begin, min(begin + small, longest)


def _checked(model: "LanguageModel", prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Sequence[Sequence[int]]:
    """The prompts as lists of whole numbers, whatever kinds of sequences and of whole numbers they are made of."""
    if len(prompts) == 0 or not all(len(prompt) for prompt in prompts):
        raise UsageError("a prompt is empty: give at least one token (the document start token stands for nothing)")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens = {max_new_tokens}: must be >= 1")
    vocabulary, found = model.config.vocab_size, []
    for row, prompt in enumerate(prompts):
        try:
            found.append([operator.index(token) for token in prompt])
        except TypeError:
            raise UsageError(
                f"prompt {row} is {prompt!r:.60}: must be token ids; swamla.generate_text takes texts"
            ) from None
        for token in found[-1]:
            if not 0 <= token < vocabulary:
                raise UsageError(f"token {token} in prompt {row} is outside the vocabulary of {vocabulary}")
    return found
