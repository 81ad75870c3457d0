"""Which backend computes each op of a run: chosen once, when the model meets its device, printed and kept with it."""

import torch

from swamla.errors import MissingBackendError
from swamla.model.config import LanguageModelConfig
from swamla.train.precision import Chosen


def resolve_backends(model: LanguageModelConfig, device: torch.device, precision: Chosen = "bf16") -> dict[str, str]:
    """Op → the backend that "auto" means on `device`, or that was asked for; several where blocks differ.

    precision: what the forward pass computes in, which not every backend can. The config keeps what was asked, so that
    it serves on other devices too. Raises `MissingBackendError`, naming the field, for a backend that cannot compute
    there.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    chosen: dict[str, set[str]] = {}
    for name, block in model.blocks.items():
        try:
            found = block.mixer.backends(device, model.width, dtype)
        except MissingBackendError as error:
            raise MissingBackendError(f"model.blocks.{name}.mixer.{error}") from error
        for op, backend in (found | block.ffn.backends(device)).items():
            chosen.setdefault(op, set()).add(backend)
    return {op: " and ".join(sorted(backends)) for op, backends in sorted(chosen.items())}


def describe(backends: dict[str, str]) -> str:
    """For people: "attention: torch, delta rule: torch"."""
    return ", ".join(f"{op}: {backend}" for op, backend in backends.items())
