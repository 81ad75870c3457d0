"""GPT-2: `mha` with learned positions, LayerNorm, GELU, biases everywhere, a tied head."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from swamla.errors import require
from swamla.interop.architecture import Architecture
from swamla.interop.equality import Lacks, ffn_of, mixer_of, norm_of
from swamla.interop.weights import Rule, same, transposed
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.norm import LayerNormConfig
from swamla.registry import register

_LAYER = {
    "mixer_norm": "ln_1",
    "mixer.qkv_proj": "attn.c_attn",
    "mixer.o_proj": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up_proj": "mlp.c_fc",
    "ffn.down_proj": "mlp.c_proj",
}


@register
@dataclass(frozen=True, kw_only=True)
class GPT2(Architecture):
    """GPT-2. n_inner: hidden width of the MLP; None for 4 · n_embd."""

    kind: ClassVar[str] = "gpt2"
    class_name: ClassVar[str] = "GPT2LMHeadModel"
    prefix: ClassVar[str] = "transformer."
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False

    @classmethod
    def example(cls) -> Self:
        """Two layers."""
        return cls(vocab_size=96, n_positions=256, n_embd=32, n_layer=2, n_head=4)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            size = self.__dict__[name]
            require(size is None or size > 0, name, size, "must be > 0")
        require(self.n_embd % self.n_head == 0, "n_head", self.n_head, f"must divide n_embd = {self.n_embd}")
        for name in ("tie_word_embeddings", "scale_attn_weights"):
            require(self.__dict__[name], name, False, "must be true: nothing else is supported")
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            require(not self.__dict__[name], name, True, "must be false: nothing else is supported")

    @classmethod
    def differences(cls, plain: Mapping[str, Any]) -> Iterator[str]:
        """Dropout of attention weights, or a different one of embeddings, is not kept."""
        for name, ours in (("attn_pdrop", 0.0), ("embd_pdrop", plain.get("resid_pdrop", cls.resid_pdrop))):
            if (found := plain.get(name, cls.__dataclass_fields__[name].default)) != ours:
                yield f"{name} = {found} becomes {ours}, which matters in training only"

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them."""
        n_heads = mixer_of(cls.kind, config, MHAConfig).n_heads
        hidden = ffn_of(cls.kind, config, DenseConfig).hidden_dim(config.width)
        if not config.learned_positions:
            raise Lacks(cls.kind, "learned_positions", 0, "a number of them")
        return cls(
            vocab_size=config.vocab_size,
            n_positions=config.learned_positions,
            n_embd=config.width,
            n_layer=config.depth,
            n_head=n_heads if config.width % n_heads == 0 else 1,
            n_inner=None if hidden == 4 * config.width else hidden,
            layer_norm_epsilon=norm_of(cls.kind, config, LayerNormConfig).eps,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=0.0,
            initializer_range=config.init_std,
        )

    def language_model(self) -> LanguageModelConfig:
        """The equal model of ours, with dropout of the residual stream only: attention weights have none."""
        hidden = None if self.n_inner in (None, 4 * self.n_embd) else self.n_inner
        block = BlockConfig(
            mixer=MHAConfig(n_heads=self.n_head, rope=None, bias=True),
            ffn=DenseConfig(hidden=hidden, activation="gelu", bias=True),
        )
        return LanguageModelConfig(
            vocab_size=self.vocab_size,
            width=self.n_embd,
            blocks={"mha": block},
            pattern=("mha",) * self.n_layer,
            norm=LayerNormConfig(eps=self.layer_norm_epsilon),
            learned_positions=self.n_positions,
            dropout=self.resid_pdrop,
            init_std=self.initializer_range,
        )

    def rules(self) -> Iterator[Rule]:
        """How our weights are made of theirs, whose matrices are transposed, as in `Conv1D`."""
        yield same("embedding.weight", f"{self.prefix}wte.weight")
        yield same("positions.weight", f"{self.prefix}wpe.weight")
        for kind in ("weight", "bias"):
            yield same(f"norm.{kind}", f"{self.prefix}ln_f.{kind}")
            for layer in range(self.n_layer):
                for ours, theirs in _LAYER.items():
                    rule = transposed if kind == "weight" and "." in theirs else same
                    yield rule(f"blocks.{layer}.{ours}.{kind}", f"{self.prefix}h.{layer}.{theirs}.{kind}")
