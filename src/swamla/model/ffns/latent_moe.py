"""LatentMoE (arXiv 2601.18089): experts that work in a narrower latent, so that there may be more of them."""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, nn

from swamla.errors import require
from swamla.model.ffns.moe import MoE, MoEConfig
from swamla.model.initial import Draw, draw_alone, normal
from swamla.ops.dispatch import Dispatch
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class LatentMoEConfig(MoEConfig):
    """A mixture of experts in a latent `ratio` times narrower than the model; router and shared experts see the model.

    At equal cost a latent allows `ratio` times the experts and the active ones: 32 and 3 become 128 and 12.
    ratio: the model's width over the latent's.
    preserve_expert_dim: whether experts keep their hidden width in the latent; else it is `ratio` times smaller too.
    """

    kind: ClassVar[str] = "latent_moe"
    n_experts: int = 128
    n_activated: int = 12
    ratio: int = 4
    preserve_expert_dim: bool = True

    @classmethod
    def example(cls) -> Self:
        """A few narrow experts, for a model of width 64."""
        return cls(n_experts=8, n_activated=4, expert_hidden=32)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ratio > 0, "ratio", self.ratio, "must be > 0, e.g. 4")

    def expert_dim(self, width: int) -> int:
        """`expert_hidden`, or 8/3 · width shared out over n_activated / ratio + n_shared, rounded up to 64."""
        met = self.n_activated + self.ratio * self.n_shared  # in units of 1 / ratio
        return self.expert_hidden or (8 * width * self.ratio + 192 * met - 1) // (192 * met) * 64

    def routed_dims(self, width: int) -> tuple[int, int]:
        """Width of the latent, and the routed experts' hidden width."""
        require(width % self.ratio == 0, "ratio", self.ratio, f"must divide the width {width}")
        hidden = self.expert_dim(width)
        if not self.preserve_expert_dim:
            allowed = f"must divide expert_hidden = {hidden} unless preserve_expert_dim"
            require(hidden % self.ratio == 0, "ratio", self.ratio, allowed)
            hidden //= self.ratio
        return self._aligned(width // self.ratio, hidden)

    def build(self, width: int) -> "LatentMoE":
        """The module."""
        return LatentMoE(self, width)

    def widths(self, width: int) -> dict[str, int]:
        """The latent's width, and hidden widths of the experts."""
        return {"latent": self.routed_dims(width)[0], **super().widths(width)}

    def components(self, width: int) -> dict[str, int]:
        """Parameters by what they are."""
        return {**super().components(width), "latent projections": 2 * width * (width // self.ratio)}


class LatentMoE(MoE):
    """W_up Σ pᵢ Eᵢ(W_down x) + shared(x); routed on x itself."""

    def __init__(self, config: LatentMoEConfig, width: int) -> None:
        super().__init__(config, width)
        latent = config.routed_dims(width)[0]
        self.latent_down_proj = nn.Linear(width, latent, bias=False)
        self.latent_up_proj = nn.Linear(latent, width, bias=False)
        draw_alone(self)

    def own_start(self) -> dict[str, Draw]:
        """The detour keeps the scale of what takes it; the way up makes a sum again of what the router averages.

        Weights that sum to 1 leave of n_activated experts what one of them would add. A dense FFN adds them all up.
        """
        width, latent = self.latent_down_proj.in_features, self.latent_up_proj.in_features
        return {
            "latent_down_proj.weight": normal(width**-0.5),
            "latent_up_proj.weight": normal(self.config.n_activated * latent**-0.5),
        }

    def routed(self, x_ND: Tensor, dispatch: Dispatch, weight_NK: Tensor) -> Tensor:
        """What the routed experts make of tokens (N, D), by way of the latent."""
        return self.latent_up_proj(self.experts(self.latent_down_proj(x_ND), dispatch, weight_NK))
