"""A profile traces the steps asked for, names what took their time, and changes no number of the run."""

import gzip
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from swamla.train import train

from .helpers import losses, run, tiny_config, weights


def profiled(folder: Path, dataset, **settings) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What a profiled run prints, and its weights."""
    out = io.StringIO()
    config = tiny_config(**({"profile": True} | settings))
    state = train(config, folder, dataset=dataset, console=Console(file=out, width=500))
    return out.getvalue().splitlines(), weights(state)


def test_a_profile_changes_no_number_and_traces_the_steps_it_names(dataset, tmp_path):
    expected = weights(run(tiny_config(), tmp_path / "plain", dataset))
    folder = tmp_path / "run"
    lines, found = profiled(folder, dataset, profile_steps=3, profile_warmup=2)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert losses(folder) == losses(tmp_path / "plain")
    (file,) = (folder / "profile").iterdir()
    assert file.name == "steps-3-5.json.gz"
    assert f"profile of 3 steps: {file}" in lines
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}  # torch counts them from 0
    assert {"aten::mm", "aten::addmm"} & {event.get("name") for event in events}


def test_the_table_has_the_operations_that_took_longest_first_and_their_shares(dataset, tmp_path):
    lines, _ = profiled(tmp_path / "run", dataset, profile_steps=2, profile_warmup=1)
    (head,) = [n for n, line in enumerate(lines) if re.match(r"operation +CPU ms/step +share +calls/step$", line)]
    rows = [re.fullmatch(r"(\S.*?) +([\d.]+) +([\d.]+)% +(\d+)", line) for line in lines[head + 1 : head + 11]]
    assert all(rows)
    times, shares = ([float(row[n]) for row in rows if row] for n in (2, 3))
    assert times == sorted(times, reverse=True)
    assert 0 < sum(shares) <= 100.5
    assert max(map(len, lines[head : head + 11])) <= 80


def test_a_run_that_ends_amid_its_profile_keeps_the_steps_there_were(dataset, tmp_path):
    lines, _ = profiled(tmp_path / "run", dataset, profile_steps=50, profile_warmup=2)
    assert [file.name for file in (tmp_path / "run/profile").iterdir()] == ["steps-3-6.json.gz"]
    assert lines[-1].startswith("profile of 4 steps: ")


def test_a_run_that_ends_before_its_profile_begins_says_so(dataset, tmp_path):
    lines, _ = profiled(tmp_path / "run", dataset, profile_warmup=6)
    assert lines[-1] == "warning: no profile: the run ended before its warm-up did; lower `profile_warmup`"
    assert not (tmp_path / "run/profile").exists()


def test_a_resumed_run_profiles_its_own_first_steps(dataset, tmp_path):
    run(tiny_config(steps=3, schedule="constant"), tmp_path / "run", dataset)
    config = tiny_config(profile=True, profile_steps=1, profile_warmup=1, schedule="constant")
    run(config, tmp_path / "run", dataset, resume=True)
    assert [file.name for file in (tmp_path / "run/profile").iterdir()] == ["steps-5-5.json.gz"]


@pytest.mark.gpu
def test_on_cuda_the_table_is_of_the_devices_time(dataset, tmp_path):
    lines, _ = profiled(tmp_path / "run", dataset, device="cuda", profile_steps=2, profile_warmup=1)
    assert any(line.startswith("operation") and "GPU ms/step" in line for line in lines)
