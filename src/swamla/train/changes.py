"""Which settings a resumed run may change, and what each change does to the run so far."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from swamla.checkpoint import read_run_config
from swamla.config import from_plain, to_plain
from swamla.errors import ConfigError
from swamla.train.config import RunConfig, TrainConfig

# Where and how things are computed, kept and told: the same numbers, up to rounding.
SAME_NUMBERS = (
    *("device", "threads", "checkpointing", "compile", "parallel", "shards", "accumulation", "expert_parallel"),
    *("log_interval", "save_interval", "keep_last", "async_save", "on_save_error", "eval_interval", "eval_seconds"),
    *("rank_timeout_minutes", "tensorboard", "wandb_project", "wandb_run_name", "hf_repo_id", "hf_private"),
    *("profile", "profile_steps", "profile_warmup"),
)
# What is learned from here on.
RATES = ("lr", "min_lr_ratio", "schedule", "warmup", "decay", "schedule_steps", "schedule_minutes")
LEARNING = ("steps", "max_minutes", *RATES, "weight_decay", "grad_clip", "max_skipped", "spike_factor")
# Settings that define the held-out loss: if one changes, the best checkpoint is evaluated again.
SCORING = ("eval_tokens",)

MAY_CHANGE = (*SAME_NUMBERS, *LEARNING, *SCORING)

RISE = 1.1  # a rate that goes up by more than this factor has to be asked for


def config_of(run_dir: Path) -> RunConfig:
    """The config that a run has in its folder. Raises as `read_run_config` does."""
    plain = read_run_config(run_dir)
    del plain["format_version"]
    # Read as a config, so that a setting which the run's swamla did not have yet counts as its default.
    return from_plain(RunConfig, plain, origin=str(run_dir / "config.json"))


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Raise `ConfigError` where `config` would make another run of the one in the folder.

    Of all that differs it names what the rest follows from: the pattern, else what is of another kind. A vocabulary
    that the tokenizer has yet to decide (size 0) counts as the run's.
    """
    before, now = (dict(_leaves(to_plain(one))) for one in (config_of(run_dir), config))
    if config.model.vocab_size == 0:
        now["model.vocab_size"] = before["model.vocab_size"]
    differing = [
        name
        for name in sorted((before.keys() | now.keys()) - {f"train.{name}" for name in MAY_CHANGE})
        if name.startswith(("model.", "train.")) and before.get(name) != now.get(name)
    ]
    if differing:
        name = min(differing, key=lambda name: (name != "model.pattern", not name.endswith(".kind")))
        had = f"the run to resume had {before.get(name)!r}; start a new run instead"
        raise ConfigError(name.removesuffix(".kind"), now.get(name), had)


def check_horizon(before: TrainConfig, now: TrainConfig, *, step: int, seconds: float) -> None:
    """Raise `ConfigError` where a later end of the run alone would lift the learning rate.

    A schedule follows the run's end: a run that has annealed and is given more steps or minutes is in the middle of
    it again. Whether that is wanted, or the last rate, has to be said.
    """
    old, new = rates(before, now, step=step, seconds=seconds)
    chosen = any(getattr(before, name) != getattr(now, name) for name in RATES)
    later = now.horizon.progress(step, seconds) < before.horizon.progress(step, seconds)
    if chosen or not later or new <= RISE * old:
        return
    moved = [
        (name, f"schedule_{name.removeprefix('max_')}")
        for name in ("steps", "max_minutes")
        if getattr(before, name) != getattr(now, name)
    ]
    stays = " ".join(f"--{flag} {getattr(before, n):g}" for n, flag in moved if getattr(before, n) is not None)
    spread = " ".join(f"--{flag} {getattr(now, n):g}" for n, flag in moved if getattr(now, n) is not None)
    last = before.lr * (1.0 if before.schedule == "constant" else before.min_lr_ratio)
    as_planned = f"it falls to {last:.2e}, and stays" if old > RISE * last else f"it stays at {old:.2e}"
    # A schedule that ends at 0 would learn nothing at its last rate.
    keep = f"{stays} ({as_planned})" if last else "--schedule constant --lr RATE"
    name = moved[0][0]
    raise ConfigError(
        f"train.{name}",
        getattr(now, name),
        f"was {getattr(before, name)}, and the learning rate, {old:.2e} now, would follow the new end and rise to "
        f"{new:.2e}: choose {keep} or {spread} (it rises, and falls again to the end)",
    )


def rates(before: TrainConfig, now: TrainConfig, *, step: int, seconds: float) -> tuple[float, float]:
    """The learning rate of the step after `step`, as it was to be and as it will be."""
    old, new = (config.rate(step, seconds) for config in (before, now))
    return old, new


def kept(before: TrainConfig, now: TrainConfig, *, step: int, seconds: float) -> TrainConfig:
    """What a resumed run keeps of its settings: where no step is left, none of learning, as nothing was learned by it.

    Else the next command would take a learning rate that no step had for the run's last one.
    """
    if now.budget.progress(step + 0.5, seconds) < 1:
        return now
    return replace(now, **{name: getattr(before, name) for name in LEARNING})


def told(before: TrainConfig, now: TrainConfig, *, step: int, seconds: float) -> list[str]:
    """Lines that name the changes, those that are not kept, and the learning rate where it differs."""
    lasting = kept(before, now, step=step, seconds=seconds)
    lines = [f"changed in this run: {changes}"] if (changes := _named(before, lasting)) else []
    if not_kept := _named(lasting, now):
        lines.append(f"not kept, as there is no step left that it would change: {not_kept}")
    old, new = rates(before, lasting, step=step, seconds=seconds)
    if f"{old:.2e}" != f"{new:.2e}":
        lines.append(f"learning rate {new:.2e} from step {step + 1} on, {old:.2e} without the changes")
    return lines


def _named(before: TrainConfig, now: TrainConfig) -> str:
    was, is_now = dict(_leaves(to_plain(before))), dict(_leaves(to_plain(now)))
    return ", ".join(f"{name} {was[name]} → {is_now[name]}" for name in is_now if was.get(name) != is_now[name])


def scoring_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that may change and that define what a held-out loss is measured on."""
    return {name: getattr(config, name) for name in SCORING}


def _leaves(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if (
            key == "plugin" and "kind" in plain
        ):  # where a class stands may change: what it is called, and its fields, may not
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
