"""Measure prefill and decoding as in `generate`: rates, and the size of the state."""

import time
from itertools import pairwise

from swamla.bench.measuring import Timing
from swamla.bench.results import Row
from swamla.bench.synthetic import random_prompt
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.accounting import all_mha_state_bytes, count_parameters, forward_flops, state_bytes
from swamla.model.language_model import LanguageModel, LanguageModelConfig

NEW = 33  # new tokens per round: one by prefill, 32 by decoding steps
_ROUNDS = 5


def expected_seconds(config: LanguageModelConfig, prompt: int, *, flops: float, copy_bytes: float) -> float:
    """Estimated seconds of a round, given the machine's FLOP/s of matrix products and its copy rate.

    Each new token reads all weights once, at half the bytes that a copy moves.
    """
    return forward_flops(config, prompt) / flops + NEW * 4 * count_parameters(config).active / (copy_bytes / 2)


def name_of(prompt: int, decoding: str) -> str:
    """The name of a row."""
    return f"prompt {prompt:,}" + (f", {decoding}" if decoding != "eager" else "")


def measure_generation(model: LanguageModel, prompt: int, *, limit: float, decoding: str = "eager") -> Row:
    """Time prefill of a prompt and greedy decoding after it, for one sequence, in the weights' dtype.

    decoding: see `Decoder`. limit: seconds after which no further round starts, but at least one round runs.
    """
    begin = time.monotonic()
    ids = random_prompt(prompt, model.config.vocab_size)
    decoder = Decoder(model, decoding)
    decoder.generate([ids[:8]], 2, sampling=Sampling(temperature=0.0))
    first: list[float] = []
    between: list[float] = []
    while not first or (len(first) < _ROUNDS and time.monotonic() - begin < limit):
        seconds = _token_seconds(decoder, ids)
        first.append(seconds[0])
        between += seconds[1:]
    prefill, decode = Timing.of(first), Timing.of(between)
    length, element_bytes = prompt + NEW - 1, model.embedding.weight.element_size()
    return {
        "name": name_of(prompt, decoding),
        "decoding": decoding,
        "prompt": prompt,
        "prefill_tokens_per_s": prompt / prefill.median,
        "decode_tokens_per_s": 1 / decode.median,
        "first_token_s": prefill.median,
        "token_s": decode.median,
        "token_low_s": decode.low,
        "token_high_s": decode.high,
        "rounds": prefill.rounds,
        "state_bytes": model.init_state(1, length).nbytes,
        "accounted_state_bytes": state_bytes(model.config, length, element_bytes=element_bytes),
        "all_mha_state_bytes": all_mha_state_bytes(model.config, length, element_bytes=element_bytes),
    }


def _token_seconds(decoder: Decoder, ids: list[int]) -> list[float]:
    """Seconds to the first new token, which are those of prefill, and between later tokens."""
    times = [time.perf_counter()]

    def on_token(row: int, token: int) -> None:
        times.append(time.perf_counter())

    decoder.generate([ids], NEW, sampling=Sampling(temperature=0.0), on_token=on_token)
    return [later - earlier for earlier, later in pairwise(times)]
