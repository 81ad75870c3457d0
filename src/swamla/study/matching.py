"""Arms of equal cost: solves FFN widths, or settings of the mixers' states, so that one axis agrees with the reference.

Counts are those of `swamla.model.accounting`, from the config alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from swamla.errors import ConfigError, UsageError, require
from swamla.model.accounting import count_parameters, state_bytes, training_flops_per_token
from swamla.model.language_model import LanguageModelConfig

MatchAxis = Literal["parameters", "flops", "state", "seconds", "none"]
TOLERANCE = {"parameters": 0.01, "flops": 0.02, "state": 0.05}
UNITS = {"parameters": "non-embedding parameters", "flops": "training FLOPs a token", "state": "bytes of state"}
STATE_ELEMENT_BYTES = 4
_STEPS = 64  # a width must allow a multiple of some number up to this
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What an arm costs, from its config. flops: of training, per token.  state: bytes of one sequence.

    Both of documents of `length` tokens, the state in fp32.
    """

    parameters: int
    total_parameters: int
    flops: float
    state: int
    length: int

    @classmethod
    def of(cls, model: LanguageModelConfig, length: int) -> "Costs":
        """The costs of a model whose vocabulary is known."""
        count = count_parameters(model)
        return cls(
            parameters=count.non_embedding,
            total_parameters=count.total,
            flops=training_flops_per_token(model, length),
            state=state_bytes(model, length, element_bytes=STATE_ELEMENT_BYTES),
            length=length,
        )


@dataclass(frozen=True, kw_only=True)
class Match:
    """An arm's model after matching. changes: dotted setting → its value before and now.

    before, after, target: on the axis, the target being the reference's.  deviation: after / target − 1.
    """

    model: LanguageModelConfig
    axis: MatchAxis
    changes: Mapping[str, tuple[int, int]]
    before: float
    after: float
    target: float

    @property
    def deviation(self) -> float:
        """Relative difference from the reference."""
        return self.after / self.target - 1

    def words(self) -> str:
        """What was done: "gdn.ffn.hidden 192 → 171: 158,208 non-embedding parameters, +0.10 % of the reference's"."""
        what = ", ".join(f"{name} {before} → {now}" for name, (before, now) in self.changes.items()) or "as it is"
        return f"{what}: {self.after:,.0f} {UNITS[self.axis]}, {100 * self.deviation:+.2f} % from the reference"


def match(arms: Mapping[str, LanguageModelConfig], axis: MatchAxis, *, length: int) -> dict[str, Match]:
    """Every arm with the first one's costs on `axis`, at documents of `length` tokens; the first stays as it is.

    "parameters" and "flops" adjust FFN widths, of all blocks by one factor, in steps of one unit (or the least that
    the FFN allows). "state" adjusts what each mixer names in `state_settings` (a window, a rank, a head's width) by one
    factor, then FFN widths, which the state does not depend on, for equal parameters. Raises `UsageError`, naming the
    arm, if the tolerance (`TOLERANCE`) cannot be met.
    """
    require(axis in TOLERANCE, "match", axis, f"must be one of {', '.join(TOLERANCE)}")
    measures = (axis, "parameters") if axis == "state" else (axis,)
    reference = next(iter(arms.values()))
    found = {}
    for name, model in arms.items():
        matched = model
        for measured in measures if model != reference else ():
            matched = _solve(name, matched, measured, cost(reference, measured, length), length)
        found[name] = Match(
            model=matched,
            axis=axis,
            changes=dict(_changes(model, matched)),
            before=cost(model, axis, length),
            after=cost(matched, axis, length),
            target=cost(reference, axis, length),
        )
    return found


def matched_steps(seconds_per_step: Mapping[str, float], steps: int) -> dict[str, int]:
    """Steps of each arm that take as long as `steps` of the first one, by measured seconds of a step.

    The tokens differ then, and the number of steps is fixed before the study runs, so that runs can be repeated.
    """
    first = next(iter(seconds_per_step.values()))
    return {name: max(1, round(steps * first / seconds)) for name, seconds in seconds_per_step.items()}


