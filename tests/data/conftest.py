"""Small datasets, made in memory's time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.preparing import prepare

TEXTS = {
    f"part{i % 3}/text{i:02d}.txt": "".join(f"line {j} of {i}: été\n" for j in range(i % 7 + 1)) for i in range(40)
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 40 short texts in three subfolders."""
    root = tmp_path / "corpus"
    for name, text in TEXTS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return root


@pytest.fixture
def make_dataset(corpus: Path) -> Callable[..., Dataset]:
    """prepare() on that folder, by bytes and a quarter held out unless told otherwise."""

    def make(**settings: object) -> Dataset:
        defaults = {"source": str(corpus), "tokenizer": "byte", "held_out_fraction": 0.25}
        return prepare(DataConfig(**{**defaults, **settings}))  # type: ignore[arg-type]

    return make
