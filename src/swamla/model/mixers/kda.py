"""Kimi Delta Attention (arXiv 2510.26692): gated DeltaNet with a decay of its own for each channel of a key."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from swamla.errors import require
from swamla.model.mixers.gdn import GDN, GDNConfig
from swamla.ops.kda import BACKENDS, kimi_delta_attention, kimi_delta_step, resolve_backend
from swamla.ops.layout import Layout
from swamla.ops.short_conv import prepare_conv
from swamla.ops.short_conv import resolve_backend as resolve_conv
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class KDAConfig(GDNConfig):
    """Kimi Delta Attention.

    decay_rank: inner width of the projection of the decays, head_v_dim by default, as in Kimi Linear; 0 for full rank,
        as in Ling 3.0.
    backend: auto, reference or torch.
    """

    kind: ClassVar[str] = "kda"
    sign: ClassVar[str] = "K"
    style: ClassVar[str] = "black on bright_green"
    BACKENDS: ClassVar[tuple[str, ...]] = BACKENDS
    gate: Literal["silu", "sigmoid", "lowrank"] = "lowrank"
    norm_eps: float = 1e-5
    decay_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "must be >= 0 (0: full rank)"
        require(self.decay_rank is None or self.decay_rank >= 0, "decay_rank", self.decay_rank, allowed)

    def build(self, width: int) -> "KDA":
        """The module."""
        return KDA(self, width)

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """Op → backend, the same on every device for the rule itself."""
        rule = {"channelwise delta rule": resolve_backend(self.backend)}
        if device.type == "cpu":
            return rule
        return rule | {"convolution": resolve_conv(self.conv_backend, device, taps=self.conv, dtype=dtype)}

    def prepare(self, seq: Layout, width: int) -> None:
        """Build masks and tables eagerly, so that the compiled forward has no graph break."""
        prepare_conv(seq, self.conv_backend, taps=self.conv)

    def kept_weights(self, width: int, length: int, *, bf16: bool) -> float:
        """Numbers per token that the steps from a to log α save for the backward pass, in fp32 also beside bf16."""
        return 3 * (2 if bf16 else 1) * self.decay_dims(width)[1]

    def decay_dims(self, width: int) -> tuple[int, int]:
        """Inner width of the projection of a, and how many decays a token has: one for each channel of each head."""
        head_k, head_v = self.head_dims(width)
        return head_v if self.decay_rank is None else self.decay_rank, self.n_heads * head_k


class KDA(GDN):
    """The layer of Kimi Linear with fused projections: `GDN` with channelwise decays from a low-rank projection.

    A_log is a number for each head, dt_bias one for each channel.
    """

    config: KDAConfig
    rule = staticmethod(kimi_delta_attention)
    rule_step = staticmethod(kimi_delta_step)

    def __init__(self, config: KDAConfig, width: int) -> None:
        super().__init__(config, width)
        rank, decays = config.decay_dims(width)
        self.expand_a = nn.Linear(rank, decays, bias=False) if rank else nn.Identity()

    def gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """log α (B, T, H, K) and β (B, T, H), in fp32 (fp64 in an fp64 model)."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        heads = self.config.n_heads
        b, a = self.ba_proj(x_BTD).tensor_split((heads,), dim=-1)
        time_step = (self.expand_a(a).to(dtype) + self.dt_bias.to(dtype)).unflatten(-1, (heads, self.head_k))
        rate_H1 = self.A_log.to(dtype).exp()[:, None]
        return self.log_decay(time_step, rate_H1), self.write_strength(b.to(dtype))
