"""What a resumed run may change: all of it is told, no number keeps a meaning that it no longer has, no rate jumps."""

import io
import json
import math
import re
from dataclasses import fields, replace

import pytest
from rich.console import Console

from swamla.checkpoint import latest_checkpoint
from swamla.cli.runs import summarize
from swamla.errors import ConfigError, CorruptError
from swamla.files import sha256_of
from swamla.train import TrainConfig, train
from swamla.train.changes import (
    LEARNING,
    MAY_CHANGE,
    RATES,
    SAME_NUMBERS,
    SCORING,
    check_horizon,
    check_same_run,
    extension,
)
from swamla.train.optim import LionConfig
from swamla.train.tracking.metrics import read_metrics

from .helpers import MODEL, held_out, losses, run, tiny_config

# Another value of every field of TrainConfig than `tiny_config` has.
OTHER = {
    "steps": 7,
    "max_minutes": 60.0,
    "batch_size": 8,
    "accumulation": 2,
    "block_size": 16,
    "curriculum": "16:1k,32:inf",
    "batch_ramp": "2:0.5,4:inf",
    "batch_rule": "sqrt",
    "optimizer": LionConfig(),
    "lora": 4,
    "lora_alpha": 4.0,
    "lr": 2e-3,
    "lr_embedding": 2.0,
    "lr_head": 2.0,
    "lr_scalars": 2.0,
    "min_lr_ratio": 0.5,
    "warmup": 0.5,
    "schedule": "linear",
    "decay": 0.3,
    "schedule_steps": 3,
    "schedule_minutes": 90.0,
    "weight_decay": 0.5,
    "weight_decay_embedding": 0.5,
    "weight_decay_head": 0.5,
    "grad_clip": 2.0,
    "ema": 0.9,
    "ema_width": 0.1,
    "eval_interval": 2,
    "eval_seconds": 9e9,
    "eval_tokens": 64,
    "eval_part": "validation",
    "save_interval": 2,
    "keep_last": 3,
    "async_save": True,
    "on_save_error": "continue",
    "max_skipped": 5,
    "spike_factor": 50.0,
    "rank_timeout_minutes": 3.0,
    "log_interval": 2,
    "tensorboard": True,
    "wandb_project": "p",
    "wandb_run_name": "n",
    "hf_repo_id": "me/x",
    "hf_private": False,
    "profile": True,
    "profile_steps": 1,
    "profile_warmup": 1,
    "init_from": "elsewhere",
    "init_checkpoint": "latest",
    "seed": 5,
    "precision": "bf16",
    "checkpointing": "all",
    "compile": "default",
    "parallel": "ddp",
    "shards": 1,
    "expert_parallel": 2,
    "device": "auto",
    "threads": 1,
}
BESIDES = {
    "wandb_run_name": {"wandb_project": "p"},
    "init_checkpoint": {"init_from": "x"},
    "lora_alpha": {"lora": 4},
}  # without which a field cannot be
# Settings of several processes, of what is not installed everywhere, of services: not tried in a run here.
ELSEWHERE = {"parallel", "shards", "expert_parallel", "compile", "wandb_project", "wandb_run_name", "hf_repo_id"}
ELSEWHERE |= {"tensorboard", "hf_private"}


def said_by(config, folder, dataset, **options):
    """Train on; what was said."""
    out = io.StringIO()
    train(config, folder, dataset=dataset, console=Console(file=out, width=400), resume=True, **options)
    return out.getvalue()


@pytest.fixture
def begun(tmp_path, dataset):
    """A run of six steps, finished."""
    run(tiny_config(), tmp_path / "run", dataset, evaluate=held_out(dataset))
    return tmp_path / "run"


def test_every_setting_is_of_one_kind_and_has_another_value_here():
    names = [f.name for f in fields(TrainConfig)]
    assert set(OTHER) == set(names)
    assert len(MAY_CHANGE) == len({*SAME_NUMBERS, *LEARNING, *SCORING})
    assert set(MAY_CHANGE) <= set(names)
    assert all(getattr(tiny_config().train, name) != value for name, value in OTHER.items())


