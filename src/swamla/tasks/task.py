"""What every task is: rows of ids with labels at the queries, drawn by (seed, index), and its spelling in one line."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from swamla.config import field_types, from_plain
from swamla.errors import UsageError, require
from swamla.registry import Registered, members_of

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "task:"
RULES = 1
"""To be raised when the rows of a task change: a run then refuses to go on with other rows."""
IGNORED = -100
"""The label of a position that asks nothing; `F.cross_entropy` ignores it."""
HELD_OUT = 0.05
"""The share of all possible rows that is never trained on."""

_ATTEMPTS = 4000  # draws for one row: where 5 % of many rows qualify, all of them fail once in 10^89 rows


class Draws:
    """Random numbers that depend on (seed, index, attempt) alone, in this and in any other version of NumPy.

    Made of raw Philox words: NumPy guarantees that these never change, but not that a `Generator`'s methods do not.
    """

    def __init__(self, seed: int, index: int, attempt: int = 0) -> None:
        self._bits = np.random.Philox(key=np.array([seed, index], np.uint64), counter=[0, attempt, 0, 0])

    def below(self, bound: int, count: int) -> np.ndarray:
        """`count` independent uniform integers 0 … bound - 1, int64."""
        return (self._bits.random_raw(count) % np.uint64(bound)).astype(np.int64)

    def integer(self, first: int, last: int) -> int:
        """One uniform integer first … last, both included."""
        return first + int(self.below(last - first + 1, 1)[0])

    def distinct(self, bound: int, count: int) -> np.ndarray:
        """`count` distinct integers 0 … bound - 1 in random order, int64: all such sequences are equally likely."""
        return np.argsort(self._bits.random_raw(bound), kind="stable")[:count]

    def distinct_weighted(self, weight_N: np.ndarray, count: int) -> np.ndarray:
        """`count` distinct indices of `weight_N`, drawn one after another in proportion to the weights that are left.

        The smallest of exponential variables divided by the weights (Efraimidis and Spirakis, 2006).
        """
        uniform_N = (self._bits.random_raw(len(weight_N)).astype(np.float64) + 1) / 2.0**64
        return np.argsort(-np.log(uniform_N) / weight_N, kind="stable")[:count]


@dataclass(frozen=True)
class Example:
    """One row.

    tokens_T: int64 ids.  labels_T: int64, what has to be predicted at each position, shifted already: where the answer
    is the next token, labels_T[t] = tokens_T[t + 1]. `IGNORED` at all positions but the queries.
    """

    tokens_T: np.ndarray
    labels_T: np.ndarray

    @property
    def query_Q(self) -> np.ndarray:
        """The positions that have a label, in order, int64."""
        return np.flatnonzero(self.labels_T != IGNORED)


@dataclass(frozen=True)
class Examples:
    """Rows as tensors on the CPU; both int64, as in `Example`."""

    tokens_BT: "Tensor"
    labels_BT: "Tensor"


@dataclass(frozen=True, kw_only=True)
class Task(Registered, home="swamla.tasks"):
    """A task and its sizes, which are its fields; they are checked when it is made.

    length: the tokens of a row.
    """

    length: int

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids; tokens and labels are below it."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """A name of every id, for people: all different, without spaces."""

    @abstractmethod
    def draw(self, random: Draws) -> Example:
        """One row, of nothing but the sizes and these random numbers."""

    def row(self, seed: int, index: int, *, held_out: bool = False) -> Example:
        """Row `index` of the training rows or of the held-out rows; both are endless, and no row is among both.

        It is the first draw of (seed, index) that asks something and that `is_held_out` puts on that side. Raises
        `ConfigError` for a negative seed or index, `UsageError` for a task with so few different rows that none of them
        is held out.
        """
        require(0 <= seed < 1 << 63, "seed", seed, "must be >= 0 and below 2^63")
        require(0 <= index < 1 << 63, "index", index, "must be >= 0 and below 2^63")
        for attempt in range(_ATTEMPTS):
            row = self.draw(Draws(seed, index, attempt))
            if len(row.query_Q) and is_held_out(row.tokens_T) == held_out:
                return row
        side = "held-out" if held_out else "training"
        raise UsageError(f"{PREFIX}{self}: has too few different rows for {side} ones: raise its length")

    def __str__(self) -> str:
        """Its spelling, "mqar?length=64&pairs=8": every size, so that `parse` gives an equal task."""
        sizes = "&".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.kind}?{sizes}"


def examples(task: Task, seed: int, indices: Iterable[int], *, held_out: bool = False) -> Examples:
    """The rows of `Task.row` at these indices, stacked."""
    import torch  # heavy, and a task alone needs none

    rows = [task.row(seed, index, held_out=held_out) for index in indices]
    tokens_BT, labels_BT = (
        torch.from_numpy(np.stack(columns)) for columns in ([r.tokens_T for r in rows], [r.labels_T for r in rows])
    )
    return Examples(tokens_BT, labels_BT)


def is_held_out(tokens_T: np.ndarray) -> bool:
    """Whether a row is never trained on: a hash of its tokens decides, so that equal rows are on the same side."""
    digest = hashlib.sha256(tokens_T.astype("<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "little") < HELD_OUT * 2**64


def parse(spec: str) -> Task:
    """The task of "mqar?pairs=8&length=64"; "task:" may stand before it, and sizes left out have their defaults.

    Raises `UsageError` for an unknown kind and for what is not written so, `ConfigError` for a size that the task has
    not, or refuses.
    """
    kind, _, query = spec.removeprefix(PREFIX).partition("?")
    known = members_of(Task)
    if kind not in known:
        close = get_close_matches(kind, known, n=1)
        there = f"there are: {', '.join(known)}; or of a plugin: --plugin FILE"
        meant = f'did you mean "{close[0]}"?' if close else there
        raise UsageError(f"{spec}: no task is called {kind!r}; {meant}")
    cls = cast(type[Task], known[kind])
    return from_plain(cls, _sizes(cls, query, spec), origin=spec)


def _sizes(cls: type[Task], query: str, spec: str) -> Mapping[str, Any]:
    types, sizes = field_types(cls), dict[str, Any]()
    for part in query.split("&") if query else []:
        name, equals, text = part.partition("=")
        if not equals or name in sizes:
            wrong = f"{name} is given twice" if equals else f"{part!r} is no size"
            raise UsageError(f"{spec}: {wrong}: sizes are written as in {PREFIX}mqar?pairs=8&length=64")
        sizes[name] = _number(text) if types.get(name) in (int, float) else text
    return sizes


def _number(text: str) -> Any:
    """A number; text that is none is left for the config's own error."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
