"""Where documents lie in a batch of packed rows: the one object that every mixer of a forward pass shares."""

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

PADDING = -1


class Layout:
    """Which document each token belongs to, and its position inside that document.

    Documents are contiguous: a change of id begins a new one, and so does every row. Tokens of one document never
    see another's. Padding has document -1: its outputs are finite and mean nothing.

    document_BT: integer ids.  position_BT: int64, 0 at each document's start.
    runs: (count, length) pairs covering the flattened B*T tokens in order; each stands for `count` consecutive
    documents of `length` tokens, so that equal neighbours can be computed as one batch.
    continues: the tokens follow those in a state, so that rows may start at different positions.
    padded: there may be padding.
    whole_rows: every row is one document, so that no mask but the causal one is needed.
    past: how many tokens every row's state holds, where all rows hold equally many and no new token is padding: the
    mixers then need no masks and no device synchronisation. None where rows differ or their lengths are unknown.
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
        self.whole_rows = runs == (self.shape,)  # stored: a compiled graph that reads it has no guard on `runs`
        self._tables: dict[Hashable, Any] = {}

    @classmethod
    def from_documents(cls, document_BT: Tensor) -> "Layout":
        """Derive positions and runs from document ids (B, T). Best called on the CPU, before moving to a device."""
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
        """The layout of unpacked rows: each row is one document, from its start."""
        zeros_BT = torch.zeros(batch, time, dtype=torch.int64, device=device)
        position_BT = torch.arange(time, device=device).expand(batch, time)
        return cls(zeros_BT, position_BT, ((batch, time),) if batch * time else (), padded=False)

    @classmethod
    def continuing(cls, length_B: Tensor, valid_BT: Tensor) -> "Layout":
        """The layout of new tokens (B, T) that follow the `length_B` tokens in a state.

        `valid_BT` is false for padding, which may stand only at the end of a row.
        """
        batch, time = valid_BT.shape
        position_BT = length_B[:, None] + torch.arange(time, device=valid_BT.device)
        document_BT = torch.where(valid_BT, 0, PADDING)
        return cls(document_BT, position_BT, ((batch, time),), continues=True)

    @classmethod
    def continuing_uniform(cls, past: int, batch: int, time: int, device: torch.device | str | None = None) -> "Layout":
        """`continuing`, where every row's state holds `past` tokens and no new token is padding."""
        position_BT = torch.arange(past, past + time, device=device).expand(batch, time)
        document_BT = torch.zeros(batch, time, dtype=torch.int64, device=device)
        whole = ((batch, time),)
        return cls(document_BT, position_BT, whole, continues=True, past=past, padded=False, end=past + time)

    @classmethod
    def one_more(cls, length_B: Tensor, end: int) -> "Layout":
        """The layout of one new token a row, after the row's `length_B` tokens, all of them fewer than `end`.

        No device synchronisation. `end` may be larger than necessary, so that steps of many lengths share one shape.
        """
        document_B1 = torch.zeros_like(length_B)[:, None]
        whole = ((len(length_B), 1),)
        return cls(document_B1, length_B[:, None], whole, continues=True, padded=False, end=end)

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
        """One past the largest position: the number of a state's tokens that these may attend to, themselves included.

        Synchronises with the device, unless the rows' lengths are known on the host.
        """
        if self._end is not None:
            return self._end
        return self.table("end", lambda: int(self.position_BT.max()) + 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest document, those before in a state included."""
        return self.end if self.continues else max((length for _, length in self.runs), default=0)

    @property
    def host_position_BT(self) -> Tensor:
        """position_BT on the CPU, computed on the host; not for a layout that continues."""
        if self.position_BT.device.type == "cpu":
            return self.position_BT
        positions = [torch.arange(length).repeat(count) for count, length in self.runs]
        return torch.cat(positions).view(self.shape)

    def table(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A mask or table derived from this layout, made at its first use and shared by all layers."""
        if key not in self._tables:
            # What is made in inference mode could not be saved for a backward pass, and may be asked for in one later.
            # The compiler cannot ask for the mode, and a layout made in a graph ends with it.
            leave = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if leave else nullcontext():
                self._tables[key] = make()
        return self._tables[key]

    def made(self, key: Hashable) -> Any:
        """What `table` has made for this key, or None."""
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
    return x.pin_memory().to(device, non_blocking=True)