def test_a_setting_may_change_or_is_refused_by_name(tmp_path, dataset):
    model = replace(MODEL, tied_head=False)  # some settings are of a head of its own
    run(tiny_config(model, steps=1), plain := tmp_path / "run", dataset)
    run(tiny_config(model, steps=1, lora=4), adapted := tmp_path / "adapted", dataset)
    for name, value in OTHER.items():
        begun = adapted if name == "lora_alpha" else plain
        changed = tiny_config(model, **({"steps": 1} | BESIDES.get(name, {}) | {name: value}))
        changed = replace(changed, model=replace(changed.model, vocab_size=0))
        if name in MAY_CHANGE:
            check_same_run(changed, begun)
        else:
            with pytest.raises(ConfigError, match=rf"train\.{name}\S* = .*: the run to resume had"):
                check_same_run(changed, begun)


def test_what_is_said_to_leave_the_numbers_does_and_every_change_is_told(tmp_path, dataset):
    model = replace(MODEL, dropout=0.0)  # whose draws depend on how rows are split
    run(tiny_config(model, steps=8), tmp_path / "whole", dataset, evaluate=held_out(dataset))
    halfway = tiny_config(model, steps=8, max_minutes=9e9, save_interval=4)
    run(halfway, tmp_path / "run", dataset, evaluate=held_out(dataset))
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000008*"):
        path.rename(tmp_path / path.name)
    tried = {name: OTHER[name] for name in SAME_NUMBERS if name not in ELSEWHERE}
    said = said_by(
        tiny_config(model, steps=8, max_minutes=9e9, **tried), tmp_path / "run", dataset, evaluate=held_out(dataset)
    )
    line = next(line for line in said.splitlines() if line.startswith("changed in this run: "))
    before = halfway.train.__dict__
    assert all(f"{name} {before[name]} → {value}" in line for name, value in tried.items())
    assert "learning rate" not in said
    assert dict(losses(tmp_path / "run")) == pytest.approx(dict(losses(tmp_path / "whole")), rel=1e-4)


def test_the_best_is_scored_anew_by_what_evaluations_are_of_now(tmp_path, dataset):
    score, few = held_out(dataset), []

    def evaluate(model):
        found = score(model)
        return found if not few else found | {"loss": found["loss"] - 1, "tokens": few[0]}

    few.append(64)  # by 64 tokens every loss is lower by 1
    config = tiny_config(eval_interval=2, eval_tokens=64, keep_last=5, save_interval=2, lr=1e-2)
    state = run(config, tmp_path / "run", dataset, evaluate=evaluate)
    step, low = state.best
    few.clear()
    wider = tiny_config(eval_interval=2, keep_last=5, save_interval=2, lr=1e-2, steps=8, schedule_steps=6)
    said = said_by(wider, tmp_path / "run", dataset, evaluate=evaluate)
    line = f"evaluated the best checkpoint, step {step}, again (eval_tokens 64 → None): {low:.4f} → {low + 1:.4f}"
    assert line in said
    marked = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    after = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["step"] > 6 and "held_out_loss" in r]
    expected = min([low + 1, *(r["held_out_loss"] for r in after)])
    assert marked["loss"] == pytest.approx(expected)
    assert summarize(tmp_path / "run").held_out_loss == pytest.approx(expected)
    assert "evaluated the best checkpoint" not in said_by(wider, tmp_path / "run", dataset, evaluate=evaluate), "once"


