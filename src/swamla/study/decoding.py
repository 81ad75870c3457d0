"""The speed of generation of a study's arms, one sequence at a time, measured in turns when all runs have ended.

By the decoder that `swamla generate` uses, greedily, after a prompt as long as the rows of training and after one four
times as long. Kept in decoding.json.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from swamla.config import from_plain
from swamla.data.dataset import TrainingData
from swamla.files import read_json, write_text_atomically
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.study.folder import waited_for
from swamla.study.plan import Arm, Study
from swamla.train.precision import resolve_device

DECODING = "decoding.json"
NEW = 32  # tokens after the first one, which are timed
LONGER = 4  # times the rows of training
ROUNDS, SECONDS = 5, 20.0  # of all arms in turns, at most


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Generation of one sequence after a prompt of so many tokens.

    median, low, high: seconds of a token, with quartiles.  first: seconds to the first token, the median.
    tokens: how many were timed.  state: bytes of the state's tensors when it holds all of them.
    """

    prompt: int
    median: float
    low: float
    high: float
    first: float
    tokens: int
    state: int


def prompt_lengths(study: Study) -> tuple[tuple[int, ...], int]:
    """Lengths of the prompts, and how many tokens are generated after the first; both fit learned positions."""
    length = study.arms[0].config.train.block_size
    limits = [arm.config.model.learned_positions for arm in study.arms if arm.config.model.learned_positions]
    if not limits:
        return (length, LONGER * length), NEW
    new = min(NEW, min(limits) // 2)
    return tuple(sorted({min(each, min(limits) - new) for each in (length, LONGER * length)})), new


def measure_decoding(folder: Path, study: Study, dataset: TrainingData) -> dict[str, list[Generation]]:
    """Time generation of all arms in turns, A B C A B C …, once; later calls read what was found.

    Of untrained weights: what a token costs does not depend on them. All models are held at once.
    """
    with waited_for(folder, "decoding"):
        if not (folder / DECODING).exists():
            torch.set_num_threads(study.asked.threads)
            lengths, new = prompt_lengths(study)
            prompts = {length: _prompt(study, dataset, length) for length in lengths}
            found = _in_turns(study.arms, prompts, new)
            plain = {name: [asdict(each) for each in ones] for name, ones in found.items()}
            write_text_atomically(folder / DECODING, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    return read_decoding(folder)


def read_decoding(folder: Path) -> dict[str, list[Generation]]:
    """Arm → its generation after each prompt; empty if it was not measured."""
    file = folder / DECODING
    if not file.exists():
        return {}
    plain: dict[str, Any] = read_json(file, inside=folder)
    return {
        name: [from_plain(Generation, each, path=name, origin=str(file)) for each in ones]
        for name, ones in plain.items()
    }


def _prompt(study: Study, dataset: TrainingData, length: int) -> list[int]:
    """The first tokens of the training rows."""
    train = study.arms[0].config.train
    rows = dataset.rows(train.block_size, train.seed).batch(0, -(-length // train.block_size))
    ids: list[int] = rows.tokens_BT.flatten()[:length].tolist()
    return ids


def _in_turns(arms: Sequence[Arm], prompts: Mapping[int, list[int]], new: int) -> dict[str, list[Generation]]:
    decoders = {}
    for arm in arms:
        model = arm.config.model.build(seed=0).to(resolve_device(arm.config.train.device)).eval()
        decoders[arm.name] = Decoder(model)
    shortest = min(prompts)
    for decoder in decoders.values():  # what is built at first use is not timed
        _seconds(decoder, prompts[shortest], 1)
    first: dict[tuple[str, int], list[float]] = {}
    later: dict[tuple[str, int], list[float]] = {}
    begin = time.monotonic()
    for number in range(ROUNDS):
        if number and time.monotonic() - begin >= SECONDS:
            break
        for length, prompt in prompts.items():
            for name, decoder in decoders.items():
                seconds = _seconds(decoder, prompt, new)
                first.setdefault((name, length), []).append(seconds[0])
                later.setdefault((name, length), []).extend(seconds[1:])
    return {
        name: [
            _generation(length, first[name, length], later[name, length], _state_bytes(decoder, length + new))
            for length in prompts
        ]
        for name, decoder in decoders.items()
    }


def _seconds(decoder: Decoder, prompt: list[int], new: int) -> list[float]:
    """Seconds to the first token, then of each further one."""
    times = [time.perf_counter()]

    def on_token(row: int, token: int) -> None:
        times.append(time.perf_counter())

    decoder.generate([prompt], new + 1, sampling=Sampling(temperature=0.0), on_token=on_token)
    return [after - before for before, after in pairwise(times)]


def _state_bytes(decoder: Decoder, length: int) -> int:
    size: int = decoder.model.init_state(1, length).nbytes
    return size


def _generation(prompt: int, first: Sequence[float], later: Sequence[float], state: int) -> Generation:
    ends = statistics.quantiles(later, n=4, method="inclusive") if len(later) > 1 else [*later] * 3
    low, median, high = ends
    return Generation(
        prompt=prompt,
        median=median,
        low=low,
        high=high,
        first=statistics.median(first),
        tokens=len(later),
        state=state,
    )
