"""Decoding: steps of one new token a row, launched operation by operation or as a recorded CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from swamla.errors import MissingBackendError, UsageError
from swamla.ops.int8 import Int8Matrix
from swamla.ops.layout import Layout
from swamla.ops.linear import linear

if TYPE_CHECKING:
    from swamla.model.language_model import LanguageModel, ModelState

DECODINGS = ("eager", "graph", "int8")
FEW_ROWS = 16  # up to which 8-bit weights multiply faster than fp32 ones
SMALLEST = 256  # tokens that the first graph reads of a state; the next read twice as many each

Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]
"""Of work that launches the same kernels on the same tensors every time: what launches them again."""


class EagerSteps:
    """Steps that launch one operation after the other, on any device."""

    def __init__(self, model: "LanguageModel", state: "ModelState") -> None:
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

    def __init__(self, model: "LanguageModel", state: "ModelState", record: Record) -> None:
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


def steps_for(decoding: str, model: "LanguageModel", state: "ModelState") -> EagerSteps | GraphSteps:
    """The steps that a name means: "eager", and so "int8", which only concerns weights, or on CUDA "graph".

    UsageError for an unknown one, MissingBackendError for one that the model's device does not have.
    """
    device = model.device.type
    if decoding not in DECODINGS:
        raise UsageError(f"decoding = {decoding!r}: must be one of {', '.join(map(repr, DECODINGS))}")
    needed = {"graph": "cuda", "int8": "cpu"}.get(decoding, device)
    if needed != device:
        raise MissingBackendError(
            f'decoding = "{decoding}" is for {needed.upper()}, the model is on {device}: use "eager"'
        )
    if decoding != "graph":
        return EagerSteps(model, state)
    check_recordable(model)
    return GraphSteps(model, state, CudaGraphs())


def check_recordable(model: nn.Module) -> None:
    """Raises UsageError for experts that only a loop multiplies, which asks the device how many rows each has."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and parameter.dtype != torch.bfloat16:
            raise UsageError(
                f'decoding = "graph": {name} are experts in {parameter.dtype}, which CUDA multiplies without a graph '
                'only: use "eager", or the model in bfloat16'
            )


@contextmanager
def fast_linears(model: nn.Module, *, int8: bool = False) -> Iterator[None]:
    """While it lasts, linear layers on a CPU multiply by `ops.linear`, which knows no gradients but better kernels.

    int8: few rows are multiplied by weights rounded to 8 bits, made here; more, as of a prompt, by the weights
    themselves. Left as they are: layers of other kinds, e.g. those that train in fp8, experts, and weights that are no
    plain tensors, e.g. shares of sharded ones.
    """
    linears = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    plain = [layer for layer in linears if type(layer.weight) is nn.Parameter]
    layers = [layer for layer in plain if layer.weight.device.type == "cpu"]
    for layer in layers:
        rounded = Int8Matrix.of(layer.weight) if int8 and Int8Matrix.fits(layer.weight) else None
        layer.forward = partial(_multiply, layer, rounded)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _multiply(layer: nn.Linear, rounded: Int8Matrix | None, x: Tensor) -> Tensor:
    if rounded is None or x.numel() > FEW_ROWS * x.shape[-1]:
        return linear(x, layer.weight, layer.bias)
    y = rounded.times(x)
    return y if layer.bias is None else y + layer.bias
