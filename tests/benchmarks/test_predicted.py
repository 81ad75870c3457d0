"""The arithmetic of predicted GPU steps, by other arithmetic; and bytes that can be counted by hand."""

import importlib.util
import os
import subprocess
import sys

import pytest

from benchmarks.gpu_models import preset
from benchmarks.gpu_running import Place
from benchmarks.lowered import Counts, Lowered
from benchmarks.predicted import predicted

ROOT = __file__.rpartition("/tests/")[0]


def counted(kernels: int, size: float) -> Lowered:
    graph = Counts(kernels=kernels, kernel_bytes=size, calls=0, call_bytes=0.0, each=())
    return Lowered(forward=graph, backward=graph, saved=0.0)


def test_a_step_of_small_is_the_sum_of_what_its_equations_say() -> None:
    config = preset("small", "swa", Place())
    step = predicted(config, {"swa": counted(10, 1e9), "mla": counted(20, 2e9)})
    tokens, ms = 16_384, 1e3
    # swamla info small: 161,507,328 parameters but the embedding, all in products but 25 norms of 1024.
    assert step.products * ms == pytest.approx(6 * 161_507_328 * tokens / 620e12 * ms)
    assert step.experts == 0
    # The head: three products of 1024 × 50304; its logits four times in 16 bits; dW read and written by four chunks.
    head = 1024 * 50304
    assert step.head * ms == pytest.approx(
        (6 * head * tokens / 700e12 + (8 * tokens * 50304 + 48 * head) / 2.9e12) * ms
    )
    # Four latent layers of 16 heads, 192 + 128 wide, on average 1024 keys; seven half-products of 2 FLOPs.
    assert step.causal * ms == pytest.approx(4 * 7 * 16 * 320 * 1024 * tokens / 450e12 * ms)
    # Eight windowed layers of 16 heads of 64: 256 keys, 4 sinks and what blocks of 128 add.
    assert step.windowed * ms == pytest.approx(8 * 14 * 16 * 64 * 516 * tokens / 200e12 * ms)
    assert step.rule == 0
    # 8 × (1 + 1) + 4 × (2 + 2) GB, and 8 × 20 + 4 × 40 launches of which a quarter is seen.
    assert step.pointwise * ms == pytest.approx(32e9 / 2.9e12 * ms + 320 * 2.5e-3 / 4)
    assert step.optimizer * ms == pytest.approx(40 * 213_018_624 / 2.9e12 * ms)
    assert step.seconds == pytest.approx(sum(vars(step).values()))
    assert step.of_large == pytest.approx(step.seconds - 0.75 * (step.optimizer + step.rest))


def test_experts_count_as_many_as_a_token_goes_to_and_flash_pads_no_heads() -> None:
    blocks = {"swa": counted(1, 1.0), "mla": counted(1, 1.0)}
    moe = preset("moe-1b", "swa", Place())
    ffn = moe.blocks["mla"].ffn
    inner, hidden = ffn.routed_dims(moe.width)
    layers = moe.pattern.count("mla")
    assert predicted(moe, blocks).experts == pytest.approx(
        layers * 6 * 3 * inner * hidden * ffn.n_activated * 16_384 / 350e12
    )
    base = preset("base", "swa", Place())
    flex, flash = (predicted(base, blocks, flash=flag).windowed for flag in (False, True))
    assert flex / flash == pytest.approx((128 * 516 / 200) / (96 * 452 / 300))  # heads of 96


def run(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/src"}
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which Inductor schedules with")
def test_bytes_of_products_are_those_counted_by_hand() -> None:
    done = run("from benchmarks.lowered import main; raise SystemExit(main(['small', '--kernels']))")
    assert done.returncode == 0, done.stderr
    # Reads 16,384 × 1024 inputs and 3072 × 1024 weights, writes 16,384 × 3072 queries, keys and values, in 16 bits.
    assert f"{2 * (16_384 * 1024 + 3072 * 1024 + 16_384 * 3072) / 1e6:9.1f} MB call" in done.stdout
    # The SwiGLU reads both halves of 16,384 × 5504 and writes the product.
    assert f"{2 * 16_384 * (5504 + 2752) / 1e6:9.1f} MB      " in done.stdout


def test_without_triton_it_says_what_is_missing() -> None:
    done = run("import sys; sys.modules['triton'] = None; from benchmarks.lowered import main; main(['small'])")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "benchmarks.lowered needs triton: pip install triton"
