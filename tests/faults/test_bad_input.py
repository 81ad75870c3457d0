"""Bad input, from the outside: one line that says what was given and what is allowed, exit 2, nothing half-written."""

import re
from pathlib import Path

import pytest

from swamla.cli import main

FLAGS = [
    ("--lr 1e400", r"lr = inf"),
    ("--lr nan", r"lr = nan"),
    ("--lr 0", r"lr = 0"),
    ("--lr=-1e-3", r"lr = -0.001"),
    ("--steps 10 --warmup 11", r"warmup = 11"),
    ("--batch_size 6 --accumulation 4", r"accumulation = 4"),
    ("--keep_last 1 --async_save", r"keep_last = 1"),
    ("--max_skipped 0", r"max_skipped = 0"),
    ("--spike_factor 1", r"spike_factor = 1"),
    ("--spike_factor nan", r"spike_factor = nan"),
    ("--rank_timeout_minutes 0", r"rank_timeout_minutes = 0"),
    ("--rank_timeout_minutes 10", r"rank_timeout_minutes = 10"),
    ("--swa_window 0", r"window = 0"),
    ("--swa_sinks=-1", r"sinks = -1"),
    ("--swa_n_heads 7", r"n_heads"),
    ("--mla_kv_lora_rank 1000000", r"kv_lora_rank = 1000000"),
    ("--run_name ..", r"--run_name '\.\.'"),
    ("--run_name a/b", r"--run_name 'a/b'"),
    ("--run_name a\0b", r"--run_name"),
    ("--output_dir a\0b", r"cannot hold NUL"),
    ("--resume somewhere --output_dir elsewhere", r"both name a folder"),
    ("--hf_repo_id no-slash", r"hf_repo_id"),
    ("--learning_rat 1e-3", r"did you mean --lr\?"),
    ("--data no-such-file.txt", r"no-such-file\.txt"),
    ("--compile sometimes", r"compile"),
]


@pytest.mark.parametrize(("line", "message"), FLAGS, ids=[line for line, _ in FLAGS])
def test_a_flag_that_cannot_be_is_one_line_and_writes_nothing(line, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", *line.split(" ")]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert list(tmp_path.iterdir()) == []


RECIPES = [
    ("[train]\nlr = 1e-3\nlr = 2e-3\n", r"run\.toml"),
    ("[train]\nlr = 1e400\n", r"train\.lr = inf \(run\.toml:2\)"),
    ('[train]\nlr = "fast"\n', r"train\.lr = 'fast' \(run\.toml:2\)"),
    ("[train]\nbatch_size = true\n", r"train\.batch_size = True \(run\.toml:2\)"),
    ('[train]\nwandb_project = "hf_abcdefghijklmnopqrst"\n', r"use the environment"),
    ('[train]\nhf_token = "abcdefgh"\n', r"use the environment"),
    ("[train]\nlearning_rate = 1e-3\n", r"train\.learning_rate"),
    ("[trian]\nlr = 1e-3\n", r"train"),
    ("lr: 1e-3\n", r"run\.toml"),
]


@pytest.mark.parametrize(("text", "message"), RECIPES, ids=[repr(text) for text, _ in RECIPES])
def test_a_recipe_that_cannot_be_is_one_line_and_writes_nothing(text, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rest = 'steps = 5\n[data]\n[model]\nwidth = 16\npattern = ["a"]\n[model.blocks.a]\nffn = { hidden = 32 }\n'
    Path("run.toml").write_text(text + rest + 'mixer = { kind = "mha", n_heads = 2 }\n')
    assert main(["train", "run.toml"]) == 2
    said = capsys.readouterr().err
    assert_one_line(said, message)
    assert "abcdefgh" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_a_recipe_that_does_not_exist_lists_those_that_do(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quikstart"]) == 2
    assert_one_line(capsys.readouterr().err, r"quickstart.*moe-1b|moe-1b.*quickstart|quickstart")
    assert list(tmp_path.iterdir()) == []


DATA = {
    "zero bytes": ("empty.txt", b"", r"empty\.txt"),
    "invalid UTF-8": ("bad.txt", b"fine " * 40 + b"\xff\xfe" + b" fine" * 40, r"bad\.txt.*200"),
    "truncated gzip": ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00", r"cut\.jsonl\.gz"),
    "no parquet": ("not.parquet", b"PAR1 but not really", r"not\.parquet"),
    "no text column": ("rows.jsonl", b'{"body": "x"}\n' * 20, r"rows\.jsonl.*body"),
    "only empty documents": ("none.jsonl", b'{"text": ""}\n' * 20, r"none\.jsonl|empty"),
    "a pickle": (
        "array.npy",
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        r"array",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read_is_one_line_with_its_file_and_writes_no_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file, content, message = DATA[name]
    Path(file).write_bytes(content)
    assert main(["train", "quickstart", "--data", file, "--tokenizer", "byte"]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "runs").exists()


def assert_one_line(said: str, message: str) -> None:
    lines = [line for line in said.splitlines() if "warning" not in line and not line.startswith("swamla: note")]
    assert len(lines) == 1, said
    assert re.search(message, lines[0]), said
    assert "Traceback" not in said
    assert "a bug in swamla" not in said
