"""The decoding state of a model: one mixer state per layer, and the lengths of the sequences."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swamla.model.mixers.mixer import State
from swamla.model.ngrams import NgramState
from swamla.ops.layout import Layout


@dataclass
class ModelState:
    """The state of a batch of sequences: one mixer state per layer, last ids for n-grams, each row's length in tokens.

    uniform_length: the length of all rows, None if rows differ.  longest: the largest length.
    Both are copies of `length_B` on the host, which avoid a device synchronisation. So only `advance`, and `GraphSteps`
    together with `count`, may change `length_B`.
    """

    layers: list[State]
    length_B: Tensor
    max_len: int
    uniform_length: int | None = 0
    longest: int = 0
    ngrams: NgramState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the layers and of the last ids that n-gram embeddings need, equal to `accounting.state_bytes`."""
        return sum(layer.nbytes for layer in self.layers) + (self.ngrams.nbytes if self.ngrams else 0)

    def tensors(self) -> list[Tensor]:
        """The live tensors of all layers and of the embedding."""
        return [tensor for part in (*self.layers, self.ngrams) if part is not None for tensor in part.tensors()]

    def snapshot(self) -> "ModelState":
        """A copy that later steps do not change."""
        return self._map(Tensor.clone)

    def select(self, rows_N: Tensor) -> "ModelState":
        """A copy of the rows of these indices, in their order and as often as they are named: beams, or a batch cut.

        The indices may be on the host.
        """
        rows_N = rows_N.to(self.length_B.device)
        return self._map(lambda tensor: tensor.index_select(0, rows_N))._with_counted_lengths(self.uniform_length)

    def first(self, rows: int) -> "ModelState":
        """The first rows, whose tensors are shared: its steps change this state too, but for the copies of lengths."""
        return self._map(lambda tensor: tensor[:rows])._with_counted_lengths(None)

    def copy_row(self, row: int, source: "ModelState", source_row: int = 0) -> None:
        """Overwrite a row by one of another state of the same model, with as many of its tokens as have room here.

        The copies of lengths are left: `first` reads them anew.
        """
        for new, old in zip(self.tensors(), source.tensors(), strict=True):
            common = tuple(slice(min(sizes)) for sizes in zip(new.shape[1:], old.shape[1:], strict=True))
            if new.shape[1:] != old.shape[1:]:
                new[row] = 0  # not what the last sequence left there: masks cannot hide its NaN
            new[row][common] = old[source_row][common]
        self.length_B[row] = source.length_B[source_row]

    def grow(self, larger: "ModelState") -> None:
        """Take the room of a state for more tokens, as `LanguageModel.grow` does; its tensors are not read."""
        for layer, room in zip(self.layers, larger.layers, strict=True):
            layer.grow(room)
        self.max_len = larger.max_len

    def _map(self, function: Callable[[Tensor], Tensor]) -> "ModelState":
        return replace(
            self,
            layers=[layer.map(function) for layer in self.layers],
            length_B=function(self.length_B),
            ngrams=self.ngrams and self.ngrams.map(function),
        )

    def _with_counted_lengths(self, uniform_length: int | None) -> "ModelState":
        """Itself, with the host's copies of its lengths. uniform_length: that of all rows if it is known already."""
        lengths = self.length_B.tolist() if uniform_length is None else [uniform_length]
        self.longest = max(lengths, default=0)
        self.uniform_length = self.longest if min(lengths, default=0) == self.longest else None
        return self

    def next_layout(self, tokens_BT: Tensor, valid_BT: Tensor | None) -> Layout:
        """The layout of new tokens after those in the state. valid_BT: False for padding, None for no padding."""
        batch, time = tokens_BT.shape
        if valid_BT is None and self.uniform_length is not None:
            return Layout.continuing_uniform(self.uniform_length, batch, time, device=tokens_BT.device)
        if valid_BT is None and time == 1:
            return Layout.one_more(self.length_B, self.longest + 1)
        if valid_BT is None:
            valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        return Layout.continuing(self.length_B, valid_BT)

    def advance(self, time: int, valid_BT: Tensor | None) -> None:
        """Add `time` new tokens to every row, or only those that are not padding."""
        if valid_BT is None:
            self.length_B += time
            self.count(time)
        else:
            self.length_B += valid_BT.sum(dim=1)
            self._with_counted_lengths(None)

    def count(self, time: int) -> None:
        """Add `time` to the host's copies of the lengths, where `length_B` has been updated already."""
        self.longest += time
        self.uniform_length = None if self.uniform_length is None else self.longest
