"""swamla: hybrid-attention language models, designed, trained, run and compared.

    import swamla
    model, tokenizer = swamla.load("runs/quickstart")

Names are imported at their first use, so that `import swamla` alone stays quick and does not import torch. It does set
how torch's threads wait and how freed memory is kept (`swamla.process.prepare`): import swamla before torch.
"""

from typing import TYPE_CHECKING

from swamla import process
from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla import data as data
    from swamla import model as model
    from swamla import ops as ops
    from swamla import train as train
    from swamla.checkpoint import load as load
    from swamla.data.config import DataConfig as DataConfig
    from swamla.errors import SwamlaError as SwamlaError
    from swamla.inference.decoding import Decoder as Decoder
    from swamla.inference.sampling import Sampling as Sampling
    from swamla.model.language_model import LanguageModel as LanguageModel
    from swamla.model.language_model import LanguageModelConfig as LanguageModelConfig
    from swamla.plugins import load_plugin as load_plugin
    from swamla.registry import register as register
    from swamla.text import generate_text as generate_text
    from swamla.train.config import RunConfig as RunConfig
    from swamla.train.config import TrainConfig as TrainConfig
    from swamla.version import __version__ as __version__
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)

process.prepare()
