"""Performance targets on a CPU, and whether a run met them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from swamla.bench.results import Results

NANOGPT = "nanoGPT"
TRAINING = {
    "swa swa mla": {1024: 1.1, 4096: 1.7, 8192: 2.0, 32768: 2.5},
    "gdn gdn mla": {1024: 0.9, 4096: 1.3, 8192: 1.6, 32768: 2.3},
    "swa swa swa swa swa mla": {16384: 3.0},
}


class Found:
    """Looks up rows of a run by their keys."""

    def __init__(self, results: Results) -> None:
        self._rows = results.rows

    def row(self, table: str, **keys: object) -> dict[str, Any] | None:
        """The row with these keys, if it was measured."""
        for row in self._rows.get(table, []):
            figures = "median_s" in row or "token_s" in row
            if figures and all(row.get(key) == value for key, value in keys.items()):
                return row
        return None

    def figure(self, table: str, key: str, **keys: object) -> float | None:
        """A number in the row with these keys."""
        row = self.row(table, **keys)
        return None if row is None or row[key] is None else float(row[key])

    def quotient(self, table: str, key: str, above: dict[str, object], below: dict[str, object]) -> float | None:
        """A number in one row over the same number in another."""
        numerator, denominator = self.figure(table, key, **above), self.figure(table, key, **below)
        return None if numerator is None or denominator is None else numerator / denominator


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target.

    what: as text.
    bound: the number to reach.
    most: the bound is an upper one, not a lower one.
    percent: print the number as a percentage, not as a factor.
    measured: finds the number in a run; None if it was not measured.
    """

    what: str
    bound: float
    most: bool = False
    percent: bool = False
    measured: Callable[[Found], float | None]

    def cells(self, found: Found) -> list[str]:
        """The cells of its line: target, bound, measured number, verdict."""
        value = self.measured(found)
        bound = f"{'≤' if self.most else '≥'} {self._as_text(self.bound)}"
        if value is None:
            return [self.what, bound, "", "not measured"]
        met = value <= self.bound if self.most else value >= self.bound
        return [self.what, bound, self._as_text(value), "met" if met else "**not met**"]

    def _as_text(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.3g} %"
        return f"{value:.3g}×" if value < 10 else f"{value:,.0f}×"


def targets() -> list[Target]:
    """All targets."""
    return [*_training(), *_ops(), *_decode(), *_loss_and_data()]


def _training() -> Iterator[Target]:
    for pattern, bounds in TRAINING.items():
        for length, bound in bounds.items():
            yield Target(
                what=f"`{pattern}` against nanoGPT, training tokens/s at {length:,}",
                bound=bound,
                measured=lambda found, at=length, own=pattern: found.quotient(
                    "training", "tokens_per_s", {"name": own, "length": at}, {"name": NANOGPT, "length": at}
                ),
            )
    yield Target(
        what="`swa swa mla`: share of the bf16 matmul rate in training at 1,024",
        bound=0.6,
        percent=True,
        measured=lambda found: found.figure("training", "bf16_share", name="swa swa mla", length=1024),
    )


def _ops() -> Iterator[Target]:
    for dtype in ("fp32", "bf16"):
        yield Target(
            what=f"gated delta rule against transformers' in PyTorch, T 4,096, {dtype}",
            bound=2.5,
            measured=lambda found, dtype=dtype: found.figure(
                "ops", "ratio", name="swamla", op="gated delta rule", length=4096, dtype=dtype
            ),
        )
        yield Target(
            what=f"windowed attention against PyTorch's causal one, T 4,096, {dtype}",
            bound=3.0,
            measured=lambda found, dtype=dtype: found.figure(
                "ops", "ratio", name="swamla, windowed", op="attention", length=4096, dtype=dtype
            ),
        )
    yield Target(
        what="windowed attention from 2k to 32k: largest distance from twice the time per doubling",
        bound=0.15,
        most=True,
        percent=True,
        measured=_from_linear,
    )


def _from_linear(found: Found) -> float | None:
    times = [found.figure("ops", "median_s", name=f"{length} tokens") for length in (2048, 4096, 8192, 16384, 32768)]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return None
    return max(abs(after / (2 * before) - 1) for before, after in pairwise(known))


def _decode() -> Iterator[Target]:
    for pattern in ("swa swa mla", "gdn gdn mla"):
        for other in ("GPT-2", "DeepSeek-V3"):
            yield Target(
                what=f"`{pattern}` against {other} of transformers, decode tokens/s after 8,192",
                bound=4.0,
                measured=lambda found, own=pattern, other=other: found.quotient(
                    "generation",
                    "decode_tokens_per_s",
                    {"name": own, "prompt": 8192},
                    {"name": other, "prompt": 8192},
                ),
            )
        yield Target(
            what=f"`{pattern}`: state bytes after 8,192, of those of all `mha`",
            bound=0.1,
            most=True,
            percent=True,
            measured=lambda found, own=pattern: found.quotient(
                "generation", "state_bytes", {"name": own, "prompt": 8192}, {"name": "mha", "prompt": 8192}
            ),
        )
    yield Target(
        what="`gdn gdn mla`: decode tokens/s after 8,192, of those after 128",
        bound=0.8,
        percent=True,
        measured=lambda found: found.quotient(
            "generation",
            "decode_tokens_per_s",
            {"name": "gdn gdn mla", "prompt": 8192},
            {"name": "gdn gdn mla", "prompt": 128},
        ),
    )


def _loss_and_data() -> Iterator[Target]:
    for what, measured in (("of the logits in fp32", _of_logits), ("of PyTorch's with all logits", _of_all_logits)):
        yield Target(
            what=f"head and loss, vocabulary 50,304: peak memory beyond the gradients, {what}",
            bound=1 / 8,
            most=True,
            percent=True,
            measured=measured,
        )
    yield Target(
        what="head and loss, vocabulary 50,304: against PyTorch's, speed",
        bound=1.0,
        measured=lambda found: found.figure(
            "ops", "ratio", name="swamla", op="head and cross-entropy", vocabulary=50304
        ),
    )
    yield Target(
        what="tokens/s out of the packed loader, rows of 1,024, against what `swa swa mla` trains on",
        bound=20.0,
        measured=lambda found: found.figure("data", "ratio", name="rows of 1024"),
    )


def _beyond_gradients(found: Found, name: str) -> float | None:
    row = found.row("ops", name=name, op="head and cross-entropy", vocabulary=50304)
    return None if row is None else float(row["peak_bytes"] - row["gradient_bytes"])


def _of_logits(found: Found) -> float | None:
    own = _beyond_gradients(found, "swamla")
    return own and own / (4 * 4096 * 50304)


def _of_all_logits(found: Found) -> float | None:
    own, others = _beyond_gradients(found, "swamla"), _beyond_gradients(found, "PyTorch")
    return own and others and own / others
