"""`swamla doctor`: hardware, libraries and automatic choices on this machine, and a self-check."""

import json
import platform
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from swamla.bench.measuring import memory_bytes
from swamla.cli.console import Console, say, say_rows, say_wrapped
from swamla.cli.flags import parse
from swamla.cli.info_tables import short
from swamla.cli.self_check import run_checks, tiny_model
from swamla.data.config import default_cache_dir
from swamla.data.sources import Source
from swamla.data.units import available_cores
from swamla.model.block import BlockConfig
from swamla.model.ffns.ffn import FFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import NormConfig
from swamla.process import prepared, processor
from swamla.registry import Registered, members_of
from swamla.tasks import Task
from swamla.train.backends import available, describe, fastest_paths, resolve_backends
from swamla.train.optim import OptimizerConfig
from swamla.train.precision import has_bf16, measured_precision, resolve_device, resolve_precision
from swamla.train.racing import ENOUGH, Choice, forget_choices, kept_choices
from swamla.version import __version__

# Optional libraries, and the extra that installs them.
OPTIONAL = {
    "huggingface_hub": "hub",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "torchao": "fp8",
    "flash-linear-attention": "gpu",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Environment, devices, optional libraries, what `auto` chooses here, and a self-check of about ten seconds.
    Nothing is downloaded. The exit status is 1 if a check fails.

    json: print one JSON object.
    measure: measure again which precision and which attention paths are faster on this machine, e.g. if it was
        busy the last time.
    """

    json: bool = False
    measure: bool = False


def main(argv: list[str]) -> int:
    """Inspect, check, and print."""
    arguments, _ = parse(Arguments, argv, command="swamla doctor")
    device = resolve_device("auto")
    if arguments.measure:
        forget_choices()
    found = {
        "environment": _environment(),
        "devices": _devices(),
        "optional": {name: _version(name) for name in OPTIONAL},
        "auto": _choices(device),
        "kinds": {family: list(members_of(base)) for family, base in _FAMILIES.items()},
        "paths": [asdict(choice) for choice in _paths(device)],
        "backends": available(device),
        "storage": _storage(),
    }
    console = Console()
    if not arguments.json:
        _show(console, found)
    outcomes = []
    for outcome in run_checks(device):
        outcomes.append(outcome)
        if not arguments.json:
            mark = "✓" if outcome.ok else "✗"
            say_wrapped(console, outcome.detail, label=f"{mark} {outcome.name:<18}  ", indent=22)
    ok = all(outcome.ok for outcome in outcomes)
    if arguments.json:
        print(json.dumps(found | {"checks": [asdict(outcome) for outcome in outcomes], "ok": ok}))
    else:
        failed = sum(not outcome.ok for outcome in outcomes)
        seconds = sum(outcome.seconds for outcome in outcomes)
        verdict = "all is well" if ok else f"{failed} of {len(outcomes)} checks failed"
        say(console, f"\n{verdict} ({seconds:.1f} s)")
    return 0 if ok else 1


def _environment() -> dict[str, Any]:
    return {
        "swamla": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cpu": processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "bf16_instructions": has_bf16(torch.device("cpu")),
        **{name.replace(" ", "_"): how for name, how in prepared().items()},
    }


def _devices() -> list[dict[str, Any]]:
    """CUDA devices."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability})
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _choices(device: torch.device) -> dict[str, Any]:
    """The choices of "auto" on this machine."""
    precision = resolve_precision("auto", device)
    return {
        "device": device.type,
        "precision": precision,
        "backends": resolve_backends(tiny_model(torch.device("cpu")).config, device, precision),
    }


_FAMILIES: dict[str, type[Registered]] = {
    "mixers": MixerConfig,
    "FFNs": FFNConfig,
    "norms": NormConfig,
    "optimizers": OptimizerConfig,
    "sources": Source,
    "tasks": Task,
}


# Attention of a typical recipe, which the doctor measures in addition to the stored measurements of runs.
_MEASURED = LanguageModelConfig(
    width=384,
    blocks={"mha": BlockConfig(mixer=MHAConfig(n_heads=6)), "swa": BlockConfig(mixer=SWAConfig(n_heads=6))},
    pattern=("mha", "swa"),
)
_LENGTHS = (512, 4096)


def _paths(device: torch.device) -> list[Choice]:
    """All stored measurements of backends on this machine; those of `_MEASURED` are made now if missing."""
    found = list(kept_choices().values())
    if (precision := measured_precision(device)) is not None:
        found.append(precision)
    for length in _LENGTHS:
        found += fastest_paths(_MEASURED, device, resolve_precision("auto", device), length=length)[1]
    by_shape = {(choice.what, choice.dtype, choice.length): choice for choice in found}
    return [by_shape[shape] for shape in sorted(by_shape)]


def _storage() -> dict[str, Any]:
    """The cache's folder and size, and the free space there and here."""
    cache = default_cache_dir()
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    used = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.is_dir() else 0
    return {
        "cache": str(cache),
        "cache_bytes": used,
        "cache_free_bytes": shutil.disk_usage(existing).free,
        "here_free_bytes": shutil.disk_usage(".").free,
    }


def _show(console: Console, found: dict[str, Any]) -> None:
    environment, chosen, storage = found["environment"], found["auto"], found["storage"]
    free = [short(storage[name], "B") for name in ("cache_free_bytes", "here_free_bytes")]
    bf16 = "with bf16 instructions" if environment["bf16_instructions"] else "without bf16 instructions: fp32 is faster"
    devices = [f"{d['name']}, {short(d['memory_bytes'], 'B')}, sm {d['capability']}" for d in found["devices"]]
    rows = [
        ("swamla", f"{environment['swamla']} on Python {environment['python']}, torch {environment['torch']}"),
        ("system", environment["system"]),
        ("CPU", f"{environment['cpu']}, {bf16}"),
        ("cores", f"{environment['cores']}, of which torch uses {environment['threads']}"),
        ("memory", short(environment["memory_bytes"], "B")),
        ("waiting threads", environment["waiting_threads"]),
        ("freed memory", environment["freed_memory"]),
        ("CUDA", "; ".join(devices) or "no device"),
        *((name, found["optional"][name] or f"missing: pip install 'swamla[{OPTIONAL[name]}]'") for name in OPTIONAL),
        ("auto", f"{chosen['precision']} on {chosen['device']}; {describe(chosen['backends'])}"),
        *((family, ", ".join(kinds)) for family, kinds in found["kinds"].items()),
        *(("backends", text) for text in _available(found["backends"])),
        *(("fastest", _measured(choice)) for choice in found["paths"]),
        ("cache", f"{storage['cache']}, {short(storage['cache_bytes'], 'B')}"),
        ("disk", f"{free[0]} free there, {free[1]} here"),
    ]
    say_rows(console, rows)
    say(console, "")


def _measured(choice: dict[str, Any]) -> str:
    """As text: "attention causal, 6 heads, width 64, documents of about 512, bfloat16: sdpa 12 ms, tiles 18 ms"."""
    first, *others = sorted(choice["seconds"], key=lambda path: path != choice["chosen"])
    times = ", ".join(f"{path} {1e3 * choice['seconds'][path]:.3g} ms" for path in (first, *others))
    rounds = choice["rounds"]
    told = f"{rounds} rounds" if rounds >= ENOUGH else "the machine is too busy to tell: the default is kept"
    return f"{Choice(**choice).shape}: {times} ({told})"


def _available(backends: dict[str, dict[str, str]]) -> list[str]:
    """As texts, kinds with the same backends in one: "swa: reference, torch; not flex (needs a CUDA device)"."""
    kinds = defaultdict[str, list[str]](list)
    for kind, obstacles in backends.items():
        there = ", ".join(name for name, obstacle in obstacles.items() if not obstacle)
        missing = [f"{name} ({obstacle.partition(',')[0]})" for name, obstacle in obstacles.items() if obstacle]
        kinds[f"{there}; not {', '.join(missing)}" if missing else there].append(kind)
    return [f"{', '.join(names)}: {text}" for text, names in kinds.items()]
