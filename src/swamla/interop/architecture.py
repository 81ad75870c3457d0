"""Other programs' architectures: the contract of one, and what all of them share."""

import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

from swamla.config import from_plain, to_plain
from swamla.errors import ConfigError, UsageError
from swamla.interop.weights import Rule
from swamla.model.ffns.ffn import FFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.norm import NormConfig
from swamla.model.rope import LinearScaling, Llama3Scaling, RopeConfig, Scaling, YarnScaling
from swamla.registry import Registered, members_of

M = TypeVar("M", bound=MixerConfig)
F = TypeVar("F", bound=FFNConfig)
N = TypeVar("N", bound=NormConfig)

# Keys of a config.json that do not change the function of the model: names of files and classes, defaults of
# generation, training settings, and descriptions of what other keys say.
HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_name_or_path",
        "add_bos_token",
        "architectures",
        "attention_dropout",
        "attn_dropout",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "decoder_start_token_id",
        "dtype",
        "embd_dropout",
        "embd_pdrop",
        "eos_token_id",
        "ep_size",
        "finetuning_task",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "language_model_only",
        "max_position_embeddings",
        "max_window_layers",
        "model_type",
        "n_ctx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "seq_aux",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_return_dict",
        "aux_loss_alpha",
        "chunk_size_feed_forward",
        "num_nextn_predict_layers",
        "tokenizer_class",
    ]
)

QUANTIZED = ("quantization_config", "compression_config")  # keys of files whose weights are not plain numbers
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})  # values that switch nothing on


@dataclass(frozen=True, kw_only=True)
class Architecture(Registered, home="swamla.interop.architectures"):
    """A model of another program, as its config.json describes it: the fields have that file's names.

    Only fields that determine the function are here. A value that ours cannot express is refused by the field's type
    (a `Literal`) or by `language_model`.
    kind: the config's `model_type`.  class_name: of the model in transformers.  prefix: of its weights' names, which
    files of a model without head lack.  fixed: keys of the config.json that may have one value only.
    also_named: another name of a key of the config.json → its name.
    unwritten: fields that config.json does not have.  surplus: pattern of the names of weights that are not read.
    renamed: older name → newer name, as patterns of `re.sub`, of weights.  harmless: keys of the config.json that do
    not change the function, beside those of `HARMLESS`.
    tried_late: whether others that are equal, too, are chosen before it.
    inside: kinds of models with a part that sees images, of which it is the language model.
    has_every_model: whether there is no model of ours that it lacks; it is chosen where no other is equal.
    """

    class_name: ClassVar[str]
    fixed: ClassVar[Mapping[str, Any]] = {}
    also_named: ClassVar[Mapping[str, str]] = {}
    unwritten: ClassVar[frozenset[str]] = frozenset()
    surplus: ClassVar[str] = r".*\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)"  # tables in older files
    prefix: ClassVar[str] = "model."
    tried_late: ClassVar[bool] = False
    has_every_model: ClassVar[bool] = False
    renamed: ClassVar[Mapping[str, str]] = {}
    inside: ClassVar[tuple[str, ...]] = ()
    harmless: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    @abstractmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them: `equal` compares.

        Raises `Lacks` for mixers, FFNs or norms of another kind.
        """

    @classmethod
    def equal(cls, config: LanguageModelConfig) -> Self:
        """The one that equals a model of ours. Raises `Lacks` naming the first setting that it does not have."""
        found = cls.of(config)
        require_same_function(cls.kind, config, found.language_model())
        return found

    @abstractmethod
    def language_model(self) -> LanguageModelConfig:
        """The equal model of ours."""

    @abstractmethod
    def rules(self) -> Iterator[Rule]:
        """How every weight of ours, but a tied head, is made of theirs; the embedding first."""

    @classmethod
    def newer(cls, name: str) -> str:
        """The newest name of a weight."""
        for old, new in cls.renamed.items():
            name = re.sub(old, new, name)
        return name

    def leaves_out(self, name: str) -> bool:
        """Whether a weight of this name is not read, as `surplus` says."""
        return re.fullmatch(self.surplus, name) is not None

    @classmethod
    def differences(cls, plain: Mapping[str, Any]) -> Iterator[str]:
        """What of a config.json is left out on purpose, to be warned of."""
        return iter(())

    @classmethod
    def read(cls, plain: Mapping[str, Any], origin: str) -> Self:
        """From a config.json. Raises `ConfigError` for what ours cannot express; warns of keys that are not known."""
        plain = {cls.also_named.get(key, key): value for key, value in plain.items()}
        known = {field.name for field in fields(cls)} - cls.unwritten
        given = {key: value for key, value in cls.modern(plain).items() if key in known}
        for key, only in cls.fixed.items():
            if plain.get(key, only) != only:
                raise ConfigError(key, plain[key], f"must be {only!r}: nothing else is supported", origin)
        known |= cls.fixed.keys() | cls.harmless | HARMLESS | {*QUANTIZED}
        unknown = sorted(key for key, value in plain.items() if key not in known and value not in NOTHING)
        left_out = [f"{', '.join(unknown)}: not known to swamla, and left out"] if unknown else []
        for each in [*left_out, *cls.differences(plain)]:
            warnings.warn(f"{origin}: {each}", stacklevel=2)
        return from_plain(cls, given, origin=origin)

    @classmethod
    def modern(cls, plain: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with the keys of the newest transformers."""
        return rope_in_one_place(plain)

    def trained_on(self, length: int) -> Self:
        """The same with the length of a text in training, for one whose config.json has a place for it."""
        return self

    def files(self) -> dict[str, str]:
        """Further text files that stand beside config.json, by name."""
        return {}

    def plain(self) -> dict[str, Any]:
        """The config.json, without what transformers adds: names of files, ids of special tokens."""
        found = {"architectures": [self.class_name], "model_type": self.kind, **to_plain(self)}
        for name in ("kind", *self.unwritten, *(name for name, value in found.items() if value == [])):
            found.pop(name, None)
        if "rope_parameters" in found:
            found["rope_parameters"] = {
                k: v for k, v in found["rope_parameters"].items() if v is not None or k == "rope_theta"
            }
        return found


