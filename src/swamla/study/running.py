"""Runs a study: its runs are ordinary `swamla train` processes, and every outcome is a line of results.jsonl.

Whatever is killed, the same call goes on: a run that ended is never repeated, one that was stopped is resumed. Several
processes may work on one folder: each takes runs that no other works on, so none waits for one that is gone.
"""

import json
import math
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from swamla.checkpoint import latest_checkpoint
from swamla.config import to_plain
from swamla.errors import CorruptError, SwamlaError, UsageError
from swamla.files import write_text_atomically
from swamla.study.folder import (
    RESULTS,
    STUDY,
    WAIT,
    append_line,
    locked,
    opened,
    read_outcomes,
)
from swamla.study.plan import Study
from swamla.study.runs import Outcome, Run, Status, command, program, ready, run_folder
from swamla.train import RunConfig
from swamla.train.claims import is_running
from swamla.train.saving import REMEDY, Diverged
from swamla.train.tracking.metrics import read_metrics

POLL = 0.05  # seconds between looks at processes
SHORT, WARM_UP = 30, 3  # steps of the run that tells what a run takes beside its steps, and those that are not counted
COMPANY = 30  # minutes after which runs that keep a plan company end by themselves: a killed plan cannot stop them
ATTEMPTS = 3  # of a run whose process is killed; then it has failed
ALIKE = 3  # runs of several arms that fail in a row, with one error: it is not theirs
ENDED_BY_SIGNAL = range(129, 160)  # statuses of shells; a process's own is negative
PREEMPTED = 75  # stopped by a scheduler with all saved: it goes on, however often


class EnvironmentFault(SwamlaError):
    """What no run of a study can help, such as a full disk: the study stops, and the same command goes on."""

    exit_status = 1


class Process(Protocol):
    """What `subprocess.Popen` has."""

    def poll(self) -> int | None:
        """The exit status, None while it runs."""

    def terminate(self) -> None:
        """Ask it to stop: it saves first."""

    def wait(self) -> int:
        """The exit status, when it has ended."""


Launch = Callable[[list[str], Path], Process]


def start(words: list[str], log: Path, lock: int | None = None) -> Process:
    """Start a command of this program; `log` gets what it prints. Signals of the terminal do not reach it.

    lock: the descriptor of a lock that the process shares, so that it is held until both have ended.
    """
    shared = () if lock is None else (lock,)
    line = [*program(), *words]
    with log.open("ab") as out:
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, pass_fds=shared
        )


@dataclass
class _Job:
    """A run under way. lock: that no other process of the study works on it, held until its outcome is written.

    before: seconds of the training that it goes on from.
    """

    run: Run
    process: Process
    begun: float
    before: float
    lock: ExitStack


@dataclass
class _Worker:
    """A process that works on a study. part: its number from 0, of `parts`.  killed: run → times its process was.

    doubtful: the last outcomes, if all failed with one error, and their locks: not written before it is known whose
    fault it is.
    """

    folder: Path
    study: Study
    jobs: int
    part: int
    parts: int
    launch: Launch | None
    report: Callable[[Outcome], None]
    active: dict[str, _Job] = field(default_factory=dict)
    killed: dict[str, int] = field(default_factory=dict)
    doubtful: list[tuple[Outcome, ExitStack]] = field(default_factory=list)


def with_start(study: Study, scratch: Path) -> Study:
    """The study with what a run takes beside its arm's timed steps, by a short run of the first arm, in `scratch`.

    Raises `UsageError` with the run's own error if it fails: so would all of the study.
    """
    arm, where, log = study.arms[0], scratch / "run", scratch / "log"
    write_text_atomically(scratch / "arm.json", json.dumps(to_plain(arm.config)) + "\n")
    steps = str(min(SHORT, arm.steps))
    words = ["train", str(scratch / "arm.json"), "--steps", steps, "--schedule_steps", str(arm.steps)]
    begun = time.monotonic()
    process = start([*words, "--save_interval", steps, "--output_dir", str(where), *_loading(study.plugins)], log)
    try:
        status = process.wait()
    except BaseException:  # whoever stops the plan stops this run, too
        process.terminate()
        process.wait()
        raise
    wall = time.monotonic() - begun
    if status:
        raise UsageError(f"arm {arm.name!r}: a run of {steps} steps fails: {_error(log, status)}")
    timed = [record for record in read_metrics(where / "metrics.jsonl") if "elapsed" in record]  # a skipped step is not
    trained = [record["elapsed"] for record in timed if "loss" in record] or [0.0]
    ended = timed[-1]["elapsed"] if timed else 0.0
    usual = trained[WARM_UP:]  # the first steps of a process are slower
    each = (usual[-1] - usual[0]) / (len(usual) - 1) if len(usual) > 1 else arm.seconds_per_step
    return replace(
        study,
        start_seconds=round(wall - ended, 2),
        loop_seconds=round(max(0.0, each - arm.seconds_per_step), 4),
        evaluation_seconds=round(ended - trained[-1], 2),
    )


