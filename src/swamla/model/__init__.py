"""Models as data: configs that build language models out of mixers, FFNs and norms."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swamla.model.accounting import count_parameters, state_bytes, training_flops_per_token
    from swamla.model.block import Block, BlockConfig
    from swamla.model.config import LanguageModelConfig
    from swamla.model.ffns.dense import DenseConfig
    from swamla.model.ffns.ffn import FFN, FFNConfig, Statistics
    from swamla.model.ffns.latent_moe import LatentMoE, LatentMoEConfig
    from swamla.model.ffns.moe import MoE, MoEConfig
    from swamla.model.language_model import LanguageModel, ModelState
    from swamla.model.mixers.gdn import GDN, GDNConfig
    from swamla.model.mixers.latent import LatentAttention, LatentConfig
    from swamla.model.mixers.mha import MHA, MHAConfig
    from swamla.model.mixers.mixer import Mixer, MixerConfig, State
    from swamla.model.mixers.mla import MLA, MLAConfig
    from swamla.model.mixers.swa import SWA, SWAConfig
    from swamla.model.norm import DynamicTanhConfig, LayerNormConfig, NormConfig, RMSNormConfig
    from swamla.model.rope import LinearScaling, RopeConfig, YarnScaling

_HOME = {
    "Block": "block",
    "BlockConfig": "block",
    "DenseConfig": "ffns.dense",
    "DynamicTanhConfig": "norm",
    "FFN": "ffns.ffn",
    "FFNConfig": "ffns.ffn",
    "GDN": "mixers.gdn",
    "GDNConfig": "mixers.gdn",
    "LanguageModel": "language_model",
    "LanguageModelConfig": "config",
    "LatentAttention": "mixers.latent",
    "LatentConfig": "mixers.latent",
    "LatentMoE": "ffns.latent_moe",
    "LatentMoEConfig": "ffns.latent_moe",
    "LayerNormConfig": "norm",
    "LinearScaling": "rope",
    "MHA": "mixers.mha",
    "MHAConfig": "mixers.mha",
    "MLA": "mixers.mla",
    "MLAConfig": "mixers.mla",
    "MoE": "ffns.moe",
    "MoEConfig": "ffns.moe",
    "Mixer": "mixers.mixer",
    "MixerConfig": "mixers.mixer",
    "ModelState": "language_model",
    "NormConfig": "norm",
    "RMSNormConfig": "norm",
    "RopeConfig": "rope",
    "SWA": "mixers.swa",
    "SWAConfig": "mixers.swa",
    "State": "mixers.mixer",
    "Statistics": "ffns.ffn",
    "YarnScaling": "rope",
    "count_parameters": "accounting",
    "state_bytes": "accounting",
    "training_flops_per_token": "accounting",
}

__all__ = [
    "FFN",
    "GDN",
    "MHA",
    "MLA",
    "SWA",
    "Block",
    "BlockConfig",
    "DenseConfig",
    "DynamicTanhConfig",
    "FFNConfig",
    "GDNConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "LatentAttention",
    "LatentConfig",
    "LatentMoE",
    "LatentMoEConfig",
    "LayerNormConfig",
    "LinearScaling",
    "MHAConfig",
    "MLAConfig",
    "Mixer",
    "MixerConfig",
    "MoE",
    "MoEConfig",
    "ModelState",
    "NormConfig",
    "RMSNormConfig",
    "RopeConfig",
    "SWAConfig",
    "State",
    "Statistics",
    "YarnScaling",
    "count_parameters",
    "state_bytes",
    "training_flops_per_token",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"swamla.model.{_HOME[name]}"), name)
    raise AttributeError(f"module 'swamla.model' has no attribute {name!r}")