class Lacks(UsageError):
    """An architecture does not have a setting of a model of ours."""

    def __init__(self, architecture: str, field: str, got: Any, wanted: str) -> None:
        super().__init__(f"{field} = {got!r}: {architecture} does not have it, it must be {wanted}")


Known = Mapping[str, type[Architecture]]


def architecture_of(plain: Mapping[str, Any], origin: str) -> Architecture:
    """The architecture that a config.json describes. Raises `UsageError` for one that is not mapped."""
    known: Known = members_of(Architecture)  # type: ignore[assignment]
    plain, kind = _language_model(plain, known, origin), str(plain.get("model_type"))
    kinds = {**known, **{outer: each for each in known.values() for outer in each.inside}}
    if kind not in kinds:
        raise UsageError(f"{origin}: model_type = {kind!r}: must be one of {', '.join(sorted(kinds))}")
    return kinds[kind].read(plain, origin)


def require_plain_numbers(plain: Mapping[str, Any], origin: str) -> None:
    """Raise `ConfigError` if a config.json says that the weights are quantized; what it describes is no less exact."""
    for key in QUANTIZED:
        if plain.get(key):
            method = plain[key].get("quant_method") if isinstance(plain[key], Mapping) else plain[key]
            raise ConfigError(key, method, "quantized weights are not read: take the model in bf16 or fp32", origin)


