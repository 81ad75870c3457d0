"""Models in other programs' formats: transformers' architectures, in and out."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.interop.architecture import Architecture as Architecture
    from swamla.interop.folder import equal_architecture as equal_architecture
    from swamla.interop.folder import load_pretrained as load_pretrained
    from swamla.interop.folder import read_architecture as read_architecture
    from swamla.interop.folder import save_pretrained as save_pretrained
    from swamla.interop.gguf.saving import save_gguf as save_gguf
    from swamla.interop.onnx.saving import save_onnx as save_onnx
    from swamla.interop.tokenizer import save_tokenizer as save_tokenizer
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
