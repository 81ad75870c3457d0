"""The layout of documents in a batch of packed rows: one object per forward pass, shared by all layers."""

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

PADDING = -1


class Layout:
    """The document of each token, and its position inside that document.

    A document is contiguous: a new one begins where the id changes, and at the start of every row. Tokens attend only
    to tokens of their own document. Padding has document -1; its outputs are finite and undefined.

    document_BT: integer ids.  position_BT: int64, 0 at each document's start.
    runs: (count, length) pairs that cover the flattened B*T tokens in order. Each stands for `count` consecutive
        documents of `length` tokens, which can be computed as one batch.
    continues: whether the tokens follow those in a state, so that rows may start at different positions.
    padded: whether there may be padding.
    whole_rows: whether every row is one document, so that the causal mask suffices.
    past: the number of tokens in every row's state, if it is the same for all rows and no new token is padding; the
        mixers then need neither masks nor a device synchronisation. None if rows differ or their lengths are unknown.
    """

    def __init__(
        self,
        document_BT: Tensor,
        position_BT: Tensor,
        runs: tuple[tuple[int, int], ...],
        *,
        continues: bool = False,
        past: int | None = None,
        padded: bool = True,
        end: int | None = None,
    ) -> None:
        self.document_BT = document_BT
        self.position_BT = position_BT
        self.runs = runs
        self.continues = continues
        self.past = past
        self.padded = padded
        self._end = end
        self.whole_rows = runs == (self.shape,)  # stored, so that a compiled graph guards on it and not on `runs`
        self._tables: dict[Hashable, Any] = {}

    @classmethod
    def from_documents(cls, document_BT: Tensor) -> "Layout":
        """Derive positions and runs from document ids (B, T); call it on the CPU, as it reads the ids back."""
        batch, time = document_BT.shape
        start_BT = torch.ones_like(document_BT, dtype=torch.bool)
        start_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
        index_T = torch.arange(time, device=document_BT.device)
        begin_BT = torch.where(start_BT, index_T, 0).cummax(dim=1).values
        starts = start_BT.flatten().nonzero().flatten().tolist()
        lengths = [end - begin for begin, end in pairwise([*starts, batch * time])]
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        return cls(document_BT, index_T - begin_BT, runs, padded=bool((document_BT == PADDING).any()))

    @classmethod
    def one_document_per_row(cls, batch: int, time: int, device: torch.device | str | None = None) -> "Layout":
        """The layout of unpacked rows, each one document from its start."""
        zeros_BT = torch.zeros(batch, time, dtype=torch.int64, device=device)
        position_BT = torch.arange(time, device=device).expand(batch, time)
        return cls(zeros_BT, position_BT, ((batch, time),) if batch * time else (), padded=False)

    @classmethod
    def continuing(cls, length_B: Tensor, valid_BT: Tensor) -> "Layout":
        """The layout of new tokens (B, T) that follow the `length_B` tokens in a state.

        valid_BT: False for padding, which is allowed only at the end of a row.
        """
        batch, time = valid_BT.shape
        position_BT = length_B[:, None] + torch.arange(time, device=valid_BT.device)
        document_BT = torch.where(valid_BT, 0, PADDING)
        return cls(document_BT, position_BT, ((batch, time),), continues=True)

    @classmethod
    def continuing_uniform(cls, past: int, batch: int, time: int, device: torch.device | str | None = None) -> "Layout":
        """`continuing` where every row's state has `past` tokens and no new token is padding."""
        position_BT = torch.arange(past, past + time, device=device).expand(batch, time)
        document_BT = torch.zeros(batch, time, dtype=torch.int64, device=device)
        whole = ((batch, time),)
        return cls(document_BT, position_BT, whole, continues=True, past=past, padded=False, end=past + time)

    @classmethod
    def one_more(cls, length_B: Tensor, end: int) -> "Layout":
        """The layout of one new token per row, after the row's `length_B` tokens, each less than `end`.

        No device synchronisation. `end` may be larger than necessary, so that steps of several lengths share one shape.
        """
        document_B1 = torch.zeros_like(length_B)[:, None]
        whole = ((len(length_B), 1),)
        return cls(document_B1, length_B[:, None], whole, continues=True, padded=False, end=end)

    @classmethod
    def some_more(cls, length_B: Tensor, time: int, end: int) -> "Layout":
        """`one_more` for `time` new tokens per row, none of them padding."""
        position_BT = length_B[:, None] + torch.arange(time, device=length_B.device)
        whole = ((length_B.shape[0], time),)
        return cls(torch.zeros_like(position_BT), position_BT, whole, continues=True, padded=False, end=end)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.document_BT.shape[0], self.document_BT.shape[1]

    @property
    def real_BT(self) -> Tensor:
        """True for tokens, False for padding."""
        return self.document_BT != PADDING

    @property
    def end(self) -> int:
        """One past the largest position: how many of a state's slots the tokens may attend to, their own included.

        Synchronises with the device, unless the rows' lengths are known on the host.
        """
        if self._end is not None:
            return self._end
        return self.table("end", lambda: int(self.position_BT.max()) + 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest document, including those in the state."""
        return self.end if self.continues else max((length for _, length in self.runs), default=0)

    @property
    def host_position_BT(self) -> Tensor:
        """position_BT on the CPU, from `runs`: no device synchronisation; not for a layout that continues."""
        if self.position_BT.device.type == "cpu":
            return self.position_BT
        positions = [torch.arange(length, device="cpu").repeat(count) for count, length in self.runs]
        return torch.cat(positions).view(self.shape)

    def table(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A mask or table derived from this layout, built at its first use and shared by all layers."""
        if key not in self._tables:
            # A tensor made in inference mode cannot be saved for a backward pass, which may use this table later. The
            # compiler cannot ask for the mode; a layout built within a graph does not outlive it.
            leave = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if leave else nullcontext():
                self._tables[key] = make()
        return self._tables[key]

    def made(self, key: Hashable) -> Any:
        """The table of this key, None if it has not been built."""
        return self._tables.get(key)

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout with its tensors on `device`."""
        document_BT, position_BT = _sent(self.document_BT, device), _sent(self.position_BT, device)
        return Layout(
            document_BT,
            position_BT,
            self.runs,
            continues=self.continues,
            past=self.past,
            padded=self.padded,
            end=self._end,
        )


def _sent(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`; to a GPU from pinned memory, since a copy from any other waits for all that the GPU has to do."""
    if x.device.type != "cpu" or torch.device(device).type != "cuda":
        return x.to(device)
    # Dense first: pinning keeps the strides, and cannot write to a tensor that `expand` made.
    return x.contiguous().pin_memory().to(device, non_blocking=True)
