"""Matrix products in fp8 (arXiv 2209.05433) by torchao: one scale a tensor, taken anew at every product."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import nn

from swamla.errors import MissingBackendError
from swamla.model.language_model import vectors_of

NEEDED = "precision = fp8 needs torchao: pip install 'swamla[fp8]'"
# What a product must have to win more than casts cost. An H200 does about 790 TFLOP/s in bf16 and 4 TB/s, so that by
# arithmetic shorter sides lose; that narrow outputs lose too is what torchao found on an H100 for one scale a tensor.
SHORTEST_SIDE = 512
NARROW_OUTPUT, WIDE_INPUT = 1024, 4096


def suits_fp8(name: str, linear: nn.Linear, vectors: Collection[str]) -> bool:
    """True for a matrix whose products gain from fp8, and whose errors do no harm: not right before probabilities.

    vectors: names of the model's parameters that are sets of vectors.
    """
    inputs, outputs = linear.in_features, linear.out_features
    if name == "head" or f"{name}.weight" in vectors or inputs % 16 or outputs % 16:
        return False
    return min(inputs, outputs) >= SHORTEST_SIDE and (outputs > NARROW_OUTPUT or inputs > WIDE_INPUT)


def convert_to_fp8(model: nn.Module, device: torch.device) -> str:
    """Let the linear layers that suit it multiply in fp8, forward and backward; returns what was done, for people.

    Weights, their names and checkpoints stay as they are, and everything but these layers runs as in bf16. Without
    the hardware, on a CPU, operands are rounded to fp8 and multiplied as they then are: the same numbers, no speed.
    Raises `MissingBackendError` without torchao, or on a CUDA device that has no fp8.
    """
    emulate = device.type != "cuda"
    if not emulate and torch.cuda.get_device_capability(device) < (8, 9):
        raise MissingBackendError("precision = fp8: this GPU has no fp8 (compute capability 8.9 or more); use bf16")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its import warns of kernels that are not used here
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise MissingBackendError(NEEDED) from error
    finally:
        logging.disable(level)

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    suiting = {name for name, linear in linears.items() if suits_fp8(name, linear, vectors_of(model))}
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # any number of tokens, not multiples of 16 alone
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in suiting)
    said = f"fp8: {len(suiting)} of {len(linears)} linear layers{' (emulated: no faster)' if emulate else ''}"
    left = ", ".join(_counted(name for name in linears if name not in suiting))
    return f"{said}; not {left}" if left else said


def _counted(names: Iterable[str]) -> list[str]:
    """Names without their layer, and how often each comes: "mixer.ba_proj ×8"."""
    counts = Counter(re.sub(r"^blocks\.\d+\.", "", name) for name in names)
    return [f"{name} ×{count}" if count > 1 else name for name, count in counts.items()]
