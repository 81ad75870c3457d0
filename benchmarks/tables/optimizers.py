"""One step of each optimizer on the model of the training table: ours against PyTorch's own."""

import torch
from torch import nn

from benchmarks.contenders import QUICK, Shape
from benchmarks.running import Bench, Maker, times_faster
from swamla.bench.measuring import Run
from swamla.bench.results import Row
from swamla.train.optim import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig, named_parameters
from swamla.train.optim.muon import is_hidden

TABLE = "optimizers"
ADAMW, MUON = "PyTorch, AdamW fused", "PyTorch, Muon and AdamW"
OURS: dict[str, OptimizerConfig] = {
    "AdamW": AdamWConfig(),
    "AdamW, bf16 moments": AdamWConfig(moments="bf16"),
    "AdamW, 8-bit moments": AdamWConfig(moments="8bit"),
    "Lion": LionConfig(),
    "Lion, bf16 moments": LionConfig(moments="bf16"),
    "Lion, 8-bit moments": LionConfig(moments="8bit"),
    "Muon": MuonConfig(),
}
LR, DECAY = 1e-4, 0.1


def measure(bench: Bench) -> None:
    """The table. Ratios are to PyTorch's optimizer of the same name; Lion's are to AdamW."""
    model = (QUICK if bench.quick else Shape()).config("swa swa mla").build(seed=0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    numbers = sum(p.numel() for p in model.parameters())
    built: dict[str, list[torch.optim.Optimizer]] = {}

    def maker(name: str) -> Maker:
        def make() -> Run:
            if name in OURS:
                optimizer = OURS[name].build(model, lr=LR, weight_decay=DECAY)
                built[name] = list(optimizer.optimizers)
                return optimizer.step
            built[name] = theirs = pytorch_adamw(model) if name == ADAMW else pytorch_muon(model)
            return lambda: [optimizer.step() for optimizer in theirs]

        return make

    what: Row = {"parameters": numbers}
    makers = {name: maker(name) for name in (ADAMW, MUON, *OURS)}
    outcomes = bench.race(TABLE, what, makers, rounds=11, limit=22)
    for name, outcome in outcomes.items():
        row: Row = {
            "name": name,
            **what,
            "ratio": times_faster(outcomes.get(MUON if "Muon" in name else ADAMW), outcome),
            "state_bytes": sum(state_bytes(optimizer) for optimizer in built[name]),
        }
        bench.results.add(TABLE, {**row, **outcome.row()})


def pytorch_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """PyTorch's fused AdamW for all parameters."""
    return [torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)]


def pytorch_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """PyTorch's Muon for the matrices that our Muon updates, fused AdamW for the rest."""
    sides: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for trained in named_parameters(model):
        sides[is_hidden(trained.spec)].append(trained.parameter)
    muon = torch.optim.Muon(sides[True], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(sides[False], lr=LR, weight_decay=DECAY, fused=True)]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in its state."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
