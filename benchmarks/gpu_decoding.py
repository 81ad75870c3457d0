"""Reading prompts and generating behind them: tokens a second by prompt length and batch, bytes of the state."""

from collections.abc import Iterator

import torch

from benchmarks.gpu_models import filled, preset
from benchmarks.gpu_running import Figures, Place
from benchmarks.gpu_timing import timed, times, used
from swamla.model.language_model import LanguageModel, ModelState
from swamla.model.sampling import prefill
from swamla.train.backends import resolve_backends

SIZES = ((2048, 1), (2048, 32), (32768, 1), (32768, 32))  # prompt, batch; what needs most memory last
ROOM = 256  # tokens that are generated at most
TARGETS = {"small": 2500.0, "base": 1200.0, "large": 900.0, "moe-1b": 1500.0}  # tokens a second, batch 1, CUDA graph


@torch.inference_mode()
def generation(place: Place, name: str, local: str) -> Iterator[Figures]:
    """A preset in bf16: prompts through `prefill`, then one token after the other."""
    config = preset(name, local, place)
    model = filled(config, place.device).to(torch.bfloat16).eval()
    uses = used(resolve_backends(config, torch.device(place.device)))
    for length, batch in ((40, 2),) if place.quick else SIZES:
        what: Figures = {"prompt": length, "batch": batch}
        prompts = torch.randint(config.vocab_size, (batch, length)).tolist()
        state = model.init_state(batch, length + ROOM)

        def read(prompts: list[list[int]] = prompts, batch: int = batch, length: int = length) -> None:
            prefill(model, prompts, model.init_state(batch, length + ROOM))

        timing = timed(read, place, rounds=3, warmup=1)
        yield {
            **what,
            "path": "prefill",
            "tokens_per_s": batch * length / timing.median,
            **times(timing),
            "uses": uses,
        }
        prefill(model, prompts, state)
        timing = timed(lambda state=state, batch=batch: one_step(model, state, batch), place, rounds=30)
        yield {
            **what,
            "path": "eager",
            "tokens_per_s": batch / timing.median,
            **times(timing),
            "state_bytes": state.nbytes,
        }


def one_step(model: LanguageModel, state: ModelState, batch: int) -> None:
    """One token for every row."""
    model.step(torch.ones(batch, 1, dtype=torch.int64, device=model.device), state)
