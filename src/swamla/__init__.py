"""swamla: hybrid-attention language models, designed, trained, run and compared.

    import swamla
    model, tokenizer = swamla.load("runs/quickstart")

Names are imported at their first use, so that `import swamla` alone stays quick and does not import torch. It does set
how torch's threads wait and how freed memory is kept (`swamla.process.prepare`): import swamla before torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swamla import process

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swamla import data, model, ops, train
    from swamla.checkpoint import load
    from swamla.data.config import DataConfig
    from swamla.errors import SwamlaError
    from swamla.inference.decoding import Decoder
    from swamla.inference.sampling import Sampling
    from swamla.inference.text import generate_text
    from swamla.model.config import LanguageModelConfig
    from swamla.model.language_model import LanguageModel
    from swamla.plugins import load_plugin
    from swamla.registry import register
    from swamla.train.config import RunConfig, TrainConfig

_HOME = {
    "DataConfig": "swamla.data.config",
    "Decoder": "swamla.inference.decoding",
    "LanguageModel": "swamla.model.language_model",
    "LanguageModelConfig": "swamla.model.config",
    "RunConfig": "swamla.train.config",
    "Sampling": "swamla.inference.sampling",
    "SwamlaError": "swamla.errors",
    "TrainConfig": "swamla.train.config",
    "generate_text": "swamla.inference.text",
    "load": "swamla.checkpoint",
    "load_plugin": "swamla.plugins",
    "register": "swamla.registry",
}
_MODULES = ("data", "model", "ops", "train")

__all__ = [
    "DataConfig",
    "Decoder",
    "LanguageModel",
    "LanguageModelConfig",
    "RunConfig",
    "Sampling",
    "SwamlaError",
    "TrainConfig",
    "__version__",
    "data",
    "generate_text",
    "load",
    "load_plugin",
    "model",
    "ops",
    "register",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"swamla.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'swamla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


process.prepare()
