"""Models handed over to other programs, and taken from them."""

from swamla.export.gpt2 import gpt2_config, load_gpt2, save_gpt2

__all__ = ["gpt2_config", "load_gpt2", "save_gpt2"]
