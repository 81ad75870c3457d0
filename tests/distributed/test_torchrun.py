"""`torchrun … -m swamla train …` as a user types it: on one machine, and on two that are network namespaces."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swamla import distributed
from tests.waiting import PATIENCE, after_start, until

TEXT = "".join(f"line {i}: the square of {i} is {i * i}, its half is {i // 2}\n" for i in range(400))
TRAIN = (
    "-m swamla train quickstart --data text.txt --tokenizer byte --held_out_fraction 0.1 --cache_dir cache --width 32 "
    "--n_heads 2 --n_layers 4 --swa_window 16 --mla_kv_lora_rank 16 --mla_qk_nope_head_dim 8 --mla_qk_rope_head_dim 8 "
    "--mla_v_head_dim 8 --batch_size 4 --block_size 64 --steps 4 --max_minutes none --eval_seconds none "
    "--eval_interval 2 --log_interval 1 --threads 1 --device cpu --precision fp32 "
)
MODULE = [sys.executable, "-m", "torch.distributed.run"]
RESTARTS = ["--standalone", "--max-restarts", "1", "--monitor-interval", "0.1"]
LONG = TRAIN.replace("--steps 4", "--steps 100000").replace("--eval_interval 2", "--eval_interval none")
Ended = subprocess.CompletedProcess[str]


def start(folder: Path, command: list[str], **env: str) -> "subprocess.Popen[str]":
    """A command in `folder`, none of whose settings come from whoever runs the tests."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    environment |= env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process: "subprocess.Popen[str]") -> Ended:
    """What it said, and how it ended."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(folder: Path, command: str, ranks: int = 2) -> Ended:
    """Several ranks on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = ["--nproc_per_node", str(ranks), "--master_port", port]
    return ended(start(folder, [*MODULE, *flags, *shlex.split(command)]))


def restarted(folder: Path, command: str, *, ranks: int, **env: str) -> Ended:
    """Ranks on this machine, which are started again once."""
    return ended(start(folder, [*MODULE, *RESTARTS, "--nproc_per_node", str(ranks), *shlex.split(command)], **env))


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm, and held-out losses."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss", r.get("held_out_loss")), r.get("grad_norm", 0.0)) for r in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, and the run of one process on it in two micro-batches."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "text.txt").write_text(TEXT)
    alone = ended(start(folder, [sys.executable, *shlex.split(f"{TRAIN} --accumulation 2 --output_dir alone")]))
    assert alone.returncode == 0, alone.stderr
    return folder


def test_two_ranks_that_find_no_prepared_data_train_as_one_process_and_one_of_them_speaks(folder: Path) -> None:
    shutil.rmtree(folder / "cache")
    done = torchrun(folder, f"{TRAIN} --parallel fsdp --output_dir two")
    assert done.returncode == 0, done.stderr
    assert "swamla:" not in done.stderr
    for line in ("the run is in two", "2 processes, each with a shard of the model (fsdp)", "Step 4 | Loss"):
        assert done.stdout.count(line) == 1
    assert curve(folder / "two") == curve(folder / "alone")
    held_out = [entry for entry in curve(folder / "two") if entry[2] == 0.0]
    assert [step for step, _, _ in held_out] == [2, 4]


def test_what_cannot_be_shared_out_is_said_once_and_ends_all_ranks(folder: Path) -> None:
    done = torchrun(folder, TRAIN.replace("--batch_size 4", "--batch_size 3") + "--output_dir refused")
    assert done.returncode != 0
    assert "SIGKILL" not in done.stderr  # as torchrun ends a process that does not end by itself
    said = [line for line in done.stderr.splitlines() if line.startswith("swamla:")]
    assert said == [
        "swamla: error: --batch_size 3: must be a multiple of 2 processes · --accumulation 1; it counts the rows of "
        "all processes"
    ]
    assert "exitcode  : 2" in done.stderr
    assert not (folder / "refused").exists()


