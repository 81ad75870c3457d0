"""Hashed embeddings of the last tokens: what an n-gram model knows, as vectors (arXiv 2412.09871, section 3.2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.model.initial import Initializer, constant
from swamla.model.mixers.mixer import State
from swamla.ops.layout import Layout

# A polynomial in the ids modulo a prime (Carter and Wegman, 1979). Ids and keys are below 2^31, products below 2^62.
PRIME = 2**31 - 1
MULTIPLIER = 1_103_515_245


def bucket_of(ids: Sequence[Tensor], buckets: int) -> Tensor:
    """The bucket, 0 … buckets − 1, of every n-gram. ids: n tensors of one shape, int64, the oldest token's first."""
    key = ids[0]
    for later in ids[1:]:
        key = (key * MULTIPLIER + later) % PRIME
    return key % buckets


@dataclass
class NgramState(State):
    """The last ids of each sequence plus 1, oldest first, (B, N − 1) for n up to N; 0 where there was no token yet."""

    id_BN: Tensor


class NgramEmbedding(nn.Module):
    """Σ_n E_n[hash(the last n tokens)] for n = 1, 2, …; the place before a document counts as an id of its own.

    buckets: rows of E_1, E_2, …; 0 leaves one out. N-grams that share a bucket share its vector. All begin at 0, so
    that a new model is the one without them.
    """

    def __init__(self, buckets: Sequence[int], width: int) -> None:
        super().__init__()
        self.past = len(buckets) - 1
        self.tables = nn.ModuleDict({f"{n}": nn.Embedding(size, width) for n, size in enumerate(buckets, 1) if size})

    def initializers(self) -> dict[str, Initializer]:
        """Initializers by the parameters' names."""
        return {f"tables.{n}.weight": constant(0.0) for n in self.tables}

    def forward(self, tokens_BT: Tensor, seq: Layout) -> Tensor:
        """The embeddings' sum (B, T, D) for whole documents."""
        return self._sum(F.pad(tokens_BT + 1, (self.past, 0)), seq)

    def init_state(self, batch: int, device: torch.device | str) -> NgramState:
        """The state of `batch` sequences without tokens."""
        return NgramState(torch.zeros(batch, self.past, dtype=torch.int64, device=device))

    def step(self, tokens_BT: Tensor, state: NgramState, seq: Layout) -> Tensor:
        """The embeddings' sum (B, T, D) for the tokens after those in `state`, which is updated."""
        id_BT = torch.cat([state.id_BN, tokens_BT + 1], dim=1)
        sum_BTD = self._sum(id_BT, seq)
        if seq.padded:  # padding is at row ends only
            last_BN = seq.real_BT.sum(dim=1, keepdim=True) + torch.arange(self.past, device=id_BT.device)
            state.id_BN.copy_(id_BT.gather(1, last_BN))
        else:
            state.id_BN.copy_(id_BT[:, id_BT.shape[1] - self.past :])
        return sum_BTD

    def _sum(self, id_BT: Tensor, seq: Layout) -> Tensor:
        """id_BT: plus 1, and with the `past` tokens before those of `seq`, which count inside their document only."""
        time = seq.shape[1]
        ids = [
            id_BT[:, self.past - back : self.past - back + time].where(seq.position_BT >= back, 0)
            for back in range(self.past, -1, -1)
        ]
        embedded = [
            table(bucket_of(ids[-int(n) :], table.num_embeddings))  # type: ignore[arg-type]
            for n, table in self.tables.items()
        ]
        return torch.stack(embedded).sum(dim=0) if len(embedded) > 1 else embedded[0]
