"""Runs that fail are results; what no run can help stops the study, and is not written as theirs."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.errors import CorruptError, DataError
from swamla.study import running, scoring
from swamla.study.folder import begin, locked, read_outcomes
from swamla.study.running import EnvironmentFault, run_study
from swamla.study.runs import Outcome
from swamla.study.scoring import work
from swamla.train.saving import REMEDY, Diverged

from .helpers import FakeRun, sized, study_of


@pytest.fixture(scope="module", autouse=True)
def _impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "POLL", 0.0)
        yield


def ending(status: int, last: dict | None = None, said: str = ""):
    """A trainer whose runs of gdn end so."""

    def launch(words: list[str], log: Path) -> FakeRun:
        if "gdn" not in " ".join(words):
            return FakeRun(words, log)
        run = FakeRun(words, log, status, last)
        log.write_text(log.read_text() + said)
        return run

    return launch


def outcomes_of_gdn(folder: Path, launch) -> list[Outcome]:
    begin(folder, study_of(rates="recipe"))
    return [one for one in run_study(folder, launch=launch).values() if one.arm == "gdn"]


def test_failed_and_diverged_runs_are_results_with_their_error(tmp_path: Path):
    said = "loading …\nswamla: error: no room\nswamla: a note\n"
    for one in outcomes_of_gdn(tmp_path / "failed", ending(2, said=said)):
        assert (one.status, one.validation, one.error) == ("failed", None, "no room")
    said = f"swamla: error: 20 steps in a row had no finite gradient; there is no checkpoint yet; {REMEDY}, now 0.01\n"
    for one in outcomes_of_gdn(tmp_path / "diverged", ending(Diverged.exit_status, {"skipped": 20}, said)):
        assert (one.status, one.validation) == ("diverged", None)
        assert "no finite gradient" in one.error
    for one in outcomes_of_gdn(tmp_path / "nan", ending(0, {"held_out_bits_per_byte": None})):
        assert (one.status, one.validation) == ("diverged", None)


def test_a_run_whose_process_is_killed_again_and_again_has_failed(tmp_path: Path):
    found = outcomes_of_gdn(tmp_path / "killed", ending(-9))
    assert {(one.status, one.error) for one in found} == {("failed", "killed 3 times, exit status -9")}
    log = (tmp_path / "killed" / "logs" / f"{found[0].run}.log").read_text().splitlines()
    assert len([line for line in log if line.startswith("train")]) == 3


@pytest.mark.parametrize("status", [-9, 2], ids=["killed", "full disk"])
def test_a_run_that_was_killed_or_had_no_disk_behind_a_skipped_step_has_not_diverged(
    status: int, tmp_path: Path
) -> None:
    said = "swamla: error: runs/x: disk full: needs 5 bytes, 0 are free; older checkpoints are intact\n"
    found = outcomes_of_gdn(tmp_path / "study", ending(status, {"skipped": 1}, said))
    assert {one.status for one in found} == {"failed"}


def test_a_run_whose_checkpoints_are_all_damaged_is_resumed_and_fails_by_itself_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    begin(folder, study_of(rates="recipe"))
    stopped = folder / "runs" / "gdn-lr0.01-seed1"
    stopped.mkdir(parents=True)
    (stopped / "config.json").write_text("{}")
    damaged = "checkpoints: no checkpoint verifies: weights.safetensors: wrong checksum"

    def latest(checkpoints: Path) -> None:
        raise CorruptError(damaged)

    def launch(words: list[str], log: Path) -> FakeRun:
        run = FakeRun(words, log, status=3 if "--resume" in words else 0)
        log.write_text(log.read_text() + f"swamla: error: {damaged}\n" * (run.status == 3))
        return run

    monkeypatch.setattr(running, "latest_checkpoint", latest)
    found = run_study(folder, launch=launch)
    assert (found[stopped.name].status, found[stopped.name].error) == ("failed", damaged)
    assert [one.status for one in found.values()].count("finished") == 3


def test_a_run_whose_metrics_are_damaged_has_failed_with_the_line_and_the_others_go_on(tmp_path: Path) -> None:
    class Damaged(FakeRun):
        def poll(self) -> int | None:
            found = super().poll()
            if found is not None and self.folder.name == "gdn-lr0.01-seed1":
                (self.folder / "metrics.jsonl").write_text("no json\n{}\n")
            return found

    begin(tmp_path / "study", study_of(rates="recipe"))
    found = run_study(tmp_path / "study", launch=Damaged)
    assert found["gdn-lr0.01-seed1"].status == "failed"
    assert "metrics.jsonl:1: not JSON" in found["gdn-lr0.01-seed1"].error
    assert [one.status for one in found.values()].count("finished") == 3


# ---- what no run can help -------------------------------------------------------------------------------------------


def full_disk(words: list[str], log: Path) -> FakeRun:
    """A trainer without room, whose message has the run's name and other numbers each time."""
    run = FakeRun(words, log, status=2)
    where, size = run.folder / "checkpoints", 1000 + len(list(log.parent.iterdir()))
    log.write_text(log.read_text() + f"swamla: error: {where}: disk full: needs {size:,} bytes, 0 are free\n")
    return run


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_of_several_arms_that_fail_alike_in_a_row_stop_the_study_which_trains_them_again(
    jobs: int, tmp_path: Path
) -> None:
    folder, fine = tmp_path / "study", tmp_path / "fine"
    for each in (folder, fine):
        begin(each, study_of(rates="recipe", seeds=3))
    with pytest.raises(EnvironmentFault, match="3 runs in a row, of mha, gdn, failed with the same error") as caught:
        run_study(folder, launch=full_disk, jobs=jobs)
    assert caught.value.exit_status == 1
    assert "disk full" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not read_outcomes(folder)
    again = run_study(folder, launch=FakeRun)
    assert {name: (one.status, one.validation) for name, one in again.items()} == {
        name: (one.status, one.validation) for name, one in run_study(fine, launch=FakeRun).items()
    }


