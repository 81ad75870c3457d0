"""Which settings a resumed run may change, and what each change does to the run so far."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from swamla.checkpoint import read_run_config
from swamla.config import from_plain, to_plain
from swamla.errors import ConfigError
from swamla.train.config import RunConfig, TrainConfig

# Settings of where to compute, what to keep and what to report: the numbers stay the same, up to rounding.
SAME_NUMBERS = (
    *("device", "threads", "checkpointing", "compile", "parallel", "shards", "accumulation", "expert_parallel"),
    *("log_interval", "save_interval", "keep_last", "async_save", "on_save_error", "eval_interval", "eval_seconds"),
    *("rank_timeout_minutes", "tensorboard", "wandb_project", "wandb_run_name", "hf_repo_id", "hf_private"),
    *("profile", "profile_steps", "profile_warmup"),
)
# Settings that change the training from here on.
RATES = ("lr", "min_lr_ratio", "schedule", "warmup", "decay", "schedule_steps", "schedule_minutes")
LEARNING = (
    *("steps", "max_minutes", *RATES, "lr_embedding", "lr_head", "lr_scalars"),
    *("weight_decay", "weight_decay_embedding", "weight_decay_head", "grad_clip", "max_skipped", "spike_factor"),
)
# Settings that define the held-out loss: if one changes, the best checkpoint is evaluated again.
SCORING = ("eval_tokens", "eval_part")
SCORED_BY_DEFAULT = {f.name: f.default for f in fields(TrainConfig) if f.name in SCORING}

MAY_CHANGE = (*SAME_NUMBERS, *LEARNING, *SCORING)

RISE = 1.1  # a learning rate may not rise by more than this factor unless asked for


def config_of(run_dir: Path) -> RunConfig:
    """The config in a run's folder. Raises as `read_run_config` does."""
    plain = read_run_config(run_dir)
    del plain["format_version"]
    # A setting that is newer than the run's swamla gets its default.
    return from_plain(RunConfig, plain, origin=str(run_dir / "config.json"))


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Raise `ConfigError` if `config` differs from the run in the folder in a setting that may not change.

    The error names the difference that others follow from: the pattern, else a kind. A vocabulary size of 0, still to
    be taken from the tokenizer, counts as the run's.
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
    """Raise `ConfigError` if the run's later end would raise the learning rate, and no setting of the rate was changed.

    A schedule spans the whole run: an annealed run that gets more steps or minutes is in the middle of its schedule
    again. The user has to choose between that and the last rate. Raises too if a change leaves steps at a rate of 0; a
    run that was planned so from its start is resumed.
    """
    old, new = rates(before, now, step=step, seconds=seconds)
    changed = any(getattr(before, name) != getattr(now, name) for name in ("steps", "max_minutes", *RATES))
    if (
        changed
        and new == 0
        and now.horizon.progress(step, seconds) >= 1
        and now.budget.progress(step + 0.5, seconds) < 1
    ):
        name = "schedule_steps" if now.schedule_steps is not None else "schedule_minutes"
        allowed = (
            "ends the schedule at a rate of 0, so no further step would change the model: choose schedule = constant"
        )
        raise ConfigError(f"train.{name}", getattr(now, name), f"{allowed} lr = RATE, or a later end")
    chosen = any(getattr(before, name) != getattr(now, name) for name in RATES)
    later = now.horizon.progress(step, seconds) < before.horizon.progress(step, seconds)
    if chosen or not later or new <= RISE * old:
        return
    moved = [
        (name, f"schedule_{name.removeprefix('max_')}")
        for name in ("steps", "max_minutes")
        if getattr(before, name) != getattr(now, name)
    ]
    stay = " ".join(f"{flag} = {getattr(before, n):g}" for n, flag in moved if getattr(before, n) is not None)
    stretch = " ".join(f"{flag} = {getattr(now, n):g}" for n, flag in moved if getattr(now, n) is not None)
    last = before.lr * (1.0 if before.schedule == "constant" else before.min_lr_ratio)
    as_planned = f"it falls to {last:.2e}, and stays" if old > RISE * last else f"it stays at {old:.2e}"
    # After a schedule that ends at 0, training on at the last rate would change nothing.
    keep = f"{stay} ({as_planned})" if last else "schedule = constant lr = RATE"
    name = moved[0][0]
    raise ConfigError(
        f"train.{name}",
        getattr(now, name),
        f"was {getattr(before, name)}, and the learning rate, {old:.2e} now, would follow the new end and rise to "
        f"{new:.2e}: choose {keep} or {stretch} (it rises, and falls again to the end)",
    )


def extension(train: TrainConfig, *, step: int, seconds: float) -> str:
    """Flags with which a run that is finished runs twice as long: its rate rises, and falls again to the new end."""
    flags = []
    for name, horizon, spent in (("steps", "schedule_steps", step), ("max_minutes", "schedule_minutes", seconds / 60)):
        planned, spanned = getattr(train, name), getattr(train, horizon)
        if planned is None or spent < planned / 2:  # not what ended the run, nor what would end twice as long a one
            continue
        flags.append(f"--{name} {2 * planned:.12g}")
        if train.schedule != "constant":
            flags.append(f"--{horizon} {max(2 * planned, spanned or 0):.12g}")
    return " ".join(flags)


def rates(before: TrainConfig, now: TrainConfig, *, step: int, seconds: float) -> tuple[float, float]:
    """The learning rate of the step after `step`: by the old settings, and by the new ones."""
    old, new = (config.rate(step, seconds) for config in (before, now))
    return old, new


def settings_to_store(before: TrainConfig, now: TrainConfig, *, step: int, seconds: float) -> TrainConfig:
    """The settings that a resumed run stores. If no step is left, changes to the training are not stored.

    Otherwise the next command would compare with a learning rate that no step had.
    """
    if now.budget.progress(step + 0.5, seconds) < 1:
        return now
    return replace(now, **{name: getattr(before, name) for name in LEARNING})


def describe_changes(before: TrainConfig, now: TrainConfig, *, step: int, seconds: float) -> list[str]:
    """Lines that name the changed settings, those that are not stored, and a changed learning rate."""
    stored = settings_to_store(before, now, step=step, seconds=seconds)
    lines = [f"changed in this run: {changes}"] if (changes := _named(before, stored)) else []
    if not_stored := _named(stored, now):
        lines.append(f"not stored, because no step is left that it would change: {not_stored}")
    old, new = rates(before, stored, step=step, seconds=seconds)
    if f"{old:.2e}" != f"{new:.2e}":
        lines.append(f"learning rate {new:.2e} from step {step + 1} on, {old:.2e} without the changes")
    return lines


def _named(before: TrainConfig, now: TrainConfig) -> str:
    was, is_now = dict(_leaves(to_plain(before))), dict(_leaves(to_plain(now)))
    return ", ".join(f"{name} {was[name]} → {is_now[name]}" for name in is_now if was.get(name) != is_now[name])


def scoring_of(config: TrainConfig) -> dict[str, Any]:
    """The settings, among those that may change, that the held-out loss depends on."""
    return {name: getattr(config, name) for name in SCORING}


def _leaves(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if key == "plugin" and "kind" in plain:  # a plugin's file may be renamed
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
