"""What the architectures with RMSNorm, SwiGLU and Llama's names of weights share."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from swamla.errors import require
from swamla.interop.architecture import Architecture
from swamla.interop.equality import norm_of
from swamla.interop.weights import Rule, convolution, rows, same, stacked
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.norm import RMSNormConfig


@dataclass(frozen=True, kw_only=True)
class Stack(Architecture):
    """Embedding, layers of a few kinds, final norm, head."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    gain = staticmethod(same)  # the rule of a norm's gain
    embedding: ClassVar[str] = "model.embed_tokens.weight"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            require(self.__dict__[name] > 0, name, self.__dict__[name], "must be > 0")
        kinds = len(self.layer_kinds)
        require(kinds == self.num_hidden_layers, "layer_types", kinds, f"must name {self.num_hidden_layers} layers")

    @property
    @abstractmethod
    def layer_kinds(self) -> Sequence[str]:
        """The kind of every layer."""

    @abstractmethod
    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """A kind of layer: the name of our block, and the block."""

    @abstractmethod
    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of the mixer of a layer of that kind, whose names begin with `theirs`."""

    def norms(self, kind: str) -> tuple[str, str]:
        """Their names of the norms of mixer and FFN in a layer of that kind."""
        return "input_layernorm", "post_attention_layernorm"

    def ffn_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of the FFN of a layer of that kind."""
        return swiglu_rules(ours, f"{theirs}.mlp", self.intermediate_size)

    @classmethod
    def size_of(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The fields of a model of ours that all stacks have, but intermediate_size."""
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "rms_norm_eps": norm_of(cls.kind, config, RMSNormConfig).eps,
            "tie_word_embeddings": config.tied_head,
        }

    def language_model(self) -> LanguageModelConfig:
        """The equal model of ours."""
        blocks = {kind: self.block(kind) for kind in dict.fromkeys(self.layer_kinds)}
        return LanguageModelConfig(
            vocab_size=self.vocab_size,
            width=self.hidden_size,
            blocks=dict(blocks.values()),
            pattern=tuple(blocks[kind][0] for kind in self.layer_kinds),
            norm=RMSNormConfig(eps=self.rms_norm_eps),
            tied_head=self.tie_word_embeddings,
        )

    def rules(self) -> Iterator[Rule]:
        """How our weights are made of theirs."""
        yield same("embedding.weight", self.embedding)
        yield self.gain("norm.weight", "model.norm.weight")
        if not self.tie_word_embeddings:
            yield same("head.weight", "lm_head.weight")
        for index, kind in enumerate(self.layer_kinds):
            ours, theirs = f"blocks.{index}", f"model.layers.{index}"
            for norm, their_norm in zip(("mixer_norm", "ffn_norm"), self.norms(kind), strict=True):
                yield self.gain(f"{ours}.{norm}.weight", f"{theirs}.{their_norm}.weight")
            yield from self.mixer_rules(kind, f"{ours}.mixer", theirs)
            yield from self.ffn_rules(kind, f"{ours}.ffn", theirs)


def swiglu_rules(ours: str, theirs: str, hidden: int, *, bias: bool = False) -> Iterator[Rule]:
    """The weights of a dense SwiGLU."""
    for what in ("weight", "bias") if bias else ("weight",):
        yield rows(f"{ours}.gate_up_proj.{what}", {f"{theirs}.{x}_proj.{what}": hidden for x in ("gate", "up")})
        yield same(f"{ours}.down_proj.{what}", f"{theirs}.down_proj.{what}")


def expert_rules(
    ours: str, theirs: str, n_experts: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Rule]:
    """The weights of routed experts."""
    gate, up, down = ([f"{theirs}.{expert}.{name}.weight" for expert in range(n_experts)] for name in names)
    yield stacked(f"{ours}.gate_up", list(zip(gate, up, strict=True)))
    yield stacked(f"{ours}.down", [(name,) for name in down])


def delta_rules(ours: str, theirs: str, channels: dict[str, int], taps: int) -> Iterator[Rule]:
    """The filters of queries, keys and values, with a name each, of a delta rule's layer. channels: by letter."""
    yield convolution(f"{ours}.conv_weight", {f"{theirs}.{x}_conv1d.weight": n for x, n in channels.items()}, taps)


def routed(ffn: MoEConfig) -> dict[str, Any]:
    """The settings of a router under DeepSeek's names."""
    return {
        "num_experts_per_tok": ffn.n_activated,
        "n_group": ffn.groups,
        "topk_group": ffn.groups_used,
        "norm_topk_prob": ffn.normalise,
        "routed_scaling_factor": ffn.scale,
    }


def dense_hidden(config: LanguageModelConfig) -> int | None:
    """The hidden width of the dense layers, None without any."""
    found = [block.ffn.hidden_dim(config.width) for block in config.layers if isinstance(block.ffn, DenseConfig)]
    return found[0] if found else None
