"""The arms of the study: three mixers, equal in all else, in four experiments.

Random repeats have no text: two layers of attention alone, as in the recipe toy-induction, are asked, after a token,
what followed it before. They are trained three times, with a short, a long and a very long budget, since whether a head
is there depends on when one looks. Shakespeare's characters are nanoGPT's own test; they have fewer steps than its
recipe. They and the longest budget have one seed, for time. Arms are trained with the same seeds, hence on the same
rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from swamla.config import from_plain, load_file
from swamla.data.dataset import TrainingData
from swamla.data.hub import has_shakespeare
from swamla.model.mixers.mha import MHAConfig
from swamla.recipes import recipe_path
from swamla.study.matching import Costs
from swamla.study.plan import Arm, Asked, Study
from swamla.study.runs import Prediction, duration
from swamla.study.statistics import Axis
from swamla.train.config import RunConfig
from swamla.train.precision import resolve_device, resolve_precision
from swamla.train.racing import describe_machine
from swamla.train.run_folder import resolve_vocabulary
from swamla.train.speed import tokens_per_second

NAME = "nanogpt-mla"
MIXERS = ("mha", "mla", "latent")
REFERENCE = MIXERS[0]  # GPT-2's own
REPEATS = "task:induction?length=128&prefix=8&shortest=8&longest=16&vocabulary=32&pieces=7"
LENGTH, ROWS = 128, 32  # of random repeats: as many tokens a step as toy-induction has
Kind = Literal["repeats", "text"]
THREADS = 1  # of a run: two runs side by side are faster than one on two threads at this size
SAVES = 4  # of a run, so that a killed one loses little
REPEATS_TOKENS, TEXT_TOKENS = 8_192, 16_384  # read by an evaluation during a run


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the three mixers are trained on. slug: its name for files and in the names of its runs.

    evaluations: how many there are during a run.  seeds: fewer than the study's.
    """

    slug: str
    kind: Kind
    title: str
    steps: int
    lr: float
    evaluations: int
    seeds: int | None = None


EXPERIMENTS = (
    Experiment(
        slug="repeats-short", kind="repeats", title="random repeats, short budget", steps=400, lr=1e-2, evaluations=20
    ),
    Experiment(
        slug="repeats-long", kind="repeats", title="random repeats, long budget", steps=1000, lr=4e-3, evaluations=25
    ),
    Experiment(
        slug="repeats-longest",
        kind="repeats",
        title="random repeats, longest budget",
        steps=3000,
        lr=4e-3,
        evaluations=30,
        seeds=1,
    ),
    Experiment(slug="text", kind="text", title="characters", steps=600, lr=2e-3, evaluations=10, seeds=1),
)


def experiment_of(arm: str) -> Experiment:
    """The experiment of an arm, by its name."""
    return next(each for each in EXPERIMENTS if arm.startswith(f"{each.slug}-"))


def arm_name(experiment: Experiment, mixer: str) -> str:
    """The name of an arm, which is its name for files too."""
    return f"{experiment.slug}-{mixer}"


def mixer_of(arm: str) -> str:
    """The mixer of an arm, by its name."""
    return arm.rpartition("-")[2]


