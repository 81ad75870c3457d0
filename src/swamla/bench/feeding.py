"""Measure the speed of the loader and of the tokenizer."""

from collections.abc import Iterator
from pathlib import Path

from swamla.bench.measuring import interleaved
from swamla.bench.results import Row
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.reading import Notes
from swamla.data.sources import open_source
from swamla.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from swamla.errors import DataError

_ROUNDS = 50
_OF_THE_HUB = {"gpt2": "openai-community/gpt2"}
_TEXT = 1 << 21  # bytes of text per call, as in preparing data


def measure_loader(dataset: Dataset, rows: int, length: int, *, limit: float) -> Row:
    """Speed of the loader, in consecutive batches as in training."""
    loader, sample = dataset.rows(length, 0), iter(range(0, 1 << 62, rows))
    timing = interleaved({"batch": lambda: loader.batch(next(sample), rows)}, rounds=_ROUNDS, warmup=2, limit=limit)[
        "batch"
    ]
    tokens = loader.batch(0, 8 * rows).n_labels / 8  # mean tokens of a batch, without padding
    return {
        "name": f"loader, {rows} × {length:,}",
        "rows": rows,
        "length": length,
        "tokens_per_s": tokens / timing.median,
        "median_s": timing.median,
        "low_s": timing.low,
        "high_s": timing.high,
        "rounds": timing.rounds,
    }


def local_tokenizer(data: DataConfig, saved: Path | None, texts: list[str]) -> Tokenizer:
    """The recipe's tokenizer, or the one in a run's folder; a trainable one is trained on `texts`.

    Raises `DataError` for one on the hub that is not in the local cache.
    """
    if saved is not None and saved.is_file():
        return load_tokenizer(saved)
    if data.tokenizer in _OF_THE_HUB or data.tokenizer.startswith("hub:"):
        return load_tokenizer(_fetched_before(data.tokenizer))
    return make_tokenizer(data.tokenizer, texts, texts)


def _fetched_before(tokenizer: str) -> Path:
    """The tokenizer's file in the cache of the hub's library."""
    name = _OF_THE_HUB.get(tokenizer, tokenizer.removeprefix("hub:"))
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError as error:
        raise DataError(f"{tokenizer} is on the hub, and huggingface_hub is not installed") from error
    found = try_to_load_from_cache(name, "tokenizer.json")
    if not isinstance(found, str):
        raise DataError(f"{tokenizer} is on the hub, and has not been downloaded")
    return Path(found)


def library_text() -> list[str]:
    """About 2 MB of text from the source files of Python's standard library."""
    return list(_first_files(_TEXT))


def _first_files(most_bytes: int) -> Iterator[str]:
    source, size = open_source(DataConfig(source="stdlib"), Path()), 0
    for text in source.documents(Notes()):
        yield text
        size += len(text)
        if size >= most_bytes:
            return


def measure_tokenizer(tokenizer: Tokenizer, name: str, texts: list[str], *, limit: float) -> Row:
    """Speed of encoding, as in preparing data, in one process."""
    n_tokens, n_bytes = sum(map(len, tokenizer.encode_batch(texts))), sum(len(text.encode()) for text in texts)
    timing = interleaved({"text": lambda: tokenizer.encode_batch(texts)}, rounds=_ROUNDS, warmup=0, limit=limit)["text"]
    return {
        "name": f"tokenizer, {name}",
        "tokens_per_s": n_tokens / timing.median,
        "text_bytes_per_s": n_bytes / timing.median,
        "median_s": timing.median,
        "low_s": timing.low,
        "high_s": timing.high,
        "rounds": timing.rounds,
    }
