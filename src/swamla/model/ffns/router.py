"""The router of a mixture of experts: sigmoid scores, top-k, load balanced by a bias instead of a loss.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); the bias of arXiv 2408.15664.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.model.ffns.ffn import Statistics
from swamla.ops.autocast import without_autocast


@dataclass(frozen=True)
class Routing:
    """K chosen experts of each of N tokens, their weights (fp32, sum 1), and the logits (N, E)."""

    expert_NK: Tensor
    weight_NK: Tensor
    logits_NE: Tensor


class Router(nn.Module):
    """Chooses experts by score + bias and weights them by score only; in fp32, also under autocast."""

    def __init__(self, width: int, n_experts: int, n_activated: int) -> None:
        super().__init__()
        self.n_activated = n_activated
        self.weight = nn.Parameter(torch.empty(n_experts, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(n_experts))

    def forward(self, x_ND: Tensor) -> Routing:
        """Route tokens (N, D)."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with without_autocast(x_ND.device.type):
            logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype))
        chosen_NK = self.choose(logits_NE.detach().sigmoid() + self.bias)
        # σᵢ / Σ σⱼ over the chosen experts, as softmax of log σ: no division by zero when all scores underflow.
        weight_NK = F.logsigmoid(logits_NE.gather(1, chosen_NK)).softmax(dim=1)
        return Routing(chosen_NK, weight_NK, logits_NE)

    def choose(self, scores: Tensor) -> Tensor:
        """The experts (…, K) of highest score (…, E)."""
        return scores.topk(self.n_activated, dim=-1, sorted=False).indices

    def auxiliary_loss(self, logits_BTE: Tensor, real_BT: Tensor) -> Tensor:
        """The sequence-wise balance loss of DeepSeek-V3 (eq. 17 to 20, α = 1), summed over tokens; a row is a sequence.

        It is 1 per token when all experts are used equally. As in the paper, experts are counted by score without the
        bias, so that the bias does not hide unbalanced scores. Padding does not count.
        """
        n_experts, real_BT1 = logits_BTE.shape[-1], real_BT[..., None]
        scores_BTE = logits_BTE.sigmoid()
        share_BTE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).where(real_BT1, 0.0)
        chosen_BTE = torch.zeros_like(share_BTE).scatter_(-1, self.choose(logits_BTE.detach()), 1.0)
        time_B1 = real_BT1.sum(1).clamp(min=1)  # a row of padding alone has sums of 0
        fraction_BE = chosen_BTE.where(real_BT1, 0.0).sum(1) * (n_experts / self.n_activated) / time_B1
        return (fraction_BE * share_BTE.sum(1)).sum()

    @staticmethod
    def z_loss(logits_BTE: Tensor, real_BT: Tensor) -> Tensor:
        """(log Σ exp(logit))², summed over tokens, which keeps logits small (arXiv 2202.08906, eq. 5)."""
        return logits_BTE.logsumexp(-1).square().where(real_BT, 0.0).sum()

    @staticmethod
    @torch.no_grad()
    def statistics(logits_BTE: Tensor, real_BT: Tensor) -> Statistics:
        """Sums over tokens. entropy: of the scores normalised to sum 1, at most log E nats per token."""
        log_share_BTE = F.logsigmoid(logits_BTE)
        log_share_BTE -= log_share_BTE.logsumexp(-1, keepdim=True)
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
