"""`swamla compare` by several processes on one folder, and by other programs than planned the study."""

import multiprocessing
import os
import re
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from swamla.cli import compare, main
from swamla.cli.console import Console
from swamla.study import folder as study_folder
from swamla.study import running, scoring
from swamla.study.folder import begin, note_program, opened, read_outcomes, source_commit, waited_for
from swamla.study.plan import Asked, Study
from swamla.study.running import run_study
from tests.study.helpers import FakeRun, study_of
from tests.waiting import PATIENCE


def test_parts_that_are_started_together_on_a_fresh_folder_plan_it_once_and_share_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = multiprocessing.get_context("fork").Barrier(2)
    looks: list[None] = []

    def first_look_together(folder: Path, asked: Asked | None = None) -> Study | None:
        found = opened(folder, asked)
        if not looks:
            looks.append(None)
            assert found is None
            together.wait(timeout=PATIENCE)
        return found

    def planned(asked: Asked, *_: object) -> tuple[Study, None]:
        with (tmp_path / "plans").open("a") as out:
            out.write("planned\n")
        time.sleep(0.2)  # the other one waits meanwhile
        return replace(study_of(*asked.arms, rates="recipe"), asked=asked), None

    (tmp_path / "tiny.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "opened", first_look_together)
    monkeypatch.setattr(compare, "_planned", planned)
    monkeypatch.setattr(compare, "_data_of", lambda *_: None)
    monkeypatch.setattr(compare, "score_tests", lambda *_: [])
    monkeypatch.setattr(compare, "measure", lambda *_: None)
    monkeypatch.setattr(compare, "_write", lambda *_: None)
    monkeypatch.setattr(running, "start", lambda words, log, lock: FakeRun(words, log))
    monkeypatch.setattr(running, "WAIT", 0.01)
    line = [
        "compare",
        "mha",
        "gdn",
        "--recipe",
        "tiny.toml",
        "--rates",
        "recipe",
        "--seeds",
        "2",
        "--output_dir",
        "new",
    ]
    children = []
    for part in ("1/2", "2/2"):
        if not (child := os.fork()):
            try:
                os._exit(main([*line, "--part", part]))
            finally:
                os._exit(70)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert (tmp_path / "plans").read_text() == "planned\n"
    assert len(read_outcomes(tmp_path / "new")) == 4


def test_parts_that_end_together_write_the_report_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    released = threading.Event()

    def written(results: object, folder: Path) -> list[Path]:
        order.append("report")
        return []

    def other() -> None:
        with waited_for(tmp_path, "report"):
            begun.set()
            released.wait(PATIENCE)
            order.append("other")

    def waits(seconds: float) -> None:
        released.set()
        part.join()

    begun = threading.Event()
    part = threading.Thread(target=other)
    monkeypatch.setattr(compare, "write_report", written)
    monkeypatch.setattr(compare, "_say_results", lambda *_: None)
    part.start()
    assert begun.wait(PATIENCE)
    monkeypatch.setattr(study_folder.time, "sleep", waits)
    try:
        compare._write(None, tmp_path, Console())  # type: ignore[arg-type]
    finally:
        released.set()
        part.join()
    assert order == ["other", "report"]


def test_the_commit_of_a_source_whose_files_are_others_is_marked(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        named = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *named, *words], check=True, capture_output=True)

    assert not source_commit(tmp_path), "no checkout"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    git("init")
    git("add", "src")
    git("commit", "-m", "a")
    commit = source_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "notes").write_text("no source")
    assert source_commit(tmp_path) == commit
    (tmp_path / "src" / "b.py").write_text("b = 1\n")
    assert source_commit(tmp_path) == f"{commit}-dirty"
    git("add", "src")
    git("commit", "-m", "b")
    (tmp_path / "src" / "a.py").write_text("a = 2\n")
    assert source_commit(tmp_path).endswith("-dirty")


def test_another_program_or_machine_than_planned_a_study_is_told_and_noted_in_it_while_runs_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told = tmp_path / "study", []
    machine = {"processor": "p", "torch": "2.0", "threads": "1"}
    study = replace(study_of(rates="recipe"), commit="abc", machine=machine)
    begin(folder, study)
    assert "went_on" not in (folder / "study.json").read_text(), "files of studies are as they were"

    def noted(commit: str, **other: str) -> list[str]:
        monkeypatch.setattr(study_folder, "source_commit", lambda: commit)
        monkeypatch.setattr(study_folder, "describe_machine", lambda: machine | other)
        found = note_program(folder, told.append)
        assert found == opened(folder)
        return [program.partition("commit ")[2] for program in found.went_on]

    assert noted("abc") == noted("abc", threads="4") == told == []
    assert noted("abc-dirty") == ["abc-dirty"]
    assert f"planned by swamla {study.version}, commit abc, and goes on with swamla" in told[-1]
    assert noted("abc", torch="2.1", processor="q") == ["abc-dirty", "abc (processor q, torch 2.1)"]
    assert noted("abc-dirty") == noted("abc", torch="2.1", processor="q"), "each is noted once"
    assert len(told) == 4, "and told each time"
    monkeypatch.setattr(running, "POLL", 0.0)
    run_study(folder, launch=FakeRun)
    assert len(noted("ghi")) == 2, "it trains nothing"


def test_a_process_of_an_executor_notes_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(rates="recipe")
    study = replace(study, data=study.data | {"fingerprint": "text"})
    begin(tmp_path / "study", study)
    monkeypatch.setattr(study_folder, "source_commit", lambda: "abc")
    monkeypatch.setattr(scoring, "data_of", lambda config: SimpleNamespace(fingerprint="text"))
    monkeypatch.setattr(scoring, "run_study", lambda *_, **__: None)
    monkeypatch.setattr(scoring, "score_tests", lambda *_: None)
    scoring.work(tmp_path / "study", (), 0, 2)
    found = opened(tmp_path / "study")
    assert found is not None
    assert found.went_on == (f"swamla {study.version}, commit abc",)
