"""The runs of a study: which come next, by the outcomes so far, and the command and the time of each.

Every arm's learning rate is searched for on seed 0: three rates √10 apart, more while the best stands at an edge, then
one on either side of the best, all scored on the validation part of the held-out text. Then the arm is trained at its
best rate with fresh seeds, the same ones in every arm, so that differences are paired. All of it follows from the study
and the outcomes alone (`ready`), so a study goes on wherever it was stopped.
"""

import math
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swamla.study.plan import SEARCH_SEED, Arm, Study

GRID = (-2, 0, 2)  # rates in quarters of a factor of 10 from the arm's own
REFINED = (-1, 1)  # beside the best of those
MORE_RATES = 0.4  # runs of a search beyond the fewest: 3 of 8 arms had one in the first two runs of hybrid-or-not
FARTHEST = 10  # quarters: a factor of 316 from the arm's own rate
Status = Literal["finished", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of a study. purpose: "rate", to find the arm's rate, or "seed".  rate: see `Arm.lr`."""

    arm: str
    slug: str
    purpose: Literal["rate", "seed"]
    rate: int
    lr: float
    seed: int

    @property
    def id(self) -> str:
        """Its name, also of its folder."""
        return f"{self.slug}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: a line of results.jsonl. validation: bits per byte of the validation part,
    of a task nats an answer; none unless finished.

    seconds: of training.  wall: of its process, with its start; of a resumed run those of the last one and of the
    training that it went on from.  error: its last line, if it failed.
    """

    run: str
    arm: str
    purpose: Literal["rate", "seed"]
    rate: int
    lr: float
    seed: int
    status: Status
    validation: float | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wall: float = 0.0
    error: str = ""
    command: str = ""

    @property
    def score(self) -> float:
        """The validation score, lower is better; infinite for a run that did not finish."""
        return math.inf if self.validation is None else self.validation


def next_rates(scores: Mapping[int, float]) -> tuple[int, ...]:
    """The rates still to be tried, in quarters of a factor of 10, by the scores of those that were; () when done.

    First the grid, then one √10 farther while the best stands at an edge, then one on either side of the best.
    """
    if missing := tuple(rate for rate in GRID if rate not in scores):
        return missing
    coarse = {rate: score for rate, score in scores.items() if rate % 2 == 0}
    # Where all diverged, lower rates may not.
    best = min(coarse, key=lambda rate: (coarse[rate], rate))
    step = 2 if best == max(coarse) and math.isfinite(coarse[best]) else -2 if best == min(coarse) else 0
    if step and abs(best + step) <= FARTHEST:
        return (best + step,)
    if not math.isfinite(coarse[best]):
        return ()
    return tuple(best + beside for beside in REFINED if best + beside not in scores)


def chosen_rate(scores: Mapping[int, float]) -> int | None:
    """The best of the rates that were tried, of two equal ones the lower; None if no run finished."""
    best = min(scores, key=lambda rate: (scores[rate], rate), default=None)
    return best if best is not None and math.isfinite(scores[best]) else None


def rate_of(study: Study, arm: Arm, outcomes: Mapping[str, Outcome]) -> int | None:
    """The rate that an arm's seeds are trained at; None if it is not found yet, or no rate trained."""
    if study.asked.rates == "recipe":
        return 0
    scores = rate_scores(arm, outcomes)
    return None if next_rates(scores) else chosen_rate(scores)


def rate_scores(arm: Arm, outcomes: Mapping[str, Outcome]) -> dict[int, float]:
    """Rate → validation score on the seed of the search."""
    found = [one for one in outcomes.values() if one.arm == arm.name and one.purpose == "rate"]
    return {one.rate: one.score for one in sorted(found, key=lambda one: one.rate)}


def seed_runs(study: Study, outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Outcomes of fresh seeds at the rates that are chosen: those of a choice before a run was tried again are none."""
    rates = {arm.name: rate_of(study, arm, outcomes) for arm in study.arms}
    seeds = {run: one for run, one in outcomes.items() if one.purpose == "seed"}
    return {run: one for run, one in seeds.items() if rates[one.arm] in (None, one.rate)}


def runs_of(study: Study, arm: Arm, outcomes: Mapping[str, Outcome]) -> list[Run]:
    """The arm's runs that are known to be wanted and have no outcome, in order."""

    def run(purpose: Literal["rate", "seed"], rate: int, seed: int) -> Run:
        return Run(arm=arm.name, slug=arm.slug, purpose=purpose, rate=rate, lr=arm.lr(rate), seed=seed)

    if study.asked.rates == "search" and (rates := next_rates(rate_scores(arm, outcomes))):
        return [run("rate", rate, SEARCH_SEED) for rate in rates]
    rate = rate_of(study, arm, outcomes)
    seeds = [] if rate is None else [run("seed", rate, SEARCH_SEED + n) for n in range(1, study.seeds_of(arm) + 1)]
    return [one for one in seeds if one.id not in outcomes]


def ready(study: Study, outcomes: Mapping[str, Outcome]) -> list[Run]:
    """All runs that can start now, those of arms with the fewest outcomes first; empty when the study is trained.

    Arms take turns, so that a machine whose speed drifts is the same to all.
    """
    found = []
    for number, arm in enumerate(study.arms):
        done = sum(outcome.arm == arm.name for outcome in outcomes.values())
        found += [(done + n, number, run) for n, run in enumerate(runs_of(study, arm, outcomes))]
    return [run for _, _, run in sorted(found, key=lambda one: one[:2])]


def command(study: Study, folder: Path, run: Run, *, resume: bool = False) -> list[str]:
    """The words of the run's command, without the program's own: any shell can start it."""
    where = str(run_folder(folder, run.id))
    plugins = [word for file in study.plugins for word in ("--plugin", file)]
    if resume:
        return ["train", "--resume", where, *plugins]
    recipe = str(arm_file(folder, run.slug))
    return ["train", recipe, "--lr", f"{run.lr:g}", "--seed", str(run.seed), "--output_dir", where, *plugins]


def program() -> list[str]:
    """The words before those of `command`: this Python, this package."""
    return [sys.executable, "-m", "swamla"]


def arm_file(folder: Path, slug: str) -> Path:
    """The resolved config of an arm, a recipe as any other."""
    return folder / "arms" / f"{slug}.json"


def run_folder(folder: Path, run: str) -> Path:
    """An ordinary run's folder."""
    return folder / "runs" / run


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Runs and seconds that are left. The search may need a few runs more, if the best rate stands at an edge."""

    runs: int
    seconds: float


def predict(study: Study, outcomes: Mapping[str, Outcome], jobs: int) -> Prediction:
    """What is left of a study with `jobs` runs at a time, by measured steps and, where there are some, by ended runs.

    Without outcomes of an arm, its runs take as long as their start, steps and evaluation were measured to take, times
    what the other arms' runs took in excess. A search may need a run more: some do, so part of one is counted. However
    many run at a time, an arm's stages follow one another: its first rates, those beside the best, its seeds. All that
    follows the runs is in the seconds, too.
    """
    pace = _pace(study, outcomes)
    runs, seconds, longest = 0, 0.0, 0.0
    for arm in study.arms:
        left = runs_left(study, arm, outcomes)
        walls = [one.wall for one in outcomes.values() if one.arm == arm.name and one.status == "finished" and one.wall]
        runs += left
        searching = study.asked.rates == "search" and next_rates(rate_scores(arm, outcomes))
        each = sum(walls) / len(walls) if walls else pace * seconds_of_run(study, arm)
        more = MORE_RATES if searching else 0.0
        seconds += (left + more) * each
        stages = bool(left) + (1 + (not _is_fine(searching, arm, outcomes)) if searching else 0)
        longest = max(longest, (stages + more) * each)
    closing = pace * study.closing_seconds if runs else 0.0
    return Prediction(runs=runs, seconds=max(seconds / jobs, longest) + closing)


def _pace(study: Study, outcomes: Mapping[str, Outcome]) -> float:
    """How many times longer than predicted the runs took that ended."""
    ended = [one for one in outcomes.values() if one.status == "finished" and one.wall]
    if not ended:
        return 1.0
    return sum(one.wall for one in ended) / sum(seconds_of_run(study, study.arm(one.arm)) for one in ended)


def seconds_of_run(study: Study, arm: Arm) -> float:
    """Predicted seconds of a run's process: start, steps, and the evaluation, slower as the arm's steps are."""
    slower = arm.seconds_per_step / (study.arms[0].seconds_per_step or 1.0)
    steps = arm.steps * (arm.seconds_per_step + study.loop_seconds)
    return study.start_seconds + steps + slower * study.evaluation_seconds


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of an arm's runs, as predicted before the study and as they took, means over those that finished."""

    arm: str
    runs: int
    predicted: float
    took: float


def paces(study: Study, outcomes: Mapping[str, Outcome]) -> list[Pace]:
    """Predicted and real times of the arms that have finished runs."""
    found = []
    for arm in study.arms:
        walls = [one.wall for one in outcomes.values() if one.arm == arm.name and one.status == "finished"]
        if walls:
            took = statistics.fmean(walls)
            found.append(Pace(arm=arm.name, runs=len(walls), predicted=seconds_of_run(study, arm), took=took))
    return found


def runs_left(study: Study, arm: Arm, outcomes: Mapping[str, Outcome]) -> int:
    """Runs of an arm without an outcome; of the search those that it needs at least."""
    if study.asked.rates == "search" and (rates := next_rates(rate_scores(arm, outcomes))):
        fine = _is_fine(rates, arm, outcomes)
        return len(rates) + (0 if fine else len(REFINED)) + study.seeds_of(arm)
    return len(runs_of(study, arm, outcomes))


def _is_fine(rates: Iterable[int], arm: Arm, outcomes: Mapping[str, Outcome]) -> bool:
    """Whether the search has come to the rates beside the best. rates: those still to be tried."""
    return any(rate % 2 for rate in (*rates, *rate_scores(arm, outcomes)))


def describe(
    study: Study, folder: Path, outcomes: Mapping[str, Outcome], jobs: int, parts: int = 1
) -> list[tuple[str, str]]:
    """Labels and texts of the plan, to be printed before anything runs. jobs: of each of `parts` processes."""
    asked, prediction = study.asked, predict(study, outcomes, jobs * parts)
    each = f" in each of {parts} parts that work together" if parts > 1 else ""
    first, train = study.arms[0], study.arms[0].config.train
    own = ", in other arms as many as take as long" if asked.match == "seconds" else ""
    search = "the recipe's in every arm" if asked.rates == "recipe" else "searched on seed 0, at first √10 apart"
    rows = [
        ("question", asked.question or f"none was stated; asked by default: {default_question(study)}"),
        ("expected", asked.expectation or "nothing was stated"),
        ("measured", f"{study.axis.name} on the {study.scored}, {study.axis.direction} is better"),
        ("margin", f"differences within ±{asked.margin:g} count as too small to matter"),
        ("data", _described_data(study)),
        ("budget", f"{first.steps} steps of {train.batch_size} rows of {train.block_size}{own}"),
        ("rates", search),
        ("seeds", f"1 to {asked.seeds}, fresh ones, the same in every arm; differences are paired by seed"),
        *_described_sizes(study),
        ("matched by", asked.match),
        *(("arm", _described_arm(arm)) for arm in study.arms),
        ("runs", f"{prediction.runs}{' or a few more' * (asked.rates == 'search')}, in {folder / 'runs'}"),
    ]  # fmt: skip
    return [
        *rows,
        ("time", f"about {duration(prediction.seconds)}, {jobs} at a time{each}, threads of each: {asked.threads}"),
        ("by", _basis(study, outcomes)),
    ]


def default_question(study: Study) -> str:
    """What a study asks whose author states no question: its comparisons, which are those with the first arm."""
    first, *others = dict.fromkeys(arm.label for arm in study.arms)
    if len(others) == 1:
        return f"Does {others[0]} differ from {first}?"
    return f"Do {', '.join(others[:-1])} and {others[-1]} differ from {first}?"


def _described_sizes(study: Study) -> list[tuple[str, str]]:
    """A row for a study of several sizes."""
    if not study.sizes:
        return []
    fewer = study.asked.larger_seeds
    seeds = f", with seeds 1 to {fewer} but for the smallest" if fewer else ""
    return [("sizes", f"widths {', '.join(map(str, study.sizes))}, each {study.each_size} by itself{seeds}")]


def _basis(study: Study, outcomes: Mapping[str, Outcome]) -> str:
    """What the predicted time rests on."""
    others = f" beside {study.beside} other run{'s' * (study.beside > 1)}" if study.beside else ""
    measured = (
        f"steps of all arms, timed in turns{others}, and a short run: {study.start_seconds:.1f} s to start and "
        f"to save, {1000 * study.loop_seconds:.0f} ms more a step, {study.evaluation_seconds:.1f} s to evaluate"
        + (f"; then {study.closing_seconds:.0f} s to score and measure all runs" if study.closing_seconds else "")
    )
    ended = sum(one.status == "finished" for one in outcomes.values())
    if not ended:
        return f"{measured}; runs that end correct it"
    return (
        f"{ended} runs that ended, which took {_pace(study, outcomes):.2f} times what was measured before: {measured}"
    )


def _described_data(study: Study) -> str:
    if study.task:
        return f"{study.data['source']}: endless rows for training, held-out ones for choices, others for the verdict"
    sizes = (
        f"{study.data['validation_bytes']} bytes for choices, {study.data['test_bytes']} to be read once, at the end"
    )
    apart = int(study.data.get("bytes_apart", "0"))
    lost = f"; its tokenizer loses {apart} bytes of it: bits per byte are too low, in all arms alike" if apart else ""
    return f"{study.data['source']}, {sizes}{lost}"


def _described_arm(arm: Arm) -> str:
    costs = arm.costs
    what = f" ({arm.matched})" if arm.matched else ""
    return (
        f"{arm.name}: {' '.join(arm.config.model.pattern)}, {costs.parameters:,} parameters without embeddings, "
        f"{costs.flops / 1e6:.2f} MFLOPs a token, {costs.state / 1024:.1f} KiB of state at {costs.length} tokens, "
        f"{1000 * arm.seconds_per_step:.0f} ms a step, {arm.steps} steps{what}"
    )


def duration(seconds: float) -> str:
    """Such as "25 min" or "2 h 10 min"."""
    minutes = max(1, round(seconds / 60))
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
