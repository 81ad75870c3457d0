"""One layer: a sequence mixer, then perhaps an FFN, each preceded by a norm and added to the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swamla.errors import UsageError
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.ffn import FFN, FFNConfig, Statistics
from swamla.model.mixers.mixer import Mixer, MixerConfig, State
from swamla.model.norm import NormConfig
from swamla.ops.autocast import product_dtype
from swamla.ops.layout import Layout

Checkpointing = Literal["none", "attention", "ffn", "all"]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The mixer and the FFN of one layer."""

    mixer: MixerConfig
    ffn: FFNConfig = field(default_factory=DenseConfig)

    def build(self, width: int, norm: NormConfig, dropout: float) -> "Block":
        """The module."""
        return Block(self, width, norm, dropout)

    @property
    def n_norms(self) -> int:
        """Norms of the block: the mixer's, and the FFN's unless there is no FFN."""
        return 1 if self.ffn.is_absent else 2

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the parameters that the mixer or the FFN lists in `vectors`, e.g. "ffn.router.weight"."""
        return (*(f"mixer.{name}" for name in self.mixer.vectors), *(f"ffn.{name}" for name in self.ffn.vectors))


class BlockFunctions(NamedTuple):
    """The functions a block calls: its methods or compiled versions of them. evaluated: `whole` without gradients."""

    whole: Callable[[Tensor, Layout], tuple[Tensor, Statistics]]
    mix: Callable[[Tensor, Layout], Tensor]
    feed: Callable[[Tensor, Layout], tuple[Tensor, Statistics]]
    evaluated: Callable[[Tensor, Layout], tuple[Tensor, Statistics]]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) unless there is no FFN.

    checkpointing: what the backward pass recomputes from its saved input: "attention" the mixer, "ffn" the FFN, "all"
    the whole block, which then saves a single tensor.
    """

    def __init__(self, config: BlockConfig, width: int, norm: NormConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.checkpointing: Checkpointing = "none"
        self.mixer_norm = norm.build(width)
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
        """x + mixer(norm(x))."""
        rounds, _ = self.rounds
        return x_BTD + self._drop(self.mixer(_rounded(self.mixer_norm(x_BTD), rounds), seq))

    def feed(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """x + ffn(norm(x)), and the FFN's statistics; x where there is no FFN."""
        if self.ffn_norm is None:
            return x_BTD, {}
        _, rounds = self.rounds
        y_BTD, statistics = self.ffn(_rounded(self.ffn_norm(x_BTD), rounds), seq)
        return x_BTD + self._drop(y_BTD), statistics

    def step(self, x_BTD: Tensor, state: State, seq: Layout) -> Tensor:
        """New tokens (B, T, D) after those in `state`, which is updated; without dropout."""
        x_BTD = x_BTD + self.mixer.step(self.mixer_norm(x_BTD), state, seq)
        return x_BTD if self.ffn_norm is None else x_BTD + self.ffn(self.ffn_norm(x_BTD), seq)[0]

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


def _rounded(x_BTD: Tensor, rounds: bool) -> Tensor:
    """The input of projections in their dtype: cast once under autocast, not by each of them in both passes."""
    return x_BTD.to(product_dtype(x_BTD)) if rounds else x_BTD


def _described(config: MixerConfig | FFNConfig) -> str:
    """Such as "swa(n_heads=4, window=128, sinks=4)": kind and plain settings, but those that are left to be chosen."""
    values = {field.name: vars(config)[field.name] for field in fields(config)}
    plain = {name: value for name, value in values.items() if isinstance(value, (int, float, str)) and value != "auto"}
    return f"{config.kind}({', '.join(f'{name}={value}' for name, value in plain.items())})"


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
