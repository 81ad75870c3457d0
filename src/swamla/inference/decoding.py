"""Generation: prefill of the prompts, then decoding of one token per row and step, with a preallocated state.

A decoding step launches its kernels one by one, replays a recorded CUDA graph (of compiled kernels if there is a
compiler), or uses weights rounded to 8 bits.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from swamla.errors import MissingBackendError, UsageError, require
from swamla.inference.sampling import Sampling
from swamla.ops.graphs import SHAPES
from swamla.ops.int8 import Int8Matrix
from swamla.ops.layout import Layout
from swamla.ops.linear import linear

DECODINGS = ("eager", "graph", "int8")
REQUIRED_DEVICE = {"graph": "cuda", "int8": "cpu"}  # of decodings that run on one device only
INT8_MAX_ROWS = 16  # with more rows, 8-bit weights are not faster than fp32
SMALLEST_GRAPH = 256  # cache slots that the first graph reads; each further graph reads twice as many
PREFILL_CHUNK = 4096  # prompt tokens of one prefill step, which bounds the memory of activations
ACCELERATOR_FACTOR = 16  # times PREFILL_CHUNK on a GPU
MASKED_CHUNK = 512  # tokens per row of a prefill step after the first row's end: bounds the mask to 512 × prompt length


class DecodingState(Protocol):
    """What a decoder needs of a model's state, see `swamla.model.ModelState`."""

    length_B: Tensor
    max_len: int
    longest: int

    def count(self, time: int) -> None:
        """Add `time` to the host's copies of the lengths."""


S = TypeVar("S", bound=DecodingState)


