"""Decoding: steps of one new token a row, launched operation by operation or as a recorded CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
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
NEEDED = {"graph": "cuda", "int8": "cpu"}  # the kind of device that one needs, if it does not run on any
FEW_ROWS = 16  # up to which 8-bit weights multiply faster than fp32 ones
SMALLEST = 256  # tokens that the first graph reads of a state; the next read twice as many each
_CHANGING = Lock()  # held while layers are changed, so that nobody finds some of them

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


def decodings_on(device: str) -> tuple[str, ...]:
    """Those of `DECODINGS` that a kind of device has: ("eager", "int8") on "cpu"."""
    return tuple(name for name in DECODINGS if NEEDED.get(name, device) == device)


def steps_for(decoding: str, model: "LanguageModel", state: "ModelState") -> EagerSteps | GraphSteps:
    """The steps that a name means: "eager", and so "int8", which only concerns weights, or on CUDA "graph".

    UsageError for an unknown one, or more rows than it is for; MissingBackendError for one that the model's device does
    not have.
    """
    device = model.device.type
    if decoding not in DECODINGS:
        raise UsageError(f"decoding = {decoding!r}: must be one of {', '.join(map(repr, DECODINGS))}")
    if decoding not in decodings_on(device):
        raise MissingBackendError(
            f'decoding = "{decoding}" is for {NEEDED[decoding].upper()}, the model is on {device}: use "eager"'
        )
    rows = len(state.length_B)
    if decoding == "int8" and rows > FEW_ROWS:
        raise UsageError(f'decoding = "int8" is for at most {FEW_ROWS} prompts at once, not {rows}: use "eager"')
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

    int8: few rows are multiplied by weights rounded to 8 bits, made here; more, by the weights themselves. Left as
    they are: layers of other kinds, e.g. those that train in fp8, experts, and weights that are no plain tensors, e.g.
    shares of sharded ones. UsageError where the model is in such use already and one of the two is int8.
    """
    mine: list[_Product] = []
    try:
        with _CHANGING:
            mine = _products(model, int8)  # all of them before the first layer changes, as this can fail
            for product in mine:
                product.layer.forward = product  # type: ignore[method-assign]
        yield
    finally:
        for product in mine:
            vars(product.layer).pop("forward", None)


@dataclass(frozen=True, eq=False)
class _Product:
    """Stands in for a linear layer's `forward`. rounded: its weight in 8 bits, if it is to be used and there is one."""

    layer: nn.Linear
    int8: bool
    rounded: Int8Matrix | None

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.layer
        if self.rounded is None or input.numel() > FEW_ROWS * input.shape[-1]:
            return linear(input, layer.weight, layer.bias)
        y = self.rounded.times(input)
        return y if layer.bias is None else y + layer.bias


def _products(model: nn.Module, int8: bool) -> list[_Product]:
    """Those of the layers that have none yet."""
    linears = [layer for layer in model.modules() if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter]
    layers = [layer for layer in linears if layer.weight.device.type == "cpu"]
    others = [found for layer in layers if isinstance(found := vars(layer).get("forward"), _Product)]
    if others and (int8 or any(other.int8 for other in others)):
        raise UsageError(
            "the model is generating already, and with weights of 8 bits it serves one use at a time: "
            "wait for the other to end, or load the model twice"
        )
    return [
        _Product(layer, int8, Int8Matrix.of(layer.weight) if int8 and Int8Matrix.fits(layer.weight) else None)
        for layer in layers
        if "forward" not in vars(layer)
    ]