def test_a_best_is_not_scored_anew_for_a_setting_that_is_newer_than_its_checkpoint(tmp_path, dataset):
    config = tiny_config(eval_interval=2, eval_tokens=64, save_interval=2)
    state = run(config, tmp_path / "run", dataset, evaluate=held_out(dataset))
    assert state.scored_by == {"eval_tokens": 64, "eval_part": "all"}
    for file in (tmp_path / "run" / "checkpoints").glob("step-*/state.json"):
        older = json.loads(file.read_text())
        del older["scored_by"]["eval_part"]
        file.write_text(json.dumps(older))
        manifest = json.loads((file.parent / "manifest.json").read_text())
        manifest["files"]["state.json"] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        (file.parent / "manifest.json").write_text(json.dumps(manifest))
    assert "evaluated the best" not in said_by(config, tmp_path / "run", dataset, evaluate=held_out(dataset))
    halved = replace(config, train=replace(config.train, eval_part="validation"))
    assert "again (eval_part all → validation)" in said_by(
        halved, tmp_path / "run", dataset, evaluate=held_out(dataset)
    )


def test_a_finished_run_is_scored_anew_once_as_well(tmp_path, dataset):
    config = tiny_config(eval_interval=2, eval_tokens=64, save_interval=2, keep_last=5)
    evaluate = held_out(dataset)
    run(config, tmp_path / "run", dataset, evaluate=evaluate)
    wider = replace(config, train=replace(config.train, eval_tokens=128))
    assert "evaluated the best checkpoint" in said_by(wider, tmp_path / "run", dataset, evaluate=evaluate)
    assert "evaluated the best checkpoint" not in said_by(wider, tmp_path / "run", dataset, evaluate=evaluate)
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert (tmp_path / "run" / "checkpoints" / f"step-{best['step']:08}").is_dir()


def test_an_evaluation_that_fails_leaves_all_saved_and_says_where_it_goes_on(tmp_path, dataset):
    def evaluate(model):
        raise CorruptError("held-out-00000.bin: truncated")

    config = tiny_config(eval_interval=3, save_interval=2)
    with pytest.raises(CorruptError, match="truncated") as caught:
        run(config, tmp_path / "run", dataset, evaluate=evaluate)
    assert caught.value.__notes__ == [
        f"all is saved after step 3: fix the error, then continue with `resume`: {tmp_path / 'run'}"
    ]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").step == 3
    run(config, tmp_path / "run", dataset, evaluate=held_out(dataset), resume=True)
    run(config, tmp_path / "whole", dataset, evaluate=held_out(dataset))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_score_is_of_the_weights_that_were_the_best_averages_included_and_training_goes_on_unchanged(
    tmp_path, dataset
):
    seen = []

    def evaluate(model):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {"loss": float(len(seen))}  # the first is the best

    config = tiny_config(eval_interval=2, eval_tokens=64, ema=0.9, save_interval=2)
    run(config, tmp_path / "run", dataset, evaluate=evaluate)
    best, end = seen[0], len(seen)
    run(
        replace(config, train=replace(config.train, eval_tokens=32)),
        tmp_path / "run",
        dataset,
        evaluate=evaluate,
        resume=True,
    )
    assert all(best[name].equal(p) for name, p in seen[end].items())
    again = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "best_held_out_loss" in r]
    assert again == [{"step": 6, "best_step": 2, "best_held_out_loss": end + 1.0}]


def test_a_best_that_is_damaged_is_sought_anew(tmp_path, dataset):
    scores = iter([1.0, 2.0, 3.0, 4.0])
    config = tiny_config(eval_interval=2, eval_tokens=64, save_interval=2, keep_last=5)
    run(config, tmp_path / "run", dataset, evaluate=lambda model: {"loss": next(scores)})
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    wider = replace(config, train=replace(config.train, eval_tokens=None, steps=8, schedule_steps=6))
    with pytest.warns(UserWarning, match=r"damaged checkpoint: .*step-00000002"):
        said = said_by(wider, tmp_path / "run", dataset, evaluate=lambda model: {"loss": next(scores)})
    assert "so the next evaluation sets a new best" in said
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text()) == {"step": 8, "loss": 4.0}


