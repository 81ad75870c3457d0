"""Optimizers and the one interface through which the loop sees them."""

from swamla.train.optim.adamw import AdamWConfig
from swamla.train.optim.lion import Lion, LionConfig
from swamla.train.optim.muon import Muon, MuonConfig
from swamla.train.optim.named import NamedOptimizer

OptimizerConfig = AdamWConfig | LionConfig | MuonConfig

__all__ = ["AdamWConfig", "Lion", "LionConfig", "Muon", "MuonConfig", "NamedOptimizer", "OptimizerConfig"]
