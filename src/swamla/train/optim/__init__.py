"""Optimizers, and their common interface to the training loop."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.train.optim.adamw import AdamWConfig as AdamWConfig
    from swamla.train.optim.lion import Lion as Lion
    from swamla.train.optim.lion import LionConfig as LionConfig
    from swamla.train.optim.muon import Muon as Muon
    from swamla.train.optim.muon import MuonConfig as MuonConfig
    from swamla.train.optim.named import GroupRates as GroupRates
    from swamla.train.optim.named import NamedOptimizer as NamedOptimizer
    from swamla.train.optim.named import OptimizerConfig as OptimizerConfig
    from swamla.train.optim.named import Role as Role
    from swamla.train.optim.named import StateTensor as StateTensor
    from swamla.train.optim.named import decay_groups as decay_groups
    from swamla.train.optim.named import named_parameters as named_parameters
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
