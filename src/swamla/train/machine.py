"""What a run computes on, as far as its bits depend on it: stored with every checkpoint, compared when it goes on."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from swamla import distributed
from swamla.process import processor

LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")  # what a user may hold a CPU down by
UNITS = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported, "AMX": torch.cpu._is_amx_tile_supported}


def describe_cpu() -> dict[str, Any]:
    """The processor, the instructions that torch may use, how many threads, and torch's version."""
    units = [name for name, there in UNITS.items() if there()]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    return {
        "processor": processor(),
        "instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *units, *limits]),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """`describe_cpu`, the device, and how many processes train together."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**describe_cpu(), "device": name, "processes": distributed.world_size()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """For people: "threads 2, before 1; torch 2.13.0, before 2.12.1"; "" where nothing that was recorded differs."""
    return "; ".join(
        f"{name} {now.get(name)}, before {value}" for name, value in before.items() if now.get(name) != value
    )
