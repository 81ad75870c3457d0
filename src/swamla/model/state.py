"""What a model remembers between steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.model.mixers.mixer import State
from swamla.ops.layout import Layout


@dataclass
class ModelState:
    """What the model remembers of a batch of sequences: one state a layer, and how many tokens each row holds.

    held: that number where it is one for all rows, None where rows differ.  longest: the largest of those numbers.
    Both are known without asking the device, so only `advance`, and `GraphSteps` with `count`, may change `length_B`.
    """

    layers: list[State]
    length_B: Tensor
    max_len: int
    held: int | None = 0
    longest: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers, exactly what `accounting.state_bytes` predicts."""
        return sum(layer.nbytes for layer in self.layers)

    def following(self, tokens_BT: Tensor, valid_BT: Tensor | None) -> Layout:
        """The layout of new tokens behind those held; `valid_BT` marks what is not padding (None: there is none)."""
        batch, time = tokens_BT.shape
        if valid_BT is None and self.held is not None:
            return Layout.continuing_level(self.held, batch, time, device=tokens_BT.device)
        if valid_BT is None and time == 1:
            return Layout.one_more(self.length_B, self.longest + 1)
        if valid_BT is None:
            valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        return Layout.continuing(self.length_B, valid_BT)

    def advance(self, time: int, valid_BT: Tensor | None) -> None:
        """Count `time` new tokens a row, or those of them that are no padding."""
        if valid_BT is None:
            self.length_B += time
            self.count(time)
        else:
            self.length_B += valid_BT.sum(dim=1)
            lengths = self.length_B.tolist()
            self.longest = max(lengths)
            self.held = self.longest if min(lengths) == self.longest else None

    def count(self, time: int) -> None:
        """Note that every row has become longer by `time`; `length_B` says so already."""
        self.longest += time
        self.held = None if self.held is None else self.longest
