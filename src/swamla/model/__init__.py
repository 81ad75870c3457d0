"""Models as data: configs that build language models out of mixers, FFNs and norms."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.model.accounting import ParameterSpec as ParameterSpec
    from swamla.model.accounting import count_parameters as count_parameters
    from swamla.model.accounting import state_bytes as state_bytes
    from swamla.model.accounting import training_flops_per_token as training_flops_per_token
    from swamla.model.block import Block as Block
    from swamla.model.block import BlockConfig as BlockConfig
    from swamla.model.ffns.dense import DenseConfig as DenseConfig
    from swamla.model.ffns.ffn import FFN as FFN
    from swamla.model.ffns.ffn import FFNConfig as FFNConfig
    from swamla.model.ffns.ffn import Statistics as Statistics
    from swamla.model.ffns.latent_moe import LatentMoE as LatentMoE
    from swamla.model.ffns.latent_moe import LatentMoEConfig as LatentMoEConfig
    from swamla.model.ffns.moe import MoE as MoE
    from swamla.model.ffns.moe import MoEConfig as MoEConfig
    from swamla.model.ffns.none import NoFFNConfig as NoFFNConfig
    from swamla.model.language_model import LanguageModel as LanguageModel
    from swamla.model.language_model import LanguageModelConfig as LanguageModelConfig
    from swamla.model.mixers.explanation import Explanation as Explanation
    from swamla.model.mixers.explanation import Weights as Weights
    from swamla.model.mixers.gdn import GDN as GDN
    from swamla.model.mixers.gdn import GDNConfig as GDNConfig
    from swamla.model.mixers.kda import KDA as KDA
    from swamla.model.mixers.kda import KDAConfig as KDAConfig
    from swamla.model.mixers.latent import LatentAttention as LatentAttention
    from swamla.model.mixers.latent import LatentConfig as LatentConfig
    from swamla.model.mixers.mha import MHA as MHA
    from swamla.model.mixers.mha import MHAConfig as MHAConfig
    from swamla.model.mixers.mixer import Mixer as Mixer
    from swamla.model.mixers.mixer import MixerConfig as MixerConfig
    from swamla.model.mixers.mixer import State as State
    from swamla.model.mixers.mla import MLA as MLA
    from swamla.model.mixers.mla import MLAConfig as MLAConfig
    from swamla.model.mixers.swa import SWA as SWA
    from swamla.model.mixers.swa import SWAConfig as SWAConfig
    from swamla.model.norm import DynamicTanhConfig as DynamicTanhConfig
    from swamla.model.norm import LayerNormConfig as LayerNormConfig
    from swamla.model.norm import NormConfig as NormConfig
    from swamla.model.norm import RMSNormConfig as RMSNormConfig
    from swamla.model.rope import LinearScaling as LinearScaling
    from swamla.model.rope import Llama3Scaling as Llama3Scaling
    from swamla.model.rope import RopeConfig as RopeConfig
    from swamla.model.rope import YarnScaling as YarnScaling
    from swamla.model.state import ModelState as ModelState
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
