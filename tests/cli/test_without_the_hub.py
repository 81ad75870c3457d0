"""Without a network, or without the hub's library, a run on the hub's data is refused with flags that need neither."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from swamla.cli import main
from tests.waiting import PATIENCE, after_start

ROOT = Path(__file__).parents[2]
BOTH = "; to train without the hub: --data FILE --tokenizer bpe:4096\n"
SMALL = shlex.split(
    "--n_layers 3 --width 64 --n_heads 4 --mla_kv_lora_rank 16 --mla_qk_nope_head_dim 8 --mla_qk_rope_head_dim 8 "
    "--mla_v_head_dim 8 --batch_size 2 --block_size 32 --steps 1 --threads 1"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text, and no network: what the tests' own environment says, said to the library once more."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {i}: its square is {i * i}\n" for i in range(3000)))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str, command: str = "") -> str:
    """The line with which it ends."""
    assert main([*words], command=command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not list(Path().rglob("config.json")), "a folder of a run was left behind"
    return error


def test_a_preset_names_data_and_a_tokenizer_that_are_here(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "train", "small")
    assert error.startswith("swamla: error: cannot list the dataset 'HuggingFaceFW/fineweb-edu' on the hub (")
    assert error.endswith(BOTH)


def test_a_dataset_of_the_hub_with_a_tokenizer_made_here_needs_only_other_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refused(capsys, "train", "quickstart", "--data", "hf:Skylion007/openwebtext")
    assert error.endswith("; to train without the hub: --data FILE\n")


def test_data_that_are_here_with_a_tokenizer_of_the_hub_need_only_another_tokenizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refused(capsys, "train", "small", "--data", "text.txt")
    assert "cannot fetch tokenizer 'openai-community/gpt2' from the hub (" in error
    assert error.endswith("; to train without the hub: --tokenizer bpe:4096\n")


def test_without_the_hubs_library_the_same_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = refused(capsys, "train", "small")
    assert error.startswith("swamla: error: data on the hub needs its library: pip install 'swamla[hub]'")
    assert error.endswith(BOTH)


def test_other_faults_of_data_are_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    assert "without the hub" not in refused(capsys, "train", "quickstart", "--data", "nowhere.txt")


def test_the_flags_of_the_former_project_are_refused_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "--size", "small", "--max_iters", "5", command="original").endswith(BOTH)


@pytest.mark.parametrize(
    "words",
    [("train_swa_mla.sh", "small", "8", "64"), ("train_swa_mla_latent_deltanet.sh", "8", "64")],
    ids=lambda words: words[0],
)
def test_the_old_scripts_are_refused_in_one_line_that_names_the_flags(words: tuple[str, ...], home: Path) -> None:
    script, *arguments = words
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "GPUS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert after_start(done.stderr).count("\n") == 1
    assert done.stderr.endswith(BOTH)


def test_the_flags_that_are_suggested_train(capsys: pytest.CaptureFixture[str]) -> None:
    suggested = BOTH.partition(": ")[2].replace("FILE", "text.txt").replace("4096", "300").split()
    assert main(["train", "small", *suggested, *SMALL]) == 0, capsys.readouterr().err
