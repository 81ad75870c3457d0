"""A model's config as transformers' config."""

from typing import Any

from transformers import PreTrainedConfig

from swamla.interop.architectures.swamla import AUTO_MAP, Swamla
from swamla.model.language_model import LanguageModelConfig


class SwamlaConfig(PreTrainedConfig):
    """A `LanguageModelConfig` as transformers' config.

    settings, vocab_size, tie_word_embeddings, swamla_format: those of `Swamla`, as plain data.
    use_cache: whether `generate` and passes without gradients or labels return a cache.
    """

    model_type = "swamla"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own name and type

    def __init__(
        self,
        *,
        settings: dict[str, Any] | None = None,
        swamla_format: int = Swamla.swamla_format,
        vocab_size: int = 0,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.settings, self.swamla_format, self.vocab_size = settings, swamla_format, vocab_size
        self.use_cache, self.tie_word_embeddings = use_cache, tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        # The file that these names stand in is written beside the config; a hub's name in front of them would be stale.
        super().__init__(**{**others, "auto_map": AUTO_MAP})

    @classmethod
    def of(cls, config: LanguageModelConfig, **others: Any) -> "SwamlaConfig":
        """The config of a model. others: fields of this class or of transformers' own, e.g. `eos_token_id`."""
        return cls(**{**Swamla.of(config).plain(), **others})

    def build_config(self) -> LanguageModelConfig:
        """The model's config. Raises `ConfigError` for bad settings or none."""
        names = ("settings", "vocab_size", "tie_word_embeddings", "swamla_format")
        return Swamla.read({name: vars(self)[name] for name in names}, "SwamlaConfig").language_model()

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.build_config().width

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self.build_config().depth

    @property
    def final_logit_softcapping(self) -> float | None:
        """The bound of logits, under the name of Gemma 2, for programs that multiply with the head themselves."""
        return self.build_config().logit_cap or None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this module into every folder that it saves."""