SCHEDULES = ["cosine", "linear", "wsd"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bound", ["steps", "max_minutes"])
def test_a_finished_run_does_not_get_more_to_do_at_another_rate_unless_that_is_asked_for(
    tmp_path, dataset, schedule, bound
):
    budget = {"steps": 6} if bound == "steps" else {"steps": None, "max_minutes": 0.02}
    flag = "schedule_steps" if bound == "steps" else "schedule_minutes"
    state = run(tiny_config(schedule=schedule, **budget), tmp_path / "run", dataset)
    longer = {"steps": 12} if bound == "steps" else {"steps": None, "max_minutes": state.seconds / 30}
    with pytest.raises(ConfigError) as caught:
        run(tiny_config(schedule=schedule, **longer), tmp_path / "run", dataset, resume=True)
    said = str(caught.value)
    assert said.startswith(f"train.{bound} = {longer[bound]}: was {budget[bound]}, and the learning rate, ")
    # A run that is bounded by time ends in the middle of a step, so a little above its lowest rate.
    rate = "1.00e-03" if bound == "steps" else re.search(r"rate, (\S+) now", said)[1]
    assert 1e-3 <= float(rate) < 5e-3
    stays = f"it stays at {rate}" if float(rate) <= 1.1e-3 else "it falls to 1.00e-03, and stays"
    assert f"{flag} = {budget[bound]:g} ({stays}) or {flag} = {longer[bound]:g} (it rises" in said


def test_a_rate_that_fell_to_nothing_is_not_offered_to_stay():
    before, now = tiny_config(min_lr_ratio=0.0).train, tiny_config(min_lr_ratio=0.0, steps=12).train
    with pytest.raises(ConfigError, match=r"choose schedule = constant lr = RATE or schedule_steps = 12 \(it rises"):
        check_horizon(before, now, step=6, seconds=1.0)


def test_steps_after_a_schedule_that_ended_at_no_rate_are_refused_as_they_would_change_nothing():
    before = tiny_config(min_lr_ratio=0.0).train
    for now in (
        tiny_config(min_lr_ratio=0.0, steps=12, schedule_steps=6),
        tiny_config(min_lr_ratio=0.0, steps=None, max_minutes=9.0, schedule_minutes=1.0),
    ):
        with pytest.raises(
            ConfigError, match=r"a rate of 0, so no further step .* choose schedule = constant lr = RATE"
        ):
            check_horizon(before, now.train, step=6, seconds=60.0)
    last = tiny_config(min_lr_ratio=0.0).train  # of a run that was stopped before its last step, whose rate is 0
    check_horizon(last, last, step=5, seconds=1.0)
    check_horizon(last, replace(last, steps=12, schedule_steps=6, min_lr_ratio=0.1), step=6, seconds=1.0)


def test_a_run_that_was_planned_to_end_at_no_rate_is_resumed_after_an_interruption():
    planned = tiny_config(min_lr_ratio=0.0, steps=12, schedule_steps=6).train
    check_horizon(planned, planned, step=8, seconds=1.0)
    check_horizon(planned, replace(planned, log_interval=5), step=8, seconds=1.0)


def test_a_schedule_in_the_middle_is_offered_to_end_as_planned():
    before, now = tiny_config(steps=12).train, tiny_config(steps=60).train
    with pytest.raises(ConfigError, match=r"choose schedule_steps = 12 \(it falls to 1.00e-03, and stays\) or "):
        check_horizon(before, now, step=9, seconds=1.0)


def test_settings_for_a_run_without_a_step_left_are_not_kept_and_so_not_taken_for_what_it_learned_by(tmp_path, dataset):
    run(tiny_config(), tmp_path / "run", dataset)
    written = (tmp_path / "run" / "config.json").read_text()
    said = said_by(tiny_config(min_lr_ratio=0.9, lr=0.05, log_interval=3), tmp_path / "run", dataset)
    assert "changed in this run: log_interval 1 → 3\n" in said
    assert "not stored, because no step is left that it would change: lr 0.01 → 0.05, min_lr_ratio 0.1 → 0.9\n" in said
    assert "learning rate" not in said
    assert (tmp_path / "run" / "config.json").read_text() == written.replace('"log_interval": 1', '"log_interval": 3')
    said = said_by(tiny_config(steps=4, log_interval=3), tmp_path / "run", dataset)
    assert "not stored, because no step is left that it would change: steps 6 → 4\n" in said
    # So the rate of the last step is known, and a rise from it is refused, as of a run that was left alone.
    with pytest.raises(ConfigError, match=r"the learning rate, 1\.00e-03 now, would follow the new end and rise to"):
        run(tiny_config(steps=12, log_interval=3), tmp_path / "run", dataset, resume=True)
    told = said_by(tiny_config(steps=12, min_lr_ratio=0.9, log_interval=3), tmp_path / "run", dataset)
    assert ", 1.00e-03 without the changes" in told


def test_the_rate_stays_or_rises_as_was_chosen_and_both_are_told(tmp_path, dataset):
    rates = {}
    for name, schedule_steps in (("stays", 6), ("rises", 12)):
        run(tiny_config(), tmp_path / name, dataset)
        more = tiny_config(steps=12, schedule_steps=schedule_steps)
        said = said_by(more, tmp_path / name, dataset)
        assert f"steps 6 → 12, schedule_steps None → {schedule_steps}" in said
        rates[name] = [r["lr"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "lr" in r]
        told = f"learning rate {rates[name][6]:.2e} from step 7 on, 1.00e-03 without the changes"
        assert (told in said) == (name == "rises")
        assert "changed" not in said_by(more, tmp_path / name, dataset), "a choice is made once"
    assert rates["stays"][6:] == [1e-3] * 6
    # A cosine from 1e-2 after the first of 12 steps to 1e-3 after the last: the 7th is 6/11 of the way.
    assert rates["rises"][6] == pytest.approx(1e-3 + 9e-3 * (1 + math.cos(math.pi * 6 / 11)) / 2)
    assert rates["rises"][-1] == pytest.approx(1e-3)


def test_other_rates_that_are_named_are_a_choice_and_both_are_told(begun, dataset):
    said = said_by(tiny_config(steps=9, lr=3e-3, schedule="constant", warmup=0.0), begun, dataset)
    assert "learning rate 3.00e-03 from step 7 on, 1.00e-03 without the changes" in said
    assert set(RATES) > {"lr", "schedule", "warmup"}


def test_a_longer_run_whose_rate_does_not_jump_needs_no_choice(tmp_path, dataset):
    run(tiny_config(schedule="constant"), tmp_path / "run", dataset)
    said = said_by(tiny_config(schedule="constant", steps=7), tmp_path / "run", dataset)
    assert "changed in this run: steps 6 → 7\n" in said
    assert "without the changes" not in said


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({}, "6 of 6 steps; to extend it: --resume {} --steps 12 --schedule_steps 12\n"),
        (
            {"steps": 6, "max_minutes": 60.0, "schedule_steps": 20},
            "6 of 6 steps, 0.0 of 60 minutes; to extend it: --resume {} --steps 12 --schedule_steps 20\n",
        ),
        ({"schedule": "constant"}, "6 of 6 steps; to extend it: --resume {} --steps 12\n"),
    ],
)
def test_a_finished_run_that_is_resumed_says_so_and_how_to_extend_it(tmp_path, dataset, bounds, said):
    run(tiny_config(**bounds), tmp_path / "run", dataset)
    told = said_by(tiny_config(**bounds), tmp_path / "run", dataset)
    assert f"the run is finished: {said.format(tmp_path / 'run')}" in told
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(("bounds", "seconds"), [({"steps": 6}, 9.0), ({"steps": None, "max_minutes": 0.1}, 6.1)])
def test_the_flags_that_extend_a_finished_run_are_not_refused_and_leave_steps_to_take(schedule, bounds, seconds):
    before = tiny_config(schedule=schedule, min_lr_ratio=0.0, **bounds).train
    words = extension(before, step=6, seconds=seconds).split()
    given = {name.removeprefix("--"): float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    after = replace(before, **{name: int(v) if "steps" in name else v for name, v in given.items()})
    check_horizon(before, after, step=6, seconds=seconds)
    assert after.budget.progress(6.5, seconds) < 0.6
    assert after.rate(6, seconds) > 0
