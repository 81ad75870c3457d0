"""The router of a mixture of experts: scores, top-k, load balanced by a bias instead of a loss.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); the bias of arXiv 2408.15664. With softmax scores, and groups by their
best expert, DeepSeek-V2 (arXiv 2405.04434, section 2.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.model.ffns.ffn import Statistics
from swamla.ops.autocast import without_autocast

Score = Literal["sigmoid", "softmax"]
GroupScore = Literal["top2", "max"]


@dataclass(frozen=True)
class Routing:
    """K chosen experts of each of N tokens, their weights (fp32), and the logits (N, E)."""

    expert_NK: Tensor
    weight_NK: Tensor
    logits_NE: Tensor


class Router(nn.Module):
    """Chooses experts by score + bias and weights them by score only; in fp32, also under autocast.

    Without options scores are sigmoids, and the weights are divided by their sum; see `MoEConfig` for all of them.
    """

    def __init__(
        self,
        width: int,
        n_experts: int,
        n_activated: int,
        *,
        score: Score = "sigmoid",
        normalise: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        groups_used: int = 1,
        group_score: GroupScore = "top2",
    ) -> None:
        super().__init__()
        self.n_activated = n_activated
        self.score, self.normalise, self.scale = score, normalise, scale
        self.groups, self.groups_used, self.group_score = groups, groups_used, group_score
        self.weight = nn.Parameter(torch.empty(n_experts, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(n_experts))

    def forward(self, x_ND: Tensor) -> Routing:
        """Route tokens (N, D)."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with without_autocast(x_ND.device.type):
            logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype))
        chosen_NK = self.choose(self.scores(logits_NE.detach()) + self.bias)
        return Routing(chosen_NK, self._weights(logits_NE, chosen_NK), logits_NE)

    def scores(self, logits: Tensor) -> Tensor:
        """The experts' scores (…, E) of their logits: sigmoids, or their softmax."""
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(dim=-1)

    def _weights(self, logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
        """`scale` · sᵢ, or `scale` · sᵢ / Σ sⱼ over the chosen experts.

        As softmax of log s, so that nothing is divided by zero when all scores underflow.
        """
        if self.score == "softmax" and not self.normalise:
            log_score_NK = logits_NE.log_softmax(dim=1).gather(1, chosen_NK)
        else:  # softmax over the chosen needs no sum over all
            logits_NK = logits_NE.gather(1, chosen_NK)
            log_score_NK = F.logsigmoid(logits_NK) if self.score == "sigmoid" else logits_NK
        weight_NK = log_score_NK.softmax(dim=1) if self.normalise else log_score_NK.exp()
        return weight_NK if self.scale == 1 else self.scale * weight_NK

    def choose(self, scores: Tensor) -> Tensor:
        """The experts (…, K) of highest score (…, E), among those of the best groups."""
        if self.groups_used < self.groups:
            scores = scores.masked_fill(~self._in_best_groups(scores), -torch.inf)
        return scores.topk(self.n_activated, dim=-1, sorted=False).indices

    def _in_best_groups(self, scores: Tensor) -> Tensor:
        """(…, E): whether an expert is in one of the groups of highest score."""
        by_group = scores.unflatten(-1, (self.groups, -1))
        best = by_group.topk(2, dim=-1).values.sum(-1) if self.group_score == "top2" else by_group.amax(-1)
        used = best.topk(self.groups_used, dim=-1, sorted=False).indices
        is_used = torch.zeros_like(best, dtype=torch.bool).scatter(-1, used, value=True)
        return is_used[..., None].expand(by_group.shape).flatten(-2)

    def auxiliary_loss(self, logits_BTE: Tensor, real_BT: Tensor) -> Tensor:
        """The sequence-wise balance loss of DeepSeek-V3 (eq. 17 to 20, α = 1), summed over tokens; a row is a sequence.

        It is 1 per token when all experts are used equally. As in the paper, experts are counted by score without the
        bias, so that the bias does not hide unbalanced scores. Padding does not count.
        """
        n_experts, real_BT1 = logits_BTE.shape[-1], real_BT[..., None]
        scores_BTE = self.scores(logits_BTE)
        share_BTE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).where(real_BT1, 0.0)
        chosen_BTE = torch.zeros_like(share_BTE).scatter_(-1, self.choose(scores_BTE.detach()), 1.0)
        time_B1 = real_BT1.sum(1).clamp(min=1)  # a row of padding alone has sums of 0
        fraction_BE = chosen_BTE.where(real_BT1, 0.0).sum(1) * (n_experts / self.n_activated) / time_B1
        return (fraction_BE * share_BTE.sum(1)).sum()

    @staticmethod
    def z_loss(logits_BTE: Tensor, real_BT: Tensor) -> Tensor:
        """(log Σ exp(logit))², summed over tokens, which keeps logits small (arXiv 2202.08906, eq. 5)."""
        return logits_BTE.logsumexp(-1).square().where(real_BT, 0.0).sum()

    @torch.no_grad()
    def statistics(self, logits_BTE: Tensor, real_BT: Tensor) -> Statistics:
        """Sums over tokens. entropy: of the scores normalised to sum 1, at most log E nats per token."""
        log_share_BTE = F.logsigmoid(logits_BTE) if self.score == "sigmoid" else logits_BTE
        log_share_BTE = log_share_BTE.log_softmax(-1)
        entropy_BT = -(log_share_BTE.exp() * log_share_BTE).sum(-1)
        return {"entropy": entropy_BT.where(real_BT, 0.0).sum(), "tokens": real_BT.sum()}

    @torch.no_grad()
    def rebalance(self, load_E: Tensor, rate: float) -> None:
        """Move the bias by ±`rate`: up for experts with less than the mean load, down for those with more."""
        load_E = load_E.to(self.bias.dtype)
        self.bias += rate * (load_E.mean() - load_E).sign()


def routed_loss(
    router: Router, logits_BTE: Tensor, real_BT: Tensor, aux_loss: float, z_loss: float
) -> Mapping[str, Tensor]:
    """The statistic "loss": both losses times their coefficients; empty if both are 0."""
    terms = []
    if aux_loss:
        terms.append(aux_loss * router.auxiliary_loss(logits_BTE, real_BT))
    if z_loss:
        terms.append(z_loss * router.z_loss(logits_BTE, real_BT))
    return {"loss": sum(terms[1:], start=terms[0])} if terms else {}
