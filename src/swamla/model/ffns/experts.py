"""Many small SwiGLUs side by side, each for the tokens that are routed to it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.distributed import local
from swamla.errors import require
from swamla.ops.dispatch import Dispatch
from swamla.ops.exchange import at_owners
from swamla.ops.grouped_mm import grouped_mm, product_dtype


class Experts(nn.Module):
    """E SwiGLUs of `width`, with `hidden`, whose weights stand in two tensors: (E, D, 2F) and (E, F, D)."""

    def __init__(self, n_experts: int, width: int, hidden: int, backend: str) -> None:
        super().__init__()
        self.n_experts, self.backend = n_experts, backend
        self.gate_up = nn.Parameter(torch.empty(n_experts, width, 2 * hidden).uniform_(-(width**-0.5), width**-0.5))
        self.down = nn.Parameter(torch.empty(n_experts, hidden, width).uniform_(-(hidden**-0.5), hidden**-0.5))
        self._owners: Any = None  # the process group that shares them out, where one does

    def own(self, mesh: Any) -> list[nn.Parameter]:
        """Keep only the experts that this process owns; from now on tokens travel to the processes that own theirs.

        mesh: its second dimension is over the owners of all experts together, its first over copies of that. The
        parameters, which are returned, become DTensors with the shape of the whole. Each gets the gradient of the
        tokens of its own group of owners: copies have to be added up. Raises `ConfigError` for experts that the owners
        cannot share evenly.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        owners = mesh.size(1)
        allowed = f"must divide the n_experts = {self.n_experts} of every layer that has experts"
        require(self.n_experts % owners == 0, "train.expert_parallel", owners, allowed)
        self._owners = mesh.get_group(1)

        def cut(whole: Tensor) -> nn.Parameter:
            part = whole.detach().chunk(owners)[mesh.get_local_rank(1)].clone()
            return nn.Parameter(DTensor.from_local(part, mesh, (Replicate(), Shard(0)), run_check=False))

        self.gate_up, self.down = cut(self.gate_up), cut(self.down)
        return [self.gate_up, self.down]

    def forward(self, x_ND: Tensor, dispatch: Dispatch, weight_NK: Tensor) -> Tensor:
        """(N, D) → (N, D): the weighted sum of what each token's experts make of it; of no experts 0."""
        rows = dispatch.scatter(x_ND)
        if self._owners is None:
            y = self._swiglus(rows, dispatch.ends_E, self.gate_up, self.down, surplus=dispatch.surplus)
        else:
            y = at_owners(rows.to(product_dtype(rows)), dispatch.load_E, self._own_swiglus, self._owners)
        return dispatch.gather(y, weight_NK)

    def _own_swiglus(self, rows: Tensor, ends_E: Tensor) -> Tensor:
        return self._swiglus(rows, ends_E, local(self.gate_up), local(self.down))

    def _swiglus(self, rows: Tensor, ends_E: Tensor, gate_up: Tensor, down: Tensor, *, surplus: bool = False) -> Tensor:
        """Of rows sorted by expert."""
        gate, up = grouped_mm(rows, gate_up, ends_E, backend=self.backend, surplus=surplus).chunk(2, dim=-1)
        return grouped_mm(F.silu(gate) * up, down, ends_E, backend=self.backend, surplus=surplus)
