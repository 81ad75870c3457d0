"""Training steps of whole models, ours and others': tokens per second, share of the matmul rate, memory, graphs."""

import re
import sys
from collections import Counter
from collections.abc import Iterator

import torch

from benchmarks.gpu_models import OurStep, TheirStep, batch_of, gpt2_step, preset, shape_of
from benchmarks.gpu_running import Figures, Place
from benchmarks.gpu_timing import matmul_flops, timed, times, used
from swamla.bench.measuring import seconds_of
from swamla.data.packing import Batch
from swamla.train.precision import Chosen
from swamla.train.utilisation import peak_of

ROWS, LENGTH = 8, 2048  # of a step: 16,384 tokens
DOCUMENTS = 4.0  # mean documents per packed row
TARGETS = {  # preset, local mixer, precision → tokens per second, peak bytes with AdamW
    ("small", "swa", "bf16"): (300e3, 10e9),
    ("small", "gdn", "bf16"): (240e3, None),
    ("base", "swa", "bf16"): (105e3, 28e9),
    ("base", "swa", "fp8"): (122e3, None),
    ("moe-1b", "swa", "bf16"): (180e3, None),
}


def our_training(
    place: Place,
    name: str,
    local: str,
    *,
    precision: Chosen = "bf16",
    compiled: bool = True,
    documents: float = DOCUMENTS,
) -> Iterator[Figures]:
    """Steps of a preset on rows of `documents` documents each, with other boundaries in every batch."""
    config = preset(name, local, place)
    compiled = compiled and not place.quick
    batches = [_batch(place, config.vocab_size, documents, seed) for seed in range(4)]
    step = OurStep(config, batches, place, precision=precision, compiled=compiled)
    tokens, peak = TARGETS.get((name, local, precision), (None, None))
    uses = [*used(step.backends), *(["model/compiled"] if compiled else [])]
    targets = {"target_tokens_per_s": tokens, "target_peak_bytes": peak}
    yield {**_measured(step, place), "documents_a_row": documents, **targets, "uses": uses}


def gpt2_training(place: Place, name: str, *, compiled: bool = True) -> Iterator[Figures]:
    """Steps of a GPT-2 with a preset's width, depth and vocabulary."""
    shape = shape_of(name, place)
    yield _measured(
        gpt2_step(shape, _batch(place, shape.vocabulary), place, compiled=compiled and not place.quick), place
    )


def their_training(place: Place, library: str, name: str, *, compiled: bool = False) -> Iterator[Figures]:
    """Steps of another contender, with a preset's width, depth and vocabulary."""
    shape, compiled = shape_of(name, place), compiled and not place.quick
    yield _measured(TheirStep(library, shape, _batch(place, shape.vocabulary), place, compiled=compiled), place)


def _batch(place: Place, vocabulary: int, documents: float = 1.0, seed: int = 0) -> Batch:
    rows, length = (2, 32) if place.quick else (ROWS, LENGTH)
    return batch_of(rows, length, vocabulary, documents, seed)


def _measured(step: OurStep | TheirStep, place: Place) -> Figures:
    """The figures of a step, and its share of the matmul rate measured right after it."""
    first_s, first_graphs = seconds_of(step), _graph_count()
    on_gpu = place.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timing = timed(step, place, warmup=3, limit=5.0)
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
    tokens_per_s = step.n_tokens / timing.median
    flops = tokens_per_s * step.flops_per_token
    return {
        "tokens_per_s": tokens_per_s,
        "of_matmul_share": flops / matmul_flops(place),
        "of_peak_share": flops / peak_of(torch.device(place.device), "bf16").flops,
        "peak_bytes": peak_bytes,
        **times(timing),
        "first_step_s": first_s,
        "parameters": step.parameters,
        "active": step.active,
        **_graphs(first_graphs),
        "backends": ", ".join(f"{op}: {backend}" for op, backend in step.backends.items()) or None,
        "notes": "; ".join(step.notes) or None,
    }


def _graph_count() -> int:
    """The number of compiled graphs so far; 0 if the compiler was never imported."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _graphs(first: int) -> Figures:
    """The number of graphs, how many later batches added, the number of graph breaks, and where they are."""
    if not _graph_count():
        return {}
    from torch._dynamo.utils import counters

    places = Counter[str]()
    for reason, count in counters["graph_break"].items():
        called = re.search(r"qualname: ([\w.<>]+)", reason)
        places[called[1] if called else reason.splitlines()[0]] += count
    broken = ", ".join(f"{place} ×{count}" for place, count in places.most_common()) or None
    graphs = {"graphs": _graph_count(), "later_graphs": _graph_count() - first}
    return {**graphs, "graph_breaks": places.total(), "broken_at": broken}