def test_quickstart_says_how_several_processes_train_it(folder: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "swamla", "quickstart"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, after_start(done.stderr).count("\n")) == (2, 1)
    assert "train quickstart" in done.stderr


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({}, True),
        ({"RANK": "3"}, True),  # left behind by something that is not torchrun, which sets both
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"RANK": "0", "WORLD_SIZE": "4"}, True),
        ({"RANK": "3", "WORLD_SIZE": "4"}, False),
    ],
)
def test_the_main_process_is_the_only_one_or_the_first_of_several(monkeypatch, place, expected) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_main() == expected


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable, as prefixes of commands; they are gone afterwards."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (package iproute2)")
    names = [f"swamla-{os.getpid()}-{i}" for i in range(2)]

    def ip(command: str) -> Ended:
        return subprocess.run(["ip", *shlex.split(command)], capture_output=True, text=True)

    try:
        for name in names:
            made = ip(f"netns add {name}")
            if made.returncode:
                pytest.skip(f"may not make a network namespace here: {made.stderr.strip()}")
        cable = ip(f"link add node0 netns {names[0]} type veth peer name node1 netns {names[1]}")
        if cable.returncode:
            pytest.skip(f"may not join network namespaces here: {cable.stderr.strip()}")
        for i, name in enumerate(names):
            for command in (f"addr add 10.77.0.{i + 1}/24 dev node{i}", f"link set node{i} up", "link set lo up"):
                assert ip(f"-n {name} {command}").returncode == 0
        yield names
    finally:
        for name in names:
            ip(f"netns del {name}")


def test_two_machines_train_as_one_process_does(folder: Path, nodes: list[str]) -> None:
    both = "--nnodes 2 --nproc_per_node 1 --master_addr 10.77.0.1 --master_port 29500"
    running = []
    for i, name in enumerate(nodes):
        inside = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME=node{i}"]
        command = shlex.split(f"{both} --node_rank {i} {TRAIN} --parallel ddp --output_dir machines")
        running.append(start(folder, [*inside, *MODULE, *command]))
    first, second = [ended(process) for process in running]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "the run is in machines" in first.stdout
    assert second.stdout == ""
    assert curve(folder / "machines") == curve(folder / "alone")


def test_a_restart_goes_on_with_nothing_but_what_its_own_launch_began(folder: Path) -> None:
    def files(run: Path) -> dict[str, bytes]:
        return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}

    foreign = {"alone": files(folder / "alone")}
    shutil.copytree(folder / "alone", folder / "runs" / "quickstart")
    refused = restarted(folder, f"{LONG} --output_dir alone", ranks=1)
    assert refused.returncode != 0
    assert refused.stderr.count("alone: exists and is not empty") == 2  # the first attempt's, and the restart's
    assert files(folder / "alone") == foreign["alone"]
    done = restarted(folder, f"{TRAIN} --save_interval 1", ranks=2, SWAMLA_FAULT="step:3@1")
    assert done.returncode == 0, done.stderr
    assert "resuming runs/quickstart-2/config.json in runs/quickstart-2" in done.stdout
    assert "resumed after step 2" in done.stdout
    assert files(folder / "runs" / "quickstart") == foreign["alone"]


def test_a_fine_tuning_one_of_whose_ranks_is_killed_goes_on_as_if_nothing_had_been(folder: Path) -> None:
    rows = ({"prompt": f"square of {i}?", "completion": f"{i * i}"} for i in range(60))
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune = "-m swamla sft alone --data chat.jsonl --steps 4 --batch_size 4 --save_interval 1 --log_interval 1"
    whole = torchrun(folder, f"{tune} --output_dir tuned")
    assert whole.returncode == 0, whole.stderr
    killed = restarted(folder, f"{tune} --output_dir killed", ranks=2, SWAMLA_FAULT="step:3@1")
    assert killed.returncode == 0, killed.stderr
    assert "resumed after step 2" in killed.stdout
    assert curve(folder / "killed") == curve(folder / "tuned")


def test_a_run_that_was_asked_to_stop_is_not_started_again_and_a_new_launch_goes_on_with_it(folder: Path) -> None:
    run = folder / "stopped"
    command = [*MODULE, *RESTARTS, "--nproc_per_node", "2", *shlex.split(f"{LONG} --output_dir stopped")]
    process = start(folder, command)
    until(lambda: process.poll() is not None or '"loss"' in (run / "metrics.jsonl").read_text())
    assert process.poll() is None, process.communicate()
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGTERM)
    done = ended(process)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not started again: the run in stopped was asked to stop, and is saved") == 1
    reached = curve(run)[-1][0]
    assert reached < 100_000
    shorter = TRAIN.replace("--steps 4", f"--steps {reached + 2} --schedule_steps 100000")  # at the rates it began with
    again = torchrun(folder, f"{shorter} --resume stopped")
    assert again.returncode == 0, again.stderr
    assert curve(run)[-1][0] == reached + 2
    assert not json.loads((run / "launch.json").read_text())["stopped"]
