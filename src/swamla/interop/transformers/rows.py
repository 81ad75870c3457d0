"""The rows of a call of transformers: where its padding is, and which documents it has."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.errors import UsageError
from swamla.model.language_model import NO_LABEL
from swamla.ops.layout import PADDING, Layout


class Rows:
    """Where the tokens of a batch are: padding is left out, and documents are found.

    valid_BT: True for tokens where they stand together, at the row's start; None without padding.
    """

    def __init__(
        self, shape: tuple[int, int], device: torch.device, mask_BT: Tensor | None, document_BT: Tensor | None
    ) -> None:
        self.shape, self.device, self.mask_BT = shape, device, mask_BT
        self.valid_BT: Tensor | None = None
        if mask_BT is not None:
            self.order_BT = (~mask_BT).to(torch.int8).argsort(dim=1, stable=True)
            self.back_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
            self.valid_BT = mask_BT.gather(1, self.order_BT)
        self.document_BT = document_BT

    @classmethod
    def of(
        cls,
        x_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seq_lens: Tensor | None,
        *,
        past: int | None,
    ) -> "Rows":
        """The rows that a call describes. past: columns of its cache, None without one.

        Raises `UsageError` for shapes and positions that do not fit.
        """
        batch, time = x_BTD.shape[:2]
        rows = cls((batch, time), x_BTD.device, _new_mask(attention_mask, (batch, time), past or 0), None)
        if cu_seq_lens is not None:
            ends = cu_seq_lens[1:].to(x_BTD.device)
            if batch != 1 or int(ends[-1]) != time:
                raise UsageError(
                    f"cu_seq_lens_q end at {int(ends[-1])}: must be for one row, and end at its {time} tokens"
                )
            index_T = torch.arange(time, device=x_BTD.device)
            rows.document_BT = torch.bucketize(index_T, ends, right=True)[None]
        elif position_ids is not None and not (past and time == 1):  # the next token's position is known
            rows.document_BT = rows._documents(position_ids, continues=bool(past))
        if past is not None and rows.document_BT is not None:
            raise UsageError("several documents in a row cannot be continued: give each a row, or use_cache=False")
        return rows

    def _documents(self, position_ids: Tensor, *, continues: bool) -> Tensor | None:
        """The document of each token, None for one per row."""
        if position_ids.ndim != 2 or position_ids.shape[1] != self.shape[1]:
            shape = tuple(position_ids.shape)
            raise UsageError(f"position_ids.shape = {shape}: must be (batch, time), here {self.shape}")
        position_BT = self.together(position_ids.to(self.device).expand(self.shape))
        jump_BT = F.pad(position_BT.diff(dim=1) != 1, (1, 0), value=not continues)
        start_BT = jump_BT & (position_BT == 0)
        if self.valid_BT is None and bool((jump_BT != start_BT).any()):
            wrong = int(position_BT[jump_BT & ~start_BT][0])
            raise UsageError(f"position_ids jump to {wrong}: must go up by 1, or back to 0 where a document begins")
        # Beside padding other jumps mean nothing: `generate` counts on from what stands at padding.
        start_BT[:, 0] = True
        document_BT = (start_BT if self.valid_BT is None else start_BT & self.valid_BT).cumsum(dim=1)
        return document_BT if bool((document_BT > 1).any()) else None

    def together(self, x_BT: Tensor) -> Tensor:
        """(B, T, …) with the tokens of each row at its start."""
        return x_BT if self.valid_BT is None else _gathered(x_BT, self.order_BT)

    def apart(self, x_BT: Tensor) -> Tensor:
        """(B, T, …) with each token's at its place; at padding, that of the last token before it."""
        return x_BT if self.valid_BT is None else _gathered(x_BT, self.back_BT)

    def predicted(self, labels: Tensor | None, shift_labels: Tensor | None, **others: Any) -> dict[str, Any]:
        """`shift_labels`, made of `labels` if need be, without those that padding would predict; and the others."""
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[..., 1:], (0, 1), value=NO_LABEL)
        if shift_labels is not None and self.mask_BT is not None:
            shift_labels = shift_labels.masked_fill(~self.mask_BT.to(shift_labels.device), NO_LABEL)
        return {"labels": labels, "shift_labels": shift_labels, **others}

    def layout(self) -> Layout:
        """The layout of rows that stand together."""
        if self.valid_BT is None and self.document_BT is None:
            return Layout.one_document_per_row(*self.shape, device=self.device)
        zeros_BT = torch.zeros(self.shape, dtype=torch.int64, device=self.device)
        document_BT = zeros_BT if self.document_BT is None else self.document_BT
        if self.valid_BT is not None:
            document_BT = document_BT.where(self.valid_BT, PADDING)
        return Layout.from_documents(document_BT.cpu()).to(self.device)


def _new_mask(mask: Tensor | None, shape: tuple[int, int], past: int) -> Tensor | None:
    """The mask (B, T) of the new tokens, None if none is padding. Raises `UsageError` for another shape."""
    if mask is None:
        return None
    batch, time = shape
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (time, past + time):
        allowed = f"(batch, time), here {(batch, time)}" + (f" or {(batch, past + time)}" if past else "")
        raise UsageError(f"attention_mask.shape = {tuple(mask.shape)}: must be {allowed}")
    mask_BT = mask[:, -time:].bool()
    return None if bool(mask_BT.all()) else mask_BT


def _gathered(x_BT: Tensor, index_BT: Tensor) -> Tensor:
    row_B1 = torch.arange(x_BT.shape[0], device=x_BT.device)[:, None]
    return x_BT[row_B1, index_BT.to(x_BT.device)]
