"""The common shape of all contenders, and our models of this shape."""

from dataclasses import dataclass

from swamla.model import BlockConfig, DenseConfig, GDNConfig, LanguageModelConfig, MHAConfig, MLAConfig, SWAConfig
from swamla.model.block import FFNConfig, MixerConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The common shape of all contenders.

    width: of the residual stream.
    heads: of every mixer, each of width `width / heads`.
    depth: number of layers.
    vocabulary: number of token ids.
    window: of sliding-window attention.
    multiple: hidden widths of FFNs are multiples of this.
    """

    width: int = 384
    heads: int = 6
    depth: int = 6
    vocabulary: int = 4096
    window: int = 256
    multiple: int = 64

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def layer(self) -> int:
        """Parameters of a layer, as in GPT-2: 4 D² in attention and 8 D² in the FFN."""
        return 12 * self.width**2

    @property
    def parameters(self) -> int:
        """Parameters of a model with a tied head."""
        return self.depth * self.layer + self.vocabulary * self.width

    def hidden(self, mixers: float) -> int:
        """Hidden width of a SwiGLU in a layer whose mixer has `mixers` parameters."""
        return round((self.layer - mixers) / (3 * self.width) / self.multiple) * self.multiple

    def mixer(self, name: str) -> MixerConfig:
        """Our mixer of this name. MLA's latent is a third of the width; half of a query or key head is rotary."""
        half = self.head // 2
        mixers: dict[str, MixerConfig] = {
            "mha": MHAConfig(n_heads=self.heads),
            "swa": SWAConfig(n_heads=self.heads, window=self.window),
            "gdn": GDNConfig(n_heads=self.heads),
            "mla": MLAConfig(
                n_heads=self.heads,
                kv_lora_rank=self.width // 3,
                qk_nope_head_dim=half,
                qk_rope_head_dim=half,
                v_head_dim=self.head,
            ),
        }
        return mixers[name]

    def config(self, pattern: str, ffn: FFNConfig | None = None) -> LanguageModelConfig:
        """Our model with this pattern, such as "swa swa mla", repeated to the depth."""
        names = tuple(pattern.split())
        blocks = {}
        for name in dict.fromkeys(names):
            mixer = self.mixer(name)
            blocks[name] = BlockConfig(
                mixer=mixer, ffn=ffn or DenseConfig(hidden=self.hidden(mixer.n_parameters(self.width)))
            )
        pattern_of_all = names * (self.depth // len(names))
        return LanguageModelConfig(vocab_size=self.vocabulary, width=self.width, blocks=blocks, pattern=pattern_of_all)


QUICK = Shape(width=96, heads=2, vocabulary=256, window=16, multiple=8)  # for dry runs


def gpt2_twin(shape: Shape) -> LanguageModelConfig:
    """Our config with the arithmetic of GPT-2."""
    block = BlockConfig(mixer=MHAConfig(n_heads=shape.heads, rope=None), ffn=DenseConfig(activation="gelu"))
    return LanguageModelConfig(
        vocab_size=shape.vocabulary, width=shape.width, blocks={"mha": block}, pattern=("mha",) * shape.depth
    )
