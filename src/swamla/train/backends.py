"""The backend of each op of a run: chosen once, when the model is placed on its device, then printed and stored."""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from swamla.data.dataset import TrainingData
from swamla.errors import MissingBackendError
from swamla.model.ffns.ffn import FFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.ops.layout import Layout
from swamla.registry import members_of
from swamla.train.precision import Chosen
from swamla.train.racing import Choice, choose, races_on

EXAMPLE_WIDTH = 64  # of a model that `Registered.example` fits


def resolve_backends(model: LanguageModelConfig, device: torch.device, precision: Chosen = "bf16") -> dict[str, str]:
    """Op → the backend that the config names, or that "auto" means on `device`; several if blocks differ.

    precision: of the forward pass, which not every backend supports. The config itself keeps "auto", so that it fits
    other devices too. Raises `MissingBackendError`, naming the field, for a backend that cannot run on `device`.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    chosen: dict[str, set[str]] = {}
    for name, block in model.blocks.items():
        asked = {
            "mixer": partial(block.mixer.backends, device, model.width, dtype),
            "conv": partial(block.conv_backends, device, dtype),
            "ffn": partial(block.ffn.backends, device, model.width, dtype),
        }
        for half, ask in asked.items():
            try:
                found = ask()
            except MissingBackendError as error:
                raise MissingBackendError(f"model.blocks.{name}.{half}.{error}") from error
            for op, backend in found.items():
                chosen.setdefault(op, set()).add(backend)
    return {op: " and ".join(sorted(backends)) for op, backends in sorted(chosen.items())}


def fastest_paths(
    model: LanguageModelConfig, device: torch.device, precision: Chosen, *, length: int
) -> tuple[dict[str, str], list[Choice]]:
    """Block → the fastest backend of its mixer, for blocks with "auto" on a CPU; and the measurements behind it.

    length: typical length of the documents. Earlier measurements of this machine are read from the cache. Both are
    empty on devices that do not measure (`races_on`).
    """
    if not races_on(device):
        return {}, []
    trials = {
        name: trial for name, block in model.blocks.items() if (trial := block.mixer.trial(model.width)) is not None
    }
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    choices = choose(set(trials.values()), dtype, length=length)
    paths = {name: choices[trial].chosen for name, trial in trials.items()}
    return paths, sorted(choices.values(), key=str)


def usual_length(dataset: TrainingData, block_size: int) -> int:
    """Mean over the tokens of the first rows of the length of the token's document."""
    runs = Layout.from_documents(dataset.rows(block_size, 0).batch(0, 32).document_BT).runs
    return round(sum(count * length**2 for count, length in runs) / sum(count * length for count, length in runs))


def available(device: torch.device) -> dict[str, dict[str, str]]:
    """Kind of mixer or FFN → backend → why it cannot compute the kind's example on `device` in bf16, "" if it can."""
    families = (members_of(MixerConfig), members_of(FFNConfig))
    kinds = {kind: cast("type[MixerConfig] | type[FFNConfig]", cls) for f in families for kind, cls in f.items()}
    return {
        kind: {name: _obstacle(cls.example(), name, device) for name in cls.BACKENDS if name != "auto"}
        for kind, cls in kinds.items()
        if cls.BACKENDS
    }


def _obstacle(example: MixerConfig | FFNConfig, backend: str, device: torch.device) -> str:
    chosen: dict[str, Any] = {"backend": backend}
    try:
        replace(example, **chosen).backends(device, EXAMPLE_WIDTH, torch.bfloat16)
    except MissingBackendError as error:
        return str(error).removeprefix(f'backend = "{backend}" ')
    return ""


def describe(backends: dict[str, str]) -> str:
    """As text: "attention: torch, delta rule: torch"."""
    return ", ".join(f"{op}: {backend}" for op, backend in backends.items())
