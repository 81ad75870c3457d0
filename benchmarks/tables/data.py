"""Speed of data: rows from the packed loader, compared with what training consumes, and tokenizing text.

The text is the source of Python's standard library; the tokenizer is a byte-level BPE of 4096 trained on it.
"""

import json
import os
import tempfile
from pathlib import Path

from tokenizers import Tokenizer as Library

from benchmarks.running import Bench, Maker, times_faster
from benchmarks.tables import training
from swamla.bench.results import Row
from swamla.data import prepare
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset

TABLE = "data"
MODEL = "swa swa mla"
LENGTHS = (256, 1024, 4096)
BATCHES, STEP = 200, 4096  # batches timed together; tokens of a batch, as in the training table
HELD_OUT = 0.2  # of the documents, so that even a small text has some
TEXT, ENCODED = 8_000_000, 2_000_000  # bytes prepared; bytes of these that are timed


def measure(bench: Bench) -> None:
    """The table."""
    with tempfile.TemporaryDirectory() as folder:
        texts = standard_library(400_000 if bench.quick else TEXT)
        source = Path(folder) / "text.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        tokenizer = "bpe:300" if bench.quick else "bpe:4096"
        dataset = prepare(
            DataConfig(source=str(source), tokenizer=tokenizer, held_out_fraction=HELD_OUT, cache_dir=f"{folder}/cache")
        )
        loader(bench, dataset)
        encoding(bench, dataset, texts)


def standard_library(size: int) -> list[str]:
    """Sources of its modules in order of their names, about `size` bytes in all."""
    texts: list[str] = []
    read = 0
    for file in sorted(Path(os.__file__).parent.glob("**/*.py")):
        if read >= size:
            break
        if "site-packages" not in file.parts and "lib2to3" not in file.parts:  # these have files that are not UTF-8
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
            read += len(texts[-1])
    return texts


def loader(bench: Bench, dataset: Dataset) -> None:
    """Rows of several lengths, in batches of the training table's size."""
    batches = 2 if bench.quick else BATCHES

    def maker(length: int) -> Maker:
        rows, count = dataset.rows(length, seed=0), STEP // length

        def run() -> None:
            for number in range(batches):
                rows.batch(number * count, count)

        return lambda: run

    what: Row = {"what": "packed loader"}
    names = {f"rows of {length}": length for length in LENGTHS}
    outcomes = bench.race(TABLE, what, {name: maker(length) for name, length in names.items()}, rounds=11, limit=6)
    for name, outcome in outcomes.items():
        speed = batches * STEP / outcome.timing.median
        consumed = consumed_by_model(bench, names[name])
        row: Row = {"name": name, **what, "length": names[name], "tokens_per_s": speed}
        bench.results.add(TABLE, {**row, "ratio": consumed and speed / consumed, **outcome.row()})


def consumed_by_model(bench: Bench, length: int) -> float | None:
    """Tokens per second of training at this length, if this run measured it."""
    for row in bench.results.rows.get(training.TABLE, []):
        speed = row.get("tokens_per_s")
        if row["name"] == MODEL and row["length"] == length and isinstance(speed, float):
            return speed
    return None


def encoding(bench: Bench, dataset: Dataset, texts: list[str]) -> None:
    """Tokenizing on all cores, ours against a bare call of the library."""
    some, size = [], 0
    for text in texts:
        if size >= ENCODED:
            break
        some.append(text)
        size += len(text.encode())
    library = Library.from_file(str(dataset.path / "tokenizer.json"))
    tokens = sum(map(len, dataset.tokenizer.encode_batch(some)))
    makers: dict[str, Maker] = {
        "tokenizers, encode_batch_fast": lambda: lambda: library.encode_batch_fast(some),
        "swamla": lambda: lambda: dataset.tokenizer.encode_batch(some),
    }
    what: Row = {"what": "tokenizer", "text_bytes": size}
    outcomes = bench.race(TABLE, what, makers, rounds=11, limit=12)
    baseline = outcomes.get(next(iter(makers)))
    for name, outcome in outcomes.items():
        seconds = outcome.timing.median
        row: Row = {"name": name, **what, "tokens_per_s": tokens / seconds, "text_bytes_per_s": size / seconds}
        bench.results.add(TABLE, {**row, "ratio": times_faster(baseline, outcome), **outcome.row()})
