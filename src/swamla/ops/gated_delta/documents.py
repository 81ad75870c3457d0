"""What the chunked gated delta rule needs to know about documents, made once per forward pass for all layers."""

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.ops.layout import PADDING, Layout


class ChunkMasks(NamedTuple):
    """Which document each token of a chunk shares with what it could read from; zeros and ones, equal for all heads.

    same_NB1CC: a token (row) and one not after it (column) share a document.
    reads_NB1C1: a token's document is that of the state carried into its chunk.
    writes_NB1C1: it is that of the state carried out.
    keeps_NB111: those two are the same.
    """

    same_NB1CC: Tensor
    reads_NB1C1: Tensor
    writes_NB1C1: Tensor
    keeps_NB111: Tensor


@dataclass(frozen=True)
class Documents:
    """padding_BT: None when there can be none.  restart_BT and masks: None when each row is one document."""

    padding_BT: Tensor | None
    restart_BT: Tensor | None
    masks: ChunkMasks | None
    document_BT: Tensor | None

    def would_mix(self, result: Tensor) -> bool:
        """Whether a NaN or an infinity of one document (or of padding) may have reached others that share its row."""
        packed = self.masks is not None or self.padding_BT is not None
        return packed and result.device.type == "cpu" and not bool(result.sum().isfinite())

    def spans(self) -> list[tuple[slice, slice]]:
        """The row, as a slice, and the tokens of every document; of padding none."""
        assert self.document_BT is not None
        found = []
        for row, ids in enumerate(self.document_BT.tolist()):
            begin = 0
            for document, same in groupby(ids):
                end = begin + len(list(same))
                if document != PADDING:
                    found.append((slice(row, row + 1), slice(begin, end)))
                begin = end
        return found


def documents_of(seq: Layout | None, chunk: int) -> Documents:
    """The document tables of `seq` for one chunk length, shared through the layout by all layers."""
    if seq is None:
        return Documents(None, None, None, None)
    return seq.table(("gated_delta", chunk), partial(_make, seq, chunk))


def _make(seq: Layout, chunk: int) -> Documents:
    padding_BT = seq.document_BT == PADDING
    padding = padding_BT if seq.padded else None
    if seq.whole_rows:
        return Documents(padding, None, None, seq.document_BT)
    restart_BT = torch.zeros_like(padding_BT)
    restart_BT[:, 1:] = (seq.document_BT[:, 1:] != seq.document_BT[:, :-1]) & ~padding_BT[:, 1:]
    # Padding counts as the tail of what precedes it: it neither decays nor writes, so the state passes through.
    return Documents(padding, restart_BT, _masks(restart_BT.cumsum(dim=1), chunk), seq.document_BT)


def _masks(ordinal_BT: Tensor, chunk: int) -> ChunkMasks:
    """Masks from the running number of each token's document inside its row."""
    batch, time = ordinal_BT.shape
    padded_BT = F.pad(ordinal_BT[:, None].float(), (0, -time % chunk), mode="replicate")[:, 0]
    ordinal_NBC = padded_BT.view(batch, -1, chunk).transpose(0, 1)
    leaving_NB1 = ordinal_NBC[..., -1:]
    entering_NB1 = torch.cat([torch.zeros_like(leaving_NB1[:1]), leaving_NB1[:-1]])
    return ChunkMasks(
        same_NB1CC=(ordinal_NBC[..., :, None] == ordinal_NBC[..., None, :]).float().tril()[:, :, None],
        reads_NB1C1=(ordinal_NBC == entering_NB1)[:, :, None, :, None],
        writes_NB1C1=(ordinal_NBC == leaving_NB1)[:, :, None, :, None],
        keeps_NB111=(entering_NB1 == leaving_NB1)[:, :, None, :, None],
    )
