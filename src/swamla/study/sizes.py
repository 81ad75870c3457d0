"""The sizes of a study: its arms at several widths, as one would widen them by hand.

A wider model keeps its shape: its depth, the size of its heads (so it has more of them), the ratio of its ranks and of
its FFNs' hidden widths to the width. Windows, sinks, convolutions, experts, vocabulary and all of the training stay.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from swamla.errors import ConfigError, UsageError
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.study.matching import settings_of, with_values
from swamla.train.config import RunConfig


def widths_of(sizes: int | tuple[int, ...], first: int) -> tuple[int, ...]:
    """The widths of a study whose first arm is `first` wide: those that are named, or so many, each twice the last."""
    return tuple(first * 2**step for step in range(sizes)) if isinstance(sizes, int) else sizes


def at_sizes(
    configs: Mapping[str, RunConfig], sizes: int | tuple[int, ...]
) -> Iterator[tuple[int | None, dict[str, RunConfig]]]:
    """Every size, the first arm's width, with the arms' configs there; without sizes None, and the configs as they are.

    All arms are widened by the factor that gives the first one that width. Raises `UsageError`, naming the arm.
    """
    first = next(iter(configs.values())).model.width
    widths = widths_of(sizes, first)
    if not widths:
        yield None, dict(configs)
    for size in widths:
        found = {}
        for arm, config in configs.items():
            try:
                found[arm] = _widened(config, Fraction(size, first))
            except (ConfigError, UsageError) as error:
                raise UsageError(f"arm {arm!r} at size {size}: {error}") from error
        yield size, found


def resized(model: LanguageModelConfig, factor: Fraction) -> LanguageModelConfig:
    """The model, `factor` times as wide. Raises `UsageError` where its width or heads then are no whole numbers."""
    width = _whole("width", model.width, factor)
    given = {setting: model.blocks[setting.block].ffn.__dict__[setting.name] for setting in settings_of(model, "ffn")}
    hidden = {  # those that are left to the width follow it anyway
        setting: replace(setting, value=value).at(float(factor))
        for setting, value in given.items()
        if value is not None
    }
    blocks = {name: _with_heads(name, block, factor) for name, block in with_values(model, hidden).blocks.items()}
    return replace(model, width=width, blocks=blocks)


def _widened(config: RunConfig, factor: Fraction) -> RunConfig:
    if factor != 1 and config.train.init_from:
        raise UsageError("`init_from` is of one width: leave it out, or `sizes`")
    if factor != 1 and config.model.mup_base_width is not None:  # whose base has as many heads, narrower ones
        raise UsageError("`mup_base_width` is for wider heads, and `sizes` for more of them: leave one out")
    return replace(config, model=resized(config.model, factor))


def _with_heads(name: str, block: BlockConfig, factor: Fraction) -> BlockConfig:
    """The block with more heads, and wider ranks."""
    mixer = block.mixer
    given = {field: value for field, value in mixer.__dict__.items() if isinstance(value, int) and value > 0}
    changes: dict[str, Any] = {
        field: _whole(f"{name}.mixer.{field}", given[field], factor) for field in mixer.head_counts if field in given
    }
    for field in mixer.ranks:
        if field in given:
            changes[field] = max(1, math.floor(given[field] * factor + Fraction(1, 2)))
    return replace(block, mixer=replace(mixer, **changes))


def _whole(field: str, value: int, factor: Fraction) -> int:
    found = value * factor
    if found.denominator != 1:
        raise UsageError(f"{field} = {value} becomes {float(found):.4g}: must be whole, name another width")
    return int(found)
