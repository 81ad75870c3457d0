"""Reading prompts and generating behind them: tokens a second by prompt length and batch, bytes of the state."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu_models import filled, preset
from benchmarks.gpu_running import Figures, Place
from benchmarks.gpu_timing import timed, times, used
from swamla.bench.measuring import Timing
from swamla.model.language_model import LanguageModel, ModelState
from swamla.model.sampling import prefill
from swamla.train.backends import resolve_backends

SIZES = ((2048, 1), (2048, 32), (32768, 1), (32768, 32))  # prompt, batch; what needs most memory last
ROOM = 256  # tokens that are generated at most
LONG = 1 << 18  # tokens of prompts that are read once
TARGETS = {"small": 2500.0, "base": 1200.0, "large": 900.0, "moe-1b": 1500.0}  # tokens a second, batch 1, CUDA graph


@torch.inference_mode()
def generation(place: Place, name: str, local: str) -> Iterator[Figures]:
    """A preset in bf16: prompts through `prefill`, then one token after the other behind them."""
    config = preset(name, local, place)
    model = filled(config, place.device).to(torch.bfloat16).eval()
    uses = used(resolve_backends(config, torch.device(place.device)))
    for length, batch in ((40, 2),) if place.quick else SIZES:
        what: Figures = {"prompt": length, "batch": batch, "uses": uses}
        timing, state = _read(model, length, batch, place)
        yield {**what, "path": "prefill", "tokens_per_s": batch * length / timing.median, **times(timing)}
        next_B1 = torch.ones(batch, 1, dtype=torch.int64, device=place.device)
        timing = timed(partial(model.step, next_B1, state), place)
        yield {**what, "path": "eager", **_rate(batch, timing), "state_bytes": state.nbytes}


def _read(model: LanguageModel, length: int, batch: int, place: Place) -> tuple[Timing, ModelState]:
    """How long prompts take, and the state behind them."""
    prompts = torch.randint(model.config.vocab_size, (batch, length)).tolist()
    states = [model.init_state(batch, length + ROOM)]

    def read() -> None:
        states[0] = model.init_state(batch, length + ROOM)
        prefill(model, prompts, states[0])

    long = batch * length > LONG  # takes seconds, and shorter ones have warmed up what there is
    return timed(read, place, rounds=3, warmup=0 if long else 1), states[0]


def _rate(batch: int, timing: Timing) -> Figures:
    return {"tokens_per_s": batch / timing.median, **times(timing)}
