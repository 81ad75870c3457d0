"""A study's folder: what is asked and resolved in study.json and arms/, what came of it in lines of results and tests.

study.json and arms/ never change (but for published figures, and programs that went on with it); runs/ are ordinary
runs, logs/ what they printed. Several processes may work on one folder, also on several machines that share it: locks/
has their locks.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swamla.config import from_plain, to_plain
from swamla.data.dataset import TrainingData
from swamla.errors import CorruptError, DataError, UsageError
from swamla.files import fcntl, read_json, try_lock, write_text_atomically
from swamla.study.plan import Asked, Study, program_of
from swamla.study.runs import Outcome, arm_file, ready
from swamla.train.racing import describe_machine
from swamla.version import __version__

STUDY, RESULTS, TESTS = "study.json", "results", "test"
WAIT = 1.0  # seconds between looks at what others hold


@dataclass(frozen=True, kw_only=True)
class Test:
    """A line of test.jsonl: a run of a fresh seed, scored on the test part of a text, or on test rows of a task.

    loss: nats a token, or an answer.  bits_per_byte, bytes: of a text.  accuracy: in a task.
    """

    run: str
    arm: str
    seed: int
    loss: float
    tokens: int
    bits_per_byte: float | None = None
    bytes: float | None = None
    accuracy: float | None = None

    @property
    def score(self) -> float:
        """What is compared."""
        score = self.accuracy if self.bits_per_byte is None else self.bits_per_byte
        assert score is not None
        return score


def begin(folder: Path, study: Study) -> None:
    """Write a new study's folder, in place of one that was only planned. Raises `UsageError` for anything else."""
    planned = {STUDY, f".{STUDY}.new", "arms", "locks"}
    if folder.exists() and any(path.name not in planned for path in folder.iterdir()):
        raise UsageError(f"{folder}: exists and holds no study: name another folder with `output_dir`")
    (folder / STUDY).unlink(missing_ok=True)
    shutil.rmtree(folder / "arms", ignore_errors=True)
    (folder / "arms").mkdir(parents=True)
    for arm in study.arms:
        write_text_atomically(arm_file(folder, arm.slug), json.dumps(to_plain(arm.config), indent=2) + "\n")
    # Last: a folder with it has all of the study.
    _write_study(folder, study)


def _write_study(folder: Path, study: Study) -> None:
    write_text_atomically(folder / STUDY, json.dumps(study.as_plain(), indent=2) + "\n")


def opened(folder: Path, asked: Asked | None = None) -> Study | None:
    """The study in a folder, None if there is none yet, or another one of which nothing has run.

    Other published figures make no other study: they are written to it.
    Raises `UsageError` if it is not the one that is asked for.
    """
    file = folder / STUDY
    if not file.exists():
        return None
    study = from_plain(Study, read_json(file, inside=folder), origin=str(file))
    if asked is None or _said(study.asked) == _said(asked):
        return study
    if _said(replace(study.asked, published=asked.published)) == _said(asked):
        return _changed(folder, lambda found: replace(found, asked=asked))
    if not (folder / "runs").exists():
        return None
    before, now = _said(study.asked), _said(asked)
    name = next(name for name in now if now[name] != before[name])
    was, wanted = _apart(before[name], now[name])
    raise UsageError(
        f"{folder}: holds another study, whose {name} is {was!r:.200}, not {wanted!r:.200}: name another folder with "
        "`output_dir`, or remove this one"
    )


def _changed(folder: Path, change: Callable[[Study], Study]) -> Study:
    """The study in a folder, changed there; read under a lock, so that what others change meanwhile stays."""
    with waited_for(folder, "study"):
        before = opened(folder)
        assert before is not None
        if (study := change(before)) != before:
            _write_study(folder, study)
    return study