def _language_model(plain: Mapping[str, Any], known: Known, origin: str) -> Mapping[str, Any]:
    """The settings of the language model in one that sees images. Whether its head is tied is said outside."""
    text = plain.get("text_config")
    if not isinstance(text, Mapping) or not any(plain.get("model_type") in each.inside for each in known.values()):
        return plain
    warnings.warn(f"{origin}: read as its language model: the part that sees images is left out", stacklevel=3)
    tied = {"tie_word_embeddings": plain["tie_word_embeddings"]} if "tie_word_embeddings" in plain else {}
    return {**text, **tied}


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary positions as a config.json describes them.

    rope_theta: None, where an architecture allows it, for no positions.
    partial_rotary_factor: share of a head that is rotated.
    """

    rope_theta: float | None = 10000.0
    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def rope(self, layout: Literal["half", "interleaved"], *, sharpens_softmax: bool = False) -> RopeConfig:
        """Ours. sharpens_softmax: mscale_all_dim scales the softmax too, as in models with latent attention."""
        if self.rope_theta is None:
            raise ConfigError("rope_parameters.rope_theta", None, "must be a number, e.g. 10000.0")
        scaling: Scaling | None = None
        if self.rope_type == "linear":
            scaling = LinearScaling(factor=self._factor())
        elif self.rope_type == "yarn":
            all_dim = self.mscale_all_dim or 0.0
            if all_dim and not sharpens_softmax:
                raise UsageError("rope_parameters.mscale_all_dim: is supported with latent attention only")
            scaling = YarnScaling(
                factor=self._factor(),
                original_length=self.original_max_position_embeddings or 0,
                beta_fast=self.beta_fast or 32.0,
                beta_slow=self.beta_slow or 1.0,
                mscale=1.0 if self.mscale is None else self.mscale,
                mscale_all_dim=all_dim,
            )
            if self.attention_factor not in (None, scaling.attention_factor):
                raise UsageError(
                    f"rope_parameters.attention_factor = {self.attention_factor}: must be {scaling.attention_factor}, "
                    "which follows from the factor"
                )
        elif self.rope_type == "llama3":
            scaling = Llama3Scaling(
                factor=self._factor(),
                original_length=self.original_max_position_embeddings or 0,
                low_freq_factor=self.low_freq_factor or 0.0,
                high_freq_factor=self.high_freq_factor or 0.0,
            )
        return RopeConfig(base=self.rope_theta, layout=layout, scaling=scaling)

    def plain(self) -> dict[str, Any]:
        """As it stands in a config.json."""
        return {key: value for key, value in to_plain(self).items() if value is not None}

    def _factor(self) -> float:
        return 1.0 if self.factor is None else self.factor

    @classmethod
    def of(cls, rope: RopeConfig, *, partial: float = 1.0) -> Self:
        """Theirs. partial: share of a head that is rotated."""
        plain, scaling = cls(rope_theta=rope.base, partial_rotary_factor=partial), rope.scaling
        if scaling is None:
            return plain
        if isinstance(scaling, LinearScaling):
            return replace(plain, rope_type="linear", factor=scaling.factor)
        if isinstance(scaling, Llama3Scaling):
            return replace(
                plain,
                rope_type="llama3",
                factor=scaling.factor,
                original_max_position_embeddings=scaling.original_length,
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
            )
        return replace(
            plain,
            rope_type="yarn",
            factor=scaling.factor,
            original_max_position_embeddings=scaling.original_length,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            mscale=scaling.mscale,
            mscale_all_dim=scaling.mscale_all_dim,
            attention_factor=scaling.attention_factor,
        )


def rope_in_one_place(plain: Mapping[str, Any], partial: float = 1.0) -> dict[str, Any]:
    """The config.json with `rope_parameters`, which older files write as `rope_theta` and `rope_scaling`.

    partial: partial_rotary_factor where there is none.
    """
    found = dict(plain.get("rope_parameters") or plain.get("rope_scaling") or {})
    if "type" in found:
        found["rope_type"] = found.pop("type")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in plain:
            found.setdefault(key, plain[key])
    found.setdefault("partial_rotary_factor", partial)
    known = {field.name for field in fields(RopeParameters)}
    # Sections of images' coordinates: for text all three coordinates are the position.
    images = ("mrope_section", "mrope_interleaved")
    found = {key: value for key, value in found.items() if key in known or key not in images}
    return {**plain, "rope_parameters": found}


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
