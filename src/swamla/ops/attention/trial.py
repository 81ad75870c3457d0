"""The attention to time when "auto" has several fast paths on a CPU: forward and backward pass for given heads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from swamla.ops.attention import causal_attention, in_tiles, windowed_attention
from swamla.ops.gradients import gradients
from swamla.ops.layout import Layout

TOKENS = 2048  # of a trial; more if one document is longer
SCORES = 2**22  # of a trial, approximately: a few heads represent all
LEAST_HEADS = 2  # so that threads have something to share


@dataclass(frozen=True, kw_only=True)
class AttentionTrial:
    """The shape of a mixer's attention; mixers with equal trials are measured once.

    heads: query heads.  key_heads: heads of keys and values.  key, value: widths of a key and a value head.
    window: None for causal attention.  sink_logit: whether each head has a learned one.
    """

    heads: int
    key_heads: int
    key: int
    value: int
    window: int | None = None
    sinks: int = 0
    sink_logit: bool = False

    def __str__(self) -> str:
        shared = "" if self.heads == self.key_heads else f", {self.key_heads} of keys"
        widths = f"{self.key}" if self.key == self.value else f"{self.key} and {self.value}"
        seen = "causal" if self.window is None else f"window {self.window} + {self.sinks}"
        sink = ", a learned sink" if self.sink_logit else ""
        return f"attention {seen}{sink}, {self.heads} heads{shared}, width {widths}"

    def paths(self, dtype: torch.dtype) -> tuple[str, ...]:
        """The backends to compare, first the one that "auto" means without a measurement."""
        tiled = self.window is not None or in_tiles(dtype == torch.bfloat16, self.key, self.value)
        return ("tiles", "sdpa") if tiled else ("sdpa", "tiles")

    def scores(self, length: int, part: int) -> int:
        """The number of scores of a trial, to which its time is proportional."""
        batch, groups, shared = self._shape(length, part)
        return batch * groups * shared * length * min(length, self.window or length)

    def _shape(self, length: int, part: int) -> tuple[int, int, int]:
        """Rows, key heads, and query heads per key head."""
        batch, pairs = max(1, TOKENS // part // length), length * min(length, self.window or length)
        most = max(LEAST_HEADS, SCORES // part // (batch * pairs))
        shared = min(self.heads // self.key_heads, most)
        return batch, min(self.key_heads, max(1, most // shared)), shared

    def step(self, path: str, length: int, dtype: torch.dtype, part: int = 1) -> Callable[[], object]:
        """A function that runs a forward and backward pass on documents of `length` tokens; inputs are drawn here.

        Uses about 1/`part` of the usual rows and heads, and does not advance the global random generator.
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
        leaves = inputs
        if self.window is not None:
            attend = partial(windowed_attention, window=self.window, sinks=self.sinks)
        if self.sink_logit:
            sink_logit_H = torch.zeros(shared * groups, requires_grad=True)
            attend, leaves = partial(attend, sink_logit_H=sink_logit_H), [*inputs, sink_logit_H]
        seq = Layout.one_document_per_row(batch, length)

        def step() -> object:
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                return gradients(attend(*inputs, seq, backend=path), leaves, upstream)

        return step
