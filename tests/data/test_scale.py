"""Large sources: in units, by several processes, in parts and after kills, the dataset is the same to the byte."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla.data import preparing, sources, units
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.preparing import Part, prepare, prepare_part
from swamla.data.reading import Notes
from swamla.data.sources import open_source
from swamla.errors import ConfigError, CorruptError, DataError
from tests.waiting import until

UNIT = 8000


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", UNIT)


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(["été", "word", "x = 1\n", "漢字", "of"], k=draw.randint(1, 120))) for _ in range(count)
    ]


def write_jsonl(path: Path, rows: list[str]) -> None:
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


@pytest.fixture
def large(tmp_path: Path) -> DataConfig:
    """A folder of small texts, two large jsonl files and a large parquet file: some twenty units."""
    root = tmp_path / "large"
    root.mkdir()
    for i, text in enumerate(texts(60, seed=1)):
        (root / f"t{i:02d}.txt").write_text(text, encoding="utf-8")
    write_jsonl(root / "a.jsonl", texts(200, seed=2))
    write_jsonl(root / "z.jsonl", [*texts(20, seed=3), "one long line " * 1000, *texts(20, seed=4)])
    pq.write_table(pa.table({"text": texts(200, seed=5)}), root / "m.parquet", row_group_size=7)
    return DataConfig(source=str(root), tokenizer="bpe:300", held_out_fraction=0.2, cache_dir=str(tmp_path / "c"))


def bytes_of(dataset: Dataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dataset.path.iterdir()}


def test_units_hold_each_document_once_and_in_order(large: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(large, Path("unused"))
    whole = list(source.documents(Notes()))
    assert len(whole) == 60 + 200 + 41 + 200
    for size in (1, 7, 100, 1000, 3000, 40_000, 1 << 30):
        monkeypatch.setattr(sources, "UNIT_BYTES", size)
        parts = source.units()
        assert [document for unit in parts for document in source.unit_documents(unit, Notes())] == whole
    assert parts == [sources.Unit(0, len(source.entries))]


def test_a_line_longer_than_units_belongs_to_the_one_it_begins_in(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["short", "x" * 5 * UNIT, "end"])
    source = open_source(DataConfig(source=str(tmp_path / "a.jsonl")), Path("unused"))
    found = [[text[0] for text in source.unit_documents(unit, Notes())] for unit in source.units()]
    assert found[0] == ["s", "x"]
    assert found[1:] == [[]] * (len(found) - 2) + [["e"]]


def test_the_dataset_is_the_same_to_the_byte_for_any_number_of_workers_or_parts(
    large: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for number in (1, 3):
        made.append(bytes_of(prepare(replace(large, cache_dir=str(tmp_path / f"w{number}")), workers=number)))
    for count in (4, 100):
        config = replace(large, cache_dir=str(tmp_path / f"p{count}"))
        for number in random.Random(count).sample(range(1, min(count, 4) + 1), min(count, 4)):
            done = prepare_part(config, Part(number, count), workers=1)
        made.append(bytes_of(done.dataset or prepare(config)))
    monkeypatch.setattr(sources, "UNIT_BYTES", 1 << 30)
    made.append(bytes_of(prepare(replace(large, cache_dir=str(tmp_path / "whole")))))
    assert all(each == made[0] for each in made)
    assert (
        Dataset.open(tmp_path / "whole" / "data" / os.listdir(tmp_path / "whole" / "data")[0]).train.n_documents > 300
    )


def test_parts_make_their_own_units_and_the_last_one_the_dataset(large: DataConfig) -> None:
    first = prepare_part(large, Part(1, 2), workers=1)
    assert first.dataset is None
    assert first.missing == first.units // 2
    assert first.throughput is not None
    assert first.throughput.tokens > 0
    again = prepare_part(large, Part(1, 2), workers=1)
    assert (again.missing, again.throughput) == (first.missing, None)
    assert prepare_part(large, Part.parse("assemble")).dataset is None
    last = prepare_part(large, Part(2, 2), workers=1)
    assert last.dataset is not None
    last.dataset.verify()
    assert [path.name for path in last.dataset.path.parent.iterdir()] == [last.dataset.path.name]
    for part in (Part(1, 2), Part.parse("assemble")):
        found = prepare_part(large, part).dataset
        assert found is not None
        assert found.fingerprint == last.dataset.fingerprint


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_a_part_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r'part = .*must be "i/N"'):
        Part.parse(text)


SCRIPT = """
import sys
from swamla.data import sources
from swamla.data.config import DataConfig
from swamla.data.preparing import prepare
sources.UNIT_BYTES = int(sys.argv[3])
config = DataConfig(source=sys.argv[1], tokenizer="bpe:300", held_out_fraction=0.2, cache_dir=sys.argv[2])
prepare(config, workers=2, progress=lambda stage, *_: print(stage, flush=True))
"""


def test_a_preparation_killed_again_and_again_ends_with_the_same_bytes(large: DataConfig, tmp_path: Path) -> None:
    undisturbed = bytes_of(prepare(replace(large, cache_dir=str(tmp_path / "calm"))))
    kills, finished, draw = 0, False, random.Random(7)
    while not finished:
        command = [sys.executable, "-c", SCRIPT, large.source, large.cache_dir, str(UNIT)]
        victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert victim.stdout is not None
        patience = draw.randint(1, 12) if kills < 5 else 10**9
        seen = sum(1 for _ in first(victim.stdout, patience))
        if seen < patience:
            finished = victim.wait() == 0
        else:
            victim.send_signal(signal.SIGKILL)
            kills += 1
        victim.communicate()
    assert kills >= 3
    assert bytes_of(prepare(large)) == undisturbed


def first(lines: Iterator[str], count: int) -> Iterator[str]:
    """The first lines about encoding, as they come."""
    for line in lines:
        if "encoding" in line:
            yield line
            count -= 1
        if not count:
            return


def test_units_made_before_a_kill_are_not_made_again(large: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_part(large, Part(1, 2), workers=1)
    (folder,) = Path(large.cache_dir, "data").iterdir()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("unit-*/*")}
    seen = []
    monkeypatch.setattr(preparing.shutil, "rmtree", lambda path, **_: seen.append(path))
    prepare(large)
    assert folder in seen
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_parts_that_run_at_once_agree(large: DataConfig, tmp_path: Path) -> None:
    code = SCRIPT.replace("prepare(config, workers=2", "prepare_part(config, Part.parse(sys.argv[4]), workers=1")
    code = code.replace("import prepare\n", "import Part, prepare_part\n")
    command = [sys.executable, "-c", code, large.source, large.cache_dir, str(UNIT)]
    racers = [subprocess.Popen([*command, f"{i}/3"], stdout=subprocess.DEVNULL) for i in (1, 2, 3)]
    assert [racer.wait() for racer in racers] == [0, 0, 0]
    (only,) = Path(large.cache_dir, "data").iterdir()
    assert bytes_of(Dataset.open(only)) == bytes_of(prepare(replace(large, cache_dir=str(tmp_path / "calm"))))


@pytest.mark.parametrize("name", ["train.tokens.npy", "held_out.txt"])
def test_a_unit_damaged_before_it_is_put_together_is_named(large: DataConfig, name: str) -> None:
    prepare_part(large, Part(1, 2), workers=1)
    (folder,) = Path(large.cache_dir, "data").iterdir()
    victim = sorted(folder.glob("unit-*/"))[2] / name
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptError, match=f"{victim}: ") as caught:
        prepare(large)
    assert caught.value.exit_status == 3
    assert f"delete {victim.parent}" in str(caught.value)


def test_bad_input_in_a_unit_is_one_line_with_its_place_and_good_units_are_kept(large: DataConfig) -> None:
    broken = Path(large.source) / "z.jsonl"
    rows = broken.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join([*rows[:30], b'{"text": "\xff"}\n', *rows[30:]]))
    offset = sum(map(len, rows[:30])) + 10
    with pytest.raises(DataError, match=rf"z\.jsonl: byte {offset} \(0xff\) is not valid UTF-8"):
        prepare(large, workers=2)
    broken.write_bytes(b"".join([*rows[:30], b"{]\n", *rows[30:]]))
    with pytest.raises(DataError, match=r"z\.jsonl: line 31: not JSON"):
        prepare(large, workers=2)
    assert all(path.name.startswith(".units-") for path in Path(large.cache_dir, "data").iterdir())
    replaced = prepare(
        replace(large, invalid_utf8="replace", text_column="text", source=str(broken.parent / "a.jsonl"))
    )
    assert replaced.train.n_documents > 100


def test_a_worker_that_dies_is_named_with_its_file_and_the_rest_goes_on_later(
    large: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = units._start

    def doomed(packed: bytes) -> subprocess.Popen[bytes]:
        worker = start(packed)
        worker.kill()
        worker.wait()
        return worker

    monkeypatch.setattr(units, "_start", doomed)
    with pytest.raises(DataError, match=r"a\.jsonl \(0 to 8000\): the process that encoded it died \(signal 9\); run"):
        prepare(large, workers=1)
    monkeypatch.setattr(units, "_start", start)
    assert prepare(large, workers=1).train.n_documents > 300


def test_a_script_needs_no_guard_to_prepare_by_several_processes(large: DataConfig, tmp_path: Path) -> None:
    """As the Python lines of the docs are: nothing asks of a user's script that it can be imported."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "print('ran')\n")
    command = [sys.executable, str(script), large.source, large.cache_dir, str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("ran") == 1
    assert done.stdout.count("encoding, unit") > 4


def test_no_worker_outlives_its_preparation(large: DataConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, large.source, large.cache_dir, str(UNIT)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    list(first(parent.stdout, 3))
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    parent.kill()
    parent.communicate()
    assert children
    until(lambda: not any(Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid) for pid in children))


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def test_a_large_row_that_is_the_only_document_is_cut_in_two(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["word " * 10000])
    config = DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", held_out_fraction=0.1)
    dataset = prepare(config)
    assert (dataset.train.n_tokens, dataset.held_out.n_tokens) == (45000, 5000)
    assert [path.name for path in dataset.path.parent.iterdir()] == [dataset.path.name]


def test_large_sources_without_text_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [""] * 1000)
    with pytest.raises(DataError, match=r"no text to learn from \(1000 empty documents skipped: .*a\.jsonl"):
        prepare(DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte"))


def test_of_a_large_source_the_tokenizer_learns_from_places_all_over_it(large: DataConfig) -> None:
    source = open_source(large, Path("unused"))
    parts = source.units()
    sample = list(preparing.training_texts(source, parts, 0.2, 8000))
    assert 4000 < sum(map(len, sample)) <= 8000
    names = {unit: set(source.unit_documents(unit, Notes())) for unit in parts}
    touched = sum(any(any(full.startswith(text) for full in names[unit]) for text in sample) for unit in parts)
    assert touched > 0.9 * len(parts)
    assert sample == list(preparing.training_texts(source, parts, 0.2, 8000))


def test_bad_rows_of_a_large_file_are_skipped_counted_and_named_by_their_bytes(large: DataConfig) -> None:
    path = Path(large.source) / "z.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    bad = [3, len(rows) // 2, len(rows) - 2]
    whole = prepare(large)
    path.write_bytes(b"".join(b"{]\n" + row if i in bad else row for i, row in enumerate(rows)))
    skipped = prepare(replace(large, on_bad_row="skip"))
    assert skipped.fingerprint == whole.fingerprint
    assert skipped.meta["notes"]["counts"]["bad rows skipped"] == 3
    first, *later = skipped.meta["notes"]["places"]["bad rows skipped"]
    assert first.startswith(f"{path}: line 4: not JSON")
    offsets = [sum(map(len, rows[:i])) + 3 * before for before, i in enumerate(bad)]
    for place, offset in zip(later, offsets[1:], strict=True):
        assert place.startswith(f"{path}: the line at byte {offset}: not JSON")
