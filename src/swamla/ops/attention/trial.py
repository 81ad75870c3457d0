"""What to measure where "auto" has more than one fast path: an attention of given heads, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from swamla.ops.attention import causal_attention, in_tiles, windowed_attention
from swamla.ops.gradients import gradients
from swamla.ops.layout import Layout

TOKENS = 2048  # of a trial, unless one document is longer
SCORES = 2**22  # of a trial, about, in elements: a few heads speak for all
LEAST_HEADS = 2  # what threads can share


@dataclass(frozen=True, kw_only=True)
class AttentionTrial:
    """The attention of a mixer on a CPU; what is equal here is measured once.

    heads, key_heads: of queries, and of keys and values.  key, value: their widths.  window: None for causal.
    """

    heads: int
    key_heads: int
    key: int
    value: int
    window: int | None = None
    sinks: int = 0

    def __str__(self) -> str:
        shared = "" if self.heads == self.key_heads else f", {self.key_heads} of keys"
        widths = f"{self.key}" if self.key == self.value else f"{self.key} and {self.value}"
        seen = "causal" if self.window is None else f"window {self.window} + {self.sinks}"
        return f"attention {seen}, {self.heads} heads{shared}, width {widths}"

    def paths(self, dtype: torch.dtype) -> tuple[str, ...]:
        """Backends that compute differently, the one that "auto" means unmeasured first."""
        tiled = self.window is not None or in_tiles(dtype == torch.bfloat16, self.key, self.value)
        return ("tiles", "sdpa") if tiled else ("sdpa", "tiles")

    def scores(self, length: int, part: int) -> int:
        """What the time of a trial grows with."""
        batch, groups, shared = self._shape(length, part)
        return batch * groups * shared * length * min(length, self.window or length)

    def _shape(self, length: int, part: int) -> tuple[int, int, int]:
        """Rows, heads of keys, and heads of queries to each."""
        batch, pairs = max(1, TOKENS // part // length), length * min(length, self.window or length)
        most = max(LEAST_HEADS, SCORES // part // (batch * pairs))
        shared = min(self.heads // self.key_heads, most)
        return batch, min(self.key_heads, max(1, most // shared)), shared

    def step(self, path: str, length: int, dtype: torch.dtype, part: int = 1) -> Callable[[], object]:
        """A forward and backward pass of documents of `length` tokens, of which inputs and gradients are made now.

        Only about one in `part` of the usual rows and heads.  No global random generator is asked.
        """
        batch, groups, shared = self._shape(length, part)
        generator = torch.Generator().manual_seed(0)

        def random(heads: int, width: int) -> torch.Tensor:
            return torch.randn(batch, length, heads, width, generator=generator).to(dtype)

        inputs = [
            random(heads, width).requires_grad_()
            for heads, width in ((shared * groups, self.key), (groups, self.key), (groups, self.value))
        ]
        upstream = random(shared * groups, self.value)

        attend: Callable[..., torch.Tensor] = causal_attention
        if self.window is not None:
            attend = partial(windowed_attention, window=self.window, sinks=self.sinks)
        seq = Layout.one_document_per_row(batch, length)

        def step() -> object:
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                return gradients(attend(*inputs, seq, backend=path), inputs, upstream)

        return step
