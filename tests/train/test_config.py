"""A training config checks itself and says what is allowed."""

import pytest

from swamla.config import from_plain, to_plain
from swamla.errors import ConfigError
from swamla.train import TrainConfig
from swamla.train.optim import AdamWConfig, MuonConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": None}, "steps = None: give `steps` or `max_minutes`"),
        ({"steps": 0}, "steps = 0: must be > 0"),
        ({"max_minutes": 0.0}, "max_minutes = 0.0: must be > 0"),
        ({"lr": 0.0}, "lr = 0.0: must be > 0 and finite, e.g. 3e-4"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": float("inf")}, "lr = inf"),
        ({"warmup": 11}, "warmup = 11: must not exceed steps = 10"),
        ({"warmup": -0.1}, "warmup = -0.1: must be >= 0"),
        ({"accumulation": 3}, "accumulation = 3: must divide batch_size = 32"),
        ({"batch_size": 0}, "batch_size = 0: must be >= 1"),
        ({"keep_last": 0}, "keep_last = 0: must be >= 1"),
        ({"keep_last": 1, "async_save": True}, "keep_last = 1: must be >= 2 with async_save"),
        ({"profile_steps": 0}, "profile_steps = 0: must be >= 1"),
        ({"profile_warmup": 0}, "profile_warmup = 0: must be >= 1"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio = 1.5: must be between 0 and 1"),
        ({"decay": 0.0}, "decay = 0.0"),
        ({"schedule": "wsd", "warmup": 0.3, "decay": 0.8}, "decay = 0.8: must not begin in the warm-up"),
        ({"schedule_steps": 4, "warmup": 5}, "warmup = 5: must not exceed schedule_steps = 4"),
        (
            {"schedule": "wsd", "schedule_steps": 6, "warmup": 4, "decay": 0.5},
            "decay = 0.5: must not begin in the warm-up",
        ),
        ({"schedule": "wsd", "warmup": 5, "decay": 0.8}, "decay = 0.8: must not begin in the warm-up"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"grad_clip": 0.0}, "grad_clip = 0.0"),
        ({"eval_interval": 0}, "eval_interval = 0"),
        ({"threads": -2}, "threads = -2"),
        ({"seed": -1}, "seed = -1: must be >= 0"),
        ({"wandb_project": "me/mine"}, "wandb_project = 'me/mine': must not contain / "),
        ({"wandb_run_name": "first"}, "wandb_run_name = 'first': names a run in a project: give wandb_project too"),
    ],
)
def test_an_impossible_setting_is_refused_with_what_is_allowed(settings, message):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**({"steps": 10} | settings))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "settings", "field"),
    [
        (AdamWConfig, {"betas": (0.9, 1.0)}, "betas"),
        (AdamWConfig, {"eps": 0.0}, "eps"),
        (MuonConfig, {"momentum": 1.0}, "momentum"),
        (MuonConfig, {"iterations": 0}, "iterations"),
        (MuonConfig, {"betas": (-0.1, 0.9)}, "betas"),
    ],
)
def test_an_impossible_optimizer_is_refused(config, settings, field):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        config(**settings)


@pytest.mark.parametrize("optimizer", [AdamWConfig(betas=(0.8, 0.9)), MuonConfig(iterations=3)])
def test_a_config_survives_its_plain_form(optimizer):
    config = TrainConfig(max_minutes=3.5, optimizer=optimizer, grad_clip=None)
    assert from_plain(TrainConfig, to_plain(config)) == config
