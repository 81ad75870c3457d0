"""Other programs' architectures: the contract of one, and what all of them share."""

import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from swamla.config import from_plain, to_plain
from swamla.errors import ConfigError, UsageError
from swamla.interop.equality import require_same_function
from swamla.interop.rope import rope_in_one_place
from swamla.interop.weights import Rule
from swamla.model.language_model import LanguageModelConfig
from swamla.registry import Registered, members_of

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
