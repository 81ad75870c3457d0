"""A study goes on after a kill at any point, repeats nothing, and ends with the same results to the digit."""

import errno
import json
import multiprocessing
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from swamla import files
from swamla.errors import CorruptError, UsageError
from swamla.study import folder as study_folder
from swamla.study import running
from swamla.study.folder import append_line, begin, locked, note_program, opened, read_lines, read_outcomes
from swamla.study.plan import Asked, Study
from swamla.study.published import Published
from swamla.study.running import beside, run_study, with_start
from swamla.study.scoring import score_tests
from swamla.train.claims import claim_new
from tests.waiting import PATIENCE, until

from .helpers import FakeRun, arm_of, score_of, study_of
from .played import results_of

CLOCK = ("wall", "seconds")


def results(folder: Path) -> dict:
    """The outcomes, without times."""
    found = {}
    for name, one in read_outcomes(folder).items():
        found[name] = {key: value for key, value in vars(one).items() if key not in CLOCK} | {"command": ""}
    return found


def begun(folder: Path, study: Study | None = None) -> Path:
    begin(folder, study or study_of())
    return folder


@pytest.fixture(scope="module", autouse=True)
def _impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "POLL", 0.0)
        patch.setattr(running, "WAIT", 0.01)
        patch.setattr(study_folder, "WAIT", 0.01)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = begun(tmp_path_factory.mktemp("whole") / "study")
    run_study(folder, launch=FakeRun)
    return folder


