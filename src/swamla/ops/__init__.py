"""Pure functions on tensors; each fast path is tested against a reference implementation of its equation.

An op with a fast path per device is a folder: `__init__.py` has the public function and chooses the backend,
`reference.py` is the equation, `cpu.py` and `cuda.py` are the fast paths. Every other op is one file.

Shape suffixes: B batch, T time, S source time, D model width, H heads, G key heads, K key width,
V value width (vocabulary in a head's weight), N rows, W convolution width, C chunk, E experts, F FFN hidden.
"""

from swamla.ops.attention import cached_attention, causal_attention, resolve_backend, windowed_attention
from swamla.ops.cross_entropy import chunked_cross_entropy
from swamla.ops.gated_delta import gated_delta_rule, gated_delta_step
from swamla.ops.grouped_mm import grouped_mm
from swamla.ops.kda import kimi_delta_attention, kimi_delta_step
from swamla.ops.l2_normalize import l2_normalize
from swamla.ops.layout import Layout
from swamla.ops.rms_norm import rms_norm
from swamla.ops.short_conv import short_conv, short_conv_step

__all__ = [
    "Layout",
    "cached_attention",
    "causal_attention",
    "chunked_cross_entropy",
    "gated_delta_rule",
    "gated_delta_step",
    "grouped_mm",
    "kimi_delta_attention",
    "kimi_delta_step",
    "l2_normalize",
    "resolve_backend",
    "rms_norm",
    "short_conv",
    "short_conv_step",
    "windowed_attention",
]
