"""swamla's models as transformers models: importing this registers them with transformers' Auto classes.

    model = AutoModelForCausalLM.from_pretrained(FOLDER)  # what `swamla export RUN FOLDER` wrote
    model.generate(**tokenizer("import os", return_tensors="pt"))

The same modules compute: `SwamlaForCausalLM.model` is the `LanguageModel`. Its state replaces transformers' caches.
Raises `MissingBackendError` where transformers is not installed.
"""

from importlib.util import find_spec

from swamla.errors import MissingBackendError

if find_spec("transformers") is None:
    raise MissingBackendError("transformers is not installed: pip install 'swamla[transformers]'")

from transformers import AutoConfig, AutoModelForCausalLM

from swamla.interop.transformers.cache import SwamlaCache
from swamla.interop.transformers.config import SwamlaConfig
from swamla.interop.transformers.model import SwamlaForCausalLM

__all__ = ["SwamlaCache", "SwamlaConfig", "SwamlaForCausalLM"]

AutoConfig.register(SwamlaConfig.model_type, SwamlaConfig)
AutoModelForCausalLM.register(SwamlaConfig, SwamlaForCausalLM)