class Decodable(nn.Module, ABC, Generic[S]):
    """A model that a `Decoder` can run, and that generates by one. `swamla.model.LanguageModel` describes the members.

    It stands below the models, so that they inherit `generate` and decoding knows no model.
    """

    embedding: nn.Embedding
    known_ids: int | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the weights."""

    @abstractmethod
    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> S:
        """An empty state for `batch` sequences of at most `max_len` tokens."""

    @abstractmethod
    def step(self, tokens_BT: Tensor, state: S, valid_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of T >= 1 new tokens after those in `state`, which is updated."""

    @abstractmethod
    def step_hidden(self, tokens_BT: Tensor, state: S, valid_BT: Tensor | None = None) -> Tensor:
        """`step` up to the head's input (B, T, D)."""

    @abstractmethod
    def step_hidden_at(self, tokens_BT: Tensor, state: S, seq: Layout) -> Tensor:
        """`step_hidden` for a given layout: updates the layers' states but not the rows' lengths."""

    @abstractmethod
    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits (…, vocabulary) of what `step_hidden` returns."""

    @abstractmethod
    def check_recordable(self) -> None:
        """Raise `UsageError` if a CUDA graph cannot record a step."""

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int = 256,
        *,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        seed: int = Sampling.seed,
        stop_id: int | None = None,
    ) -> Tensor:
        """The ids that continue tokens (T,) or (B, T), without them: (N,) or (B, N), on the device of `tokens`.

            new = model.generate(tokens, 32, temperature=0.8)
            whole = torch.cat((tokens, new), dim=-1)

        N is `max_new_tokens`, or less if every row has ended: stop_id ends a row and fills the rest of it.
        temperature, top_k, top_p, seed: as in `Sampling`. The same seed gives the same ids. Decodes eagerly by a
        `Decoder`, which also takes rows of different lengths, CUDA graphs and 8-bit weights. Raises `UsageError` for
        anything but a tensor of ids, an id outside the vocabulary, or more tokens than learned positions.
        """
        require_ids(tokens, dims=(1, 2))
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        prompts = tokens.reshape(-1, tokens.shape[-1]).tolist()
        rows = Decoder(self).generate(prompts, max_new_tokens, sampling=sampling, stop_id=stop_id)
        longest = max(len(row) for row in rows)  # without a stop_id all rows are
        filled = [row + [stop_id or 0] * (longest - len(row)) for row in rows]
        new = torch.tensor(filled, dtype=torch.int64, device=tokens.device).view(len(rows), longest)
        return new[0] if tokens.ndim == 1 else new


SHAPES_OF_IDS = {1: "(time,)", 2: "(batch, time)"}


def require_ids(tokens: object, *, dims: tuple[int, ...]) -> None:
    """Raise `UsageError` unless `tokens` is an integer tensor with one of these numbers of dimensions, and not empty.

    Reads no id, so that it costs a GPU no synchronisation.
    """
    shapes = " or ".join(SHAPES_OF_IDS[n] for n in dims)
    if not isinstance(tokens, Tensor):
        raise UsageError(
            f"tokens are a {type(tokens).__name__}: must be a tensor of ids, {shapes}: torch.tensor(tokens); "
            "swamla.generate_text takes texts"
        )
    if tokens.ndim not in dims or not tokens.numel():
        raise UsageError(f"tokens have the shape {tuple(tokens.shape)}: must be {shapes}, one token at least")
    if tokens.dtype not in (torch.int32, torch.int64):
        raise UsageError(f"tokens are of {tokens.dtype}: must be of torch.int64")


class Decoder:
    """Generates with a model, by its own inference modules, which share the model's parameters.

    The model is not changed, so several decoders with different settings can use one model.

    decoding: how the tokens after the first are computed. "eager"; on CUDA "graph", which replays CUDA graphs of a step
    that is compiled first if Triton supports the GPU (see `description`); on a CPU "int8", for at most 16 prompts.
    There the decoder rounds the weights of linear layers to 8 bits when it is made, which is faster but not the same
    function. Not rounded are routed experts, weights whose rows are not a multiple of 16 elements, and the weights that
    latent attention absorbs into queries and outputs.
    Raises `UsageError` for an unknown decoding and for experts that a graph cannot record, `MissingBackendError` for a
    decoding that the model's device does not support.
    """

    def __init__(self, model: Decodable[Any], decoding: str = "eager") -> None:
        device = model.device.type
        if decoding not in DECODINGS:
            raise UsageError(f"decoding = {decoding!r}: must be one of {', '.join(map(repr, DECODINGS))}")
        if decoding not in decodings_on(device):
            raise MissingBackendError(
                f'decoding = "{decoding}" is for {REQUIRED_DEVICE[decoding].upper()}, the model is on {device}: '
                'use "eager"'
            )
        if decoding == "graph":
            model.check_recordable()
        self.decoding = decoding
        self.compiled = decoding == "graph" and has_compiler()
        self.model = inference_copy(model)  # for prefill, without rounding
        self.stepping = inference_copy(model, int8=True) if decoding == "int8" else self.model

    @property
    def description(self) -> str:
        """The decoding, for people; of "graph" also whether the step that is recorded is a compiled one."""
        if self.decoding != "graph":
            return self.decoding
        return "graph, compiled" if self.compiled else "graph, uncompiled: no triton for this GPU"

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop_id: int | None = None,
        known_ids: int | None = None,
        context: int | None = None,
        on_token: Callable[[int, int], object] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt (token ids, length >= 1) by at most `max_new_tokens`; returns the new tokens only.

        stop_id: ends a row and is not returned.  known_ids: this and larger ids are never sampled; by default
        the model's `known_ids`.  on_token(row, token): called as soon as a token is sampled; if it returns True, the
        row ends after it.
        context: as in nanoGPT, a row of more tokens is read from its last `context` ones alone, as a document of its
        own. Once a row is longer, each further token costs a prefill, which is neither recorded nor rounded.
        A row's logits equal those of the prompt in a batch of its own up to rounding: the order of sums in fp32, about
        a percent with "int8", whose activations are bf16. Greedy text may differ where two tokens are that close.
        Raises `UsageError` for an empty prompt, an id outside the vocabulary, more tokens than learned positions, or
        more prompts than "int8" supports.
        """
        sampling = sampling or Sampling()
        prompts = _checked(self.model, prompts, max_new_tokens)
        require(context is None or context > 0, "context", context, "must be > 0, or None for all tokens")
        known_ids = self.model.known_ids if known_ids is None else known_ids
        produced: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        generators = sampling.generators(len(prompts))
        longest = max(len(prompt) for prompt in prompts)
        size = longest + max_new_tokens - 1  # the last token is not fed back
        size = size if context is None else min(size, context)
        seen = [list(prompt) for prompt in prompts]
        state = self.model.init_state(len(prompts), size)
        step = self.steps(state)
        logits_BV = prefill(self.model, [tokens[-size:] for tokens in seen], state)
        for count in range(1, max_new_tokens + 1):
            chosen = sampling.choose(logits_BV[:, :known_ids], generators)
            for row, token in enumerate(chosen):
                done[row] = done[row] or token == stop_id
                if not done[row]:
                    produced[row].append(token)
                    if on_token:
                        done[row] = on_token(row, token) is True
            if all(done) or count == max_new_tokens:
                break
            for tokens, token in zip(seen, chosen, strict=True):
                tokens.append(token)
            logits_BV = step(chosen) if longest + count <= size else self._read_anew(seen, size)
        return produced

    def _read_anew(self, seen: Sequence[Sequence[int]], size: int) -> Tensor:
        """Logits (B, V) after the last `size` tokens of each row, at new positions: keys hold their old ones."""
        state = self.model.init_state(len(seen), size)
        return prefill(self.model, [tokens[-size:] for tokens in seen], state)

    def steps(self, state: DecodingState) -> "EagerSteps | GraphSteps":
        """A function that appends one token, given by its id, to each row of `state` and returns logits (B, V).

        Raises `UsageError` for more rows than "int8" supports.
        """
        rows = len(state.length_B)
        if self.decoding == "int8" and rows > INT8_MAX_ROWS:
            raise UsageError(
                f'decoding = "int8" is for at most {INT8_MAX_ROWS} prompts at once, not {rows}: use "eager"'
            )
        if self.decoding == "graph":
            return GraphSteps(self.stepping, state, CudaGraphs(), compiled_step() if self.compiled else one_step)
        return EagerSteps(self.stepping, state)


