"""Prefill and decoding: tokens per second by prompt length and batch size, and bytes of the state."""

from collections.abc import Iterator

import torch

from benchmarks.gpu_gates import OUTPUT, hybrid, relative
from benchmarks.gpu_models import filled, preset
from benchmarks.gpu_running import Figures, Place
from benchmarks.gpu_timing import timed, times, used
from swamla.bench.measuring import Timing
from swamla.inference.decoding import Decoder, decodings_on, prefill
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState
from swamla.train.backends import resolve_backends

SIZES = ((2048, 1), (2048, 32), (32768, 1), (32768, 32))  # prompt, batch; the largest last
ROOM = 256  # most tokens generated
LONG = 1 << 18  # prompts with more tokens in all have no warm-up
TARGETS = {"small": 2500.0, "base": 1200.0, "moe-1b": 1500.0}  # tokens per second, batch 1, CUDA graph


@torch.inference_mode()
def generation(place: Place, name: str, local: str) -> Iterator[Figures]:
    """A preset in bf16: prefill of the prompts, then decoding token by token."""
    config = preset(name, local, place)
    model = filled(config, place.device).to(torch.bfloat16).eval()
    uses = used(resolve_backends(config, torch.device(place.device)))
    for length, batch in ((40, 2),) if place.quick else SIZES:
        what: Figures = {"prompt": length, "batch": batch}
        timing, state = _read(model, length, batch, place)
        rate = batch * length / timing.median
        yield {**what, "path": "prefill", "tokens_per_s": rate, **times(timing), "uses": uses}
        for decoding in decodings_on(place.device):
            figures = _decoded(model, state, decoding, place)
            target = TARGETS[name] if (decoding, batch) == ("graph", 1) else None
            uses_too = [*uses, f"decoding/{decoding}"]
            yield {**what, "path": decoding, **figures, "target_tokens_per_s": target, "uses": uses_too}


def _read(model: LanguageModel, length: int, batch: int, place: Place) -> tuple[Timing, ModelState]:
    """The time of prefill, and the state after it."""
    prompts = torch.randint(model.config.vocab_size, (batch, length)).tolist()
    states, decoder = [model.init_state(batch, length + ROOM)], Decoder(model)

    def read() -> None:
        states[0] = model.init_state(batch, length + ROOM)
        prefill(decoder.model, prompts, states[0])

    long = batch * length > LONG  # takes seconds, and shorter prompts were the warm-up
    return timed(read, place, rounds=3, warmup=0 if long else 1), states[0]


def _decoded(model: LanguageModel, state: ModelState, decoding: str, place: Place) -> Figures:
    """Greedy decoding; each token is copied to the host before the next step, as in `generate`."""
    greedy, chosen = Sampling(temperature=0), [1] * len(state.length_B)
    step = Decoder(model, decoding).steps(state)

    def one_more() -> None:
        chosen[:] = greedy.choose(step(chosen), [])

    timing = timed(one_more, place, rounds=60)
    return {"tokens_per_s": len(chosen) / timing.median, **times(timing), "state_bytes": state.nbytes}


@torch.inference_mode()
def decoding_gate(place: Place, decoding: str) -> Iterator[Figures]:
    """Every mixer in fp32: prefill and decoding against the reference's forward pass on the whole sequence."""
    length, prompt = (60, 40) if place.quick else (300, 200)  # past 256, from where decoding uses a second graph
    reference, fast = (filled(hybrid(place, backend), place.device) for backend in ("reference", "auto"))
    fast.load_state_dict(reference.state_dict())
    tokens_BT = torch.randint(fast.config.vocab_size, (2, length), device=place.device)
    expected_BTV = reference(tokens_BT)[:, prompt - 1 : -1]
    state = fast.init_state(2, length)
    decoder = Decoder(fast, decoding)
    step = decoder.steps(state)
    found = [prefill(decoder.model, tokens_BT[:, :prompt].tolist(), state)]
    found += [step(tokens_B.tolist()).clone() for tokens_B in tokens_BT[:, prompt:-1].unbind(1)]
    error = relative(torch.stack(found, dim=1), expected_BTV)
    yield {"case": f"gdn swa mla, {decoding}", "output_error": error, "passed": int(error <= OUTPUT)}
