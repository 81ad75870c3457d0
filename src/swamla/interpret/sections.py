"""The sections of a report, which explain.json holds: results of the measures, and on how much they were measured."""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from torch import Tensor

from swamla.interpret.ablation import LayerAblation
from swamla.interpret.context import BehaviouralContext, InContext
from swamla.interpret.drawn import Guesses, Text
from swamla.interpret.patterns import HeadPatterns
from swamla.interpret.repeats import Repeats
from swamla.interpret.routing import ClassLoad

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class About:
    """The model and how it was measured. repeat_length, repeat_rows: tokens of a copy, and rows, of random repeats.

    exact_to: what the explanation of any layer misses of its mixer's output at most, as a share of the output's largest
        value, on the text that is drawn; rounded up: 1e-12, 1e-9, 1e-6, 1e-5 …
    """

    name: str
    parameters: int
    vocabulary: int
    width: int
    version: str
    exact_to: float
    seed: int
    repeat_length: int
    repeat_rows: int
    source: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer's parts. signed: whether its weights are implied ones, of either sign.

    taps: what a convolution filters → mean |weight| over the channels of x_t, x_{t−1}, … as shares of their sum.
    copying: each head's `copying` score.
    """

    block: str
    mixer: str
    ffn: str
    heads: int
    signed: bool
    taps: dict[str, tuple[float, ...]]
    copying: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """`head_patterns` of a text. tokens: of all rows; length: of one."""

    tokens: int
    length: int
    layers: tuple[HeadPatterns, ...]


@dataclass(frozen=True, kw_only=True)
class Worth:
    """`ablated` on a text. tokens: of all rows."""

    tokens: int
    loss: float
    layers: tuple[LayerAblation, ...]


@dataclass(frozen=True, kw_only=True)
class Lens:
    """The loss by `logit_lens` of the stream before each layer and behind the last. tokens: of all rows."""

    tokens: int
    loss: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Positions:
    """`loss_by_position`, means over positions first … last, from 1. tokens: predictions in each."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    loss: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Needed:
    """`behavioural_context`. predictions: on how many it was tried."""

    predictions: int
    found: BehaviouralContext


@dataclass(frozen=True, kw_only=True)
class Routing:
    """`load_by_class`: the routers' choices by classes of tokens. tokens: of all rows."""

    tokens: int
    classes: tuple[str, ...]
    layers: tuple[ClassLoad, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A question's answer. short: in a word or a figure.  text: a sentence with the figures that it rests on."""

    question: str
    answer: Literal["yes", "partly", "no", "figure"]
    short: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The head that the page shows first."""

    layer: int
    head: int


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What a report says. `plain` is explain.json. Sections that need a text are None without one; routing, too,
    without routers.
    """

    about: About
    layers: tuple[Layer, ...]
    verdicts: tuple[Verdict, ...]
    repeats: Repeats
    worth: Worth | None
    patterns: Patterns | None
    lens: Lens | None
    guesses: Guesses
    positions: Positions | None
    learned: InContext | None
    needed: Needed | None
    routing: Routing | None
    texts: tuple[Text, ...]
    shown: Shown

    def plain(self) -> dict[str, Any]:
        """As JSON data: numbers of six digits, None for what is not finite."""
        return {"format_version": FORMAT_VERSION, **as_plain(self)}


def as_plain(value: Any) -> Any:
    """Dataclasses and tensors as JSON data: numbers of six digits, None for what is not finite."""
    if isinstance(value, Tensor):
        return as_plain(value.tolist())
    if is_dataclass(value):
        return {field.name: as_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
