"""`swamla compare` by several processes on one folder, and by other programs than planned the study."""

import multiprocessing
import os
import re
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.cli import compare, main
from swamla.cli.console import Console
from swamla.study import folder as study_folder
from swamla.study import running
from swamla.study.folder import begin, opened, read_outcomes, waited_for
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

    assert not compare.source_commit(tmp_path), "no checkout"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    git("init")
    git("add", "src")
    git("commit", "-m", "a")
    commit = compare.source_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "notes").write_text("no source")
    assert compare.source_commit(tmp_path) == commit
    (tmp_path / "src" / "b.py").write_text("b = 1\n")
    assert compare.source_commit(tmp_path) == f"{commit}-dirty"
    git("add", "src")
    git("commit", "-m", "b")
    (tmp_path / "src" / "a.py").write_text("a = 2\n")
    assert compare.source_commit(tmp_path).endswith("-dirty")


def test_another_program_than_planned_a_study_is_told_and_noted_in_it_while_runs_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    study = replace(study_of(rates="recipe"), commit="abc")
    begin(folder, study)
    assert "went_on" not in (folder / "study.json").read_text(), "files of studies are as they were"
    for commit, noted in (("abc", ()), ("abc-dirty", (f"swamla {study.version}, commit abc-dirty",)), ("def", ...)):
        monkeypatch.setattr(compare, "source_commit", lambda commit=commit: commit)
        found = compare.noted_program(study, folder, Console())
        said = " ".join(capsys.readouterr().out.split())
        assert (f"planned by swamla {study.version}, commit abc, and goes on with" in said) == (commit != "abc")
        if noted is ...:
            assert [program.rpartition(" ")[2] for program in found.went_on] == ["abc-dirty", "def"]
        else:
            assert found.went_on == noted
    assert compare.noted_program(study, folder, Console()) == found == opened(folder), "each is noted once"
    monkeypatch.setattr(running, "POLL", 0.0)
    run_study(folder, launch=FakeRun)
    monkeypatch.setattr(compare, "source_commit", lambda: "ghi")
    assert compare.noted_program(found, folder, Console()) == found, "it trains nothing"
