"""Rotary position embedding (arXiv 2104.09864) with context extension: linear, YaRN (arXiv 2309.00071), Llama 3's."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from swamla.errors import require
from swamla.ops.graphs import is_fused, outside_graphs
from swamla.ops.layout import Layout
from swamla.ops.rotary import doubled, rotate, rotate_doubled


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""

    kind: ClassVar[str] = "linear"
    factor: float

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "must be >= 1, e.g. 4.0")

    @property
    def attention_factor(self) -> float:
        """Factor of the cos and sin tables: 1."""
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """Factor of attention's softmax scale: 1."""
        return 1.0

    def frequencies(self, plain: Tensor, base: float) -> Tensor:
        """The frequency (angle per position) of each rotated pair, from the unscaled ones."""
        return plain / self.factor


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): high frequencies kept, low ones interpolated, a ramp between, attention sharpened.

    mscale: sharpening by the cos and sin tables, which scale rotated queries and keys; 0 for none.
    mscale_all_dim: moves sharpening from the tables to the softmax scale, which also covers the unrotated elements of a
        head, as in DeepSeek-V2/V3. Every mixer applies both. In transformers, models with latent attention apply both,
        Llama-like models only the first.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "must be >= 1, e.g. 4.0")
        require(self.original_length > 0, "original_length", self.original_length, "must be > 0, e.g. 4096")
        require(self.beta_fast > self.beta_slow > 0, "beta_fast", self.beta_fast, "must be > beta_slow > 0, e.g. 32")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "must be >= 0, e.g. 1.0 (0: no sharpening)")

    def _sharpening(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def attention_factor(self) -> float:
        """Factor of the cos and sin tables."""
        return self._sharpening(self.mscale) / self._sharpening(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor of attention's softmax scale."""
        return self._sharpening(self.mscale_all_dim) ** 2

    def frequencies(self, plain: Tensor, base: float) -> Tensor:
        """The frequency of each rotated pair, from the unscaled ones (arXiv 2309.00071, eq. 13 and 14)."""
        pairs = plain.numel()

        def pair_with(rotations: float) -> float:
            """The (fractional) index of the pair that makes so many rotations within the original length."""
            return pairs * math.log(self.original_length / (rotations * 2 * math.pi)) / math.log(base)

        low = max(math.floor(pair_with(self.beta_fast)), 0)
        high = min(math.ceil(pair_with(self.beta_slow)), 2 * pairs - 1)
        ramp = (torch.arange(pairs, dtype=plain.dtype, device=plain.device) - low) / max(high - low, 0.001)
        interpolated = ramp.clamp(0, 1)
        return plain / self.factor * interpolated + plain * (1 - interpolated)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: pairs that turn often within the original length are kept, those that turn rarely interpolated.

    Between `low_freq_factor` and `high_freq_factor` rotations the share that is kept rises linearly from 0 to 1.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "must be >= 1, e.g. 8.0")
        require(self.original_length > 0, "original_length", self.original_length, "must be > 0, e.g. 8192")
        ordered = self.high_freq_factor > self.low_freq_factor > 0
        require(ordered, "high_freq_factor", self.high_freq_factor, "must be > low_freq_factor > 0, e.g. 4")

    @property
    def attention_factor(self) -> float:
        """Factor of the cos and sin tables: 1."""
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """Factor of attention's softmax scale: 1."""
        return 1.0

    def frequencies(self, plain: Tensor, base: float) -> Tensor:
        """The frequency of each rotated pair, from the unscaled ones."""
        rotations = self.original_length * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return plain / self.factor * (1 - kept) + plain * kept


Scaling = LinearScaling | YarnScaling | Llama3Scaling


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Which pairs of a head are rotated, and by which angles.

    layout: "half" pairs element i with i + K/2 (Llama, Mistral), "interleaved" pairs 2i with 2i + 1 (DeepSeek).
    """

    base: float = 10000.0
    layout: Literal["half", "interleaved"] = "half"
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        require(self.base > 1, "base", self.base, "must be > 1, e.g. 10000")

    @property
    def softmax_factor(self) -> float:
        """Factor of attention's softmax scale (1 except under YaRN with mscale_all_dim)."""
        return self.scaling.softmax_factor if self.scaling else 1.0

    def tables(self, seq: Layout, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B or 1, T, 1, head_dim / 2), shared by all layers of this forward pass.

        dtype: fp32, or fp64 for models in fp64. A compiled graph on a GPU recomputes the tables inside its kernels
        instead, at no cost.
        """
        return self._angles(seq, head_dim, dtype) if is_fused(seq.position_BT) else self._shared(seq, head_dim, dtype)

    def rotate(self, x_BTHK: Tensor, seq: Layout, width: int) -> Tensor:
        """Rotate the last `width` elements of each head by their positions."""
        if torch.compiler.is_compiling() and seq.continues:  # a decoding step: its graph builds the tables once
            return self._rotate_by_table(x_BTHK, seq, width)
        if not is_fused(seq.position_BT):
            return self._rotate_by_shared(x_BTHK, seq, width)
        dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
        return rotate(x_BTHK, self._angles(seq, width, dtype), self.layout)

    @outside_graphs
    def _rotate_by_shared(self, x_BTHK: Tensor, seq: Layout, width: int) -> Tensor:
        return self._rotate_by_table(x_BTHK, seq, width)

    def _rotate_by_table(self, x_BTHK: Tensor, seq: Layout, width: int) -> Tensor:
        dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
        key = ("rope, doubled", self, width, dtype)
        plain = self._angles if torch.compiler.is_compiling() else self.tables
        tables = seq.table(key, lambda: doubled(plain(seq, width, dtype), self.layout))
        return rotate_doubled(x_BTHK, tables, self.layout)

    @outside_graphs
    def _shared(self, seq: Layout, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return seq.table(("rope", self, head_dim, dtype), lambda: self._angles(seq, head_dim, dtype))

    def _angles(self, seq: Layout, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        position_BT = seq.position_BT[:1] if seq.whole_rows and not seq.continues else seq.position_BT
        exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=position_BT.device) / head_dim
        frequency = 1.0 / self.base**exponent  # rounded as in Llama and DeepSeek: the error grows with position
        factor = 1.0
        if self.scaling:
            frequency, factor = self.scaling.frequencies(frequency, self.base), self.scaling.attention_factor
        angle = position_BT.to(dtype)[:, :, None, None] * frequency
        return angle.cos() * factor, angle.sin() * factor
