"""Figures of a run by other arithmetic than the run's own."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from swamla import distributed
from swamla.data.config import DataConfig
from swamla.data.dataset import Throughput
from swamla.data.preparing import prepare
from swamla.train import train, utilisation
from swamla.train.parallel.strategy import clip, seed_ranks
from swamla.train.step import StepResult
from swamla.train.tracking import step_log
from swamla.train.tracking.metrics import read_metrics
from swamla.train.tracking.step_log import Epochs, StepLog
from swamla.train.utilisation import Peak, matmul_flops, peak_of

from .helpers import tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Most of a tiny run's time."""
    monkeypatch.setattr("swamla.train.loop.plot_losses", lambda *args, **options: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peak_is_what_a_product_computes_over_the_time_of_the_fastest(dtype, monkeypatch):
    """By a clock on which products take 3, 2 and then 4 s, and operations that PyTorch's own counter counts."""
    seconds, now = [3.0, 2.0], [0.0]

    def timed(multiply):
        def run(a, b):
            now[0] += seconds.pop(0) if seconds else 4.0
            return multiply(a, b)

        return run

    monkeypatch.setattr(utilisation, "_clock", lambda: now[0])
    monkeypatch.setattr(torch, "matmul", timed(torch.matmul))
    monkeypatch.setattr(utilisation, "linear", timed(torch.nn.functional.linear))
    with FlopCounterMode(display=False) as counter:
        found = matmul_flops(CPU, dtype, seconds=11.0, size=96)
    rounds = 3  # at least, though the 11 s are over in the second
    assert now[0] == 3 + 2 + 4 * (2 * rounds - 2)
    assert found == counter.get_total_flops() / (2 * rounds) / 2.0


def test_the_peak_of_a_run_is_that_measurement(monkeypatch):
    utilisation._measured_once.cache_clear()
    asked = []
    monkeypatch.setattr(utilisation, "matmul_flops", lambda *args, **options: asked.append(args) or 1.5e12)
    for precision, kind in (("fp32", "float32"), ("bf16", "bfloat16")):
        peak = peak_of(CPU, precision)
        assert peak.flops == 1.5e12
        assert peak.name == f"1.5 TFLOP/s, measured here on a {kind} product of 1024³"
    assert asked == [(CPU, torch.float32), (CPU, torch.bfloat16)]
    utilisation._measured_once.cache_clear()


class Told:
    """Stands in for the records and the display of a run."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.shown: list[tuple[float, float, dict[str, float]]] = []

    def write(self, step, values):
        self.records.append(dict(values))

    def update(self, progress, seconds, values):
        self.shown.append((progress, seconds, dict(values)))


def test_a_steps_figures_are_those_of_all_ranks(monkeypatch):
    monkeypatch.setattr(step_log, "peak_of", lambda device, precision: Peak(flops=8e9, name=""))
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "on_main", lambda work: work())
    config, told = tiny_config(steps=40), Told()
    state = SimpleNamespace(device=CPU, precision="fp32", step=10, seconds=5.0, tokens=77, model=None)
    log = StepLog(config, state, told, told, bits_per_nat=0.25, epochs=Epochs({"text": 154}))
    result = StepResult(loss=2.0, grad_norm=0.5, tokens=600, statistics={})
    # three ranks of 8 GFLOP/s could have done 12 GFLOP in half a second, and had 3 to do
    log.write(result, lr=0.1, flops=3e9, seconds=0.5)
    log.write(result, lr=0.1, flops=3e9, seconds=1.0)
    first, second = told.records
    assert (first["mfu"], second["mfu"]) == (0.25, 0.125)
    assert first["epoch"] == 0.5
    assert (first["tokens_per_second"], second["tokens_per_second"]) == (1200, 600)
    assert (first["bits_per_byte"], first["tokens"], first["elapsed"]) == (0.5, 77, 5.0)
    shown = [values["tokens_per_second"] for _, _, values in told.shown]
    assert shown == pytest.approx([1200, (0.9 * 600 + 600) / (0.9 * 0.5 + 1.0)])
    assert [(progress, seconds) for progress, seconds, _ in told.shown] == [(0.25, 5.0)] * 2


def test_bits_per_byte_of_training_count_the_end_of_every_document(tmp_path):
    """Of documents that are short, ends are a good part of what is learned: a label each, without a byte."""
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"é{i:03}" for i in range(40)]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    data = DataConfig(source=str(folder), tokenizer="byte", held_out_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    dataset = prepare(data)
    documents = dataset.train.n_documents
    assert dataset.bytes_per_label == pytest.approx(documents * 5 / (documents * (5 + 1)))  # é is two bytes
    assert dataset.bytes_per_token == 1.0
    assert sorted(dataset.held_out_text().decode()) == sorted(
        "".join(texts)[:0] + dataset_text(dataset.held_out, dataset)
    )
    train(tiny_config(steps=2), tmp_path / "run", dataset=dataset, console=Console(file=io.StringIO()))
    for record in read_metrics(tmp_path / "run/metrics.jsonl"):
        # a row of 6 labels is a document of 5 bytes
        assert record["bits_per_byte"] == pytest.approx(6 * record["loss"] * math.log2(math.e) / 5)
        assert record["tokens"] == 4 * 32 * record["step"]


def dataset_text(split, dataset) -> str:
    return "".join(dataset.tokenizer.decode(split.document(i).tolist()) for i in range(split.n_documents))


def test_ranks_steps_and_seeds_draw_dropout_of_their_own_and_the_same_again(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)

    def draw(seed: int, step: int, rank: int) -> tuple[float, ...]:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        seed_ranks(seed, step)
        return tuple(torch.rand(8).tolist())

    cases = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 11) for rank in (0, 1, 2)]
    with torch.random.fork_rng():
        drawn = [draw(*case) for case in cases]
        assert len(set(drawn)) == len(cases)
        assert [draw(*case) for case in cases] == drawn


@pytest.mark.parametrize(("norm", "scale"), [(10.0, 0.2), (2.5, 0.8), (2.0, 1.0), (0.1, 1.0)])
def test_clipping_leaves_a_gradient_of_the_largest_norm_allowed(norm, scale):
    gradients = [torch.tensor([0.6 * norm]), torch.tensor([[0.8 * norm]])]
    clip(gradients, norm, 2.0)
    assert [g.item() for g in gradients] == pytest.approx([0.6 * norm * scale, 0.8 * norm * scale], rel=1e-6)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            Throughput(tokens=3000, bytes=9_000_000, seconds=2.0, workers=3),
            "3,000 tokens in 2.0 s by 3 processes: 1,500 tokens/s, 4.5 MB/s",
        ),
        (
            Throughput(tokens=10, bytes=500_000, seconds=0.25, workers=1),
            "10 tokens in 0.2 s by 1 process: 40 tokens/s, 2.0 MB/s",
        ),
    ],
)
def test_throughput(found: Throughput, text: str):
    assert str(found) == text


def test_memory_is_told_in_bytes(tmp_path: Path):
    """Beside what Linux tells of a process, in kB."""
    told = utilisation.peak_memory(CPU)
    status = Path("/proc/self/status")
    if not status.exists():
        assert told > 50e6
        return
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    assert told == pytest.approx(1024 * int(line.split()[1]), rel=0.05)