def cost(model: LanguageModelConfig, axis: str, length: int) -> float:
    """The count on an axis of `TOLERANCE`."""
    return float(getattr(Costs.of(model, length), axis))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A number in a block that may be adjusted: part "ffn" or "mixer", in multiples of `step`."""

    block: str
    part: str
    name: str
    value: int
    step: int

    def at(self, factor: float) -> int:
        """The nearest multiple of `step` to `factor` times the value, at least one."""
        return self.step * max(1, math.floor(factor * self.value / self.step + 0.5))


def _solve(arm: str, model: LanguageModelConfig, axis: str, target: float, length: int) -> LanguageModelConfig:
    """`model` with the settings whose cost is nearest to `target`. Raises `UsageError` if that is not near enough."""
    settings = list(settings_of(model, "mixer" if axis == "state" else "ffn"))

    def at(factor: float) -> LanguageModelConfig | None:
        try:
            return with_values(model, {setting: setting.at(factor) for setting in settings})
        except ConfigError:  # such as a rank above the model's width
            return None

    candidates = [model, *_around(at, lambda made: cost(made, axis, length), target)] if settings else [model]
    nearest = min(candidates, key=lambda made: abs(cost(made, axis, length) - target))
    if abs(cost(nearest, axis, length) / target - 1) <= TOLERANCE[axis]:
        return nearest
    adjusted = ", ".join(dict.fromkeys(f"{setting.block}.{setting.part}.{setting.name}" for setting in settings))
    parts = "mixers have no setting" if axis == "state" else "FFNs have no width"
    how = f"adjusting {adjusted} comes to {cost(nearest, axis, length):,.0f}" if adjusted else f"its {parts} to adjust"
    raise UsageError(
        f"arm {arm!r}: cannot have {target:,.0f} {UNITS[axis]} within {TOLERANCE[axis]:.0%}, as the first arm has: "
        f"it has {cost(model, axis, length):,.0f}, and {how}; change the arm, the first arm, or `match`"
    )


def _around(
    at: Callable[[float], LanguageModelConfig | None], measure: Callable[[LanguageModelConfig], float], target: float
) -> list[LanguageModelConfig]:
    """The models with the largest cost up to `target` and the smallest above, where these exist; by bisection."""
    low, high = 2.0**-20, 2.0**20
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        made = at(middle)
        low, high = (middle, high) if made is not None and measure(made) <= target else (low, middle)
    return [made for made in (at(low), at(high)) if made is not None]


def settings_of(model: LanguageModelConfig, part: str) -> Iterator[Setting]:
    """The widths of the FFNs that are fields of their configs, or the settings of the mixers' states."""
    for block, config in model.blocks.items():
        half: Any = getattr(config, part)
        values = half.widths(model.width) if part == "ffn" else half.state_settings(model.width)
        names = {field.name for field in fields(half)}
        for name, value in values.items():
            if name in names:
                yield Setting(block=block, part=part, name=name, value=value, step=_step(model, half, name, value))


def _step(model: LanguageModelConfig, half: Any, name: str, value: int) -> int:
    """The least step that the setting allows: grouped products of experts need multiples of 8."""
    for step in range(1, _STEPS + 1):
        try:
            replace(half, **{name: value // step * step + step}).n_parameters(model.width)
        except ConfigError:
            continue
        return step
    return value


def with_values(model: LanguageModelConfig, values: Mapping[Setting, int]) -> LanguageModelConfig:
    """The model with these settings. Raises `ConfigError` for one that does not fit."""
    blocks = dict(model.blocks)
    for setting, value in values.items():
        half = replace(getattr(blocks[setting.block], setting.part), **{setting.name: value})
        blocks[setting.block] = replace(blocks[setting.block], **{setting.part: half})
    return replace(model, blocks=blocks)


def _changes(before: LanguageModelConfig, now: LanguageModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    for part in ("mixer", "ffn"):
        pairs = zip(settings_of(before, part), settings_of(now, part), strict=True)
        for old, new in pairs:
            if old.value != new.value:
                yield f"{old.block}.{part}.{old.name}", (old.value, new.value)
