"""One layer: a sequence mixer, then perhaps an FFN, each with a norm and added to the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swamla.errors import UsageError, require
from swamla.model.convolution import Convolution
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.ffn import FFN, FFNConfig, Statistics
from swamla.model.mixers.explanation import Explanation
from swamla.model.mixers.mixer import Mixer, MixerConfig, State
from swamla.model.norm import FrozenNorm, NormConfig
from swamla.ops.autocast import product_dtype
from swamla.ops.layout import Layout
from swamla.ops.short_conv import prepare_conv, resolve_backend

Checkpointing = Literal["none", "attention", "ffn", "all"]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The mixer and the FFN of one layer.

    mixer: moves information along time.
    ffn: works on every token by itself; none leaves it out.
    conv: width of a causal depthwise convolution before the mixer, x_t + Σ_i w_i ⊙ x_{t−i} on its normed input (a Canon
        layer, arXiv 2512.17351); 0 for none.
    norm_place: pre, x + f(norm(x)), or post, x + norm(f(x)), as in OLMo 2 (arXiv 2501.00656); f is mixer or FFN.
    """

    mixer: MixerConfig
    ffn: FFNConfig = field(default_factory=DenseConfig)
    conv: int = 0
    norm_place: Literal["pre", "post"] = "pre"

    def __post_init__(self) -> None:
        require(self.conv >= 0, "conv", self.conv, "must be >= 0, e.g. 4 (0: none)")

    def build(self, width: int, norm: NormConfig, dropout: float) -> "Block":
        """The module."""
        return Block(self, width, norm, dropout)

    @property
    def n_norms(self) -> int:
        """Norms of the block: the mixer's, and the FFN's unless there is no FFN."""
        return 1 if self.ffn.is_absent else 2

    @property
    def sees_order(self) -> bool:
        """Whether the output depends on the order of earlier tokens without positions in the embeddings."""
        return self.mixer.sees_order or self.conv > 1

    def conv_parameters(self, width: int) -> int:
        """Parameters of the convolution before the mixer."""
        return self.conv * width

    def forward_flops(self, width: int, length: int) -> int:
        """Floating-point operations of mixer, FFN and convolution over one document of `length` tokens."""
        halves = self.mixer.forward_flops(width, length) + self.ffn.forward_flops(width, length)
        return halves + 2 * self.conv_parameters(width) * length

    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """Bytes of the state of one sequence: the mixer's, and the last conv − 1 inputs of the convolution."""
        return self.mixer.state_bytes(width, length, element_bytes) + max(0, self.conv - 1) * width * element_bytes

    def conv_backends(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """Op → backend of the convolution; empty without one, and on a CPU, where there is one path."""
        if not self.conv or device.type == "cpu":
            return {}
        return {"convolution": resolve_backend("auto", device, taps=self.conv, dtype=dtype, activation="none")}

    def prepare(self, seq: Layout, width: int) -> None:
        """Build masks and tables eagerly, so that the compiled forward has no graph break."""
        if self.conv:
            prepare_conv(seq, "auto", taps=self.conv, activation="none")
        self.mixer.prepare(seq, width)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the parameters that are sets of vectors: the filters of `conv`, what mixer and FFN list as such."""
        filters = ("conv.weight",) if self.conv else ()
        mixer, ffn = (f"mixer.{name}" for name in self.mixer.vectors), (f"ffn.{name}" for name in self.ffn.vectors)
        return (*filters, *mixer, *ffn)


class BlockFunctions(NamedTuple):
    """The functions a block calls: its methods or compiled versions of them. evaluated: `whole` without gradients."""

    whole: Callable[[Tensor, Layout], tuple[Tensor, Statistics]]
    mix: Callable[[Tensor, Layout], Tensor]
    feed: Callable[[Tensor, Layout], tuple[Tensor, Statistics]]
    evaluated: Callable[[Tensor, Layout], tuple[Tensor, Statistics]]


@dataclass
class BlockState(State):
    """The mixer's state, and the last inputs of the convolution before it, (B, conv − 1, D)."""

    mixer: State
    conv_BWD: Tensor

    def tensors(self) -> list[Tensor]:
        """The live tensors."""
        return [*self.mixer.tensors(), self.conv_BWD]


class Block(nn.Module):
    """x + mixer(conv(norm(x))), then x + ffn(norm(x)); without convolution conv(x) = x, without FFN the mixer alone.

    With norm_place = "post" x + norm(mixer(conv(x))), then x + norm(ffn(x)).

    checkpointing: what the backward pass recomputes from its saved input: "attention" the mixer, "ffn" the FFN, "all"
    the whole block, which then saves a single tensor.
    """

    def __init__(self, config: BlockConfig, width: int, norm: NormConfig, dropout: float) -> None:
        super().__init__()
        self.dropout, self.norms_outputs = dropout, config.norm_place == "post"
        self.checkpointing: Checkpointing = "none"
        self.norm, self.mixer_norm = norm, norm.build(width)
        self.conv = Convolution(width, config.conv) if config.conv else None
        self.mixer: Mixer = config.mixer.build(width)
        self.ffn_norm = None if config.ffn.is_absent else norm.build(width)
        self.ffn: FFN = config.ffn.build(width)
        self.rounds = config.mixer.only_projects, config.ffn.only_projects
        _require_outputs(config.mixer, self.mixer)
        _require_outputs(config.ffn, self.ffn)
        self.description = f"mixer: {_described(config.mixer)}; ffn: {_described(config.ffn)}"
        self.functions = self._uncompiled()

    def _uncompiled(self) -> BlockFunctions:
        return BlockFunctions(self.whole, self.mix, self.feed, evaluated=self.whole)

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled functions, which would compute with the weights of the block that they were made for."""
        return {name: value for name, value in self.__dict__.items() if name != "functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy (`copy.deepcopy`) or a pickled block is not compiled."""
        super().__setstate__(state)
        self.functions = self._uncompiled()

    def extra_repr(self) -> str:
        """The settings of mixer and FFN, for `print(model)`."""
        return self.description

    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D) and the FFN's statistics."""
        whole, mix, feed, evaluated = self.functions
        if not torch.is_grad_enabled():
            return evaluated(x_BTD, seq)
        if self.checkpointing == "none":
            return whole(x_BTD, seq)
        if self.checkpointing == "all":
            return _recomputed(whole, x_BTD, seq)
        if self.checkpointing == "attention":
            return feed(_recomputed(mix, x_BTD, seq), seq)
        return _recomputed(feed, mix(x_BTD, seq), seq)

    def whole(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """Mixer and FFN: `mix`, then `feed`."""
        return self.feed(self.mix(x_BTD, seq), seq)

    def mix(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        """x + mixer(conv(norm(x))), or x + norm(mixer(conv(x)))."""
        return self.with_mixed(x_BTD, self.mixer(self.mixer_input(x_BTD, seq), seq))

    def mixer_input(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        """What the mixer gets of the residual stream: conv(norm(x)), or conv(x)."""
        rounds, _ = self.rounds
        h_BTD = _rounded(self._before(x_BTD, self.mixer_norm), rounds)
        return h_BTD if self.conv is None else self.conv(h_BTD, seq)

    def explain(self, x_BTD: Tensor, seq: Layout) -> tuple[Explanation, FrozenNorm | None]:
        """What the mixer adds to the residual stream x (B, T, D) by head and source token, for rows of any documents.

        The stream becomes x + f(explanation's output), where f is the norm behind the mixer, frozen at that output, or
        nothing for norm_place = "pre". Raises `UsageError` where the mixer or that norm cannot be taken apart.
        """
        explained = self.mixer.explain(self.mixer_input(x_BTD, seq), seq)
        if not self.norms_outputs:
            return explained, None
        return explained, self.norm.frozen(self.mixer_norm, explained.output())

    def taps(self) -> dict[str, Tensor]:
        """Filters of the layer's convolutions by what they filter: (channels, W), of x_t first, then x_{t-1}, …

        "input" is that of `conv`, to which its input is added. Empty without convolutions.
        """
        own = {} if self.conv is None else {"input": self.conv.weight.detach().flip(-1)}
        return own | self.mixer.taps()

    def with_mixed(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        """The residual stream x with the mixer's output y."""
        return x_BTD + self._drop(self._after(y_BTD, self.mixer_norm))

    def feed(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """x + ffn(norm(x)) or x + norm(ffn(x)), and the FFN's statistics; x where there is no FFN."""
        if self.ffn_norm is None:
            return x_BTD, {}
        _, rounds = self.rounds
        y_BTD, statistics = self.ffn(_rounded(self._before(x_BTD, self.ffn_norm), rounds), seq)
        return x_BTD + self._drop(self._after(y_BTD, self.ffn_norm)), statistics

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> State:
        """The empty state of `batch` sequences that may grow to `max_len` tokens: the mixer's if there is no `conv`."""
        state: State = self.mixer.init_state(batch, max_len, dtype=dtype, device=device)
        if self.conv is None:
            return state
        return BlockState(state, self.conv.init_history(batch, dtype=dtype, device=device))

    def step(self, x_BTD: Tensor, state: State, seq: Layout) -> Tensor:
        """New tokens (B, T, D) after those in `state`, which is updated; without dropout."""
        h_BTD = self._before(x_BTD, self.mixer_norm)
        if self.conv is not None:
            assert isinstance(state, BlockState)
            h_BTD, state = self.conv.step(h_BTD, state.conv_BWD, seq), state.mixer
        x_BTD = x_BTD + self._after(self.mixer.step(h_BTD, state, seq), self.mixer_norm)
        if self.ffn_norm is None:
            return x_BTD
        y_BTD, _ = self.ffn(self._before(x_BTD, self.ffn_norm), seq)
        return x_BTD + self._after(y_BTD, self.ffn_norm)

    def _before(self, x_BTD: Tensor, norm: nn.Module) -> Tensor:
        return x_BTD if self.norms_outputs else norm(x_BTD)

    def _after(self, y_BTD: Tensor, norm: nn.Module) -> Tensor:
        return norm(y_BTD) if self.norms_outputs else y_BTD

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


def _rounded(x_BTD: Tensor, rounds: bool) -> Tensor:
    """The input of projections in their dtype: cast once under autocast, not by each of them in both passes."""
    return x_BTD.to(product_dtype(x_BTD)) if rounds else x_BTD


def _described(config: MixerConfig | FFNConfig) -> str:
    """Such as "swa(n_heads=4, window=128, sinks=4)": kind, whole numbers, and what else is not at its default."""
    values = [(field.name, vars(config)[field.name], field.default) for field in fields(config)]
    told = {
        name: value
        for name, value, default in values
        if isinstance(value, int) or (isinstance(value, float | str) and value != default)
    }
    return f"{config.kind}({', '.join(f'{name}={value}' for name, value in told.items())})"


def _require_outputs(config: MixerConfig | FFNConfig, module: nn.Module) -> None:
    """Raise `UsageError` if `outputs` names no parameter: its initial weights would silently not be scaled by depth."""
    names = [name for name, _ in module.named_parameters()]
    if config.outputs and not set(config.outputs) & set(names):
        raise UsageError(
            f"{config.kind}: `outputs` names no parameter of its module: {', '.join(config.outputs)}; it has "
            f"{', '.join(names) or 'none'}. Name those that write to the residual stream, or () for none"
        )


def _recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Activation checkpointing: saves only `inputs`, recomputes `function` in the backward pass, dropout included."""
    return checkpoint(function, *inputs, use_reentrant=False)
