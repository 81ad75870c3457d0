"""Text to batches: sources, tokenizers, shards on disk, packing and sampling.

    from swamla.data import DataConfig, prepare
    dataset = prepare(DataConfig(source="stdlib", tokenizer="bpe:4096"))
    batch = dataset.rows(block_size=512, seed=0).batch(first_sample=0, count=8)

Names are imported at their first use: only packing and sampling need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swamla.data.config import DataConfig
    from swamla.data.dataset import Dataset
    from swamla.data.packing import Batch, HeldOutRows, PackedRows
    from swamla.data.preparing import Part, prepare, prepare_part
    from swamla.data.reopening import reopen
    from swamla.data.shards import Split
    from swamla.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, make_tokenizer

_HOME = {
    "Batch": "packing",
    "DataConfig": "config",
    "Dataset": "dataset",
    "HeldOutRows": "packing",
    "PackedRows": "packing",
    "Part": "preparing",
    "Split": "shards",
    "StreamDecoder": "tokenizer",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "make_tokenizer": "tokenizer",
    "prepare": "preparing",
    "prepare_part": "preparing",
    "reopen": "reopening",
}

__all__ = [
    "Batch",
    "DataConfig",
    "Dataset",
    "HeldOutRows",
    "PackedRows",
    "Part",
    "Split",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
    "make_tokenizer",
    "prepare",
    "prepare_part",
    "reopen",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"swamla.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'swamla.data' has no attribute {name!r}")