def _apart(before: Any, now: Any) -> tuple[Any, Any]:
    """Both values; of two tables the first entry that differs, with its name."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before, now
    name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
    return {name: before.get(name)}, {name: now.get(name)}


def _said(asked: Asked) -> dict[str, Any]:
    """What is asked, with the order of its arms, which equal mappings may have apart: the first is the reference."""
    return to_plain(asked) | {"order of arms": list(asked.arms)}


def require_planned(study: Study, dataset: TrainingData) -> None:
    """Raise `DataError` for data other than the study was planned with."""
    if dataset.fingerprint != study.data["fingerprint"]:
        raise DataError(
            f"{study.data['source']}: the data changed since the study was planned (fingerprint "
            f"{dataset.fingerprint[:12]}, then {study.data['fingerprint'][:12]}): restore it, or begin another study"
        )


def source_commit(root: Path = Path(__file__).parents[3]) -> str:
    """The commit of this program's source, with "-dirty" where its files are others; "" if it is no checkout."""
    if not (root / ".git").exists():
        return ""
    found = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "src"]):
        try:
            done = subprocess.run(["git", "-C", str(root), *words], check=False, capture_output=True, text=True)
        except OSError:  # no git
            return ""
        if done.returncode:
            return ""
        found.append(done.stdout.strip())
    return found[0] + "-dirty" * bool(found[1])


def _this_program(study: Study) -> str:
    """This program in words, with what this machine has other than the one that the study was planned on."""
    now = describe_machine()
    other = [
        f"{name} {now[name]}" for name in ("processor", "torch") if study.machine.get(name, now[name]) != now[name]
    ]
    return program_of(__version__, source_commit()) + (f" ({', '.join(other)})" if other else "")


def note_program(folder: Path, tell: Callable[[str], None] = lambda text: None) -> Study:
    """The study in a folder; with this program noted in it, if it or its machine is another and runs are left.

    tell: called with a sentence of that.
    """
    study = opened(folder)
    assert study is not None
    program = _this_program(study)
    if program == study.program or not ready(study, read_outcomes(folder)):
        return study
    tell(
        f"the study was planned by {study.program}, and goes on with {program}, as its page will say: runs may differ "
        "by that"
    )

    def noted(study: Study) -> Study:
        known = program in (study.program, *study.went_on)
        return study if known else replace(study, went_on=(*study.went_on, program))

    with waited_for(folder, "plan"):
        return _changed(folder, noted)


def append_line(file: Path, values: Mapping[str, Any]) -> None:
    """Append a record to a file of JSON lines, on the disk when this returns. A half-written last line is removed."""
    with file.open("a+b") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # what another process is writing is not half-written
        out.seek(0)
        before = out.read()
        whole = before.rfind(b"\n") + 1
        if whole < len(before):  # killed while it wrote
            out.truncate(whole)
        out.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of NAME.jsonl and of NAME-i-of-N.jsonl, without a half-written last line. Raises `CorruptError`."""
    found = []
    for file in sorted(folder.glob(f"{name}*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise CorruptError(f"{file}:{number}: not JSON: {error}") from error
    return found


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """Run → outcome, of the runs that have ended."""
    rows = [from_plain(Outcome, row, origin=str(folder)) for row in read_lines(folder, RESULTS)]
    return {outcome.run: outcome for outcome in sorted(rows, key=lambda one: one.run)}


def read_tests(folder: Path) -> list[Test]:
    """The scores on the test part, of the runs that have one."""
    return [from_plain(Test, row, origin=str(folder)) for row in read_lines(folder, TESTS)]


@contextmanager
def locked(folder: Path, name: str) -> Iterator[int | None]:
    """Lock a name in the study's folder; None if another process holds it, else the lock's descriptor.

    The system unlocks it when every process that has the descriptor has ended. A file and no folder is locked: file
    systems of several machines pass locks of files on, and not of folders.
    """
    file = folder / "locks" / name
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = try_lock(handle, file) and file.exists()
        # Who held it may have removed the file.
        yield handle if held and os.path.samestat(os.fstat(handle), file.stat()) else None
    finally:
        os.close(handle)


@contextmanager
def waited_for(folder: Path, name: str) -> Iterator[None]:
    """Lock a name in the study's folder, after whoever holds it."""
    while True:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        with locked(folder, name) as held:
            if held is not None:
                yield
                return
        time.sleep(WAIT)


@contextmanager
def planning(folder: Path) -> Iterator[None]:
    """Lock a folder while a study is planned for it, after whoever else plans one.

    An error or a stop takes away what was made for the lock: a plan that is refused leaves nothing.
    """
    with waited_for(folder, "plan"):
        try:
            yield
        except BaseException:
            with suppress(OSError):  # other things are there
                (folder / "locks" / "plan").unlink()
                (folder / "locks").rmdir()
                folder.rmdir()
            raise
