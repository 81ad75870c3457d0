"""Rotary positions as a config.json of transformers describes them, and ours."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from swamla.config import to_plain
from swamla.errors import ConfigError, UsageError
from swamla.model.rope import LinearScaling, Llama3Scaling, RopeConfig, Scaling, YarnScaling


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary positions as a config.json describes them.

    rope_theta: None, where an architecture allows it, for no positions.
    partial_rotary_factor: share of a head that is rotated.
    """

    rope_theta: float | None = 10000.0
    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def rope(self, layout: Literal["half", "interleaved"], *, sharpens_softmax: bool = False) -> RopeConfig:
        """Ours. sharpens_softmax: mscale_all_dim scales the softmax too, as in models with latent attention."""
        if self.rope_theta is None:
            raise ConfigError("rope_parameters.rope_theta", None, "must be a number, e.g. 10000.0")
        scaling: Scaling | None = None
        if self.rope_type == "linear":
            scaling = LinearScaling(factor=self._factor())
        elif self.rope_type == "yarn":
            all_dim = self.mscale_all_dim or 0.0
            if all_dim and not sharpens_softmax:
                raise UsageError("rope_parameters.mscale_all_dim: is supported with latent attention only")
            scaling = YarnScaling(
                factor=self._factor(),
                original_length=self.original_max_position_embeddings or 0,
                beta_fast=self.beta_fast or 32.0,
                beta_slow=self.beta_slow or 1.0,
                mscale=1.0 if self.mscale is None else self.mscale,
                mscale_all_dim=all_dim,
            )
            if self.attention_factor not in (None, scaling.attention_factor):
                raise UsageError(
                    f"rope_parameters.attention_factor = {self.attention_factor}: must be {scaling.attention_factor}, "
                    "which follows from the factor"
                )
        elif self.rope_type == "llama3":
            scaling = Llama3Scaling(
                factor=self._factor(),
                original_length=self.original_max_position_embeddings or 0,
                low_freq_factor=self.low_freq_factor or 0.0,
                high_freq_factor=self.high_freq_factor or 0.0,
            )
        return RopeConfig(base=self.rope_theta, layout=layout, scaling=scaling)

    def plain(self) -> dict[str, Any]:
        """As it stands in a config.json."""
        return {key: value for key, value in to_plain(self).items() if value is not None}

    def _factor(self) -> float:
        return 1.0 if self.factor is None else self.factor

    @classmethod
    def of(cls, rope: RopeConfig, *, partial: float = 1.0) -> Self:
        """Theirs. partial: share of a head that is rotated."""
        plain, scaling = cls(rope_theta=rope.base, partial_rotary_factor=partial), rope.scaling
        if scaling is None:
            return plain
        if isinstance(scaling, LinearScaling):
            return replace(plain, rope_type="linear", factor=scaling.factor)
        if isinstance(scaling, Llama3Scaling):
            return replace(
                plain,
                rope_type="llama3",
                factor=scaling.factor,
                original_max_position_embeddings=scaling.original_length,
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
            )
        return replace(
            plain,
            rope_type="yarn",
            factor=scaling.factor,
            original_max_position_embeddings=scaling.original_length,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            mscale=scaling.mscale,
            mscale_all_dim=scaling.mscale_all_dim,
            attention_factor=scaling.attention_factor,
        )


def rope_in_one_place(plain: Mapping[str, Any], partial: float = 1.0) -> dict[str, Any]:
    """The config.json with `rope_parameters`, which older files write as `rope_theta` and `rope_scaling`.

    partial: partial_rotary_factor where there is none.
    """
    found = dict(plain.get("rope_parameters") or plain.get("rope_scaling") or {})
    if "type" in found:
        found["rope_type"] = found.pop("type")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in plain:
            found.setdefault(key, plain[key])
    found.setdefault("partial_rotary_factor", partial)
    known = {field.name for field in fields(RopeParameters)}
    # Sections of images' coordinates: for text all three coordinates are the position.
    images = ("mrope_section", "mrope_interleaved")
    found = {key: value for key, value in found.items() if key in known or key not in images}
    return {**plain, "rope_parameters": found}
