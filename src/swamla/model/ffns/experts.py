"""The routed experts: SwiGLUs computed by grouped matrix products."""

from typing import Any

import torch
from torch import Tensor, nn

from swamla.distributed import local
from swamla.errors import UsageError, require
from swamla.ops.autocast import product_dtype
from swamla.ops.dispatch import Dispatch
from swamla.ops.exchange import apply_at_owners
from swamla.ops.grouped_mm import grouped_mm
from swamla.ops.swiglu import swiglu


class Experts(nn.Module):
    """E SwiGLUs of width D and hidden width F; their weights are two stacked tensors, (E, D, 2F) and (E, F, D)."""

    def __init__(self, n_experts: int, width: int, hidden: int, backend: str) -> None:
        super().__init__()
        self.n_experts, self.backend = n_experts, backend
        self.gate_up = nn.Parameter(torch.empty(n_experts, width, 2 * hidden).uniform_(-(width**-0.5), width**-0.5))
        self.down = nn.Parameter(torch.empty(n_experts, hidden, width).uniform_(-(hidden**-0.5), hidden**-0.5))
        self._group: Any = None  # of the ranks that share the experts, with expert parallelism

    def shard(self, mesh: Any) -> list[nn.Parameter]:
        """Expert parallelism: keep this rank's experts only; `forward` then sends tokens to their experts' ranks.

        mesh: (replicas, expert-parallel ranks). The parameters become DTensors of the full shape and are returned.
        Their gradients are of one replica's tokens, so the caller sums them over replicas. Raises `ConfigError` if the
        number of ranks does not divide the number of experts.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        ranks = mesh.size(1)
        allowed = f"must divide the n_experts = {self.n_experts} of every layer that has experts"
        require(self.n_experts % ranks == 0, "train.expert_parallel", ranks, allowed)
        self._group = mesh.get_group(1)

        def sharded(whole: Tensor) -> nn.Parameter:
            own = whole.detach().chunk(ranks)[mesh.get_local_rank(1)].clone()
            return nn.Parameter(DTensor.from_local(own, mesh, (Replicate(), Shard(0)), run_check=False))

        self.gate_up, self.down = sharded(self.gate_up), sharded(self.down)
        return [self.gate_up, self.down]

    def forward(self, x_ND: Tensor, dispatch: Dispatch, weight_NK: Tensor) -> Tensor:
        """(N, D) → (N, D): the weighted sum of the outputs of each token's experts; 0 for a token without experts."""
        if torch.compiler.is_exporting():
            return self._every_expert(x_ND, dispatch.expert_NK, weight_NK)
        rows = dispatch.scatter(x_ND)
        if self._group is None:
            y = self._swiglus(rows, dispatch.ends_E, self.gate_up, self.down, surplus=dispatch.surplus)
        else:
            y = apply_at_owners(rows.to(product_dtype(rows)), dispatch.load_E, self._local_swiglus, self._group)
        return dispatch.gather(y, weight_NK)

    def _every_expert(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """The same by products of all tokens with all experts: in a graph for other runtimes nothing is sorted."""
        weight_NE = weight_NK.new_zeros(x_ND.shape[0], self.n_experts).scatter(1, expert_NK, weight_NK)
        hidden_ENF = swiglu(torch.matmul(x_ND, self.gate_up))
        return torch.matmul(hidden_ENF * weight_NE.T[..., None], self.down).sum(dim=0)

    def _local_swiglus(self, rows: Tensor, ends_E: Tensor) -> Tensor:
        return self._swiglus(rows, ends_E, local(self.gate_up), local(self.down))

    def _swiglus(self, rows: Tensor, ends_E: Tensor, gate_up: Tensor, down: Tensor, *, surplus: bool = False) -> Tensor:
        """The experts' outputs for rows sorted by expert."""
        hidden = swiglu(grouped_mm(rows, gate_up, ends_E, backend=self.backend, surplus=surplus))
        return grouped_mm(hidden, down, ends_E, backend=self.backend, surplus=surplus)


def check_recordable(model: nn.Module) -> None:
    """Raise `UsageError` for experts whose products need a loop, which synchronises with the device."""
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.down.dtype != torch.bfloat16:
            raise UsageError(
                f'decoding = "graph": {name} are in {module.down.dtype}, which CUDA multiplies without a graph '
                'only: use "eager", or the model in bfloat16'
            )
