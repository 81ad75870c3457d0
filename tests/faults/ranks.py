"""Several processes: one dies, hangs, or has a gradient of its own; their number changes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from swamla.train.tracking.metrics import read_metrics
from tests.faults import acts
from tests.faults.rows import Row
from tests.faults.stage import ROOT, Stage, assert_same_end, curve, ending, newest, step_of
from tests.waiting import until

EIGHT = {"steps": 8, "batch_size": 8}


def launched(stage: Stage, run_dir: Path, count: int, restarts: int, steps: int, **env: str) -> "subprocess.Popen[str]":
    """torchrun with a program that trains, or goes on."""
    program = [str(ROOT / "tests" / "faults" / "program.py"), str(run_dir), str(stage.data), str(steps)]
    return torchrun(program, count, restarts, **env)


def torchrun(program: list[str], count: int, restarts: int, **env: str) -> "subprocess.Popen[str]":
    """torchrun, which starts a program on so many ranks, and all of them again when one dies."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(count)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{acts.free_port()}", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    return subprocess.Popen(
        command + program,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _undisturbed(stage: Stage, count: int, **settings: Any) -> Path:
    run_dir = stage.folder / f"undisturbed-{count}-{settings['steps']}-{settings.get('parallel', 'ddp')}"
    if not run_dir.exists():
        for process in stage.ranks(run_dir, count, settings=settings):
            process.expect(0)
    return run_dir


def one_killed(stage: Stage, times: int) -> Iterator[None]:
    """A rank of two is killed in a step; torchrun starts both again. The last trial is of the command line."""
    expected = _undisturbed(stage, 2, **EIGHT)
    for rank in range(times):
        if rank == 2:
            _command_line(stage)
            yield
            return
        run_dir = stage.fresh()
        with launched(stage, run_dir, 2, 1, 8, SWAMLA_FAULT=f"step:6@{rank}") as agent:
            said = agent.communicate(timeout=300)[0]
        assert agent.returncode == 0, said
        assert "resumed after step 4" in said, said
        assert_same_end(run_dir, expected)
        yield


def _command_line(stage: Stage) -> None:
    """The one command that torchrun was given goes on, when it is run again, with what it had begun."""
    text, runs = stage.data / "text.txt", stage.fresh("runs")
    text.write_text("\n\n".join(f"the cat {i} sat on mat {i * 7 % 13} " * 5 for i in range(200)))
    line = f"-m swamla train quickstart --data {text} --tokenizer byte --steps 8 --max_minutes none --batch_size 4"
    line += " --block_size 64 --pattern swa --width 32 --swa_n_heads 2 --precision fp32 --eval_interval none"
    line += f" --save_interval 2 --output_dir {runs}"
    for name, fault in (("whole", {}), ("killed", {"SWAMLA_FAULT": "step:6@1"})):
        with torchrun([*line.split(), "--run_name", name], 2, 1, **fault) as process:
            said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        assert ("resumed after step 4" in said) == bool(fault), said
    assert_same_end(runs / "killed", runs / "whole")


def killed_five_times(stage: Stage, times: int) -> Iterator[None]:
    """A rank of four, whichever it is, killed at a random moment, as often as that; torchrun starts all again."""
    steps = 40
    expected = _undisturbed(stage, 4, **EIGHT | {"steps": steps})
    run_dir, rng, killed = stage.fresh(), random.Random(5), 0
    with launched(stage, run_dir, 4, times, steps, SWAMLA_SLOWLY="0.2") as agent:
        while killed < times:
            begun = _last_step(run_dir)
            # It must have come further than at the last kill, and is killed a random time after.
            until(lambda begun=begun: _last_step(run_dir) > begun or agent.poll() is not None, seconds=300)
            time.sleep(1.5 * rng.random())
            assert agent.poll() is None, agent.communicate()[0]
            ranks = _children(agent.pid)
            os.kill(rng.choice(ranks), signal.SIGKILL)
            killed += 1
            gone = set(ranks)
            until(lambda gone=gone: not gone & set(_children(agent.pid)) or agent.poll() is not None)
        said = agent.communicate(timeout=300)[0]
    assert agent.returncode == 0, said
    assert_same_end(run_dir, expected)
    for _ in range(times):
        yield


def _last_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def _children(pid: int) -> list[int]:
    """Processes that this one started, as Linux lists them."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def one_hangs(stage: Stage, times: int) -> Iterator[None]:
    """A rank stops (SIGSTOP) in a step, in an evaluation, or stays in a computation of its own."""
    in_step = partial(acts.signal_in_step, signal.SIGSTOP, step=3)
    in_evaluation = partial(acts.signal_in_evaluation, signal.SIGSTOP, step=4)
    cases = [
        ("in a step", in_step, "1", "rank 1 hangs or is cut off", "rank 0 is in step 3"),
        ("in an evaluation", in_evaluation, "1", "rank 1 hangs or is cut off", "is in the evaluation after step 4"),
        ("busy", partial(acts.stay_in_step, 3), "1", "step 3 takes more than", "rank 1 at " + acts.__file__),
        ("main, in a step", in_step, "0", "MASTER_ADDR", "which is in step 3"),
    ]
    settings = EIGHT | {"rank_timeout_minutes": 3 / 60}
    for where, twist, rank, message, place in cases[:times]:
        run_dir = stage.fresh()
        with ending(stage.ranks(run_dir, 2, settings=settings, twist=partial(acts.on_rank, rank, twist))) as processes:
            others = [process for number, process in enumerate(processes) if str(number) != rank]
            # Gloo's own patience is twice as long.
            until(lambda others=others: not any(process.alive() for process in others))
            said = "".join(process.said() for process in processes)
        assert message in said, (where, said)
        assert place in said, (where, said)
        yield


def other_numbers(stage: Stage, times: int) -> Iterator[None]:
    """Stopped on two ranks, taken up by one, stopped again, taken up by four; and as one process all along."""
    alone = stage.undisturbed(**EIGHT | {"dropout": 0.0})
    for parallel in ("ddp", "fsdp")[:times]:
        run_dir = stage.fresh()
        settings = EIGHT | {"dropout": 0.0}
        for count, stop in ((2, 3), (1, 6), (4, None)):
            chosen = settings | ({"parallel": parallel} if count > 1 else {})
            twist = {} if stop is None else {"twist": partial(acts.signal_in_step, signal.SIGTERM, step=stop)}
            accumulation = {"accumulation": 2}
            processes = (
                stage.ranks(run_dir, count, settings=chosen | accumulation, **twist)
                if count > 1
                else [stage.start(run_dir, settings=chosen | accumulation, **twist)]
            )
            for process in processes:
                process.expect(0 if stop is None else 75)
        found, expected = curve(run_dir), curve(alone)
        assert [step for step, *_ in found] == [step for step, *_ in expected]
        worst = max(abs(a - b) for (_, a, _), (_, b, _) in zip(found, expected, strict=True))
        assert worst < 1e-4, (parallel, worst)
        tokens = [r["tokens"] for r in read_metrics(run_dir / "metrics.jsonl") if "tokens" in r]
        assert tokens == [r["tokens"] for r in read_metrics(alone / "metrics.jsonl") if "tokens" in r]
        yield


def bad_gradient(stage: Stage, times: int) -> Iterator[None]:
    """One rank has a gradient of NaN, once and then for good."""
    for case in ("once", "for good")[:times]:
        run_dir = stage.fresh()
        steps = range(3, 4) if case == "once" else range(5, 100)
        twist = partial(acts.on_rank, "1", partial(acts.spoil_gradient, steps))
        settings = EIGHT | {"max_skipped": 3}
        processes = stage.ranks(run_dir, 2, settings=settings, twist=twist)
        status = 0 if case == "once" else 1
        said = "".join(process.expect(status) for process in processes)
        if case == "once":
            assert "warning: step 3 skipped, gradient norm nan (1 so far)" in said, said
            assert [step for step, loss, _ in curve(run_dir) if loss > 0] == [1, 2, 4, 5, 6, 7, 8]
        else:
            assert "3 steps in a row, up to step 7, had no finite gradient; the last good checkpoint is" in said, said
            assert "step-00000004" in said, said
            assert step_of(newest(run_dir)) == 4
        yield


ROWS = [
    Row(
        fault="one rank killed",
        expected="torchrun starts all ranks again, the run resumes, curve and weights are equal to the bit",
        how="`SWAMLA_FAULT=step:6@RANK`, two ranks under `torchrun --max-restarts 1`; also of `swamla train`",
        trials=one_killed,
        short=0,
        long=3,
    ),
    Row(
        fault="one rank of four killed at random moments, five times",
        expected="the run ends with the weights of an undisturbed one, to the bit",
        how="SIGKILL from outside; `torchrun --max-restarts 5`",
        trials=killed_five_times,
        short=0,
        long=5,
    ),
    Row(
        fault="one rank hangs",
        expected="the others end within the time-out, 3 s here, and name rank and step, or the place it is at",
        how="SIGSTOP in a step, of the main rank too, in an evaluation; a rank that computes for ever",
        trials=one_hangs,
        short=1,
        long=4,
    ),
    Row(
        fault="world size 2 → 1 → 4",
        expected="the same rows; losses within 1e-4 of one process alone",
        how="stopped by SIGTERM and taken up by another number of ranks, DDP and FSDP2",
        trials=other_numbers,
        short=1,
        long=2,
    ),
    Row(
        fault="NaN gradient on one rank",
        expected="every rank skips that step, it is counted and told; `max_skipped` in a row stop the run, which names "
        "the last good checkpoint; NaN is never saved",
        how="a hook on one rank's gradient, once, and from a step on",
        trials=bad_gradient,
        short=1,
        long=2,
        tests=("tests/train/test_loop.py::test_weights_that_are_not_finite_are_never_saved",),
    ),
]
