"""The launchers in scripts/, run with stand-ins for Slurm's programs and for Python; and what the Dockerfile says."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from tests.waiting import PATIENCE, after_start, running, until

ROOT = Path(__file__).parents[1]
SHELL = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts/slurm").glob("*.sbatch")])
# A line of JSON for each call: the words, and what a test asks about.
PYTHON = """#!/usr/bin/env bash
{ printf '%s\\037' "$0" "$@"; printf '\\n'; } >> "$CALLS"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show job") printf 'JobId=%s JobName=swamla\\n   Command=%s small run\\n   WorkDir=/\\n' "$3" "$RECORDED" ;;
    "show hostnames") printf 'first\\nsecond\\n' && sleep 0.02 && seq 3 20000 ;;
    requeue*) echo "requeue $2" >> "$ASKED" ;;
esac
"""
SRUN = """#!/usr/bin/env bash
echo "cpus $SRUN_CPUS_PER_TASK" >> "$ASKED"
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
for node in 0 1; do SLURM_NODEID=$node "$@"; done
[ -z "${UNTIL:-}" ] || while [ ! -e "$UNTIL" ]; do sleep 0.05; done
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >> "$ASKED"
touch "$UNTIL"
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Cluster:
    """A checkout with an environment, a spool folder in which Slurm runs a copy of the job's file, and its programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout = folder, folder / "the checkout"
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
        self.python = executable(self.checkout / ".venv/bin/python", PYTHON)
        self.elsewhere = executable(folder / "bin/python3", PYTHON)  # on the path, and not to be used
        for name, text in {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL}.items():
            executable(folder / "bin" / name, text)
        self.job = folder / "spool/slurm_script"
        self.job.parent.mkdir()
        shutil.copy(self.checkout / "scripts/slurm/train.sbatch", self.job)
        self.calls_file, self.asked_file = folder / "calls", folder / "asked"

    def environment(self, job: int = 4711, **more: str) -> dict[str, str]:
        unset = ("PYTHON", "VENV")
        return {name: value for name, value in os.environ.items() if name not in unset} | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "ASKED": str(self.asked_file),
            "RECORDED": str(self.checkout / "scripts/slurm/train.sbatch"),
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "first,second",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "24",
            **more,
        }

    def submit(self, *words: str, job: int = 4711, **more: str) -> subprocess.CompletedProcess[str]:
        for file in (self.calls_file, self.asked_file):
            file.unlink(missing_ok=True)
        return subprocess.run(
            ["bash", str(self.job), *words],
            env=self.environment(job, **more),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def calls(self) -> list[list[str]]:
        """Each call of a Python: its path, and its words."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line.split("\037")[:-1] for line in lines]

    def launches(self) -> list[Any]:
        """What torchrun makes of each call."""
        calls = self.calls()
        assert all(words[1:3] == ["-m", "torch.distributed.run"] for words in calls)
        return [get_args_parser().parse_args(words[3:]) for words in calls]

    def port(self, job: int) -> int:
        assert self.submit("small", "run", job=job).returncode == 0
        first, second = (launch.master_port for launch in self.launches())
        assert first == second
        return first


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@contextmanager
def listening(port: int) -> Iterator[None]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen(8)
        yield


def test_a_slurm_job_starts_one_torchrun_a_machine_which_meet_at_the_first(cluster: Cluster) -> None:
    done = cluster.submit("small", "a run", "--parallel", "fsdp")
    assert (done.returncode, after_start(done.stderr)) == (0, "")
    launches = cluster.launches()
    assert [launch.node_rank for launch in launches] == [0, 1]
    for launch in launches:
        assert (launch.nnodes, launch.nproc_per_node, launch.master_addr) == ("2", "8", "first")
        assert (launch.module, launch.training_script) == (True, "swamla")
        assert launch.training_script_args == ["train", "small", "--output_dir", "a run", "--parallel", "fsdp"]


def test_a_slurm_job_resumes_the_run_that_is_there(cluster: Cluster) -> None:
    (cluster.folder / "a run").mkdir()
    (cluster.folder / "a run/config.json").touch()
    assert cluster.submit("small", "a run").returncode == 0
    assert cluster.launches()[0].training_script_args == ["train", "--resume", "a run"]


def test_a_slurm_job_asks_for_cores_and_gives_them_to_its_step(cluster: Cluster) -> None:
    assert re.search(r"^#SBATCH --cpus-per-task=\d+$", cluster.job.read_text(), re.MULTILINE)
    assert cluster.submit("small", "run").returncode == 0
    assert cluster.asked_file.read_text() == "cpus 24\n"


def test_a_slurm_job_uses_the_environment_of_the_checkout_though_slurm_runs_a_copy(cluster: Cluster) -> None:
    assert cluster.submit("small", "run").returncode == 0
    assert [Path(words[0]).resolve() for words in cluster.calls()] == [cluster.python] * 2


def test_a_slurm_job_uses_the_environment_that_venv_names_and_before_it_the_python(cluster: Cluster) -> None:
    other = executable(cluster.folder / "other venv/bin/python", PYTHON)
    assert cluster.submit("small", "run", VENV="other venv").returncode == 0
    assert [Path(cluster.folder, words[0]) for words in cluster.calls()] == [other] * 2
    named = executable(cluster.folder / "a python", PYTHON)
    assert cluster.submit("small", "run", VENV="other venv", PYTHON=str(named)).returncode == 0
    assert [Path(words[0]) for words in cluster.calls()] == [named] * 2