def _loading(plugins: Sequence[str]) -> list[str]:
    return [word for file in plugins for word in ("--plugin", file)]


@contextmanager
def beside(config: RunConfig, others: int, scratch: Path, plugins: Sequence[str] = ()) -> Iterator[None]:
    """`others` processes that train `config` meanwhile, as a study's other jobs will: cores share caches and memory.

    Raises `UsageError` with a run's own error if it fails: so would all of the study.
    """
    recipe = scratch / "beside.json"
    write_text_atomically(recipe, json.dumps(to_plain(config)) + "\n")
    folders = [scratch / f"beside-{number}" for number in range(others)]
    words = ["train", str(recipe), "--steps", "1000000000", "--max_minutes", str(COMPANY), "--save_interval", "none"]
    words += _loading(plugins)
    processes = [start([*words, "--output_dir", str(folder)], folder.with_suffix(".log")) for folder in folders]
    try:
        for process, folder in zip(processes, folders, strict=True):
            while not any("loss" in record for record in _records(folder / "metrics.jsonl")):
                if (status := process.poll()) is not None:
                    raise UsageError(f"a run fails: {_error(folder.with_suffix('.log'), status)}")
                time.sleep(POLL)
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def run_study(
    folder: Path,
    *,
    jobs: int = 1,
    part: int = 0,
    parts: int = 1,
    launch: Launch | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[str, Outcome]:
    """Train what is left of the study in `folder`, `jobs` runs at a time; returns the outcomes of all runs by name.

    part: this process's number, from 0, of `parts` that work on the folder: where it begins.  launch: starts a run, by
    default a process of this program.  report: called with every outcome that this process writes. Whatever stops this
    call, it asks its runs to save, and waits for that. Raises `EnvironmentFault` when runs of several arms fail in a
    row with one error: no outcome of theirs is written, so the next call trains them again.
    """
    study = opened(folder)
    if study is None:
        raise UsageError(f"{folder}: holds no study (it has no {STUDY})")
    worker = _Worker(folder, study, jobs, part, parts, launch, report)
    for name in ("runs", "logs", "locks"):
        (folder / name).mkdir(exist_ok=True)
    try:
        while True:
            outcomes = read_outcomes(folder) | {one.run: one for one, _ in worker.doubtful}
            wanted = ready(study, outcomes)
            _start_runs(worker, wanted)
            if not worker.active:  # nothing will tell more of failures, and others may wait for their locks
                _write_doubtful(worker)
                if not wanted:
                    return outcomes
            if not _note_ended(worker):
                time.sleep(POLL if worker.active else WAIT)
    finally:
        _stop(worker)


def _start_runs(worker: _Worker, wanted: list[Run]) -> None:
    """Start runs that no other process works on, as many as there are free jobs."""
    first = worker.part * len(wanted) // worker.parts
    for run in [*wanted[first:], *wanted[:first]]:
        if len(worker.active) >= worker.jobs:
            return
        folder = run_folder(worker.folder, run.id)
        if run.id in worker.active or (folder.exists() and is_running(folder)):  # left behind by a killed process
            continue
        with ExitStack() as stack:
            lock = stack.enter_context(locked(worker.folder, run.id))
            if lock is None or run.id in read_outcomes(worker.folder):
                continue
            resume = (folder / "config.json").exists()
            if not resume and folder.exists():
                shutil.rmtree(folder)  # its process was killed before it had written the config
            before = _trained_seconds(folder) if resume else 0.0
            words = command(worker.study, worker.folder, run, resume=resume)
            log = worker.folder / "logs" / f"{run.id}.log"
            # The process may outlive this one: the lock goes on, though nothing else shows yet that it is there.
            process = worker.launch(words, log) if worker.launch else start(words, log, lock)
            worker.active[run.id] = _Job(run, process, time.monotonic(), before, stack.pop_all())


def _note_ended(worker: _Worker) -> bool:
    """Write the outcomes of the runs that have ended since; True if there are any."""
    ended = [job for job in worker.active.values() if job.process.poll() is not None]
    for job in ended:
        outcome = _outcome(worker, job)
        del worker.active[job.run.id]
        if outcome is None:
            job.lock.close()
        elif outcome.status == "failed":
            _doubt(worker, outcome, job.lock)
        else:
            _write_doubtful(worker)
            _write(worker, outcome, job.lock)
    return bool(ended)


def _doubt(worker: _Worker, outcome: Outcome, lock: ExitStack) -> None:
    """Keep a failed run's outcome back. Raises `EnvironmentFault` if the error is that of several arms, in a row."""
    if worker.doubtful and _cause(worker.doubtful[-1][0]) != _cause(outcome):
        _write_doubtful(worker)
    worker.doubtful.append((outcome, lock))
    arms = dict.fromkeys(worker.study.arm(one.arm).label for one, _ in worker.doubtful)  # of one at several sizes once
    if len(worker.doubtful) < ALIKE or len(arms) < 2:
        return
    count = len(worker.doubtful)
    while worker.doubtful:
        worker.doubtful.pop()[1].close()
    raise EnvironmentFault(
        f"{count} runs in a row, of {', '.join(arms)}, failed with the same error, which is no result of theirs: "
        f"{outcome.error}; mend that: the same command trains them again"
    )


def _cause(outcome: Outcome) -> str:
    """A run's error without what differs between runs: its name and numbers."""
    return re.sub(r"\d[\d.,]*", "#", outcome.error.replace(outcome.run, "RUN"))


def _write_doubtful(worker: _Worker) -> None:
    while worker.doubtful:
        _write(worker, *worker.doubtful.pop(0))


def _write(worker: _Worker, outcome: Outcome, lock: ExitStack) -> None:
    """Write a run's outcome, and let go of the run."""
    with lock:
        part = f"-{worker.part + 1}-of-{worker.parts}" if worker.parts > 1 else ""
        append_line(worker.folder / f"{RESULTS}{part}.jsonl", asdict(outcome))
        worker.report(outcome)


def _stop(worker: _Worker) -> None:
    """Ask all runs to save, and wait for them; the next call resumes them."""
    for job in worker.active.values():
        job.process.terminate()
    for job in worker.active.values():
        job.process.wait()
        job.lock.close()
    _write_doubtful(worker)


def _outcome(worker: _Worker, job: _Job) -> Outcome | None:
    """The outcome of an ended process; None for one that was stopped or killed, to be resumed."""
    run, status = job.run, job.process.wait()
    folder, log = run_folder(worker.folder, run.id), worker.folder / "logs" / f"{run.id}.log"
    if status == PREEMPTED:
        return None
    was_killed = status < 0 or status in ENDED_BY_SIGNAL
    if was_killed:
        worker.killed[run.id] = worker.killed.get(run.id, 0) + 1
        if worker.killed[run.id] < ATTEMPTS:
            return None
    records, damage = _readable_records(folder / "metrics.jsonl")
    ended: Status
    if damage and not status:
        ended, score, error = "failed", None, damage
    elif status:
        error = f"killed {ATTEMPTS} times, exit status {status}" if was_killed else _error(log, status)
        ended = "diverged" if status == Diverged.exit_status and REMEDY in error else "failed"
        score = None
    else:
        score, error = _final_score(records, worker.study.arm(run.arm).steps), ""
        ended = "diverged" if score is None else "finished"
    trained = [record for record in records if "loss" in record]
    return Outcome(
        run=run.id,
        arm=run.arm,
        purpose=run.purpose,
        rate=run.rate,
        lr=run.lr,
        seed=run.seed,
        status=ended,
        validation=score,
        steps=records[-1]["step"] if records else 0,
        tokens=trained[-1]["tokens"] if trained else 0,
        seconds=round(max((record.get("elapsed", 0.0) for record in records), default=0.0), 2),
        wall=round(job.before + time.monotonic() - job.begun, 2),
        error=error,
        command=shlex.join(["swamla", *command(worker.study, worker.folder, run)]),
    )


def _trained_seconds(folder: Path) -> float:
    """Seconds of training in the checkpoint that a resumed run goes on from; 0 if none is whole: the run says so."""
    try:
        checkpoint = latest_checkpoint(folder / "checkpoints")
    except CorruptError:
        return 0.0
    return float(checkpoint.state.get("seconds", 0.0)) if checkpoint else 0.0


def _records(file: Path) -> list[dict[str, Any]]:
    return read_metrics(file) if file.exists() else []


def _readable_records(file: Path) -> tuple[list[dict[str, Any]], str]:
    """A run's records, and what is wrong with its file if that cannot be read: a damaged run stops no study."""
    try:
        return _records(file), ""
    except CorruptError as error:
        return [], str(error)


def _final_score(records: Iterable[Mapping[str, Any]], steps: int) -> float | None:
    """Bits per byte of the run's last evaluation, of a task its nats a label; None if that is not finite."""
    scores = ("held_out_bits_per_byte", "held_out_loss")
    found = [record[name] for record in records if record["step"] >= steps for name in scores if name in record]
    score = found[0] if found else None
    return score if score is not None and math.isfinite(score) else None


def _error(log: Path, status: int) -> str:
    """The last line that says what was wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.startswith("swamla: error: ")] or [line for line in lines if line.strip()]
    return said[-1].removeprefix("swamla: error: ") if said else f"exit status {status}"
