"""The exponential moving average of the weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.errors import CorruptError


class WeightAverage:
    """After n steps Σ decay^(n − i) · weights_i / Σ decay^(n − i), over the weights after every step i = 1 … n.

    The division removes the bias towards the initial weights: it is Adam's bias correction (arXiv 1412.6980, sec. 3),
    folded into the weight of the newest term. Averages are kept in fp32, sharded as the weights are. Buffers, such as
    a router's biases, are not averaged but used as they are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._averages = {name: shard.float().clone() for name, shard in self._shards().items()}
        # All names of a tied weight, so that a checkpoint can be read without knowing which weights are tied.
        own = {p: name for name, p in self._parameters.items()}
        self._names = {name: own[p] for name, p in model.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take in the weights as they are after step `count` (from 1), skipped steps not counted."""
        newest = (1 - self.decay) / (1 - self.decay**count)
        weights = [shard.float() for shard in self._shards().values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, newest)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered the model's weights are the averages; its own are put back however the block ends."""
        with torch.no_grad():
            own = [shard.clone() for shard in self._shards().values()]
        try:
            self._write(self._averages.values())
            yield
        finally:
            self._write(own)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the names of the weights, sharded as these are."""
        found = {}
        for name, p in self._parameters.items():
            average = self._averages[name]
            found[name] = distributed.as_sharded(average, p) if distributed.sharded(p) else average
        return {name: found[own] for name, own in self._names.items()}

    def load(self, tensors: Mapping[str, Tensor], *, origin: str) -> None:
        """Take over what `tensors` gave. Raises `CorruptError` for other names or shapes."""
        expected = {name: average.shape for name, average in self.tensors().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise CorruptError(f"{origin}: the averaged weights do not fit the model")
        for name, average in self._averages.items():
            average.copy_(distributed.shard_like(tensors[name], self._parameters[name]))

    @torch.no_grad()
    def _write(self, tensors: Iterable[Tensor]) -> None:
        """Write into the weights in place, so that a compiled graph, which holds them, sees the change."""
        for shard, tensor in zip(self._shards().values(), tensors, strict=True):
            shard.copy_(tensor)

    def _shards(self) -> dict[str, Tensor]:
        """This process's shards of the weights, sharing their memory."""
        return {name: distributed.local(p.detach()) for name, p in self._parameters.items()}