@pytest.mark.parametrize("venv", ["", "nowhere"])
def test_a_slurm_job_without_an_environment_is_refused_in_one_line(venv: str, cluster: Cluster) -> None:
    cluster.python.unlink()
    done = cluster.submit("small", "run", **({"VENV": venv} if venv else {}))
    assert done.returncode == 2
    assert after_start(done.stderr).count("\n") == 1
    assert "set VENV to the environment" in done.stderr
    assert cluster.calls() == []
    assert not cluster.asked_file.exists()


def test_slurm_jobs_meet_at_ports_of_their_own_that_the_system_hands_to_nobody(cluster: Cluster) -> None:
    ports = {job: cluster.port(job) for job in (4711, 4712, 34_711, 12_345_678)}
    assert ports[4711] != ports[4712]
    assert all(20_000 <= port < 30_000 for port in ports.values())
    assert cluster.port(4711) == ports[4711]


def test_a_slurm_job_passes_over_ports_that_are_taken(cluster: Cluster) -> None:
    first = cluster.port(9999)  # the last of the range is followed by its first
    with listening(first):
        second = cluster.port(9999)
        assert second not in (first, 0)
        assert 20_000 <= second < 30_000
        with listening(second):
            assert cluster.port(9999) not in (first, second)
    assert cluster.port(9999) == first


def test_a_slurm_job_that_is_told_to_stop_asks_its_step_and_queues_itself_again(cluster: Cluster) -> None:
    environment = cluster.environment(UNTIL=str(cluster.folder / "stopped"))
    with running(["bash", str(cluster.job), "small", "run"], env=environment, cwd=cluster.folder) as job:
        until(lambda: len(cluster.calls()) == 2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE) == 0
    assert cluster.asked_file.read_text().splitlines()[1:] == ["scancel --signal=TERM 4711.0", "requeue 4711"]


def launched(cluster: Cluster, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(cluster.checkout / "scripts/train_swa_mla.sh"), "small", "8", "64"],
        env=cluster.environment() | {"GPUS": "1"} | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_the_scripts_use_the_environment_of_the_checkout_or_the_one_that_venv_names(cluster: Cluster) -> None:
    other = executable(cluster.folder / "other/bin/python", PYTHON)
    for named, expected in (({}, cluster.python), ({"VENV": str(cluster.folder / "other")}, other)):
        done = launched(cluster, **named)
        assert (done.returncode, after_start(done.stderr)) == (0, "")
        assert Path(cluster.calls()[-1][0]).resolve() == expected


def test_an_environment_that_is_not_there_is_refused_in_one_line(cluster: Cluster) -> None:
    done = launched(cluster, VENV="nowhere")
    assert (done.returncode, done.stderr) == (2, "VENV=nowhere: no bin/python in it\n")
    assert cluster.calls() == []


def test_the_scripts_take_the_python_on_the_path_only_if_it_has_torch(cluster: Cluster) -> None:
    cluster.python.unlink()
    done = launched(cluster)
    assert (done.returncode, after_start(done.stderr)) == (0, "")
    question, work = cluster.calls()
    assert question[1] == "-c"
    assert "torch" in question[2]
    assert Path(work[0]) == cluster.elsewhere
    assert Path(work[1]).resolve() == cluster.checkout / "train.py"
    cluster.calls_file.unlink()
    executable(cluster.elsewhere, PYTHON + "exit 1\n")
    done = launched(cluster)
    assert done.returncode == 2
    assert after_start(done.stderr).count("\n") == 1
    assert "no torch for python3" in done.stderr
    assert "set VENV" in done.stderr
    assert len(cluster.calls()) == 1


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_can_read_the_script(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not on this machine")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", "-x", *map(str, SHELL)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in their order, lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_image_has_the_libraries_for_a_gpu_and_installs_them_as_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = (
        re.findall(r"'\.\[(.*)\]'", said)[0].split(",") for name, said in instructions() if "pip install" in said
    )
    assert "gpu" in extras
    assert set(extras) <= set(project["optional-dependencies"])


def test_the_image_runs_as_a_user_whose_home_and_cache_are_open_to_any_user() -> None:
    """With `docker run --user` it is any: what it writes must be in folders that are open to all."""
    said = instructions()
    names = [name for name, _ in said]
    (user,) = (word for name, word in said if name == "USER")
    assert user not in ("root", "0")
    assert names.index("USER") < names.index("ENTRYPOINT")
    made = next(word for name, word in said if name == "RUN" and f"--create-home {user}" in word)
    opened = re.search(r"chmod 1777 (.*)$", made)
    assert opened
    folders = [Path(word) for word in opened[1].split()]
    environment = dict(pair.split("=", 1) for name, word in said if name == "ENV" for pair in word.split())
    assert environment["USER"] == user
    assert Path(environment["HOME"]) in folders
    assert Path(environment["SWAMLA_CACHE"]).parent in folders
    assert Path([word for name, word in said if name == "WORKDIR"][-1]) in folders
    assert not any(name in ("RUN", "COPY") for name in names[names.index("USER") :]), "installed as that user"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_browser_says_that_chromium_is_missing_before_it_installs_anything(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    make, empty = shutil.which("make"), tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [str(make), "browser"], cwd=tmp_path, env={"PATH": str(empty)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pages are tried in Chromium, which is missing: apt-get install chromium")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "empty"]
