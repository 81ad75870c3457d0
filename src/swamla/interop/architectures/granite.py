"""Granite: Llama with factors of embeddings, residuals, scores and logits; with windows and sinks in `granite_swa`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from swamla.errors import require
from swamla.interop.architectures.llama import LayerType, Llama, windows_of
from swamla.interop.rope import RopeParameters
from swamla.interop.weights import Rule, same, scaled
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.norm import RMSNormConfig
from swamla.model.rope import RopeConfig
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Granite(Llama):
    """Granite 3 and 4, dense.

    Ours has no factors. They are in its weights: its residual stream is theirs divided by embedding_multiplier, so that
    embeddings and a tied head are the same tensor. RMSNorm undoes that exactly, with eps / embedding_multiplier². What
    is added to the stream is multiplied in the output projections, logits are divided in the last norm's gain. Written,
    all factors but attention_multiplier are 1.

    attention_multiplier: factor of the scores before the softmax.
    """

    kind: ClassVar[str] = "granite"
    class_name: ClassVar[str] = "GraniteForCausalLM"
    tried_late: ClassVar[bool] = True
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_multiplier: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
            require(self.__dict__[name] > 0, name, self.__dict__[name], "must be > 0, e.g. 1.0")

    @classmethod
    def example(cls) -> Self:
        """Two layers with grouped heads, whose scores have a factor of their own."""
        return replace(super().example(), attention_multiplier=0.25)

    def attention(self) -> dict[str, Any]:
        """With the factor of scores."""
        return {**super().attention(), "softmax_scale": self.attention_multiplier}

    def language_model(self) -> LanguageModelConfig:
        """The equal model of ours."""
        norm = RMSNormConfig(eps=self.rms_norm_eps / self.embedding_multiplier**2)
        return replace(super().language_model(), norm=norm)

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The factor of scores."""
        mixer = next(block.mixer for block in config.layers if isinstance(block.mixer, MHAConfig))
        factor = mixer.softmax_scale or mixer.key_dim(config.width) ** -0.5
        return {**super().details(config), "attention_multiplier": factor}

    def rules(self) -> Iterator[Rule]:
        """Llama's, with the factors in weights."""
        added = self.embedding_multiplier / self.residual_multiplier
        factors = {"norm": self.logits_scaling, "o_proj": added, "down_proj": added}
        for rule in super().rules():
            factor = factors.get(rule.ours.split(".")[-2], 1.0)
            yield rule if factor == 1 else scaled(rule.ours, rule.theirs[0], factor)


@register
@dataclass(frozen=True, kw_only=True)
class GraniteSWA(Granite):
    """Granite with windows: a learned sink for each head, and for each layer a base of positions, or none.

    layer_rope_theta: the base of each layer's positions, 0 for none; rope_theta everywhere by default.
    """

    kind: ClassVar[str] = "granite_swa"
    class_name: ClassVar[str] = "GraniteSWAForCausalLM"
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    sliding_window: int | None = 128
    layer_types: tuple[LayerType, ...] = ()
    layer_rope_theta: tuple[float, ...] = ()

    @classmethod
    def example(cls) -> Self:
        """A layer that sees all tokens, without positions, and one with a window."""
        types: tuple[LayerType, ...] = ("full_attention", "sliding_attention")
        return replace(super().example(), layer_types=types, layer_rope_theta=(0.0, 1e4), sliding_window=7)

    @property
    def layer_kinds(self) -> Sequence[str]:
        """The kind of every layer: what it sees, and the base of its positions."""
        depth = self.num_hidden_layers
        types = self.layer_types or [f"{'sliding' if i % 4 else 'full'}_attention" for i in range(depth)]
        base = self.rope_parameters.rope_theta or 0.0
        bases = [float(each) for each in self.layer_rope_theta or (base,) * depth]
        require(len(types) == len(bases), "layer_rope_theta", len(bases), f"must have {len(types)} numbers")
        return [f"{kind} {base}" for kind, base in zip(types, bases, strict=True)]

    @property
    def window(self) -> int:
        """Tokens that a layer of sliding attention sees."""
        return self.sliding_window or 0

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """A layer with these positions."""
        sees, base = kind.split()
        name, block = super().block(sees)
        rope = replace(self.rope_parameters, rope_theta=float(base)).rope("half") if float(base) else None
        assert isinstance(block.mixer, MHAConfig)
        alike = [each for each in dict.fromkeys(self.layer_kinds) if each.split()[0] == sees]
        number = alike.index(kind) + 1
        name = name if number == 1 else f"{name}_{number}"
        return name, replace(block, mixer=replace(block.mixer, rope=rope, sink_logit=True))

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """Windows, which layers have them, and the base of each layer's positions."""
        bases = tuple(rope.base if rope else 0.0 for rope in ropes_of(config))
        return {**super().details(config), **windows_of(config), "layer_rope_theta": bases}

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them."""
        turning = next((rope for rope in ropes_of(config) if rope), None)
        found = super().of(config)
        return replace(found, rope_parameters=RopeParameters.of(turning)) if turning else found

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """Those of Llama, and the sinks."""
        yield from super().mixer_rules(kind, ours, theirs)
        yield same(f"{ours}.sink_logit", f"{theirs}.self_attn.sinks")


def ropes_of(config: LanguageModelConfig) -> list[RopeConfig | None]:
    """The positions of each layer of `mha` or `swa`."""
    return [block.mixer.rope for block in config.layers if isinstance(block.mixer, MHAConfig)]
