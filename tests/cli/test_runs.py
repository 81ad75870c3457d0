"""`swamla runs`: one row a run, whatever state it is in, and a name for what is broken."""

import fcntl
import json
import os
import re
import time
from pathlib import Path

import pytest

from swamla.cli import main
from swamla.cli.runs import compress, summarize
from swamla.config import to_plain
from swamla.data.config import DataConfig
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.train import RunConfig, TrainConfig
from swamla.train.claims import is_running

MODEL = LanguageModelConfig(
    width=16, vocab_size=257, pattern=("swa", "swa"), blocks={"swa": BlockConfig(mixer=SWAConfig(n_heads=2))}
)
RECORDS = [
    {"step": 1, "loss": 5.0, "tokens": 1000, "elapsed": 1.0},
    {"step": 5, "loss": 3.0, "tokens": 5000, "elapsed": 5.0},
    {"step": 5, "held_out_loss": 2.5, "held_out_bits_per_byte": 1.25, "elapsed": 5.5},
    {"step": 10, "loss": 2.0, "tokens": 10000, "elapsed": 10.0},
    {"step": 10, "held_out_loss": 2.75, "held_out_bits_per_byte": 1.5, "elapsed": 11.0},
]


def make(folder: Path, records: list[dict[str, float]] = RECORDS, saved: bool = True, **settings: float) -> Path:
    """A run's folder, as training leaves it, without tensors."""
    train = TrainConfig(**({"steps": 10} | settings))
    config = {"format_version": 1, **to_plain(RunConfig(model=MODEL, data=DataConfig(), train=train))}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if saved:
        (folder / "checkpoints" / "step-00000010").mkdir()
    return folder


def test_a_row_says_what_a_run_is_how_far_it_came_and_how_good_it_is(tmp_path: Path) -> None:
    run = summarize(make(tmp_path / "first"))
    parameters = sum(p.numel() for p in MODEL.build().parameters())
    assert (run.name, run.pattern, run.parameters) == ("first", "swa×2", parameters)
    assert (run.steps, run.tokens, run.loss) == (10, 10000, 2.0)
    assert (run.held_out_loss, run.bits_per_byte) == (2.5, 1.25)  # the best, not the last


@pytest.mark.parametrize(
    ("records", "saved", "settings", "state"),
    [
        (RECORDS, True, {}, "done"),
        (RECORDS[:3], True, {}, "stopped"),
        (RECORDS, True, {"steps": 11}, "stopped"),
        (RECORDS, True, {"steps": None, "max_minutes": 11 / 60}, "done"),
        (RECORDS, True, {"steps": None, "max_minutes": 1.0}, "stopped"),
        (RECORDS, False, {}, "no save"),
        ([], False, {}, "no save"),
    ],
)
def test_a_run_is_done_when_its_budget_is_spent(records, saved, settings, state, tmp_path: Path) -> None:
    assert summarize(make(tmp_path / "run", records, saved, **settings)).state == state


def test_a_run_whose_folder_a_process_holds_is_running(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert not is_running(run)
    trainer = os.open(run, os.O_RDONLY)
    fcntl.flock(trainer, fcntl.LOCK_EX)
    assert summarize(run).state == "running"
    os.close(trainer)
    assert summarize(run).state == "done"


def test_the_table_fits_80_columns_and_names_what_is_broken(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    wide = [
        {"step": 123456, "loss": 10.8251, "tokens": 123456789, "held_out_loss": 10.7, "held_out_bits_per_byte": 15.1}
    ]
    old, new = make(tmp_path / "old"), make(tmp_path / "a-name-that-is-rather-long-for-a-table", wide)
    now = time.time()
    os.utime(old / "metrics.jsonl", (now - 7300, now - 7300))
    os.utime(new / "metrics.jsonl", (now - 3540, now - 3540))
    (make(tmp_path / "bad-config") / "config.json").write_text("{")
    (make(tmp_path / "bad-metrics") / "metrics.jsonl").write_text("nothing\n")
    (tmp_path / "no-config" / "checkpoints").mkdir(parents=True)
    (tmp_path / "something-else").mkdir()
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    table, broken = shown.split("broken: ", 1)
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "…" not in table
    assert re.search(r" 123k +123M 10\.825 10\.700 15\.100 59 min stopped", table)
    assert re.search(r"^old +swa×2 .* 10 +10k +2\.000 +2\.500 +1\.250 +2 h +done", table, re.MULTILINE)
    assert table.index("a-name") < table.index("old ")
    named = [line.removeprefix("broken: ").removeprefix(f"{tmp_path}/") for line in broken.splitlines()]
    assert [re.split("[/:]", line)[0] for line in named] == ["bad-config", "bad-metrics", "no-config"]


def test_json_has_every_run_and_every_reason(tmp_path: Path, capsys) -> None:
    make(tmp_path / "fine")
    (make(tmp_path / "bad") / "config.json").write_text("{")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    fine, bad = json.loads(capsys.readouterr().out)
    assert fine["path"] == str(tmp_path / "fine")
    assert fine["modified"].startswith("20")
    assert fine.keys() >= {
        "pattern",
        "parameters",
        "steps",
        "tokens",
        "loss",
        "held_out_loss",
        "bits_per_byte",
        "state",
    }
    assert bad["path"] == str(tmp_path / "bad")
    assert "not JSON" in bad["broken"]


def test_one_run_no_run_and_no_folder_are_answered_as_such(tmp_path: Path, capsys) -> None:
    assert main(["runs", str(make(tmp_path / "runs" / "only"))]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("only ")
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'empty'}\n"
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.endswith("nowhere: no such folder; swamla train writes runs to the folder runs\n")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (("swa", "swa", "mla") * 4, "(swa swa mla)×4"),
        (("gdn",) * 6, "gdn×6"),
        (("mla",), "mla"),
        (("swa", "mla", "mla"), "swa mla mla"),
    ],
)
def test_a_pattern_is_its_shortest_cycle(pattern: tuple[str, ...], text: str) -> None:
    assert compress(pattern) == text
