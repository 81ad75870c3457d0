"""Text to batches: sources, tokenizers, shards on disk, packing and sampling.

    from swamla.data import DataConfig, prepare
    dataset = prepare(DataConfig(source="stdlib", tokenizer="bpe:4096"))
    batch = dataset.rows(block_size=512, seed=0).batch(first_sample=0, count=8)

Names are imported at their first use: only packing and sampling need torch.
"""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.data.chat_rows import ChatDataset as ChatDataset
    from swamla.data.config import DataConfig as DataConfig
    from swamla.data.dataset import Dataset as Dataset
    from swamla.data.dataset import TrainingData as TrainingData
    from swamla.data.packing import Batch as Batch
    from swamla.data.packing import HeldOutRows as HeldOutRows
    from swamla.data.packing import PackedRows as PackedRows
    from swamla.data.preparing import Part as Part
    from swamla.data.preparing import prepare as prepare
    from swamla.data.preparing import prepare_part as prepare_part
    from swamla.data.reopening import reopen as reopen
    from swamla.data.shards import Split as Split
    from swamla.data.sources import Source as Source
    from swamla.data.task_rows import TaskDataset as TaskDataset
    from swamla.data.tokenizer import StreamDecoder as StreamDecoder
    from swamla.data.tokenizer import Tokenizer as Tokenizer
    from swamla.data.tokenizer import load_tokenizer as load_tokenizer
    from swamla.data.tokenizer import make_tokenizer as make_tokenizer
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