def test_failures_of_one_arm_or_of_other_errors_or_with_a_run_between_that_ended_are_results(tmp_path: Path) -> None:
    errors = iter(["no room", "no rows", "no room", "no rows", "no room", "no rows"])

    def others(words: list[str], log: Path) -> FakeRun:
        run = FakeRun(words, log, status=2)
        log.write_text(f"swamla: error: {next(errors)}\n")
        return run

    for name, launch, failed in (("arm", ending(2, said="swamla: error: no room\n"), 3), ("errors", others, 6)):
        begin(tmp_path / name, study_of(rates="recipe", seeds=3))
        outcomes = run_study(tmp_path / name, launch=launch, jobs=1 if name == "errors" else 6)
        assert [one.status for one in outcomes.values()].count("failed") == failed
        assert read_outcomes(tmp_path / name) == outcomes


def test_failures_of_one_arm_at_several_sizes_are_its_results(tmp_path: Path) -> None:
    fails = ending(2, said="swamla: error: no room\n")

    def launch(words: list[str], log: Path) -> FakeRun:
        run = fails(words, log)
        if not run.status:
            run.poll()  # it ends a look before those that fail, which so end in a row
        return run

    begin(tmp_path / "study", sized(study_of(rates="recipe"), 32, 48))
    outcomes = run_study(tmp_path / "study", launch=launch, jobs=8)
    assert {one.arm for one in outcomes.values() if one.status == "failed"} == {"gdn@32", "gdn@48"}
    assert [one.status for one in outcomes.values()].count("failed") == 4


def test_who_stops_a_study_keeps_the_failure_before(tmp_path: Path) -> None:
    def launch(words: list[str], log: Path) -> FakeRun:
        if "gdn" in " ".join(words):
            raise KeyboardInterrupt
        return FakeRun(words, log, status=2)

    begin(tmp_path / "study", study_of(rates="recipe"))
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path / "study", launch=launch)
    assert [one.status for one in read_outcomes(tmp_path / "study").values()] == ["failed"]


def test_a_failure_is_written_when_all_that_is_left_is_others_work_who_may_wait_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    begin(folder, study_of(rates="recipe"))
    (folder / "locks").mkdir()

    def told(outcome: Outcome) -> None:
        raise KeyboardInterrupt  # there is no end: others hold all other runs

    with ExitStack() as others:
        for run in ("mha-lr0.01-seed1", "mha-lr0.01-seed2", "gdn-lr0.01-seed2"):
            assert others.enter_context(locked(folder, run))
        others.enter_context(pytest.raises(KeyboardInterrupt))
        run_study(folder, launch=ending(2), part=1, parts=2, report=told)
    assert list(read_outcomes(folder)) == ["gdn-lr0.01-seed1"]


def test_a_process_of_an_executor_refuses_other_data_than_the_study_was_planned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        fingerprint = "other"

    study = study_of()
    begin(tmp_path / "study", replace(study, data=study.data | {"fingerprint": "planned"}))
    monkeypatch.setattr(scoring, "data_of", lambda config: Other())
    monkeypatch.setattr(scoring, "run_study", lambda *_, **__: pytest.fail("trained on other data"))
    with pytest.raises(DataError, match=r"the data changed since the study was planned \(fingerprint other, then plan"):
        work(tmp_path / "study", (), 0, 2)
