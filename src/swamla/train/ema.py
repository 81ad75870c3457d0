"""The moving average of the weights: exponential, or fitted to the length of the run."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.errors import CorruptError


def exponent(width: float) -> float:
    """The γ of an average of this width: the positive root of (γ + 1) / ((γ + 2)² (γ + 3)) = width²."""
    low, high = 0.0, 4 / width
    for _ in range(100):
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
        low, high = (middle, high) if wider else (low, middle)
    return low


class WeightAverage:
    """Averages the weights w_i after steps i = 1 … n: Σ decay^(n − i) · w_i / Σ decay^(n − i).

    The division removes the bias towards the initial weights. It is Adam's bias correction (arXiv 1412.6980, sec. 3),
    folded into the weight of the newest term. Averages are in fp32 and sharded like the weights. Buffers, such as a
    router's biases, are not averaged.

    With a `width` the weights are i^γ instead (power function EMA, arXiv 2312.02696, section 3.1): at any length of the
    run the average has the same shape, whose standard deviation is `width` of the run so far.
    """

    def __init__(self, model: nn.Module, decay: float = 0.0, *, width: float | None = None) -> None:
        self.decay = decay
        self._exponent = None if width is None else exponent(width)
        self._parameters = dict(model.named_parameters())
        self._averages = {name: shard.float().clone() for name, shard in self._shards().items()}
        # A tied weight is stored under all its names, so that reading a checkpoint does not depend on which are tied.
        own = {p: name for name, p in self._parameters.items()}
        self._names = {name: own[p] for name, p in model.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Add the current weights, those after update `count` (from 1); skipped steps do not count."""
        if self._exponent is None:
            newest = (1 - self.decay) / (1 - self.decay**count)
        else:
            newest = 1 - (1 - 1 / count) ** (self._exponent + 1)
        weights = [shard.float() for shard in self._shards().values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, newest)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model's weights are the averages; its own are restored even after an error."""
        with torch.no_grad():
            own = [shard.clone() for shard in self._shards().values()]
        try:
            self._write(self._averages.values())
            yield
        finally:
            self._write(own)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by name of the weight, sharded like the weights."""
        found = {}
        for name, p in self._parameters.items():
            average = self._averages[name]
            found[name] = distributed.as_sharded(average, p) if distributed.sharded(p) else average
        return {name: found[own] for name, own in self._names.items()}

    def load(self, tensors: Mapping[str, Tensor], *, origin: str) -> None:
        """Load what `tensors` returned. Raises `CorruptError` for other names or shapes."""
        expected = {name: average.shape for name, average in self.tensors().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise CorruptError(f"{origin}: the averaged weights do not fit the model")
        for name, average in self._averages.items():
            average.copy_(distributed.shard_like(tensors[name], self._parameters[name]))

    @torch.no_grad()
    def _write(self, tensors: Iterable[Tensor]) -> None:
        """Write into the weights in place, so that compiled graphs that refer to them see the change."""
        for shard, tensor in zip(self._shards().values(), tensors, strict=True):
            shard.copy_(tensor)

    def _shards(self) -> dict[str, Tensor]:
        """This rank's shards of the weights, which share their memory."""
        return {name: distributed.local(p.detach()) for name, p in self._parameters.items()}
