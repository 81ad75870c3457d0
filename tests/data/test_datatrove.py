"""datatrove's own executor runs the parts, and the dataset is the same to the byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from swamla.data.config import DataConfig
from swamla.data.datatrove import preparation
from swamla.data.preparing import prepare
from swamla.errors import ConfigError, UsageError

SCRIPT = """
import sys
from swamla.data.config import DataConfig
from swamla.data.datatrove import preparation
if __name__ == "__main__":
    config = DataConfig(source=sys.argv[1], tokenizer="bpe:300", held_out_fraction=0.2, cache_dir=sys.argv[2])
    preparation("local", config, 3, {"workers": int(sys.argv[3]), "start_method": "spawn"}).run()
"""


def write(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": f"{i} " + "word " * (i % 30)}) + "\n" for i in range(300)))
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_the_parts_on_datatroves_local_executor_make_the_same_dataset(tmp_path: Path, workers: int) -> None:
    pytest.importorskip("datatrove")
    source = write(tmp_path / "a.jsonl")
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "run.py", str(source), str(tmp_path / "c"), str(workers)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (made,) = (path for path in (tmp_path / "c" / "data").iterdir())
    config = DataConfig(source=str(source), tokenizer="bpe:300", held_out_fraction=0.2)
    whole = prepare(config).path
    assert made.name == whole.name
    for path in whole.iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes()


def test_an_executor_that_cannot_be_is_refused(tmp_path: Path) -> None:
    config = DataConfig(source=str(write(tmp_path / "a.jsonl")), cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"executor = 'k8s': must be one of local, slurm, ray"):
        preparation("k8s", config, 2)
    with pytest.raises(ConfigError, match="parts = 0"):
        preparation("local", config, 0)
    pytest.importorskip("datatrove")
    with pytest.raises(UsageError, match=r"`executor_options`: .*nodez"):
        preparation("local", config, 2, {"nodez": 1})


def test_slurm_gets_its_settings(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    config = DataConfig(source=str(write(tmp_path / "a.jsonl")), cache_dir=str(tmp_path))
    settings = {"time": "01:00:00", "partition": "cpu", "slurm_logs_folder": str(tmp_path / "logs")}
    made = preparation("slurm", config, 7, settings)
    assert (made.tasks, made.partition, made.time) == (7, "cpu", "01:00:00")
