"""`swamla prepare` compared with a bare call of `tokenizers`, on the same synthetic text, in the same run.

    python benchmarks/prepare.py            # 200 MB, all cores
    python benchmarks/prepare.py --mb 20 --workers 1

The text depends only on the seed: words with Zipf frequencies, punctuation, numbers and lines of code, in documents of
a few hundred words, as jsonl. The tokenizer is a BPE of 8,192 trained on the first documents. `tokenizers` encodes
texts in memory by `encode_batch`, on one core and on all cores. Its rates count encoding only; those of prepare include
reading, parsing, writing, checksums and starting processes. On a busy machine compare rates by CPU time.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from swamla.data.config import DataConfig
from swamla.data.preparing import prepare
from swamla.data.tokenizer import make_tokenizer
from swamla.data.units import available_cores

LETTERS = "etaoinshrdlucmfwypvbgkqjxz"


def make_text(path: Path, size: int, seed: int = 0) -> None:
    """Write about `size` bytes of jsonl."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(LETTERS, range(26, 0, -1), k=draw.randint(2, 11))) for _ in range(50_000)]
    totals = [0.0]
    for rank in range(1, len(words) + 1):
        totals.append(totals[-1] + 1 / rank)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            chosen = draw.choices(words, cum_weights=totals[1:], k=draw.randint(50, 900))
            for at in range(0, len(chosen), draw.randint(8, 15)):
                chosen[at] = draw.choice(
                    (f"{chosen[at].capitalize()},", f"{draw.randint(0, 9999)}.", "\n    x = f(y)\n")
                )
            written += file.write(json.dumps({"text": " ".join(chosen)}) + "\n")


def read_texts(path: Path, most: int) -> list[str]:
    """The first texts, about `most` characters in all."""
    texts, size = [], 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if size >= most:
                break
    return texts


SINGLE_CALL = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = json.load(open(sys.argv[2]))
tokenizer.encode_batch(texts[:100], add_special_tokens=False)
begin, cpu = time.perf_counter(), time.process_time()
encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
print(json.dumps([sum(len(each.ids) for each in encoded), seconds, cpu]))
"""


class Rate(NamedTuple):
    """Tokens, wall-clock seconds, and CPU seconds over all cores."""

    tokens: int
    seconds: float
    cpu: float

    def __str__(self) -> str:
        by_cpu = f"{self.tokens / self.cpu:10,.0f} per CPU second"
        return f"{self.tokens / self.seconds:12,.0f} tokens/s {by_cpu}"


def single_call(tokenizer: Path, texts: Path, cores: int) -> Rate:
    """One `encode_batch` in a new process with `cores` threads."""
    threads = {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false"}
    command = [sys.executable, "-c", SINGLE_CALL, str(tokenizer), str(texts)]
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=True)
    return Rate(*json.loads(done.stdout))


def prepared(config: DataConfig, workers: int) -> tuple[Rate, int]:
    """The rate of `prepare`, its processes included, and the bytes of text that it encoded."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    dataset = prepare(config, workers=workers)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    tokens = dataset.train.n_tokens + dataset.held_out.n_tokens
    return Rate(tokens, seconds, cpu), dataset.train.n_bytes + dataset.held_out.n_bytes


def cpu_seconds() -> float:
    """CPU seconds of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Generate the text, run both, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=200, help="megabytes of text (200)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (all cores)")
    parser.add_argument("--sample_mb", type=int, default=20, help="megabytes given to the single call (20)")
    arguments = parser.parse_args()
    workers = arguments.workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, tokenizer, sample = (folder / part for part in ("text.jsonl", "tokenizer.json", "sample.json"))
        make_text(text, arguments.mb * 10**6)
        make_tokenizer("bpe:8192", read_texts(text, 4_000_000)).save(tokenizer)
        sample.write_text(json.dumps(read_texts(text, arguments.sample_mb * 10**6)))
        before = single_call(tokenizer, sample, 1)
        ours, size = prepared(
            DataConfig(source=str(text), tokenizer=str(tokenizer), cache_dir=str(folder / "cache")), workers
        )
        after = single_call(tokenizer, sample, 1)
        every = single_call(tokenizer, sample, workers)
    one = Rate(*(sum(pair) for pair in zip(before, after, strict=True)))
    rows = (
        (f"prepare, {workers} processes", ours),
        ("encode_batch, 1 core, before", before),
        ("encode_batch, 1 core, after", after),
        (f"encode_batch, {workers} cores", every),
    )
    for label, rate in rows:
        print(f"{label:<30}{rate}")
    speed, single = ours.tokens / ours.seconds, one.tokens / one.seconds
    print(
        f"prepare: {ours.tokens:,} tokens, {size:,} bytes, {ours.seconds:.1f} s, {size / ours.seconds / 1e6:.1f} MB/s"
    )
    print(f"per core, wall clock: {speed / workers / single:.0%} of encode_batch on one core")
    print(f"per core, CPU time:    {ours.tokens / ours.cpu / (one.tokens / one.cpu):.0%}")
    print(f"all cores, wall clock: {speed * every.seconds / every.tokens:.0%} of encode_batch on {workers}")


if __name__ == "__main__":
    main()
