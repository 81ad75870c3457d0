"""A study of real runs that is killed, with and without its runs, ends with the same results to the digit."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.data.preparing import prepare
from swamla.study.evidence import measure
from swamla.study.folder import begin, opened, read_outcomes, read_tests
from swamla.study.page.report import report_html
from swamla.study.plan import Asked, resolve_study
from swamla.study.results import Results
from swamla.train import RunConfig
from tests.train.helpers import tiny_dataset
from tests.waiting import until

from .helpers import arm_of

SERVER = Path(__file__).with_name("server.py")


def planned(folder: Path, texts: Path) -> Path:
    """A study of two arms of width 32, 20 steps and two seeds, at the recipe's rate."""
    dataset = tiny_dataset(texts)
    source = str(texts / "documents")
    configs: dict[str, RunConfig] = {}
    for name in ("mha", "gdn"):
        config = arm_of(name).config
        data = replace(config.data, source=source, held_out_fraction=0.2, cache_dir=str(texts / "cache"))
        configs[name] = replace(config, data=data)
    asked = Asked(arms=dict.fromkeys(configs, ""), seeds=2, rates="recipe")
    begin(folder, resolve_study(asked, configs, dataset, measure=lambda *_: dict.fromkeys(configs, 0.1)))
    return folder


class Server:
    """A process that forks processes which work on studies."""

    def __init__(self) -> None:
        command = [sys.executable, str(SERVER)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, folder: Path, what: str) -> int:
        """The number of a process that works on the study. what: "score", or an arm whose runs stand still midway."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder} {what}\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.process.kill()
    made.process.communicate()


def wait_for(path: Path) -> None:
    until(path.exists, what=f"{path} is there")


def figures(folder: Path) -> dict[str, tuple]:
    tests = {test.run: test for test in read_tests(folder)}
    outcomes = read_outcomes(folder)
    return {name: (one.status, one.validation, one.tokens, tests[name]) for name, one in outcomes.items()}


def page_of(folder: Path) -> str:
    """The study's page, but for times."""
    study = opened(folder)
    assert study is not None
    outcomes = read_outcomes(folder)
    dataset = prepare(study.arms[0].config.data)
    evidence = measure(folder, study, outcomes, dataset, lambda text: None)
    page = report_html(Results.of(study, outcomes, read_tests(folder), evidence))
    return re.sub(r'<span class="clock">.*?</span>', "", page)


def test_a_study_killed_with_its_runs_and_without_them_gives_the_same_figures_to_the_digit(
    tmp_path: Path, server: Server
) -> None:
    killed, whole = (planned(tmp_path / name, tmp_path) for name in ("killed", "whole"))
    first, second = (killed / "runs" / f"{arm}-lr0.01-seed1" for arm in ("mha", "gdn"))

    group = server.begin(killed, "mha")
    wait_for(first / "metrics.jsonl")
    os.killpg(group, signal.SIGKILL)  # in the middle of the first run
    assert server.read() == -9
    assert not read_outcomes(killed)

    alone = server.begin(killed, "gdn")
    wait_for(second / "metrics.jsonl")
    os.kill(alone, signal.SIGKILL)
    assert server.read() == -9
    (killed / "go").touch()  # its second run goes on, without anyone who notes its end
    assert list(read_outcomes(killed)) == [first.name]

    for folder in (killed, whole):
        server.begin(folder, "score")
        assert server.read() == 0
    found = figures(killed)
    assert found == figures(whole)
    assert len(found) == 4
    for one in (*read_outcomes(killed).values(), *read_outcomes(whole).values()):
        assert one.wall > one.seconds > 0, "a resumed run took what it went on from, too"
    pages = [page_of(folder) for folder in (killed, whole)]
    assert "Loss by what was read" in pages[0]
    assert pages[0] == pages[1]
    assert {status for status, *_ in found.values()} == {"finished"}
    log = (killed / "logs" / f"{first.name}.log").read_text()
    assert log.count("the run is in") == 1, "what had ended was not trained again"


@pytest.mark.parametrize("status", [0, 2])
def test_a_run_is_a_process_of_this_program_whose_output_goes_to_its_log(status: int, tmp_path: Path) -> None:
    from swamla.study.running import start

    process = start([["--version"], ["nonsense"]][status > 0], tmp_path / "log")
    assert process.wait() == status
    assert (tmp_path / "log").read_text().startswith(["swamla 0.", "", "swamla: error: no command"][status])
