"""What a run's surroundings do to it: trackers, hubs, data; and rows that are made of the suite's own tests."""

import importlib.util
import json
from collections.abc import Iterator
from functools import partial

from swamla.train.tracking.metrics import read_metrics
from tests.faults import acts
from tests.faults.rows import Row
from tests.faults.stage import NotHere, Stage, assert_same_end, ending
from tests.train.hub_stub import Hub, serving

CANARY = "canary" + 34 * "7"


def spike(stage: Stage, times: int) -> Iterator[None]:
    """A loss three times as large, in a run that is killed right before, in, and after that step."""
    settings = {"steps": 30, "save_interval": 5, "spike_factor": 1.5, "eval_interval": None}
    twist = partial(acts.spoil_loss, 27)
    expected = stage.fresh("undisturbed")
    stage.start(expected, settings=settings, twist=twist).expect(0)
    for point in ("step:26", "update:27", "save-manifest:27", "step:28")[:times]:
        run_dir = stage.fresh()
        stage.start(run_dir, settings=settings, twist=twist, env={"SWAMLA_FAULT": point}).expect(-9)
        stage.start(run_dir, settings=settings, twist=twist).expect(0)
        assert_same_end(run_dir, expected)
        (told,) = [r for r in read_metrics(run_dir / "metrics.jsonl") if "spike" in r]
        assert (told["step"], told["rolled_back_to"], told["rows"]) == (27, 25, {"first": 100, "last": 107})
        yield


def worker_dies(stage: Stage, times: int) -> Iterator[None]:
    """A process that encodes a stream is killed while the run needs it."""
    for _ in range(times):
        run_dir = stage.fresh()
        options = {"settings": {"steps": 400, "eval_interval": None}, "stream": True}
        with ending([stage.start(run_dir, twist=partial(acts.kill_workers, 3), **options)]) as (process,):
            said = process.expect(2)
        assert "stream.jsonl" in said, said
        assert "the process that encoded it died (signal 9)" in said, said
        yield


def secrets(stage: Stage, times: int) -> Iterator[None]:
    """The keys of trackers and hubs, in no file of a run that uses them all, and in nothing that it pushed."""
    for package in ("huggingface_hub", "wandb", "tensorboard"):
        if importlib.util.find_spec(package) is None:
            raise NotHere(f"{package} is not installed")
    users = {"tensorboard": True, "wandb_project": "mine", "hf_repo_id": "me/mine"}
    for _ in range(times):
        run_dir = stage.fresh()
        with serving(Hub()) as hub:
            env = {"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY, "WANDB_MODE": "offline", "HF_ENDPOINT": hub.url}
            env |= {"HF_HOME": f"{run_dir}-hf", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
            settings = {"steps": 4, "profile": True, "profile_steps": 1, **users}
            said = stage.start(run_dir, settings=settings, env=env).expect(0)
        assert CANARY in hub.tokens, said  # so it was used
        written = {str(file): file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
        for name in ("config.json", "tensorboard/events.", "wandb/offline-run-", "profile/"):
            assert any(f"{run_dir}/{name}" in file for file in written), f"{name}:\n{said}"
        written |= {"the log": said.encode(), **hub.objects, **hub.files("me/mine")[1]}
        for name, data in written.items():
            assert CANARY.encode() not in data, name
        assert json.loads((run_dir / "config.json").read_text())
        yield


TRACKERS, PUSH, SHARDS = "tests/train/test_trackers.py", "tests/train/test_hub_push.py", "tests/data/test_shards.py"

ROWS = [
    Row(
        fault="loss spike",
        expected="with `spike_factor`: back to the last checkpoint's weights, the rows since are left behind; a run "
        "killed before, in or after it takes the same decision",
        how="one step's loss times three; SIGKILL around it",
        trials=spike,
        short=1,
        long=4,
        tests=("tests/train/test_spikes.py",),
    ),
    Row(
        fault="hub or tracker answers 500, 401, or hangs",
        expected="training unaffected, curve identical, one warning, tried again at the end",
        how="servers on this machine, the real clients",
        tests=(
            f"{TRACKERS}::test_a_broken_tracker_costs_one_warning_and_no_bit_of_the_run",
            f"{TRACKERS}::test_a_server_that_fails_or_hangs_leaves_an_offline_run",
            f"{TRACKERS}::test_the_real_wandb_refused_with_401_leaves_an_offline_run_and_no_key_in_any_file",
            f"{TRACKERS}::test_a_server_that_comes_back_gets_the_whole_run_at_the_end",
            f"{PUSH}::test_a_hub_that_fails_costs_one_warning_and_no_bit_of_the_run",
            f"{PUSH}::test_a_hub_that_comes_back_gets_the_run_at_the_end",
            f"{PUSH}::test_a_push_beyond_its_time_is_ended_and_training_hardly_waits",
        ),
    ),
    Row(
        fault="tracker resume",
        expected="one run id, steps rise",
        how="a run killed and resumed, wandb offline and against a server",
        tests=(
            f"{TRACKERS}::test_a_run_killed_and_resumed_is_one_offline_run_whose_steps_rise",
            f"{TRACKERS}::test_a_resumed_online_run_keeps_its_id_and_gets_the_steps_it_lacks",
        ),
    ),
    Row(
        fault="a data worker dies, a shard is corrupt",
        expected="file and place named",
        how="SIGKILL of a stream's workers; files of a dataset truncated, removed, a bit changed",
        trials=worker_dies,
        short=1,
        long=2,
        tests=(
            f"{SHARDS}::test_a_truncated_or_missing_file_is_found_on_opening_and_a_flipped_bit_on_verifying",
            f"{SHARDS}::test_an_id_outside_of_the_vocabulary_is_named_with_shard_and_offset",
            "tests/data/test_scale.py::test_a_worker_that_dies_is_named_with_its_file_and_the_rest_goes_on_later",
            "tests/data/test_scale.py::test_a_unit_damaged_before_it_is_put_together_is_named",
        ),
    ),
    Row(
        fault="gradient accumulation × DDP × FSDP2",
        expected="2 ranks equal accumulation 2, whatever the labels' numbers; FSDP2 within the last bits",
        how="gloo, up to four ranks",
        tests=("tests/train/test_parallel.py", "tests/train/test_sharded_runs.py"),
    ),
    Row(
        fault="expert collapse",
        expected="a warning with the largest and the mean load, dead experts, entropy",
        how="a biased router",
        tests=("tests/train/test_router_health.py",),
    ),
    Row(
        fault="secrets",
        expected="HF_TOKEN and WANDB_API_KEY are in no file that the run wrote",
        how="a canary in both, with wandb (offline), TensorBoard and a hub on this machine in use: every file, the "
        "output and all that was pushed searched",
        trials=secrets,
        short=1,
        long=1,
        tests=(
            f"{TRACKERS}::test_the_real_wandb_refused_with_401_leaves_an_offline_run_and_no_key_in_any_file",
            f"{PUSH}::test_what_arrives_is_the_run_as_it_lies_on_the_disk",
        ),
    ),
]
