"""A folder: what of it is read and what is left out, and that both are told."""

import os
from pathlib import Path

import pytest

from swamla.data.config import DataConfig
from swamla.data.folders import walk
from swamla.data.preparing import prepare
from swamla.data.reading import Notes
from swamla.errors import DataError


def fill(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n" * 3)


def names(root: Path, notes: Notes | None = None) -> list[str]:
    return [name for name, _ in walk(root, notes or Notes())]


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path: Path) -> None:
    fill(tmp_path, "elsewhere/b.txt", "data/a.txt", "data/sub/c.txt")
    root = tmp_path / "data"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "up").symlink_to(root)
    (root / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    notes = Notes()
    assert names(root, notes) == ["a.txt", "linked/b.txt", "sub/c.txt"]
    assert notes.counts == {"links to folders that are read already left out": 3}


def test_a_linked_file_is_read_once(tmp_path: Path) -> None:
    fill(tmp_path, "elsewhere/b.txt", "data/2024.txt")
    root = tmp_path / "data"
    (root / "0-latest.txt").symlink_to(root / "2024.txt")
    (root / "b.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (root / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    notes = Notes()
    assert names(root, notes) == ["2024.txt", "b.txt"]
    assert notes.counts == {"links to files that are read already left out": 2}


def test_a_link_that_leads_to_itself_is_a_broken_one(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "train-loop.txt").symlink_to(tmp_path / "train-loop.txt")
    notes = Notes()
    assert names(tmp_path, notes) == ["a.txt"]
    assert notes.counts == {"broken links, pipes and devices left out": 2}
    with pytest.raises(DataError, match="is a broken link"):
        prepare(DataConfig(source=str(tmp_path / "loop"), tokenizer="byte", cache_dir=str(tmp_path / "cache")))


def test_broken_links_and_pipes_are_left_out_and_told(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt")
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    notes = Notes()
    assert names(tmp_path, notes) == ["a.txt"]
    assert notes.counts == {"broken links, pipes and devices left out": 2}


def test_runs_inside_a_folder_are_left_out_and_named(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "runs/one/config.json", "runs/one/checkpoints/step-1/state.json", "other/config.json")
    prepare(DataConfig(source=str(tmp_path / "a.txt"), tokenizer="byte", cache_dir=str(tmp_path / "cache")))
    notes = Notes()
    assert names(tmp_path, notes) == ["a.txt", "other/config.json"]
    (made,) = (tmp_path / "cache" / "data").iterdir()
    assert sorted(notes.places["runs and caches of swamla left out"]) == [str(made), str(tmp_path / "runs/one")]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["train.jsonl", "test.jsonl", "valid.jsonl"], ["train.jsonl"]),
        (["data-train.csv", "data-validation.csv", "notes.csv"], ["data-train.csv", "notes.csv"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"], [0, 1]),
        (["train/a.txt", "test/b.txt", "dev/c.txt", "extra/d.txt"], ["extra/d.txt", "train/a.txt"]),
        (["test.jsonl", "other.jsonl"], ["other.jsonl", "test.jsonl"]),  # no training split beside it
        (["train.jsonl", "test.jsonl.gz", "valid.csv"], ["train.jsonl"]),  # packed, or written, otherwise
        (["trainset.jsonl", "testset.jsonl", "test_set.jsonl"], ["trainset.jsonl"]),
        (["train.jsonl", "test-set.jsonl", "testimony.jsonl"], ["testimony.jsonl", "train.jsonl"]),
        (["train.py", "test.py", "eval.py"], ["eval.py", "test.py", "train.py"]),  # code
        (["trains.txt", "contest.txt", "latest.txt"], ["contest.txt", "latest.txt", "trains.txt"]),
        (["train.txt.gz", "test.txt.gz"], ["train.txt.gz"]),
        (["README.md", "LICENSE", "a.txt"], ["LICENSE", "README.md", "a.txt"]),
    ],
)
def test_of_a_training_split_the_others_beside_it_are_left_out(
    tmp_path: Path, given: list[str], taken: list[str | int]
) -> None:
    fill(tmp_path, *given)
    notes = Notes()
    assert names(tmp_path, notes) == [given[name] if isinstance(name, int) else name for name in taken]
    assert sum(notes.counts.values()) == len(given) - len(taken)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "closed/b.txt")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(DataError, match="closed: cannot be read"):
        names(tmp_path)
    (tmp_path / "closed").chmod(0o700)


def test_what_was_taken_and_left_out_is_kept_and_described(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{i}.txt" for i in range(30)), "README.md", "LICENSE", ".git/config", ".hidden", "b/train.txt")
    fill(tmp_path, "b/test.txt", "run/config.json", "run/checkpoints/x")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    config = DataConfig(source=str(tmp_path), tokenizer="byte", held_out_fraction=0.3, cache_dir=str(tmp_path / ".c"))
    for _ in range(2):  # made, and found again
        rows = prepare(config).describe()
        assert ("files read", "31 .txt, 1 .md, 1 without a suffix") in rows
        notes = sorted(value for label, value in rows if label == "note")
        assert [note.partition(":")[0] for note in notes] == [
            "1 files and folders of other splits left out",
            "1 files that are not text left out",
            "1 runs and caches of swamla left out",
            "2 hidden files and folders left out",
        ]
        assert f"{tmp_path}/b/test.txt" in notes[0]
        assert f"{tmp_path}/image.png" in notes[1]


def test_a_folder_of_which_nothing_is_taken_says_why(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "checkpoints/x")
    with pytest.raises(DataError, match=rf"has no files \(1 runs and caches of swamla left out: {tmp_path}\)"):
        prepare(DataConfig(source=str(tmp_path), tokenizer="byte"))