def killed_at(event: int, folder: Path, **settings) -> bool:
    """Work on the study in a process that is killed at its `event`-th look at a run; False if it ended before."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (9, 0)
        return os.waitstatus_to_exitcode(status) == 9
    seen = [0]

    class Killed(FakeRun):
        def poll(self):
            seen[0] += 1
            found = super().poll()
            if seen[0] == event:
                os._exit(9)
            return found

    try:
        run_study(folder, launch=Killed, **settings)
        os._exit(0)
    finally:
        os._exit(1)


def begins_together(barrier) -> running.Launch:
    """A launch of the fake trainer whose first run ends when all processes of `barrier` have one under way."""
    started = []

    def launch(words: list[str], log: Path) -> FakeRun:
        run = FakeRun(words, log)
        if not started:
            started.append(run)
            barrier.wait(timeout=PATIENCE)
        return run

    return launch


@pytest.mark.parametrize("events", [[1] * 3, [2] * 3, [3] * 3, [4, 9, 2, 11], [5] * 20], ids=str)
def test_a_study_that_is_killed_anywhere_ends_with_the_same_results(whole: Path, tmp_path: Path, events: list[int]):
    folder = begun(tmp_path / "study")
    kills = sum(killed_at(event, folder) for event in events)
    run_study(folder, launch=FakeRun)
    assert kills >= 3
    assert results(folder) == results(whole)
    logs = {log.stem: log.read_text().splitlines() for log in (folder / "logs").iterdir()}
    assert logs.keys() == results(whole).keys()


def test_a_run_that_ended_is_never_started_again(tmp_path: Path):
    folder = begun(tmp_path / "study")
    while killed_at(7, folder):
        started = {log.stem: len(log.read_text().splitlines()) for log in (folder / "logs").iterdir()}
        ended = read_outcomes(folder).keys()
        killed_at(1, folder)
        for name in ended:
            assert len((folder / "logs" / f"{name}.log").read_text().splitlines()) == started[name]
    assert run_study(folder, launch=lambda *_: pytest.fail("started a run")) == read_outcomes(folder)


def test_several_jobs_and_several_parts_find_the_same(whole: Path, tmp_path: Path):
    folder = begun(tmp_path / "jobs")
    run_study(folder, launch=FakeRun, jobs=3)
    assert results(folder) == results(whole)
    folder = begun(tmp_path / "parts")
    all_at_work = multiprocessing.get_context("fork").Barrier(3)
    children = []
    for part in range(3):
        if not (child := os.fork()):
            try:
                run_study(folder, launch=begins_together(all_at_work), part=part, parts=3)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert results(folder) == results(whole)
    for log in (folder / "logs").iterdir():
        assert len(log.read_text().splitlines()) == 1, "each run was started by one part"
    assert len(list(folder.glob("results-*-of-3.jsonl"))) == 3


def test_a_part_alone_ends_the_study_when_the_others_are_gone(whole: Path, tmp_path: Path):
    folder = begun(tmp_path / "study")
    assert killed_at(4, folder, part=0, parts=2)
    run_study(folder, launch=FakeRun, part=1, parts=2)
    assert results(folder) == results(whole)


def test_a_run_is_started_by_nobody_else_while_its_process_outlives_the_one_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, go = begun(tmp_path / "study"), tmp_path / "go"
    script = f"until [ -e {go} ]; do sleep 0.01; done"  # writes nothing, as a run that still imports torch
    monkeypatch.setattr(running, "program", lambda: ["sh", "-c", script])
    if not (child := os.fork()):
        running.time.sleep = lambda seconds: os._exit(9)  # killed at its first look, when its run is under way
        try:
            run_study(folder)
        finally:
            os._exit(1)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        (run,) = [log.stem for log in (folder / "logs").iterdir()]
        with locked(folder, run) as held:
            assert held is None
    finally:
        go.touch()

    def is_free() -> bool:
        with locked(folder, run) as held:
            return held is not None

    until(is_free, what="the run's process has ended")


def test_what_another_process_notes_in_a_study_stays_when_published_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "study")
    row = Published(name="a", source="https://a.b", value=1.0, unit="u", comparable=False, why="another text")
    asked = replace(study_of().asked, published=(row,))
    apart = study_folder._said
    monkeypatch.setattr(study_folder, "source_commit", lambda: "abc")

    def meanwhile(asked: Asked) -> dict:
        monkeypatch.setattr(study_folder, "_said", apart)
        note_program(folder)  # after `opened` has read the study, before it writes it
        return apart(asked)

    monkeypatch.setattr(study_folder, "_said", meanwhile)
    assert opened(folder, asked) == opened(folder)
    found = opened(folder)
    assert found is not None
    assert (found.asked.published, found.went_on) == ((row,), (f"swamla {found.version}, commit abc",))


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    folder = begun(tmp_path / "study")
    monkeypatch.setattr(files.fcntl, "flock", missing)
    with pytest.raises(UsageError, match=r"has no locks \(flock: No locks available\): without them two processes"):
        run_study(folder, launch=FakeRun)
    with pytest.raises(UsageError, match="has no locks"):
        claim_new(tmp_path / "run")


def test_the_command_of_a_run_is_one_that_a_shell_takes_apart_into_the_same_words(tmp_path: Path) -> None:
    folder = begun(tmp_path / "my study", study_of(rates="recipe"))
    for one in run_study(folder, launch=FakeRun).values():
        words = shlex.split(one.command)
        assert words[:3] == ["swamla", "train", str(folder / "arms" / f"{one.arm}.json")]
        assert words[-1] == str(folder / "runs" / one.run)


def test_the_best_rate_of_each_arm_is_found_and_its_seeds_are_scored(whole: Path):
    rates = {one.arm: one.lr for one in read_outcomes(whole).values() if one.purpose == "seed"}
    assert rates == {"mha": 0.01, "gdn": 0.1}
    for one in read_outcomes(whole).values():
        assert one.validation == score_of(one.run)
        assert (one.status, one.tokens, one.steps, one.seconds) == ("finished", 2560, 20, 2.0)
        assert one.command.startswith("swamla train ")


class Short(FakeRun):
    """A run of ten steps, the first of which take long; the others 150 ms each. It evaluates for three seconds."""

    def __init__(self, words: list[str], log: Path) -> None:
        super().__init__(words, log)
        assert words[words.index("--steps") + 1] == "10"
        assert words[words.index("--schedule_steps") + 1] == "10"
        elapsed = [1.0, 1.5, 2.0, *(2.0 + 0.15 * number for number in range(1, 8))]
        lines: list[dict] = [{"step": step, "loss": 3.0, "elapsed": at} for step, at in enumerate(elapsed, 1)]
        lines.append({"step": 10, "held_out_bits_per_byte": 2.0, "elapsed": elapsed[-1] + 3.0})
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_short_run_tells_what_a_run_takes_beside_its_timed_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 112.55])
    monkeypatch.setattr(running, "start", Short)
    monkeypatch.setattr(running.time, "monotonic", lambda: next(clock))
    study = study_of()
    ten_steps = replace(study, arms=(arm_of("mha", steps=10, seconds=0.1), *study.arms[1:]))
    found = with_start(ten_steps, tmp_path)
    # 12.55 s, of which 2 + 7 × .15 are steps and 3 the evaluation; a step takes .15 s and not the .1 that were timed
    assert (found.start_seconds, found.loop_seconds, found.evaluation_seconds) == (6.5, 0.05, 3.0)


def test_a_short_run_whose_steps_were_skipped_tells_its_start_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Skipped(FakeRun):
        def __init__(self, words: list[str], log: Path) -> None:
            super().__init__(words, log)
            lines = [
                {"step": 1, "skipped": 1},
                {"step": 1, "held_out_loss": 2.0, "elapsed": 3.0},
                {"step": 2, "skipped": 2},
            ]
            (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    clock = iter([100.0, 110.0])
    monkeypatch.setattr(running, "start", Skipped)
    monkeypatch.setattr(running.time, "monotonic", lambda: next(clock))
    found = with_start(study_of(), tmp_path)
    assert (found.start_seconds, found.loop_seconds, found.evaluation_seconds) == (7.0, 0.0, 3.0)


def test_whoever_stops_the_plan_stops_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Stopped(FakeRun):
        def wait(self) -> int:
            seen.append("wait")
            if seen == ["wait"]:
                raise KeyboardInterrupt
            return -15

        def terminate(self) -> None:
            seen.append("terminate")

    monkeypatch.setattr(running, "start", Stopped)
    with pytest.raises(KeyboardInterrupt):
        with_start(study_of(), tmp_path)
    assert seen == ["wait", "terminate", "wait"]


def test_a_study_whose_runs_cannot_train_is_refused_with_the_runs_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(words: list[str], log: Path) -> FakeRun:
        log.write_text("swamla: error: no room\n")
        return FakeRun(words, log, status=2)

    monkeypatch.setattr(running, "start", fails)
    with pytest.raises(UsageError, match="arm 'mha': a run of 20 steps fails: no room"):
        with_start(study_of(), tmp_path)


class Endless(FakeRun):
    """A trainer that never ends: its first step is written at its second look."""

    def poll(self) -> int | None:
        return super().poll() if self.polls < 2 else None

    def terminate(self) -> None:
        self.polls = -1

    def wait(self) -> int:
        assert self.polls == -1, "asked to stop first"
        return 75


def test_steps_are_timed_while_as_many_others_train_which_stop_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Endless] = []

    def launch(words: list[str], log: Path) -> FakeRun:
        begun.append(Endless(words, log))
        return begun[-1]

    monkeypatch.setattr(running, "start", launch)
    config = study_of().arms[0].config
    with beside(config, 2, tmp_path, ["mixer.py"]):
        assert [run.polls for run in begun] == [2, 2], "both have taken a step"
    assert [run.polls for run in begun] == [-1, -1]
    log = (tmp_path / "beside-0.log").read_text()
    assert log.startswith(f"train {tmp_path}/beside.json --steps 1000000000")
    assert "--max_minutes 30" in log, "whoever kills the plan with SIGKILL is not left with runs without an end"
    assert log.endswith("--plugin mixer.py --output_dir " + f"{tmp_path}/beside-0\n")
    assert json.loads((tmp_path / "beside.json").read_text())["train"]["lr"] == config.train.lr
    with beside(config, 0, tmp_path):
        assert len(begun) == 2


def test_a_plan_whose_other_runs_cannot_train_is_refused_with_the_runs_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed(Endless):
        def poll(self) -> int | None:
            return 2

    def fails(words: list[str], log: Path) -> FakeRun:
        log.write_text("swamla: error: no room\n")
        return Failed(words, log)

    monkeypatch.setattr(running, "start", fails)
    with pytest.raises(UsageError, match="a run fails: no room"), beside(study_of().arms[0].config, 1, tmp_path):
        pytest.fail("timed beside a run that failed")


def test_a_run_that_is_preempted_goes_on_however_often(whole: Path, tmp_path: Path) -> None:
    starts: dict[str, int] = {}

    def launch(words: list[str], log: Path) -> FakeRun:
        starts[log.stem] = starts.get(log.stem, 0) + 1
        return FakeRun(words, log, status=75 if starts[log.stem] <= 2 * running.ATTEMPTS else 0)

    folder = begun(tmp_path / "study")
    run_study(folder, launch=launch)
    assert set(starts.values()) == {2 * running.ATTEMPTS + 1}
    assert results(folder) == results(whole)


def test_whoever_stops_a_study_stops_its_runs_and_they_are_resumed(whole: Path, tmp_path: Path):
    folder, stopped = begun(tmp_path / "study"), []

    class Stopped(FakeRun):
        def poll(self):
            if self.polls == 1:
                raise KeyboardInterrupt
            return super().poll()

        def terminate(self):
            stopped.append(self.folder.name)

    with pytest.raises(KeyboardInterrupt):
        run_study(folder, launch=Stopped, jobs=2)
    assert len(stopped) == 2
    run_study(folder, launch=FakeRun)
    assert results(folder) == results(whole)


def test_a_half_written_line_is_no_outcome_and_the_next_one_replaces_it(tmp_path: Path):
    file = tmp_path / "results.jsonl"
    append_line(file, {"run": "a"})
    with file.open("a") as out:
        out.write('{"run": "b", "arm')
    assert read_lines(tmp_path, "results") == [{"run": "a"}]
    append_line(file, {"run": "c"})
    assert read_lines(tmp_path, "results") == [{"run": "a"}, {"run": "c"}]
    file.write_text('{"run": "a"}\nno json\n')
    with pytest.raises(CorruptError, match=r"results\.jsonl:2: not JSON"):
        read_lines(tmp_path, "results")


def test_a_study_is_written_with_everything_resolved_and_read_again(tmp_path: Path):
    study = study_of(question="Which?")
    begin(tmp_path / "study", study)
    assert opened(tmp_path / "study") == study
    assert opened(tmp_path / "elsewhere") is None
    recipe = json.loads((tmp_path / "study" / "arms" / "gdn.json").read_text())
    assert recipe["model"]["pattern"] == ["gdn"]
    assert recipe["train"]["steps"] == 20


def test_another_study_in_the_folder_is_refused_and_so_is_a_folder_of_something_else(tmp_path: Path):
    begin(tmp_path / "study", study_of())
    other = replace(study_of().asked, seeds=7)
    assert opened(tmp_path / "study", other) is None, "nothing of it has run"
    begin(tmp_path / "study", replace(study_of(), asked=other))
    begin(tmp_path / "study", study_of())
    (tmp_path / "study" / "runs").mkdir()
    with pytest.raises(UsageError, match=r"holds another study, whose seeds is 2, not 7: name another folder"):
        opened(tmp_path / "study", other)
    last = list(study_of().asked.arms)[-1]
    changed = replace(study_of().asked, arms={**study_of().asked.arms, last: "--pattern other"})
    with pytest.raises(UsageError, match=rf"whose arms is {{'{last}': '.*'}}, not {{'{last}': '--pattern other'}}:"):
        opened(tmp_path / "study", changed)
    turned = replace(study_of().asked, arms=dict(reversed(study_of().asked.arms.items())))
    assert turned == study_of().asked, "equal mappings: the first arm, the reference, is another"
    with pytest.raises(UsageError, match=r"whose order of arms is \['mha', 'gdn'\], not \['gdn', 'mha'\]: name"):
        opened(tmp_path / "study", turned)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="exists and holds no study"):
        begin(tmp_path / "mine", study_of())
    with pytest.raises(UsageError, match=r"holds no study \(it has no study.json\)"):
        run_study(tmp_path / "nowhere")


def test_the_test_part_is_not_read_while_runs_are_left(tmp_path: Path):
    begun(tmp_path / "study")
    with pytest.raises(UsageError, match="has runs left: the test part is read once, when all have ended"):
        score_tests(tmp_path / "study", None)  # type: ignore[arg-type]


def test_the_test_part_is_read_for_seeds_at_the_chosen_rate_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of a rate that was chosen before a run of the search was tried again are not scored."""
    results, scored = results_of(0.05), list[str]()
    begin(tmp_path / "study", results.study)
    before = [replace(one, run=f"{one.run}-before", rate=1) for one in results.outcomes if one.purpose == "seed"]
    for one in (*results.outcomes, *before):
        append_line(tmp_path / "study" / "results.jsonl", asdict(one))
    tests = {test.run: test for test in results.tests}
    monkeypatch.setattr("swamla.study.scoring.validation", lambda *_, part: part)
    monkeypatch.setattr("swamla.study.scoring._tested", lambda *given: scored.append(given[2].run) or tests[scored[-1]])
    score_tests(tmp_path / "study", None)  # type: ignore[arg-type]
    assert sorted(scored) == sorted(tests)
