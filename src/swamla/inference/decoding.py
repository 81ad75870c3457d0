"""Decoding: prompts are read, then one new token a row at a time, with a state of constant size.

Steps are launched operation by operation, or as a recorded CUDA graph, or with weights rounded to 8 bits.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from swamla.errors import MissingBackendError, UsageError
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState
from swamla.ops.int8 import Int8Matrix
from swamla.ops.layout import Layout
from swamla.ops.linear import linear

DECODINGS = ("eager", "graph", "int8")
NEEDED = {"graph": "cuda", "int8": "cpu"}  # the kind of device that one needs, if it does not run on any
FEW_ROWS = 16  # up to which 8-bit weights multiply faster than fp32 ones
SMALLEST = 256  # tokens that the first graph reads of a state; the next read twice as many each
PREFILL_PIECE = 4096  # tokens of prompts taken at once: bounds the activations, of which accelerators hold more
ON_ACCELERATORS = 16  # times as many
MASKED_PIECE = 512  # of a row, where some have ended: bounds the attention mask at 512 × prompt length


class Decoder:
    """A model as it writes: modules of its own, over the model's parameters, which are fast without gradients.

    The model is not touched; any number of decoders serve side by side, whatever each rounds.

    decoding: how the tokens after the first are computed. "eager"; on CUDA "graph", recorded launches; on a CPU, for at
    most 16 prompts, "int8": linear layers multiply by weights rounded to 8 bits, here and now, which is faster but
    another function. Not rounded are routed experts, weights whose rows are no multiple of 16 numbers, and those that
    attention to latents folds into queries and outputs.
    Raises `UsageError` for an unknown one and for experts that cannot be recorded, `MissingBackendError` for one that
    the model's device does not have.
    """

    def __init__(self, model: LanguageModel, decoding: str = "eager") -> None:
        device = model.device.type
        if decoding not in DECODINGS:
            raise UsageError(f"decoding = {decoding!r}: must be one of {', '.join(map(repr, DECODINGS))}")
        if decoding not in decodings_on(device):
            raise MissingBackendError(
                f'decoding = "{decoding}" is for {NEEDED[decoding].upper()}, the model is on {device}: use "eager"'
            )
        if decoding == "graph":
            check_recordable(model)
        self.decoding = decoding
        self.model = twin(model)  # reads prompts, by the weights themselves
        self.stepping = twin(model, int8=True) if decoding == "int8" else self.model

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop_id: int | None = None,
        known_ids: int | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt (token ids, length >= 1) by at most `max_new_tokens`; returns the new tokens only.

        A row ends with `stop_id`, which is not returned. known_ids: ids from there on are never drawn; by default those
        that no text has, where the model knows (`LanguageModel.known_ids`). on_token(row, token) is called as soon as
        each token is known.
        A row's logits are those it has alone but for rounding: in fp32 that of sums in another order; with "int8",
        whose activations are bf16, about a percent, so that its greedy text may part where two tokens are that close.
        UsageError for an empty prompt, what is no token id of the vocabulary, more tokens than learned positions, or
        more prompts than "int8" is for.
        """
        sampling = sampling or Sampling()
        prompts = _checked(self.model, prompts, max_new_tokens)
        known_ids = self.model.known_ids if known_ids is None else known_ids
        produced: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        generators = sampling.generators(len(prompts))
        longest = max(len(prompt) for prompt in prompts)
        state = self.model.init_state(len(prompts), longest + max_new_tokens - 1)  # the last token is not read back
        step = self.steps(state)
        logits_BV = prefill(self.model, prompts, state)
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

    def steps(self, state: ModelState) -> "EagerSteps | GraphSteps":
        """What continues the rows of `state` by a token each, called with their ids: logits (B, V).

        UsageError for more rows than "int8" is for.
        """
        rows = len(state.length_B)
        if self.decoding == "int8" and rows > FEW_ROWS:
            raise UsageError(f'decoding = "int8" is for at most {FEW_ROWS} prompts at once, not {rows}: use "eager"')
        if self.decoding == "graph":
            return GraphSteps(self.stepping, state, CudaGraphs())
        return EagerSteps(self.stepping, state)


