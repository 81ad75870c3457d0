"""LatentMoE (arXiv 2601.18089): experts in a narrower latent space, which allows more experts at equal cost."""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, nn

from swamla.errors import require
from swamla.model.ffns.moe import MoE, MoEConfig
from swamla.model.initial import Initializer, normal, reset_parameters
from swamla.ops.dispatch import Dispatch
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class LatentMoEConfig(MoEConfig):
    """A mixture of experts in a latent `ratio` times narrower than the model; router and shared experts use full width.

    At equal cost a latent allows `ratio` times as many experts and active experts: 32 and 3 become 128 and 12.
    ratio: the model's width over the latent's.
    preserve_expert_dim: whether experts keep their hidden width in the latent; if not, it is divided by `ratio` too.
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
        """`expert_hidden`, or 8/3 · width / (n_activated / ratio + n_shared), rounded up to a multiple of 64."""
        active = self.n_activated + self.ratio * self.n_shared  # in units of 1 / ratio
        return self.expert_hidden or (8 * width * self.ratio + 192 * active - 1) // (192 * active) * 64

    def routed_dims(self, width: int) -> tuple[int, int]:
        """Width of the latent, and the routed experts' hidden width."""
        require(width % self.ratio == 0, "ratio", self.ratio, f"must divide the width {width}")
        hidden = self.expert_dim(width)
        if not self.preserve_expert_dim:
            allowed = f"must divide expert_hidden = {hidden} unless `preserve_expert_dim`"
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
        """Parameters by component."""
        return {**super().components(width), "latent projections": 2 * width * (width // self.ratio)}


class LatentMoE(MoE):
    """W_up Σ pᵢ Eᵢ(W_down x) + shared(x); the router reads x, not the latent."""

    def __init__(self, config: LatentMoEConfig, width: int) -> None:
        super().__init__(config, width)
        latent = config.routed_dims(width)[0]
        self.latent_down_proj = nn.Linear(width, latent, bias=False)
        self.latent_up_proj = nn.Linear(latent, width, bias=False)
        reset_parameters(self)

    def initializers(self) -> dict[str, Initializer]:
        """The down-projection preserves scale; the up-projection's standard deviation has the factor n_activated.

        The router's weights usually sum to 1, so the experts' outputs are averaged. The factor makes the average a sum,
        which has the scale of a dense FFN's output.
        """
        width, latent = self.latent_down_proj.in_features, self.latent_up_proj.in_features
        return {
            **super().initializers(),
            "latent_down_proj.weight": normal(width**-0.5),
            "latent_up_proj.weight": normal(self.config.n_activated * latent**-0.5),
        }

    def routed(self, x_ND: Tensor, dispatch: Dispatch, weight_NK: Tensor) -> Tensor:
        """The routed experts' outputs for tokens (N, D), through the latent."""
        return self.latent_up_proj(self.experts(self.latent_down_proj(x_ND), dispatch, weight_NK))
