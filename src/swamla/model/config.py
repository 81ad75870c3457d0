"""The whole model as data: named blocks, and the pattern in which they are stacked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from swamla.config import within
from swamla.errors import require
from swamla.model.block import BlockConfig
from swamla.model.norm import NormConfig, RMSNormConfig

if TYPE_CHECKING:
    from swamla.model.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A decoder-only language model.

    vocab_size: ids the model knows; 0 stands for as many as the tokenizer has, and is settled before `build`.
    width: of the residual stream.
    blocks: what a layer may be, by name.
    pattern: the name of every layer's block, bottom first; its length is the depth.
    norm: before every mixer and FFN, and before the head.
    tied_head: whether the head shares the embedding's weights.
    learned_positions: how many learned position vectors to add, then the longest document it can read; 0 for none.
    dropout: of the embeddings and of what mixers and FFNs add, in training.
    init_std: standard deviation of the initial weights; output projections get it / √(2 · depth).
    """

    vocab_size: int = 0
    width: int
    blocks: dict[str, BlockConfig]
    pattern: tuple[str, ...]
    norm: NormConfig = field(default_factory=RMSNormConfig)
    tied_head: bool = True
    learned_positions: int = 0
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        require(self.vocab_size >= 0, "vocab_size", self.vocab_size, "must be > 0, or 0 for the tokenizer's")
        require(self.width > 0, "width", self.width, "must be > 0, e.g. 256")
        require(
            len(self.pattern) > 0, "pattern", self.pattern, 'must name a block for every layer, e.g. ["swa", "mla"]'
        )
        for name in self.pattern:
            require(name in self.blocks, "pattern", name, f"must be one of the blocks: {', '.join(self.blocks)}")
        for name in self.blocks:
            require(name in self.pattern, "blocks", name, f"is not used by the pattern: {' '.join(self.pattern)}")
        require(self.learned_positions >= 0, "learned_positions", self.learned_positions, "must be >= 0 (0: none)")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1), e.g. 0.1")
        require(self.init_std > 0, "init_std", self.init_std, "must be > 0, e.g. 0.02")
        for name, block in self.blocks.items():  # what does not fit the width is found now, not when it is built
            with within(f"blocks.{name}.mixer"):
                block.mixer.n_parameters(self.width)
            with within(f"blocks.{name}.ffn"):
                block.ffn.n_parameters(self.width)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.pattern)

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The block of every layer, bottom first."""
        return tuple(self.blocks[name] for name in self.pattern)

    def with_backends(self, paths: Mapping[str, str]) -> "LanguageModelConfig":
        """The same model, mixers of these blocks by the backends given, but for those that name one themselves."""
        blocks = {
            name: replace(block, mixer=block.mixer.with_backend(paths[name])) if name in paths else block
            for name, block in self.blocks.items()
        }
        return replace(self, blocks=blocks)

    def build(self, seed: int | None = None) -> "LanguageModel":
        """The model with the initial weights of `seed`, or of a seed drawn from torch's random generator."""
        import torch

        model, device = self.skeleton(), torch.get_default_device()
        if device.type == "meta":
            return model
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu").item())
        model.to_empty(device=device)
        model.tie()
        model.reset_weights(seed)
        return model

    def skeleton(self) -> "LanguageModel":
        """The model without numbers, on torch's meta device: shapes and names alone."""
        import torch

        from swamla.model.initial import Unfilled
        from swamla.model.language_model import LanguageModel

        require(self.vocab_size > 0, "vocab_size", self.vocab_size, "must be > 0 to build the model")
        with torch.device("meta"), Unfilled():
            return LanguageModel(self)
