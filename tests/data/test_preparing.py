"""prepare: encoded once, whole or not at all, held-out documents never trained on."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from swamla.data import packing, preparing, shards
from swamla.data import tokenizer as tokenizers
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.preparing import prepare
from swamla.data.shards import divide, is_held_out
from swamla.data.tokenizer import make_tokenizer
from swamla.errors import DataError

Make = Callable[..., Dataset]


def test_prepare_is_imported_from_the_package_even_after_its_module() -> None:
    from swamla import data

    assert data.prepare is preparing.prepare
    assert all(hasattr(data, name) for name in data.__all__)


def test_a_second_preparation_reads_no_text(make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_dataset()
    monkeypatch.setattr("swamla.data.preparing.encode_documents", None)
    assert make_dataset().fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("setting", "value"),
    [("tokenizer", "bpe:300"), ("held_out_fraction", 0.5), ("text_column", "body"), ("invalid_utf8", "replace")],
)
def test_every_setting_makes_its_own_dataset(make_dataset: Make, setting: str, value: object) -> None:
    assert make_dataset().path != make_dataset(**{setting: value}).path


def test_the_cache_folder_can_be_named(make_dataset: Make, tmp_path: Path) -> None:
    named = make_dataset(cache_dir=str(tmp_path / "here"))
    assert tmp_path / "here" in named.path.parents
    assert named.fingerprint == make_dataset().fingerprint


def test_a_changed_file_or_tokenizer_file_makes_a_new_dataset(make_dataset: Make, corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "tokenizer.json"
    make_tokenizer("bpe:300", ["a b c"]).save(own)
    first = make_dataset(tokenizer=str(own))
    (corpus / "part0" / "text00.txt").write_text("other")
    second = make_dataset(tokenizer=str(own))
    make_tokenizer("bpe:300", ["some other text"]).save(own)
    third = make_dataset(tokenizer=str(own))
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


def test_the_tokenizer_learns_from_nothing_that_is_held_out(tmp_path: Path) -> None:
    for i in range(60):
        text = f"{i} " + "zqzqzqzq " * 50
        (tmp_path / f"{i}.txt").write_text(text if is_held_out(text, 0.3) else f"{i} " + "training " * 50)
    dataset = prepare(DataConfig(source=str(tmp_path), tokenizer="bpe:280", held_out_fraction=0.3))
    assert b"zqzq" in dataset.held_out_text()
    assert len(dataset.tokenizer.encode("zqzqzqzq")) == 8
    assert len(dataset.tokenizer.encode("training")) < 3


def test_documents_are_held_out_by_their_text_alone() -> None:
    texts = [f"text {i}" for i in range(4000)]
    chosen = {text for text in texts if is_held_out(text, 0.05)}
    assert 0.04 < len(chosen) / len(texts) < 0.06
    assert chosen < {text for text in texts if is_held_out(text, 0.1)}
    _, pairs = divide(reversed(texts), 0.05)
    assert {text for text, held in pairs if held} == chosen
    assert all(is_held_out(text, 1) for text in texts)


def test_the_draw_is_the_sha256_of_the_text() -> None:
    for text in ("", "a", "été\n漢字", "x" * 10_000):
        for fraction in (0.05, 0.4):
            place = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
            assert is_held_out(text, fraction) == (place < fraction)


def test_of_the_standard_library_as_many_documents_are_held_out_as_chance_would_have_it() -> None:
    dataset = prepare(DataConfig(tokenizer="byte"))
    total = dataset.train.n_documents + dataset.held_out.n_documents
    deviation = (total * 0.05 * 0.95) ** 0.5  # another Python has other files, and another draw
    assert abs(dataset.held_out.n_documents - 0.05 * total) < 5 * deviation
    empty = dataset.meta["notes"]["counts"].get("empty documents skipped", 0)
    assert dict(dataset.describe())["files read"] == f"{total + empty} .py"


def test_a_share_of_the_text_far_from_that_of_documents_is_warned_of_with_both(tmp_path: Path) -> None:
    short, long = [f"short {i} " for i in range(60)], [f"long {i} " + "word " * 5000 for i in range(40)]
    texts = [text for text in short if not is_held_out(text, 0.2)] + [text for text in long if is_held_out(text, 0.2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, held_out = (sum(len(t) for t in texts if is_held_out(t, 0.2) is side) for side in (False, True))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", held_out_fraction=0.2)
    both = (
        rf"{train:,} bytes are for training and {held_out:,} are held out, 99\.\d% of the text; "
        r"data\.held_out_fraction = 0\.2 is a share of the documents"
    )
    with pytest.warns(UserWarning, match=both):
        described = dict(prepare(config).describe())
    assert f"({held_out / (train + held_out):.2%} of the text; 20 % of documents" in described["held out"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(config)


def test_of_a_single_document_the_last_characters_are_held_out(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i % 500) for i in range(1000))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    dataset = prepare(DataConfig(source=str(tmp_path / "one.txt"), tokenizer="char", held_out_fraction=0.1))
    assert dataset.held_out_text().decode() == text[900:]
    assert dataset.tokenizer.decode(dataset.train.document(0).tolist()) == text[:900]
    assert dataset.meta["held_out_rule"] == "the last 10 % of the only document's characters"


def test_a_character_vocabulary_covers_the_held_out_text(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a" * 95 + "bcdef")
    dataset = prepare(DataConfig(source=str(tmp_path / "one.txt"), tokenizer="char"))
    assert dataset.tokenizer.vocab_size == 7


def test_only_empty_documents_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    for tokenizer in ("byte", "char", "bpe:300"):
        with pytest.raises(DataError, match=r"no text to learn from \(3 empty documents skipped"):
            prepare(DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer=tokenizer))


def test_an_empty_split_is_an_error_that_says_which_way_to_go(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("one text is on one side")
    for fraction, split, advice in ((1e-9, "held-out", "raise"), (1 - 1e-9, "training", "lower")):
        with pytest.raises(DataError, match=f"the {split} split is empty: of 3 documents.*{advice} it"):
            prepare(DataConfig(source=str(tmp_path), tokenizer="byte", held_out_fraction=fraction))


def test_a_failure_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    (corpus / "part2" / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"zz\.txt: byte 0"):
        prepare(DataConfig(source=str(corpus), tokenizer="byte", cache_dir=str(tmp_path / "c")))
    assert list((tmp_path / "c" / "data").iterdir()) == []
    replaced = prepare(DataConfig(source=str(corpus), tokenizer="byte", held_out_fraction=0.25, invalid_utf8="replace"))
    where = corpus / "part2" / "zz.txt"
    assert ("note", f"1 invalid UTF-8 sequences replaced: {where}") in replaced.describe()


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(make_dataset: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file.*: cannot be written"):
        make_dataset(cache_dir=str(tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_source_that_cannot_be_read_is_said_to_be_unreadable(make_dataset: Make, corpus: Path) -> None:
    (corpus / "part0" / "text00.txt").chmod(0)
    with pytest.raises(DataError, match=r"text00\.txt: cannot be read"):
        make_dataset()


def test_a_file_that_vanishes_while_it_is_read_is_said_to_be_unreadable(
    make_dataset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(*_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/elsewhere/text.txt")

    monkeypatch.setattr(preparing, "encode_documents", vanished)
    with pytest.raises(DataError, match=r"^/elsewhere/text\.txt: cannot be read \(No such file"):
        make_dataset()


def test_a_full_disk_is_said_of_the_dataset(make_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing, "encode_documents", full)
    with pytest.raises(DataError, match=r"data/corpus-.*: cannot be written \(No space left"):
        make_dataset()


def test_a_bpe_trained_by_other_rules_is_never_taken_from_the_cache(
    make_dataset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {spec: make_dataset(tokenizer=spec).path for spec in ("bpe:300", "byte")}
    monkeypatch.setattr(tokenizers, "WORDS", tokenizers.WORDS.replace("{1,3}", "{1,2}"))
    assert make_dataset(tokenizer="bpe:300").path != before["bpe:300"]
    assert make_dataset(tokenizer="byte").path == before["byte"]


SCRIPT = """
import sys
from swamla.data.config import DataConfig
from swamla.data.preparing import prepare
config = DataConfig(source=sys.argv[1], tokenizer="bpe:300", held_out_fraction=0.25, cache_dir=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(prepare(config, progress=lambda *_: print("at work", flush=True)).fingerprint)
"""


def start(corpus: Path, cache: Path) -> subprocess.Popen[str]:
    """A process that waits for a line, then prepares."""
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(cache)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_that_prepare_at_once_agree_and_leave_one_dataset(corpus: Path, tmp_path: Path) -> None:
    racers = [start(corpus, tmp_path / "c") for _ in range(3)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    fingerprints = {racer.communicate()[0].splitlines()[-1] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(fingerprints) == 1
    (only,) = (tmp_path / "c" / "data").iterdir()
    Dataset.open(only).verify()


def test_a_killed_preparation_is_never_taken_for_a_dataset(corpus: Path, tmp_path: Path) -> None:
    victim = start(corpus, tmp_path / "c")
    assert victim.stdin is not None
    assert victim.stdout is not None
    victim.stdin.write("go\n")
    victim.stdin.flush()
    assert victim.stdout.readline() == "at work\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    left = list((tmp_path / "c" / "data").glob("*"))
    assert all(path.name.startswith(".staging-") for path in left)
    config = DataConfig(source=str(corpus), tokenizer="bpe:300", held_out_fraction=0.25, cache_dir=str(tmp_path / "c"))
    prepare(config).verify()


def test_what_a_kill_left_is_removed_after_a_day_and_not_before(make_dataset: Make, tmp_path: Path) -> None:
    parent = tmp_path / "c" / "data"
    ages = {".staging-old": 2 * 86400, ".staging-live": 60}
    for name, age in ages.items():
        (parent / name).mkdir(parents=True)
        (parent / name / "train.tokens.npy").touch()
        for path in (parent / name / "train.tokens.npy", parent / name):
            os.utime(path, times=(time.time() - age,) * 2)
    make_dataset(cache_dir=str(tmp_path / "c"))
    assert not (parent / ".staging-old").exists()
    assert (parent / ".staging-live").exists()


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:400", "bpe-lines:400"])
def test_a_text_encoded_in_pieces_has_the_ids_of_the_whole(spec: str) -> None:
    text = Path(packing.__file__).read_text(encoding="utf-8") + Path(shards.__file__).read_text(encoding="utf-8")
    tokenizer = make_tokenizer(spec, [text], [text])
    parts = list(shards.pieces(text, tokenizer, size=700))
    assert len(parts) > 8
    assert "".join(parts) == text
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_one_endless_line_is_encoded_in_pieces_and_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE", 1000)
    monkeypatch.setattr(shards.pieces, "__defaults__", (1000,))
    text = "xyz" * 20_000
    (tmp_path / "one.txt").write_text(text)
    dataset = prepare(DataConfig(source=str(tmp_path / "one.txt"), tokenizer="bpe:300"))
    both = (dataset.tokenizer.decode(split.document(0).tolist()) for split in (dataset.train, dataset.held_out))
    assert "".join(both) == text
    assert dataset.meta["lossless"]
