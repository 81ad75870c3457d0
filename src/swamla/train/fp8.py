"""Matrix products in fp8 (arXiv 2209.05433) by torchao, with one dynamic scale per tensor."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import nn

from swamla.errors import MissingBackendError
from swamla.model.language_model import vectors_of

NEEDED = "precision = fp8 needs torchao: pip install 'swamla[fp8]'"
# Smallest shapes for which fp8 gains more than the casts cost. Short sides lose by arithmetic: an H200 does about
# 790 TFLOP/s in bf16 and 4 TB/s. Narrow outputs lose by torchao's measurements on an H100 with one scale per tensor.
SHORTEST_SIDE = 512
NARROW_OUTPUT, WIDE_INPUT = 1024, 4096


def suits_fp8(name: str, linear: nn.Linear, vectors: Collection[str]) -> bool:
    """True for a matrix whose products gain from fp8 and tolerate its errors; logits and router scores do not.

    vectors: names of the model's parameters that are sets of vectors.
    """
    inputs, outputs = linear.in_features, linear.out_features
    if name == "head" or f"{name}.weight" in vectors or inputs % 16 or outputs % 16:
        return False
    return min(inputs, outputs) >= SHORTEST_SIDE and (outputs > NARROW_OUTPUT or inputs > WIDE_INPUT)


def convert_to_fp8(model: nn.Module, device: torch.device) -> str:
    """Convert the linear layers that suit fp8, for the forward and backward pass; returns a line that says which.

    Weights, their names and checkpoints are unchanged, and all other layers run as with bf16. On a CPU fp8 is emulated:
    operands are rounded to fp8, then multiplied in higher precision, which is no faster. Raises `MissingBackendError`
    without torchao, or on a CUDA device without fp8.
    """
    emulate = device.type != "cuda"
    if not emulate and torch.cuda.get_device_capability(device) < (8, 9):
        raise MissingBackendError("precision = fp8: this GPU has no fp8 (compute capability 8.9 or more); use bf16")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # importing it warns about kernels that are not used here
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise MissingBackendError(NEEDED) from error
    finally:
        logging.disable(disabled)

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    suiting = {name for name, linear in linears.items() if suits_fp8(name, linear, vectors_of(model))}
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # for token counts that are no multiple of 16
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in suiting)
    said = f"fp8: {len(suiting)} of {len(linears)} linear layers{' (emulated: no faster)' if emulate else ''}"
    left = ", ".join(_counted(name for name in linears if name not in suiting))
    return f"{said}; not {left}" if left else said


def _counted(names: Iterable[str]) -> list[str]:
    """Names without the layer's prefix, each with its count: "mixer.ba_proj ×8"."""
    counts = Counter(re.sub(r"^blocks\.\d+\.", "", name) for name in names)
    return [f"{name} ×{count}" if count > 1 else name for name, count in counts.items()]