def configs(source: str, tokenizer: str) -> dict[str, RunConfig]:
    """Arm → config of its runs, before flags: `source` and `tokenizer` are those of the text."""
    found = {}
    for experiment in EXPERIMENTS:
        for mixer in MIXERS:
            if experiment.kind == "repeats":
                config = _on_repeats(mixer)
                tokens = REPEATS_TOKENS
            else:
                config = _on_text(mixer, source, tokenizer)
                tokens = TEXT_TOKENS
            train = replace(
                config.train,
                steps=experiment.steps,
                lr=experiment.lr,
                eval_interval=experiment.steps // experiment.evaluations,
                eval_tokens=tokens,
                precision="fp32",
                threads=THREADS,
                log_interval=max(1, experiment.steps // 10),
            )
            found[arm_name(experiment, mixer)] = replace(config, train=train)
    return found


def _shipped(recipe: str, mixer: str) -> RunConfig:
    """A recipe, its layers of one mixer: its own, or one that it has to spare."""
    plain, place = load_file(recipe_path(recipe))
    model, spare = plain["model"], plain.pop("spare", {})
    model["blocks"] = {mixer: ({**model["blocks"], **spare})[mixer]}
    model["pattern"] = [mixer] * len(model["pattern"])
    return from_plain(RunConfig, plain, origin=place)


def _on_repeats(mixer: str) -> RunConfig:
    """toy-induction on longer rows in pieces, with GPT-2's learned positions, to which mla adds its rotary part."""
    config = _shipped("toy-induction", mixer)
    model = replace(config.model, learned_positions=LENGTH)
    if mixer == REFERENCE:
        block = model.blocks[mixer]
        assert isinstance(block.mixer, MHAConfig)
        model = replace(model, blocks={mixer: replace(block, mixer=replace(block.mixer, rope=None))})
    train = replace(config.train, batch_size=ROWS, block_size=LENGTH)
    return replace(config, data=replace(config.data, source=REPEATS), model=model, train=train)


def _on_text(mixer: str, source: str, tokenizer: str) -> RunConfig:
    """nanoGPT's settings for a CPU; learned positions in all arms, to which mla adds its rotary part."""
    config = _shipped("shakespeare-char" if mixer == REFERENCE else f"shakespeare-char-{mixer}", mixer)
    data = replace(config.data, source=source, tokenizer=tokenizer)
    return replace(config, data=data, model=replace(config.model, learned_positions=config.train.block_size))


def asked_for(seeds: int, source: str, flags: str) -> Asked:
    """The study as it is asked for. source: of the text.  flags: of `swamla train`, for all runs."""
    return Asked(
        question="Does latent attention grow induction heads, as GPT-2's attention does?",
        expectation="It does not: so the nanoGPT-MLA fork says of its own latent attention.",
        arms={
            arm_name(experiment, mixer): f"{experiment.steps} steps at {experiment.lr:g} on "
            f"{source if experiment.kind == 'text' else 'random repeats'}"
            for experiment in EXPERIMENTS
            for mixer in MIXERS
        },
        recipe="toy-induction, shakespeare-char",
        flags=flags,
        match="none",
        seeds=seeds,
        rates="recipe",
        threads=THREADS,
    )


def planned(
    asked: Asked,
    wanted: Mapping[str, RunConfig],
    dataset_of: Callable[[RunConfig], TrainingData],
    *,
    plugins: Sequence[str] = (),
    commit: str = "",
) -> Study:
    """The study of the arms whose configs, flags applied, are `wanted`: sizes counted, a few steps of each timed."""
    torch.set_num_threads(asked.threads)
    arms, paces = [], dict[str, float]()
    for name, given in wanted.items():
        dataset = dataset_of(given)
        config = _kept(resolve_vocabulary(given, dataset))
        train = config.train
        assert train.steps is not None
        pace = f"{experiment_of(name).kind}-{mixer_of(name)}"  # budgets differ in steps alone
        if pace not in paces:
            labels = dataset.rows(train.block_size, train.seed).batch(0, train.batch_size).n_labels
            paces[pace] = labels / tokens_per_second(config, dataset)
        arms.append(
            Arm(
                name=name,
                slug=name,
                flags=asked.flags,
                config=config,
                costs=Costs.of(config.model, train.block_size),
                seconds_per_step=paces[pace] * _with_evaluations(config),
                seeds=experiment_of(name).seeds,
            )
        )
    text = dataset_of(wanted[arm_name(EXPERIMENTS[-1], MIXERS[0])])
    return Study(
        asked=asked,
        axis=Axis(),
        arms=tuple(arms),
        # The runner adds one evaluation of the validation part; ours are part of the steps' time.
        data={"source": text.source, "fingerprint": text.fingerprint, "validation_tokens": "0"},
        machine=describe_machine(),
        commit=commit,
        plugins=tuple(plugins),
    )


def _kept(config: RunConfig) -> RunConfig:
    """The config with what "auto" means here, and with checkpoints that a killed run goes on from."""
    train = config.train
    assert train.steps is not None
    kept = replace(
        train,
        precision=resolve_precision(train.precision, resolve_device(train.device)),
        save_interval=math.ceil(train.steps / SAVES),
        keep_last=1,
        async_save=False,
    )
    return replace(config, train=kept)


def _with_evaluations(config: RunConfig) -> float:
    """Time of a run with its evaluations, over that of its steps alone: a scored token costs a third of a trained."""
    train = config.train
    if not train.eval_interval:
        return 1.0
    return 1.0 + (train.eval_tokens or 0) / (train.eval_interval * train.batch_size * train.block_size) / 3


def text_of(data: str, cache: Path) -> tuple[str, str]:
    """The source of the text and its tokenizer: the given file or folder, Shakespeare where it is here, or stdlib.

    Nothing is downloaded. Of Python's library bytes are read: it has thousands of different characters.
    """
    if data:
        return data, "byte" if data == "stdlib" else "char"
    return ("shakespeare", "char") if has_shakespeare(cache) else ("stdlib", "byte")


def described(study: Study, folder: Path, left: Prediction, jobs: int) -> list[tuple[str, str]]:
    """Labels and texts of the plan, to be printed before anything runs."""
    rows = [
        ("question", study.asked.question),
        ("claim", study.asked.expectation),
        ("arms", f"{', '.join(MIXERS)}, equal in all but the mixer; the same seeds in every arm"),
    ]
    for experiment in EXPERIMENTS:
        arms = [study.arm(arm_name(experiment, mixer)) for mixer in MIXERS]
        train = arms[0].config.train
        paces = ", ".join(f"{mixer} {1000 * arm.seconds_per_step:.0f}" for mixer, arm in zip(MIXERS, arms, strict=True))
        what = "learn " + (study.data["source"] if experiment.kind == "text" else arms[0].config.data.source)
        seeds = study.seeds_of(arms[0])
        which = f"seeds 1 to {seeds}" if seeds > 1 else "seed 1"
        rows.append(
            (
                experiment.slug,
                f"{train.steps} steps at {train.lr:g} {what}, {which}; ms a step with evaluations: {paces}",
            )
        )
    if not left.runs:
        return [*rows, ("runs", f"all have ended, in {folder / 'runs'}")]
    threads = f"{jobs} at a time, {study.asked.threads} thread each"
    time = f"about {duration(left.seconds)} and a minute for measuring, {threads}"
    return [*rows, ("runs", f"{left.runs}, in {folder / 'runs'}"), ("time", time)]
