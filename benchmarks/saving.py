"""How long a checkpoint blocks training, synchronous and in the background, and how much it slows steps meanwhile.

    python benchmarks/saving.py --megabytes 600 --device cpu --folder /somewhere/on/the/disk

Both are measured alternately; figures are medians. A step is a matrix product of about a tenth of a second.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from swamla import process

process.prepare()  # as the command line does

import torch

from swamla.checkpoint import Saver


def step(a: torch.Tensor, count: int) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    for _ in range(count):
        torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    names = [f"layer{i}" for i in range(100)]
    numbers = arguments.megabytes * 10**6 // 4 // len(names)
    tensors = {"model": {name: torch.randn(numbers, device=arguments.device) for name in names}}
    a = torch.randn(2048, 2048, device=arguments.device)
    count = max(1, round(0.1 / min(step(a, 1) for _ in range(5))))
    alone = statistics.median(step(a, count) for _ in range(20))
    still: dict[bool, list[float]] = {False: [], True: []}
    placed: dict[bool, list[float]] = {False: [], True: []}
    during: list[float] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        savers = {way: Saver(Path(folder) / str(way), keep_last=2, background=way) for way in (False, True)}
        for number in range(1, arguments.saves + 2):
            for way, saver in savers.items():
                begin = time.perf_counter()
                saver.save(number, tensors=tensors, state={})
                stood = time.perf_counter() - begin
                while not (done := saver.saved()):
                    during.append(step(a, count))
                assert done[0].error is None, done[0].error
                if number > 1:  # the first also allocates the memory for copies
                    still[way].append(stood)
                    placed[way].append(time.perf_counter() - begin)
    print(
        json.dumps(
            {
                "megabytes": arguments.megabytes,
                "device": arguments.device,
                "stands_still_seconds": {"at_once": _median(still[False]), "background": _median(still[True])},
                "in_place_after_seconds": {"at_once": _median(placed[False]), "background": _median(placed[True])},
                "step_seconds": {"alone": round(alone, 4), "while_one_is_written": _median(during)},
            }
        )
    )


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


if __name__ == "__main__":
    main()
