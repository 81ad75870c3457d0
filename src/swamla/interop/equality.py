"""Whether two models of ours compute the same, and what a model has: for architectures that lack some of it."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from swamla.errors import UsageError
from swamla.model.ffns.ffn import FFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.norm import NormConfig

M = TypeVar("M", bound=MixerConfig)
F = TypeVar("F", bound=FFNConfig)
N = TypeVar("N", bound=NormConfig)


class Lacks(UsageError):
    """An architecture does not have a setting of a model of ours."""

    def __init__(self, architecture: str, field: str, got: Any, wanted: str) -> None:
        self.field = field
        super().__init__(f"{field} = {got!r}: {architecture} does not have it, it must be {wanted}")


# Settings that do not change the function that a trained model computes.
TRAINING_ONLY = frozenset(
    ["dropout", "init_std", "residual", "mup_base_width", "ngram_layer", "backend", "bias_rate", "aux_loss", "z_loss"]
)
# Settings that follow the width unless they are given.
RESOLVED: Mapping[str, Callable[[Any, int], Any]] = {
    "n_kv_heads": lambda mixer, width: mixer.kv_heads,
    "head_dim": lambda mixer, width: mixer.key_dim(width),
    "n_key_heads": lambda mixer, width: mixer.key_heads,
    "head_k_dim": lambda mixer, width: mixer.head_dims(width)[0],
    "head_v_dim": lambda mixer, width: mixer.head_dims(width)[1],
    "hidden": lambda ffn, width: ffn.hidden_dim(width),
    "expert_hidden": lambda ffn, width: ffn.expert_dim(width),
    "decay_rank": lambda mixer, width: mixer.decay_dims(width)[0],
    "rope_dim": lambda mixer, width: mixer.rope_dim or (mixer.rope and mixer.key_dim(width)),
    "softmax_scale": lambda mixer, width: mixer.softmax_scale or mixer.heads(width).key ** -0.5,
    "shared_hidden": lambda ffn, width: ffn.shared_hidden or ffn.expert_dim(width),
}


def require_same_function(name: str, ours: LanguageModelConfig, theirs: LanguageModelConfig) -> None:
    """Raise `Lacks` naming the first setting of `ours` that `theirs`, what the architecture `name` means, has not."""
    if ours.mup_base_width not in (None, ours.width):
        raise Lacks(name, "mup_base_width", ours.mup_base_width, f"none, or the width {ours.width}")
    for setting in fields(ours):
        if setting.name not in TRAINING_ONLY | {"blocks", "pattern"}:
            _require_same(name, setting.name, getattr(ours, setting.name), getattr(theirs, setting.name), ours.width)
    for block, own, their in zip(ours.pattern, ours.layers, theirs.layers, strict=True):
        _require_same(name, f"blocks.{block}", own, their, ours.width)


def _require_same(name: str, where: str, ours: Any, theirs: Any, width: int) -> None:
    if not is_dataclass(ours) or type(ours) is not type(theirs):
        if ours != theirs:
            raise Lacks(name, where, _shown(ours), str(_shown(theirs)))
        return
    for setting in fields(ours):
        if setting.name in TRAINING_ONLY:
            continue
        own, their = getattr(ours, setting.name), getattr(theirs, setting.name)
        if setting.name in RESOLVED and None in (own, their):
            own, their = (RESOLVED[setting.name](config, width) for config in (ours, theirs))
        _require_same(name, f"{where}.{setting.name}", own, their, width)


def _shown(setting: Any) -> Any:
    return getattr(setting, "kind", "a table") if is_dataclass(setting) else "none" if setting is None else setting


def mixer_of(name: str, config: LanguageModelConfig, kind: type[M]) -> M:
    """The lowest mixer of exactly this kind. Raises `Lacks` if there is none."""
    found = next((block.mixer for block in config.layers if type(block.mixer) is kind), None)
    if found is None:
        block = config.pattern[0]
        raise Lacks(name, f"blocks.{block}.mixer.kind", config.blocks[block].mixer.kind, kind.kind)
    return found


def ffn_of(name: str, config: LanguageModelConfig, kind: type[F]) -> F:
    """The lowest FFN of exactly this kind. Raises `Lacks` if there is none."""
    found = next((block.ffn for block in config.layers if type(block.ffn) is kind), None)
    if found is None:
        block = config.pattern[0]
        raise Lacks(name, f"blocks.{block}.ffn.kind", config.blocks[block].ffn.kind, kind.kind)
    return found


def norm_of(name: str, config: LanguageModelConfig, kind: type[N]) -> N:
    """The norm, which has to be of this kind. Raises `Lacks` otherwise."""
    if type(config.norm) is not kind:
        raise Lacks(name, "norm.kind", config.norm.kind, kind.kind)
    return config.norm
