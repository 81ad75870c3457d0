"""Many small SwiGLUs side by side, each for the tokens that are routed to it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.ops.grouped_mm import Dispatch, grouped_mm


class Experts(nn.Module):
    """E SwiGLUs of `width`, with `hidden`, whose weights stand in two tensors: (E, D, 2F) and (E, F, D)."""

    def __init__(self, n_experts: int, width: int, hidden: int, backend: str) -> None:
        super().__init__()
        self.n_experts, self.backend = n_experts, backend
        self.gate_up = nn.Parameter(torch.empty(n_experts, width, 2 * hidden).uniform_(-(width**-0.5), width**-0.5))
        self.down = nn.Parameter(torch.empty(n_experts, hidden, width).uniform_(-(hidden**-0.5), hidden**-0.5))

    def forward(self, x_ND: Tensor, dispatch: Dispatch, weight_NK: Tensor) -> Tensor:
        """(N, D) → (N, D): the weighted sum of what each token's experts make of it."""
        gate, up = grouped_mm(dispatch.scatter(x_ND), self.gate_up, dispatch.ends_E, backend=self.backend).chunk(
            2, dim=-1
        )
        y = grouped_mm(F.silu(gate) * up, self.down, dispatch.ends_E, backend=self.backend)
        return dispatch.gather(y, weight_NK)