def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], state: ModelState) -> Tensor:
    """Read prompts of unequal lengths into an empty state; the logits (B, V) after the last token of each."""
    device = model.device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths_B.max())
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    tokens_BT = tokens_BT.to(device)
    valid_BT = torch.arange(longest, device=device) < lengths_B[:, None]
    last_BD = torch.zeros(len(prompts), model.config.width, dtype=model.embedding.weight.dtype, device=device)
    at_once = PREFILL_PIECE * (1 if device.type == "cpu" else ON_ACCELERATORS)
    for begin, end in _pieces(int(lengths_B.min()), longest, max(1, at_once // len(prompts))):
        x_BTD = model.read(tokens_BT[:, begin:end], state, valid_BT[:, begin:end])
        index_B = lengths_B - 1 - begin
        ends_here_B = (index_B >= 0) & (index_B < x_BTD.shape[1])
        found_BD = x_BTD[torch.arange(len(prompts), device=device), index_B.clamp(0, x_BTD.shape[1] - 1)]
        last_BD = torch.where(ends_here_B[:, None], found_BD, last_BD)
    return model.head(last_BD)


def decodings_on(device: str) -> tuple[str, ...]:
    """Those of `DECODINGS` that a kind of device has: ("eager", "int8") on "cpu"."""
    return tuple(name for name in DECODINGS if NEEDED.get(name, device) == device)


def _pieces(shortest: int, longest: int, large: int) -> Iterator[tuple[int, int]]:
    """Where prompts are cut: large pieces as long as no row has ended, and then small ones, which need masks."""
    for begin in range(0, shortest, large):
        yield begin, min(begin + large, shortest)
    small = min(large, MASKED_PIECE)
    for begin in range(shortest, longest, small):
        yield begin, min(begin + small, longest)


def _checked(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Sequence[Sequence[int]]:
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


M = TypeVar("M", bound=nn.Module)
Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]
"""Of work that launches the same kernels on the same tensors every time: what launches them again."""


class EagerSteps:
    """Steps that launch one operation after the other, on any device."""

    def __init__(self, model: LanguageModel, state: ModelState) -> None:
        self.model, self.state = model, state

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token in each row."""
        tokens_B1 = torch.tensor(chosen, device=self.model.device)[:, None]
        return self.model.step(tokens_B1, self.state)[:, -1]


class GraphSteps:
    """Steps recorded once and launched as a whole, which spares the host the work of launching each operation.

    What is recorded has one shape: it finds each row's position on the device, and of states that grow it reads as
    many places as the next power of two, those behind a row's end masked. So there is a graph for every such size. The
    first step of a size runs eagerly, as libraries set themselves up when they are called first; the second is
    recorded. The logits are overwritten by the next step.
    """

    def __init__(self, model: LanguageModel, state: ModelState, record: Record) -> None:
        self.model, self.state, self.record = model, state, record
        self.tokens_B1 = torch.zeros(len(state.length_B), 1, dtype=torch.int64, device=model.device)
        self.replays: dict[int, Replay | None] = {}

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token in each row. UsageError when the state is full."""
        needed = self.state.longest + 1
        if needed > self.state.max_len:
            raise UsageError(f"{needed} tokens do not fit a state made for {self.state.max_len}")
        self.tokens_B1.copy_(torch.tensor(chosen)[:, None])
        size = size_read(needed, self.state.max_len)
        step = partial(self._step, size)
        if size not in self.replays:
            self.replays[size] = None
            logits_BV = step()
        else:
            replay = self.replays[size] or self.record(step)
            self.replays[size] = replay
            logits_BV = replay()
        self.state.count(1)
        return logits_BV

    def _step(self, size: int) -> Tensor:
        """One step without a question to the device, and without a number from the host that changes."""
        seq = Layout.one_more(self.state.length_B, size)
        x_B1D = self.model.read_at(self.tokens_B1, self.state, seq)
        self.state.length_B += 1
        return self.model.head(x_B1D)[:, -1]


def size_read(needed: int, max_len: int) -> int:
    """How many places of a growing state a graph reads that has to read `needed`: a power of two, or all."""
    size = SMALLEST
    while size < needed:
        size *= 2
    return min(size, max_len)


class CudaGraphs:
    """Records CUDA graphs that share their memory, as only one of them runs at a time. Not measured on GPU."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        """Recording runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def check_recordable(model: nn.Module) -> None:
    """Raises UsageError for experts that only a loop multiplies, which asks the device how many rows each has."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and parameter.dtype != torch.bfloat16:
            raise UsageError(
                f'decoding = "graph": {name} are experts in {parameter.dtype}, which CUDA multiplies without a graph '
                'only: use "eager", or the model in bfloat16'
            )


def twin(module: M, *, int8: bool = False, made: dict[int, Any] | None = None) -> M:
    """The module and all below it once more, in evaluation mode, over the same parameters, buffers and hooks.

    For passes without gradients: what is compiled for training stays the model's own.
    Linear layers on a CPU multiply by `ops.linear`, which knows no gradients but better kernels; int8: and few rows by
    weights rounded to 8 bits, made here. The same are layers of other kinds, e.g. those that train in fp8, experts, and
    linear ones whose weights are no plain tensors, e.g. shares of sharded ones.
    """
    made = {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    fast = type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu"
    copy = made[id(module)] = object.__new__(_FastLinear if fast else type(module))
    # A wrapped module may exchange its parameters for others: what is shared are the dictionaries that hold them.
    copy.__dict__ = {**module.__dict__, "training": False}
    copy.__dict__["_modules"] = {
        name: None if below is None else twin(below, int8=int8, made=made) for name, below in module._modules.items()
    }
    if isinstance(copy, _FastLinear):
        copy.__dict__["rounded"] = Int8Matrix.of(copy.weight) if int8 and Int8Matrix.fits(copy.weight) else None
    return copy  # type: ignore[return-value]


class _FastLinear(nn.Linear):
    """rounded: the weight in 8 bits, if it is to be used and there is one."""

    rounded: Int8Matrix | None

    def forward(self, input: Tensor) -> Tensor:
        if self.rounded is None or input.numel() > FEW_ROWS * input.shape[-1]:
            return linear(input, self.weight, self.bias)
        y = self.rounded.times(input)
        return y if self.bias is None else y + self.bias
