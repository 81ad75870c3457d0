"""A time-boxed recipe fitted to the machine: the faster it trains the recipe's own model, the larger the model.

docs/log.md, "How large a model for three minutes", has what was measured and what was not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swamla.cli.run_config import resolve
from swamla.data.dataset import Dataset
from swamla.train.config import RunConfig
from swamla.train.optim import MuonConfig
from swamla.train.speed import tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Size:
    """Flags of a size, for machines that would show the recipe's own model at least `tokens` in the time of the run."""

    tokens: int
    flags: Mapping[str, Any]


SIZES = (
    Size(tokens=0, flags={"width": 128, "n_heads": 2}),
    Size(tokens=3_000_000, flags={}),
)
NORMUON = {"muon_normuon": 0.95}  # not in the recipe, which several processes train too
FITTED = frozenset(name for size in SIZES for name in size.flags)
# Who gives one of these has chosen the size, or a run whose time is not the recipe's.
CHOSEN = FITTED | {
    "batch_size",
    "pattern",
    "n_layers",
    "local_mixer",
    "block_size",
    "accumulation",
    "steps",
    "init_from",
}


def fitted(
    config: RunConfig, recipe: str, given: Mapping[str, Any], dataset: Dataset, say: Callable[[str], None]
) -> RunConfig:
    """`config`, the recipe's with the flags `given`, in the size that suits the machine's speed; says what was chosen.

    Unchanged if a flag chooses the size already.
    """
    minutes = config.train.max_minutes
    if CHOSEN & given.keys() or minutes is None:
        return config
    speed = tokens_per_second(config, dataset)
    tokens = round(60 * minutes * speed)
    size = size_for(tokens)
    seen = f"this machine trains the recipe's model by {speed:,.0f} tokens a second, {tokens / 1e6:.2g} M in its time"
    added = size.flags if config.train.optimizer.kind != MuonConfig.kind else {**size.flags, **NORMUON}
    chosen = {name: value for name, value in added.items() if name not in given}
    if not chosen:
        return config
    say(f"{seen}: {' '.join(f'--{name} {value}' for name, value in chosen.items())} suits that")
    return resolve(recipe, {**chosen, **given}, new=True).config


def size_for(tokens: int) -> Size:
    """The size for a machine that would show the recipe's own model this many tokens."""
    return max((size for size in SIZES if size.tokens <= tokens), key=lambda size: size.tokens)
