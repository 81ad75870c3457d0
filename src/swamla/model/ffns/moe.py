"""Mixture of experts (DeepSeek-V3, arXiv 2412.19437): a few of many small SwiGLUs per token, plus shared ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.errors import require
from swamla.model.ffns.dense import DenseConfig, SwiGLU
from swamla.model.ffns.experts import Experts
from swamla.model.ffns.ffn import FFN, FFNConfig, Statistics
from swamla.model.ffns.router import GroupScore, Router, Score, routed_loss
from swamla.model.initial import Initializer, constant
from swamla.ops.dispatch import Dispatch
from swamla.ops.grouped_mm import BACKENDS, resolve_backend
from swamla.ops.layout import Layout
from swamla.registry import register

ROW = 8  # grouped products need widths that are multiples of it: 16 bytes of bf16


@register
@dataclass(frozen=True, kw_only=True)
class MoEConfig(FFNConfig):
    """A mixture of experts, by default routed as in DeepSeek-V3 without groups; no token is ever dropped.

    n_experts: routed experts, each a SwiGLU.
    n_activated: how many of them a token goes to.
    n_shared: shared experts, which every token goes to.
    expert_hidden: hidden width of an expert; by default a token uses as many weights as in a dense SwiGLU.
    shared_hidden: hidden width of a shared expert, by default that of a routed one.
    shared_gate: what the shared experts' output is multiplied by: none, or sigmoid, σ(g · x) as in Qwen3-Next.
    score: of an expert by its logit: sigmoid, or softmax over all experts as in DeepSeek-V2 and Qwen3-Next.
    normalise: whether the weights of the chosen experts are their scores divided by the sum of these, or the scores.
    scale: factor of these weights.
    groups: equal groups, in order, of the experts; a token goes to experts of its groups_used best groups only.
    groups_used: groups that a token may go to.
    group_score: of a group: top2, the sum of its two best experts' scores as in DeepSeek-V3, or max, the best as in
        DeepSeek-V2.
    bias_rate: how far a step moves the bias that balances the experts.
    aux_loss: weight of DeepSeek-V3's sequence-wise balance loss; 0 for none.
    z_loss: weight of the loss that keeps the router's logits small; 0 for none.
    backend: auto, reference or torch.
    """

    kind: ClassVar[str] = "moe"
    sign: ClassVar[str] = "E"
    outputs: ClassVar[tuple[str, ...]] = ("experts.down", "shared.down_proj.weight")
    BACKENDS: ClassVar[tuple[str, ...]] = BACKENDS
    n_experts: int = 32
    n_activated: int = 3
    n_shared: int = 1
    expert_hidden: int | None = None
    shared_hidden: int | None = None
    shared_gate: Literal["none", "sigmoid"] = "none"
    score: Score = "sigmoid"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    group_score: GroupScore = "top2"
    bias_rate: float = 1e-3
    aux_loss: float = 0.0
    z_loss: float = 0.0
    backend: str = "auto"

    @classmethod
    def example(cls) -> Self:
        """A few narrow experts, for a model of width 64."""
        return cls(n_experts=4, n_activated=2, expert_hidden=32)

    def __post_init__(self) -> None:
        require(self.n_experts > 0, "n_experts", self.n_experts, "must be > 0, e.g. 32")
        fits = 1 <= self.n_activated <= self.n_experts
        require(fits, "n_activated", self.n_activated, f"must be 1 … n_experts = {self.n_experts}")
        require(self.n_shared >= 0, "n_shared", self.n_shared, "must be >= 0 (0: none)")
        for name in ("expert_hidden", "shared_hidden"):
            value = self.__dict__[name]
            require(value is None or value > 0, name, value, "must be > 0, or left out")
        gated = self.shared_gate != "none"
        require(not gated or self.n_shared > 0, "shared_gate", self.shared_gate, "must be none where n_shared = 0")
        require(0 < self.scale < float("inf"), "scale", self.scale, "must be > 0, e.g. 2.5")
        self._check_groups()
        for name in ("bias_rate", "aux_loss", "z_loss"):
            value = self.__dict__[name]
            require(0 <= value < float("inf"), name, value, "must be >= 0 (0: none)")
        require(self.backend in self.BACKENDS, "backend", self.backend, f"must be one of {', '.join(self.BACKENDS)}")

    def _check_groups(self) -> None:
        divides = self.groups > 0 and self.n_experts % self.groups == 0
        require(divides, "groups", self.groups, f"must divide n_experts = {self.n_experts}, e.g. 1 for no groups")
        used, size = self.groups_used, self.n_experts // self.groups
        require(1 <= used <= self.groups, "groups_used", used, f"must be 1 … groups = {self.groups}")
        enough = self.n_activated <= used * size
        allowed = f"must have n_activated = {self.n_activated} experts: there are {size} in each group"
        require(enough, "groups_used", used, allowed)
        pairs = self.groups == 1 or size > 1 or self.group_score == "max"
        require(pairs, "group_score", self.group_score, 'must be "max" where each group has a single expert')

    @property
    def vectors(self) -> tuple[str, ...]:  # type: ignore[override]
        """A vector for each expert, and that of the gate."""
        return ("router.weight",) if self.shared_gate == "none" else ("router.weight", "shared_gate")

    def expert_dim(self, width: int) -> int:
        """`expert_hidden`, or 8/3 · width / (n_activated + n_shared), rounded up to a multiple of 64."""
        active = self.n_activated + self.n_shared
        return self.expert_hidden or (8 * width + 192 * active - 1) // (192 * active) * 64

    def routed_dims(self, width: int) -> tuple[int, int]:
        """Input width and hidden width of the routed experts."""
        return self._aligned(width, self.expert_dim(width))

    def shared_config(self, width: int) -> DenseConfig | None:
        """The shared experts as one SwiGLU, which equals their sum; None if n_shared is 0."""
        if not self.n_shared:
            return None
        return DenseConfig(hidden=self.n_shared * (self.shared_hidden or self.expert_dim(width)))

    def build(self, width: int) -> "MoE":
        """The module."""
        return MoE(self, width)

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """Op → backend, the same on any device."""
        return {"experts": resolve_backend(self.backend)}

    def widths(self, width: int) -> dict[str, int]:
        """Hidden widths of the experts."""
        shared = {"shared_hidden": self.shared_hidden or self.expert_dim(width)} if self.n_shared else {}
        return {"expert_hidden": self.routed_dims(width)[1], **shared}

    def projections(self, width: int) -> dict[str, dict[str, int]]:
        """Gate and up of every expert, and of the shared ones."""
        hidden, shared = self.routed_dims(width)[1], self.shared_config(width)
        of_shared = {} if shared is None else shared.projections(width)
        return {
            "experts.gate_up": {"gate": hidden, "up": hidden},
            **{f"shared.{name}": parts for name, parts in of_shared.items()},
        }

    def components(self, width: int) -> dict[str, int]:
        """Parameters by component."""
        inner, hidden = self.routed_dims(width)
        shared = self.shared_config(width)
        return {
            "experts": self.n_experts * 3 * inner * hidden,
            "router": self.n_experts * width,
            "shared experts": shared.n_parameters(width) if shared else 0,
            "shared gate": 0 if self.shared_gate == "none" else width,
        }

    def n_parameters(self, width: int) -> int:
        """Parameters of the module."""
        return sum(self.components(width).values())

    def n_active_parameters(self, width: int) -> int:
        """Parameters that one token uses: those of n_activated experts, and everything else."""
        inner, hidden = self.routed_dims(width)
        return self.n_parameters(width) - (self.n_experts - self.n_activated) * 3 * inner * hidden

    def forward_flops(self, width: int, length: int) -> int:
        """Floating-point operations of one forward pass over `length` tokens, the weighted sum included."""
        return 2 * (self.n_active_parameters(width) + self.n_activated * self.routed_dims(width)[0]) * length

    def _aligned(self, inner: int, hidden: int) -> tuple[int, int]:
        aligned = resolve_backend(self.backend) == "reference" or (inner % ROW == 0 and hidden % ROW == 0)
        widths = f"{inner} and {hidden}"
        allowed = f'must give experts with widths that are multiples of {ROW}, not {widths}; or backend = "reference"'
        require(aligned, "expert_hidden", self.expert_hidden, allowed)
        return inner, hidden


class MoE(FFN):
    """Σ pᵢ Eᵢ(x) over the chosen experts, plus the shared experts, perhaps times σ(g · x). Padding is not routed."""

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(
            width,
            config.n_experts,
            config.n_activated,
            score=config.score,
            normalise=config.normalise,
            scale=config.scale,
            groups=config.groups,
            groups_used=config.groups_used,
            group_score=config.group_score,
        )
        self.experts = Experts(config.n_experts, *config.routed_dims(width), config.backend)
        shared = config.shared_config(width)
        self.shared = SwiGLU(shared, width) if shared else None
        self.shared_gate = None if config.shared_gate == "none" else nn.Parameter(torch.zeros(1, width))

    def initializers(self) -> dict[str, Initializer]:
        """A gate begins at σ(0) = .5 for every token."""
        return {} if self.shared_gate is None else {"shared_gate": constant(0.0)}

    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D) and the router's statistics."""
        x_ND, real_BT = x_BTD.flatten(0, 1), seq.real_BT
        routing = self.router(x_ND)
        # Padding gets the index E, which is no expert: shapes do not depend on its amount, so nothing is recompiled.
        expert_NK = routing.expert_NK.masked_fill(~real_BT.flatten()[:, None], self.config.n_experts)
        dispatch = Dispatch(expert_NK, self.config.n_experts, surplus=seq.padded)
        y_BTD = self.routed(x_ND, dispatch, routing.weight_NK).view(x_BTD.shape)
        if self.shared is not None:
            shared_BTD, _ = self.shared(x_BTD, seq)
            if self.shared_gate is not None:
                shared_BTD = shared_BTD * F.linear(x_BTD, self.shared_gate).sigmoid()
            y_BTD = y_BTD + shared_BTD
        if torch.compiler.is_exporting():
            return y_BTD, {}
        logits_BTE = routing.logits_NE.unflatten(0, x_BTD.shape[:2])
        loss = routed_loss(self.router, logits_BTE, real_BT, self.config.aux_loss, self.config.z_loss)
        return y_BTD, {**loss, **self.router.statistics(logits_BTE, real_BT), "load": dispatch.load_E}

    def routed(self, x_ND: Tensor, dispatch: Dispatch, weight_NK: Tensor) -> Tensor:
        """The routed experts' outputs for tokens (N, D)."""
        return self.experts(x_ND, dispatch, weight_NK)

    def shard_experts(self, mesh: Any) -> list[nn.Parameter]:
        """Shard the routed experts over ranks; router, shared experts and projections stay as they are."""
        return self.experts.shard(mesh)

    def balance(self) -> Tensor:
        """The router's bias."""
        return self.router.bias

    def rebalance(self, statistics: Mapping[str, Tensor]) -> None:
        """Update the router's bias by the load of the whole batch."""
        self.router.rebalance(statistics["load"], self.config.bias_rate)
