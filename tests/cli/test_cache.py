"""`swamla cache`: what prepared data is there, which runs need it, and what is lost with it."""

import fcntl
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from swamla.cli import main
from swamla.data.caching import remember_run, remembered_runs
from swamla.data.config import DataConfig
from swamla.data.reopening import reopen
from tests.cli.test_runs import make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a prepared text, "text.txt", and a run on it in runs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    prepared(tmp_path / "text.txt", tmp_path / "runs/first")
    return tmp_path


def prepared(text: Path, run: Path) -> Path:
    """Prepare a text, and make a run on it; returns the folder of the cache."""
    text.write_text("".join(f"line {i} of {text.name}\n" for i in range(300)))
    assert main(["prepare", str(text), "--tokenizer", "byte", "--held_out_fraction", "0.1"]) == 0
    folder = next(Path(os.environ["SWAMLA_CACHE"]).glob(f"data/{text.name}-*"))
    meta = json.loads((folder / "meta.json").read_text())
    make(run, data=config_of(text))
    from swamla.data.sources import open_source

    raw = open_source(config_of(text), Path(os.environ["SWAMLA_CACHE"])).digest()
    (run / "data.json").write_text(json.dumps([{"fingerprint": meta["fingerprint"], "raw": raw}]))
    return folder


def config_of(text: Path) -> DataConfig:
    return DataConfig(source=str(text.resolve()), tokenizer="byte", held_out_fraction=0.1)


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    assert main(["cache", "list", "--json"]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)}


def test_the_list_has_sizes_last_use_and_the_runs_that_need_it(home: Path, capsys) -> None:
    (one,) = listed(capsys).values()
    (folder,) = map(Path, one["paths"])  # type: ignore[call-overload]
    assert one["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert one["runs"] == [str(home / "runs/first")]
    assert one["what"] == "text.txt, byte"
    assert main(["cache", "list"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0] == folder.name
    size = f"{one['bytes'] / 1000:.1f} kB"  # type: ignore[operator]
    assert " ".join(line.strip() for line in lines[1:]) == f"text.txt, byte; {size}, used now; needed by runs/first"
    assert total == f"{size} in {home / 'cache'}"
    shutil.rmtree(home / "runs/first")
    assert main(["cache", "list"]) == 0
    assert "needed by no run that is known" in " ".join(capsys.readouterr().out.split())


def test_last_use_is_when_a_command_opened_it_last(home: Path, capsys) -> None:
    (before,) = listed(capsys).values()
    meta = Path(before["paths"][0]) / "meta.json"  # type: ignore[index]
    for use in (
        lambda: main(["prepare", "text.txt", "--tokenizer", "byte", "--held_out_fraction", "0.1"]),
        lambda: reopen(config_of(home / "text.txt"), json.loads((home / "runs/first/data.json").read_text())),
    ):
        os.utime(meta, (1, 1))
        use()
        assert time.time() - meta.stat().st_mtime < 60


def test_a_run_elsewhere_is_known_once_it_was_trained(home: Path, capsys) -> None:
    folder = prepared(home / "far.txt", home / "elsewhere/second")
    assert listed(capsys)[folder.name]["runs"] == []
    remember_run(home / "cache", home / "elsewhere/second")
    assert listed(capsys)[folder.name]["runs"] == [str(home / "elsewhere/second")]
    shutil.rmtree(home / "elsewhere")
    assert listed(capsys)[folder.name]["runs"] == []
    assert remembered_runs(home / "cache") == []
    assert not any((home / "cache/runs").iterdir()), "forgotten"


def test_rm_refuses_what_a_run_needs_and_says_what_would_be_lost(home: Path, capsys) -> None:
    (name,) = listed(capsys)
    assert main(["cache", "rm", name, "--yes"]) == 2
    needed = f"{name}: needed by runs/first: without it runs/first "
    again = f"has to prepare {home / 'text.txt'} again to be resumed or evaluated; --force removes it\n"
    assert capsys.readouterr().err == f"swamla: error: {needed}{again}"
    (home / "text.txt").unlink()
    assert main(["cache", "rm", name, "--yes"]) == 2
    assert f"{needed}can never be resumed or evaluated on its held-out text again" in capsys.readouterr().err
    assert list(listed(capsys)) == [name]
    assert main(["cache", "rm", name, "--yes", "--force"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("without it runs/first can never be resumed")
    assert shown[1].startswith(f"removed {name} (")
    assert listed(capsys) == {}
    assert not list((home / "cache/data").iterdir())


def test_rm_removes_what_no_run_needs_after_asking(home: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = listed(capsys)
    shutil.rmtree(home / "runs/first")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["cache", "rm", name]) == 2
    assert "There is no terminal to answer on: add --yes" in capsys.readouterr().err
    assert main(["cache", "rm", name, "--yes"]) == 0
    assert listed(capsys) == {}


def test_rm_never_removes_what_a_run_is_being_trained_from(home: Path, capsys) -> None:
    (name,) = listed(capsys)
    trainer = os.open(home / "runs/first", os.O_RDONLY)
    fcntl.flock(trainer, fcntl.LOCK_EX)
    assert main(["cache", "rm", name, "--yes", "--force"]) == 2
    assert f"{name}: runs/first is being trained from it" in capsys.readouterr().err
    os.close(trainer)
    assert list(listed(capsys)) == [name]


@pytest.mark.parametrize("wrong", ["text.txt", "../../runs/first", "..", "/etc"])
def test_rm_knows_names_only_and_removes_nothing_if_one_is_unknown(wrong: str, home: Path, capsys) -> None:
    (name,) = listed(capsys)
    assert main(["cache", "rm", name, wrong, "--yes", "--force"]) == 2
    assert f"{wrong}: not in the cache; " in capsys.readouterr().err
    assert list(listed(capsys)) == [name]
    assert (home / "runs/first/config.json").exists()


def test_tokenizers_texts_and_unfinished_preparations_are_listed_and_links_not_followed(home: Path, capsys) -> None:
    cache = home / "cache"
    for folder, file in (
        ("tokenizers", "ab12.json"),
        ("sources", "shakespeare.txt"),
        ("data/.units-x", "tokenizer.json"),
    ):
        (cache / folder).mkdir(parents=True, exist_ok=True)
        (cache / folder / file).write_text("{}")
    outside = home / "outside"
    outside.mkdir()
    (outside / "meta.json").write_text("{}")
    (cache / "data/linked").symlink_to(outside)
    found = listed(capsys)
    assert {one["what"] for one in found.values()} >= {
        "the tokenizer of a mixture",
        "downloaded text",
        "an unfinished preparation",
        "damaged",
    }
    assert main(["cache", "rm", "linked", "--yes", "--force"]) == 2
    assert "linked: is a link to" in capsys.readouterr().err
    assert main(["cache", "rm", ".units-x", "--yes"]) == 2
    assert "a preparation wrote to it less than ten minutes ago" in capsys.readouterr().err
    for file in (cache / "data/.units-x", cache / "data/.units-x/tokenizer.json"):
        os.utime(file, (1, 1))
    assert main(["cache", "rm", ".units-x", "ab12.json", "shakespeare.txt", "--yes"]) == 0
    assert (outside / "meta.json").exists()
    assert len(listed(capsys)) == 2