def prefill(model: Decodable[Any], prompts: Sequence[Sequence[int]], state: DecodingState) -> Tensor:
    """Prefill an empty state with prompts of any lengths; returns the logits (B, V) of each prompt's last token."""
    device = model.device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths_B.max())
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    tokens_BT = tokens_BT.to(device)
    valid_BT = torch.arange(longest, device=device) < lengths_B[:, None]
    last_BD = torch.zeros(
        len(prompts), model.embedding.embedding_dim, dtype=model.embedding.weight.dtype, device=device
    )
    at_once = PREFILL_CHUNK * (1 if device.type == "cpu" else ACCELERATOR_FACTOR)
    for begin, end in prompt_chunks(int(lengths_B.min()), longest, max(1, at_once // len(prompts))):
        x_BTD = model.step_hidden(tokens_BT[:, begin:end], state, valid_BT[:, begin:end])
        index_B = lengths_B - 1 - begin
        ends_here_B = (index_B >= 0) & (index_B < x_BTD.shape[1])
        found_BD = x_BTD[torch.arange(len(prompts), device=device), index_B.clamp(0, x_BTD.shape[1] - 1)]
        last_BD = torch.where(ends_here_B[:, None], found_BD, last_BD)
    return model.logits(last_BD)


def decodings_on(device: str) -> tuple[str, ...]:
    """The decodings that a device type supports: ("eager", "int8") on "cpu"."""
    return tuple(name for name in DECODINGS if REQUIRED_DEVICE.get(name, device) == device)


def prompt_chunks(shortest: int, longest: int, large: int) -> Iterator[tuple[int, int]]:
    """Chunks (begin, end) of prefill: large until the shortest prompt ends, then small, because they need masks."""
    for begin in range(0, shortest, large):
        yield begin, min(begin + large, shortest)
    small = min(large, MASKED_CHUNK)
    for begin in range(shortest, longest, small):
        yield begin, min(begin + small, longest)


def _checked(model: Decodable[Any], prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Sequence[Sequence[int]]:
    """The prompts as lists of ints, from any sequence and integer types. Raises `UsageError` as `generate` does."""
    if not all(hasattr(prompt, "__len__") for prompt in prompts) or (isinstance(prompts, Tensor) and prompts.ndim != 2):
        raise UsageError(f"prompts are {prompts!r:.60}: must be a sequence of prompts, each a sequence of token ids")
    if len(prompts) == 0 or not all(len(prompt) for prompt in prompts):
        raise UsageError("a prompt is empty: give at least one token (the document start token stands for nothing)")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens = {max_new_tokens}: must be >= 1")
    vocabulary, found = model.embedding.num_embeddings, []
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
Step = Callable[[Decodable[Any], Tensor, DecodingState, int], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]
"""Records the kernels that a function launches. The returned function launches them again on the same tensors."""


class EagerSteps:
    """Decoding steps that launch kernels one by one, on any device."""

    def __init__(self, model: Decodable[Any], state: DecodingState) -> None:
        self.model, self.state = model, state

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token in each row."""
        tokens_B1 = torch.tensor(chosen, device=self.model.device)[:, None]
        return self.model.step(tokens_B1, self.state)[:, -1]


class GraphSteps:
    """Decoding steps recorded as CUDA graphs, which removes the host's cost of launching each kernel.

    A graph has fixed shapes. It reads each row's position on the device, and a power of two of cache slots, of which
    those after a row's end are masked: there is one graph per size. The first step of a size is not recorded, because
    libraries initialise themselves on first use and the step is compiled then; the second is. Each step overwrites the
    last step's logits.
    """

    def __init__(self, model: Decodable[Any], state: DecodingState, record: Record, step: Step | None = None) -> None:
        self.model, self.state, self.record, self.step = model, state, record, step or one_step
        self.tokens_B1 = torch.zeros(len(state.length_B), 1, dtype=torch.int64, device=model.device)
        self.replays: dict[int, Replay | None] = {}

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token in each row. Raises `UsageError` when the state is full."""
        needed = self.state.longest + 1
        if needed > self.state.max_len:
            raise UsageError(f"{needed} tokens do not fit a state made for {self.state.max_len}")
        self.tokens_B1.copy_(torch.tensor(chosen)[:, None])
        size = graph_size(needed, self.state.max_len)
        step = partial(self.step, self.model, self.tokens_B1, self.state, size)
        if size not in self.replays:
            self.replays[size] = None
            logits_BV = step()
        else:
            replay = self.replays[size] or self.record(step)
            self.replays[size] = replay
            logits_BV = replay()
        self.state.count(1)
        return logits_BV


def one_step(model: Decodable[Any], tokens_B1: Tensor, state: DecodingState, size: int) -> Tensor:
    """Logits (B, V) after one more token in each row, of states that hold fewer than `size`.

    Without a device synchronisation and without numbers from the host that change, but for `size`. The host's copies of
    the lengths are left to the caller.
    """
    seq = Layout.one_more(state.length_B, size)
    x_B1D = model.step_hidden_at(tokens_B1, state, seq)
    state.length_B += 1
    return model.logits(x_B1D)[:, -1]


@cache
def compiled_step(backend: str = "inductor") -> Step:
    """`one_step` as one graph of the compiler, without CUDA graphs of its own.

    It is compiled at its first call, again for the first other size, state or batch, and from then on serves all of
    them, except that one row and several are compiled apart. Ops that the compiler cannot hold run between graphs.
    """
    import torch.compiler.config as config  # loads the compiler

    config.recompile_limit = max(config.recompile_limit, SHAPES)
    return torch.compile(one_step, backend=backend)


def has_compiler() -> bool:
    """Whether a step can be compiled for this GPU: by Triton, which has to be installed and to know it."""
    from torch.utils._triton import has_triton  # loads the compiler

    return bool(has_triton())


def graph_size(needed: int, max_len: int) -> int:
    """The number of slots a graph reads when `needed` are filled: the next power of two, at most `max_len`."""
    size = SMALLEST_GRAPH
    while size < needed:
        size *= 2
    return min(size, max_len)


class CudaGraphs:
    """Records CUDA graphs that share memory, because only one runs at a time. Not run on a GPU."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        """Record `step` without running it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def inference_copy(module: M, *, int8: bool = False, made: dict[int, Any] | None = None) -> M:
    """A copy of the module tree for inference: in evaluation mode, with the same parameters, buffers and hooks.

    Linear layers on a CPU use `ops.linear`, which has faster kernels but no gradients. With int8 they multiply few rows
    by weights that are rounded to 8 bits here. Other layers are copied unchanged: experts, fp8 layers, and linear
    layers whose weights are not plain tensors, e.g. sharded ones. Compiled code is not copied.
    """
    made = {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    fast = type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu"
    copy = made[id(module)] = object.__new__(_FastLinear if fast else type(module))
    # Share the dictionaries, not the parameters in them: a wrapper (FSDP) may replace these.
    copy.__dict__ = {**module.__dict__, "training": False}
    copy.__dict__["_modules"] = {
        name: None if child is None else inference_copy(child, int8=int8, made=made)
        for name, child in module._modules.items()
    }
    if isinstance(copy, _FastLinear):
        copy.__dict__["rounded"] = Int8Matrix.of(copy.weight) if int8 and Int8Matrix.fits(copy.weight) else None
    return copy  # type: ignore[return-value]


class _FastLinear(nn.Linear):
    """A linear layer by `ops.linear`. rounded: the weight in int8, used for few rows; None for no rounding."""

    rounded: Int8Matrix | None

    def forward(self, input: Tensor) -> Tensor:
        if self.rounded is None or input.numel() > INT8_MAX_ROWS * input.shape[-1]:
            return linear(input, self.weight, self.bias)
        y = self.rounded.times(input)
        return y if self.bias is None else y + self.bias
