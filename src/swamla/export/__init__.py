"""Export to and import from other programs' formats."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.export.gpt2 import gpt2_config as gpt2_config
    from swamla.export.gpt2 import load_gpt2 as load_gpt2
    from swamla.export.gpt2 import save_gpt2 as save_gpt2
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
