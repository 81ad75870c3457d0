"""The plan of a study: from its question and arms to resolved configs.

What is asked (`Asked`, STUDY.toml) is resolved once to what is done (`Study`, study.json): arms matched, precision and
backends chosen, steps timed. Which runs that means is in `runs`.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

import torch

from swamla.config import to_plain
from swamla.data.dataset import Dataset, TrainingData
from swamla.errors import UsageError, require
from swamla.evaluate import bytes_apart, part_of
from swamla.study.matching import TOLERANCE, Costs, MatchAxis, match, matched_steps
from swamla.study.published import Published
from swamla.study.sizes import at_sizes
from swamla.study.statistics import Axis
from swamla.tasks import Task
from swamla.train.backends import fastest_paths, usual_length
from swamla.train.config import RunConfig, TrainConfig
from swamla.train.precision import resolve_device, resolve_precision
from swamla.train.racing import describe_machine
from swamla.train.run_folder import resolve_vocabulary
from swamla.train.speed import step_seconds
from swamla.version import __version__

TOKENS = 1_200_000  # of a run, where neither the study nor its recipe has a number of steps
SEARCH_SEED = 0
MOST_SIZES = 6
ADDED = ("sizes", "larger_seeds", "published")  # keys that files of studies without them do not have
ROUNDS, SECONDS = 7, 6.0  # steps of an arm that are timed for the plan, and seconds for each arm, at most


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A study as its author states it, before it runs; the keys of STUDY.toml.

    question: what the study shall answer.
    expectation: what the author expects, and why; printed beside the result.
    arms: what is compared, name → flags of `swamla train`; without flags the name is the pattern. All others are
        compared with the first.
    recipe: of all arms, a shipped one or a file.
    flags: of all arms, beside the recipe.
    match: what all arms have alike: parameters (without embeddings, ±1 %), flops (of training, ±2 %), state (bytes,
        ±5 %), seconds (of training on this machine, by fewer or more steps), or none.
    margin: a difference that is too small to matter, in bits per byte, or in accuracy of a task.
    tokens: of a run; none for the recipe's steps, or 1,200,000 where it is bounded by time.
    seeds: fresh seeds of every arm at its best rate.
    rates: "search", or "recipe" for the recipe's rate in every arm, without a search.
    threads: CPU threads of a run.
    sizes: widths at which all of it is repeated, e.g. [128, 256], the first arm's (all others are widened by the same
        factor); or how many, each twice the last. Each size is matched, searched and compared by itself.
    larger_seeds: fresh seeds of every size but the smallest; none for as many as there.
    published: figures of others, shown beside the results; nothing that is computed depends on them.
    """

    question: str = ""
    expectation: str = ""
    arms: dict[str, str]
    recipe: str = "quickstart"
    flags: str = ""
    match: MatchAxis = "parameters"
    margin: float = 0.01
    tokens: int | None = None
    seeds: int = 5
    rates: Literal["search", "recipe"] = "search"
    threads: int = 1
    sizes: int | tuple[int, ...] = ()
    larger_seeds: int | None = None
    published: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        require(len(self.arms) > 1, "arms", ", ".join(self.arms), 'must be two or more, e.g. mha and "swa swa mla"')
        require(0 < self.margin < math.inf, "margin", self.margin, "must be > 0, e.g. 0.01")
        require(self.tokens is None or self.tokens > 0, "tokens", self.tokens, "must be > 0, or left out")
        require(self.seeds >= 2, "seeds", self.seeds, "must be >= 2: one seed says nothing of the spread; 5 are usual")
        require(self.threads >= 1, "threads", self.threads, "must be >= 1")
        self._check_sizes()
        names = [row.name for row in self.published]
        twice = next((name for name in names if names.count(name) > 1), "")
        require(not twice, "published", twice, "is the name of two rows: name them apart")

    def as_plain(self) -> dict[str, Any]:
        """The keys of a file that asks the same, without those added since that say nothing."""
        return {name: value for name, value in to_plain(self).items() if value or name not in ADDED}

    def _check_sizes(self) -> None:
        sizes, seeds = self.sizes, self.larger_seeds
        if isinstance(sizes, int):
            allowed = f"must be 2 to {MOST_SIZES}, each twice as wide as the last, or widths, e.g. [128, 256]"
            require(2 <= sizes <= MOST_SIZES, "sizes", sizes, allowed)
        elif sizes:
            rising = len(sizes) > 1 and sizes[0] > 0 and all(a < b for a, b in pairwise(sizes))
            require(rising, "sizes", list(sizes), "must be two or more widths, rising, e.g. [128, 256]")
        fits = seeds is None or (bool(sizes) and 2 <= seeds <= self.seeds)
        require(fits, "larger_seeds", seeds, f"must be 2 to seeds = {self.seeds}, in a study of several `sizes`")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the compared, fully resolved. slug: its name for files.  flags: beside the recipe.

    size: in a study of several, the first arm's width at it; the name ends in it.
    config: of its runs, but for rate and seed.  changes: what matching changed, dotted setting → before and now.
    matched: that in words.  seconds_per_step: measured before the study, 0 if it was not.
    seeds: fewer fresh seeds than the study's, of an arm that is dear.
    """

    name: str
    slug: str
    flags: str
    config: RunConfig
    costs: Costs
    matched: str = ""
    changes: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds_per_step: float = 0.0
    seeds: int | None = None
    size: int | None = None

    @property
    def label(self) -> str:
        """The name without the size."""
        return self.name if self.size is None else self.name.removesuffix(f"@{self.size}")

    @property
    def steps(self) -> int:
        """Of a run."""
        assert self.config.train.steps is not None
        return self.config.train.steps

    def lr(self, rate: int) -> float:
        """The learning rate `rate` quarters of a factor of 10 from the arm's own, of three digits as it is typed."""
        return float(f"{self.config.train.lr * 10 ** (rate / 4):.3g}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study with everything resolved, as it is written to study.json. The first arm is the reference.

    Of several sizes it has every arm at each, the smallest first; the reference of a size is its first arm.

    data: its source, the fingerprint of its tokens and split, `Split.counts` of training, validation and test text,
    and how many bytes more were counted than held-out tokens decode to: 0, or bits per byte are wrong.
    machine: where it was planned; commit: of this program's source, if it is a checkout.  start_seconds,
    evaluation_seconds: of a run of the first arm beside its steps; loop_seconds: of each of its steps beside what was
    timed, such as its rows and records; closing_seconds: of scoring and measuring all runs when they have ended; 0 if
    they were not measured.  beside: other runs that were under way as all this was timed.  went_on: other programs, or
    machines, than planned it, which trained some of its runs.
    """

    asked: Asked
    axis: Axis
    arms: tuple[Arm, ...]
    data: dict[str, str]
    machine: dict[str, str]
    version: str = __version__
    commit: str = ""
    plugins: tuple[str, ...] = ()
    start_seconds: float = 0.0
    loop_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    closing_seconds: float = 0.0
    beside: int = 0
    went_on: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        """What planned it."""
        return program_of(self.version, self.commit)

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return self.arms[0].name

    @property
    def task(self) -> Task | None:
        """The task whose answers are scored; None where text is."""
        return self.arms[0].config.data.task

    @property
    def loss_unit(self) -> str:
        """Of losses."""
        return "nats an answer" if self.task else "nats a token"

    @property
    def choosing(self) -> tuple[str, str]:
        """What rates are chosen by, and its unit, in words."""
        if self.task:
            return "held-out rows", self.loss_unit
        return "validation part of the held-out text", self.axis.name

    @property
    def scored(self) -> str:
        """What the verdict rests on, in words."""
        return "test rows" if self.task else "test part of the held-out text"

    def seeds_of(self, arm: Arm) -> int:
        """How many fresh seeds an arm is trained with."""
        return self.asked.seeds if arm.seeds is None else min(arm.seeds, self.asked.seeds)

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes, the smallest first; empty for a study of one."""
        return tuple(dict.fromkeys(arm.size for arm in self.arms if arm.size is not None))

    @property
    def each_size(self) -> str:
        """What is done at each size by itself, in words."""
        done = {"matched": self.asked.match != "none", "searched for its learning rates": self.asked.rates == "search"}
        words = ", ".join(word for word, is_so in done.items() if is_so)
        return f"{words} and compared" if words else "compared"

    def reference_of(self, arm: Arm) -> Arm:
        """The arm that this one is compared with: the first of its size."""
        return next(other for other in self.arms if other.size == arm.size)

    def at(self, size: int) -> "Study":
        """The study of one of its sizes alone, whose arms have their names without it."""
        arms = [replace(arm, name=arm.label, size=None) for arm in self.arms if arm.size == size]
        return replace(self, arms=tuple(arms))

    def as_plain(self) -> dict[str, Any]:
        """As it is written: without what a study has no use for, so that its file is as older versions wrote it."""
        plain = {name: value for name, value in to_plain(self).items() if name != "went_on" or value}
        return plain | {
            "asked": self.asked.as_plain(),
            "arms": [{name: value for name, value in arm.items() if name != "size" or value} for arm in plain["arms"]],
        }


def program_of(version: str, commit: str) -> str:
    """This program in words."""
    return f"swamla {version}{f', commit {commit}' if commit else ''}"


def slug_of(name: str) -> str:
    """A name for files: "swa-swa-mla" for "swa swa mla"."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "arm"


def resolve_study(
    asked: Asked,
    configs: Mapping[str, RunConfig],
    dataset: TrainingData,
    *,
    flags: Mapping[str, str] = MappingProxyType({}),
    plugins: Sequence[str] = (),
    commit: str = "",
    measure: Callable[[Mapping[str, RunConfig], TrainingData], Mapping[str, float]] | None = None,
) -> Study:
    """The study of arms whose configs, from recipe and flags, are `configs`, on `dataset`: matched, timed, frozen.

    flags: of each arm beside the recipe, as text, to be shown.  measure: seconds of a training
    step of each config, by default `median_steps`.
    Raises `UsageError` for arms that cannot be compared or matched, `DataError` for held-out text that cannot be
    divided.
    """
    _check_comparable(configs)
    budgeted = {name: budget(config, asked) for name, config in configs.items()}
    resolved = {name: resolve_vocabulary(config, dataset) for name, config in budgeted.items()}
    arms = [
        arm for size, found in at_sizes(resolved, asked.sizes) for arm in _matched(asked, size, found, dataset, flags)
    ]
    arms = [arm if arm.size == arms[0].size else replace(arm, seeds=asked.larger_seeds) for arm in arms]
    if twice := [slug for slug, count in Counter(arm.slug.lower() for arm in arms).items() if count > 1]:  # as on macOS
        raise UsageError(f"two arms have the same name for files, {twice[0]!r}: name them apart")
    seconds = (measure or median_steps)({arm.name: arm.config for arm in arms}, dataset)
    arms = [replace(arm, seconds_per_step=seconds[arm.name]) for arm in arms]
    if asked.match == "seconds":
        sizes = dict.fromkeys(arm.size for arm in arms)
        arms = [arm for size in sizes for arm in _matched_by_seconds([one for one in arms if one.size == size])]
    return Study(
        asked=asked,
        axis=_axis(asked.margin, dataset),
        arms=tuple(arms),
        data=_described(dataset, arms[0].config),
        machine=describe_machine(),
        commit=commit,
        plugins=tuple(plugins),
    )


def _matched(
    asked: Asked,
    size: int | None,
    configs: Mapping[str, RunConfig],
    dataset: TrainingData,
    flags: Mapping[str, str],
) -> list[Arm]:
    """The arms at a size, None for that of a study of one, matched with the first; their steps are not timed yet."""
    length = next(iter(configs.values())).train.block_size
    models = {name: config.model for name, config in configs.items()}
    try:
        matches = match(models, asked.match, length=length) if asked.match in TOLERANCE else {}
    except UsageError as error:
        raise error if size is None else UsageError(f"at size {size}: {error}") from error
    arms = []
    for name, config in configs.items():
        found = matches.get(name)
        final = _with_paths(replace(config, model=found.model if found else config.model), dataset)
        arms.append(
            Arm(
                name=name if size is None else f"{name}@{size}",
                slug=slug_of(name) if size is None else f"{slug_of(name)}-w{size}",
                flags=flags.get(name, ""),
                config=final,
                costs=Costs.of(final.model, length),
                matched=found.words() if found else "",
                changes=dict(found.changes) if found else {},
                size=size,
            )
        )
    return arms


def median_steps(configs: Mapping[str, RunConfig], dataset: TrainingData) -> dict[str, float]:
    """Seconds of each config's training steps: the median of a few, timed in turns."""
    found = step_seconds(configs, dataset, rounds=ROUNDS, seconds=SECONDS * len(configs))
    return {name: statistics.median(each) for name, each in found.items()}


def budget(config: RunConfig, asked: Asked) -> RunConfig:
    """The config of a study's runs: so many steps, scored once at the end on the validation part, nothing published.

    A run keeps its last checkpoint, and saves four times so that a stopped one loses little.
    """
    train = config.train
    a_step = train.batch_size * train.block_size
    steps = train.steps if asked.tokens is None else None
    steps = steps or max(1, round((asked.tokens or TOKENS) / a_step))
    changed: dict[str, Any] = {
        "steps": steps,
        "save_interval": math.ceil(steps / 4),
        "keep_last": 1,
        "async_save": False,
        "eval_part": "validation",
        "threads": asked.threads,
        "seed": SEARCH_SEED,
        **dict.fromkeys(("max_minutes", "schedule_steps", "schedule_minutes")),
        **dict.fromkeys(("eval_interval", "eval_seconds", "eval_tokens")),
        **dict.fromkeys(("tensorboard", "profile"), False),
        **dict.fromkeys(("wandb_project", "wandb_run_name", "hf_repo_id"), ""),
    }
    return replace(config, train=replace(train, **changed))


def _check_comparable(configs: Mapping[str, RunConfig]) -> None:
    """Raise `UsageError` for arms that do not see the same text in the same rows."""
    first, *others = configs.items()
    for name, config in others:
        for what, here, there in (
            ("data", config.data, first[1].data),
            ("block_size", config.train.block_size, first[1].train.block_size),
            ("batch_size", config.train.batch_size, first[1].train.batch_size),
        ):
            if here != there:
                raise UsageError(f"arms {first[0]!r} and {name!r} differ in `{what}`: arms see the same rows of text")


def _with_paths(config: RunConfig, dataset: TrainingData) -> RunConfig:
    """The config with the precision and the backends that "auto" means here: every run of the study has the same."""
    device = resolve_device(config.train.device)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    precision = resolve_precision(config.train.precision, device)
    length = usual_length(dataset, config.train.block_size)
    paths, _ = fastest_paths(config.model, device, precision, length=length)
    train: TrainConfig = replace(config.train, precision=precision)
    return replace(config, model=config.model.with_backends(paths), train=train)


def _matched_by_seconds(arms: Sequence[Arm]) -> list[Arm]:
    """The arms with as many steps as take as long as the first arm's."""
    steps = matched_steps({arm.name: arm.seconds_per_step for arm in arms}, arms[0].steps)
    found = []
    for arm in arms:
        now = steps[arm.name]
        train = replace(arm.config.train, steps=now, save_interval=math.ceil(now / 4))
        seconds = f"{now * arm.seconds_per_step:.0f} seconds of {1000 * arm.seconds_per_step:.1f} ms a step"
        changes = {} if now == arm.steps else {"train.steps": (arm.steps, now)}
        what = f"train.steps {arm.steps} → {now}" if changes else "as it is"
        found.append(
            replace(arm, config=replace(arm.config, train=train), changes=changes, matched=f"{what}: {seconds}")
        )
    return found


def _axis(margin: float, dataset: TrainingData) -> Axis:
    """Bits per byte of a text, accuracy in a task."""
    if isinstance(dataset, Dataset):
        return Axis(margin=margin)
    return Axis(name="accuracy", direction="higher", margin=margin)


def _described(dataset: TrainingData, config: RunConfig) -> dict[str, str]:
    if not isinstance(dataset, Dataset):
        return {"source": dataset.source, "fingerprint": dataset.fingerprint}
    parts = {part: part_of(dataset.held_out, part, dataset.tokenizer.decode) for part in ("validation", "test")}
    known = parts if config.data.stream else {"train": dataset.train, **parts}  # a stream has no end
    sizes = {f"{name}_{what}": str(n) for name, part in known.items() for what, n in part.counts().items()}
    apart = sum(bytes_apart(part, dataset.tokenizer.decode) for part in parts.values())
    about = {"source": dataset.source, "tokenizer": config.data.tokenizer, "fingerprint": dataset.fingerprint}
    return about | sizes | {"bytes_apart": str(apart)}
