"""Our own: any model of ours, for transformers where swamla is installed (`swamla.interop.transformers`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from swamla.interop.architecture import Architecture
from swamla.interop.weights import Rule, same
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.registry import register

CODE = "modeling_swamla"
AUTO_MAP = {"AutoConfig": f"{CODE}.SwamlaConfig", "AutoModelForCausalLM": f"{CODE}.SwamlaForCausalLM"}
SOURCE = '''"""For `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`, where swamla is installed."""

from swamla.interop.transformers import SwamlaConfig, SwamlaForCausalLM

__all__ = ["SwamlaConfig", "SwamlaForCausalLM"]
'''


@register
@dataclass(frozen=True, kw_only=True)
class Swamla(Architecture):
    """A model of ours.

    settings: the model's, but for the two fields that transformers has at the top and changes when it resizes.
    swamla_format: of these settings.
    max_position_embeddings: tokens of a text, for programs that ask; not a limit unless positions are learned.
    """

    kind: ClassVar[str] = "swamla"
    class_name: ClassVar[str] = "SwamlaForCausalLM"
    fixed: ClassVar[Mapping[str, Any]] = {"swamla_format": 1}
    has_every_model: ClassVar[bool] = True
    settings: LanguageModelConfig
    vocab_size: int
    tie_word_embeddings: bool = True
    swamla_format: int = 1
    max_position_embeddings: int | None = None

    @classmethod
    def example(cls) -> Self:
        """Two layers."""
        blocks = {"swa": BlockConfig(mixer=SWAConfig(n_heads=2))}
        return cls.of(LanguageModelConfig(vocab_size=96, width=32, blocks=blocks, pattern=("swa", "swa")))

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that is this model."""
        return cls(
            settings=replace(config, vocab_size=0, tied_head=True),
            vocab_size=config.vocab_size,
            tie_word_embeddings=config.tied_head,
            max_position_embeddings=config.learned_positions or None,
        )

    @classmethod
    def equal(cls, config: LanguageModelConfig) -> Self:
        """The one that is this model, which has no setting that could be lacking."""
        return cls.of(config)

    @classmethod
    def modern(cls, plain: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json as it is."""
        return dict(plain)

    def trained_on(self, length: int) -> Self:
        """The same, where nothing else limits a text told to have this length."""
        return replace(self, max_position_embeddings=self.max_position_embeddings or length)

    def plain(self) -> dict[str, Any]:
        """The config.json, with the file that `trust_remote_code` reads."""
        found = super().plain()
        for name in ("vocab_size", "tied_head"):
            del found["settings"][name]
        if self.max_position_embeddings is None:
            del found["max_position_embeddings"]
        return {**found, "auto_map": AUTO_MAP}

    def files(self) -> dict[str, str]:
        """That file."""
        return {f"{CODE}.py": SOURCE}

    def language_model(self) -> LanguageModelConfig:
        """The model."""
        return replace(self.settings, vocab_size=self.vocab_size, tied_head=self.tie_word_embeddings)

    def rules(self) -> Iterator[Rule]:
        """Every weight and buffer by its name, with the prefix."""
        config = self.language_model()
        for name in config.skeleton().state_dict():
            if not (config.tied_head and name == "head.weight"):
                yield same(name, self.prefix + name)
