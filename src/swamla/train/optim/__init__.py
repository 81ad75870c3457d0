"""Optimizers and the one interface through which the loop sees them."""

from swamla.train.optim.adamw import AdamWConfig
from swamla.train.optim.lion import Lion, LionConfig
from swamla.train.optim.muon import Muon, MuonConfig
from swamla.train.optim.named import Held, NamedOptimizer, OptimizerConfig, decay_groups, named_parameters

__all__ = [
    "AdamWConfig",
    "Held",
    "Lion",
    "LionConfig",
    "Muon",
    "MuonConfig",
    "NamedOptimizer",
    "OptimizerConfig",
    "decay_groups",
    "named_parameters",
]
