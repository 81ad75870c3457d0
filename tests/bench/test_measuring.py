"""Timings take turns and keep their limit, ceilings are rates, and memory is seen where it is taken."""

import gc
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from swamla.bench import measuring
from swamla.bench.measuring import Timing, ceilings, interleaved, machine, peak_memory, peak_memory_of_child

MIB = 1 << 20


class Clock:
    """Time that passes only where a contender says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.ran: list[str] = []
        monkeypatch.setattr(measuring, "_clock", lambda: self.now)

    def contender(self, name: str, *seconds: float) -> Callable[[], None]:
        """One that takes these times in turn, the last one for ever."""
        left = list(seconds)

        def run() -> None:
            self.ran.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_contenders_take_turns_and_the_warm_up_is_not_timed(clock: Clock) -> None:
    found = interleaved(
        {"a": clock.contender("a", 100.0, 1.0), "b": clock.contender("b", 100.0, 2.0)}, rounds=3, warmup=1
    )
    assert clock.ran == ["a", "b"] * 4
    assert found == {
        "a": Timing(median=1.0, low=1.0, high=1.0, rounds=3),
        "b": Timing(median=2.0, low=2.0, high=2.0, rounds=3),
    }


def test_low_and_high_are_the_quartiles(clock: Clock) -> None:
    found = interleaved({"a": clock.contender("a", 5.0, 1.0, 4.0, 2.0, 3.0)}, rounds=5, warmup=0)
    assert found["a"] == Timing(median=3.0, low=2.0, high=4.0, rounds=5)


def test_no_round_begins_after_the_limit_and_every_contender_has_as_many(clock: Clock) -> None:
    pair = {"a": clock.contender("a", 1.0), "b": clock.contender("b", 2.0)}
    found = interleaved(pair, rounds=100, warmup=1, limit=8.0)
    assert {name: timing.rounds for name, timing in found.items()} == {"a": 2, "b": 2}  # 3 s of warm-up, 3 s a round


def test_a_limit_that_is_over_at_once_leaves_one_round(clock: Clock) -> None:
    found = interleaved({"a": clock.contender("a", 7.0)}, rounds=100, warmup=0, limit=0.0)
    assert found["a"] == Timing(median=7.0, low=7.0, high=7.0, rounds=1)


def test_ctrl_c_passes_through() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleaved({"a": stop}, rounds=1)


def test_ceilings_are_rates_that_a_processor_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measuring._COPIED, "cpu", 1 << 24)
    found = ceilings(seconds=0.05)
    assert found.keys() == {"fp32_flops", "bf16_flops", "copy_bytes"}
    assert 1e8 < found["fp32_flops"] < 1e14
    assert 1e7 < found["bf16_flops"] < 1e15
    assert 1e7 < found["copy_bytes"] < 1e13


def test_a_copy_reads_and_writes_each_byte(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "matmul_flops", lambda device, dtype, *, seconds: 1.0)
    monkeypatch.setitem(measuring._COPIED, "cpu", 1 << 12)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: setattr(clock, "now", clock.now + 0.5))
    assert ceilings(seconds=2.0)["copy_bytes"] * 0.5 == (1 << 12) + (1 << 12)


def test_the_machine_is_described_and_not_named() -> None:
    found = machine()
    assert found["processor"]
    assert str(found["instructions"]).startswith(torch.backends.cpu.get_cpu_capability())
    assert found["torch"] == torch.__version__
    assert int(str(found["memory_bytes"])) > 1 << 28
    assert platform.node() not in [str(value) for value in found.values()]


@pytest.mark.parametrize("measure", [peak_memory, peak_memory_of_child])
def test_peak_memory_sees_what_a_run_took_and_sees_it_again(measure: Callable[[Callable[[], object]], int]) -> None:
    def run() -> None:
        torch.ones(64 * MIB // 4).sum()

    for _ in range(2):
        assert measure(run) == pytest.approx(64 * MIB, rel=0.1)


@pytest.mark.parametrize("measure", [peak_memory, peak_memory_of_child])
def test_peak_memory_sees_small_pieces_that_were_freed_before(measure: Callable[[Callable[[], object]], int]) -> None:
    """Freed pieces stay with the allocator, which gives them out again without asking the system."""

    def run() -> None:
        pieces = [torch.ones(16 * 1024 // 4) for _ in range(4096)]
        del pieces

    for _ in range(2):
        assert measure(run) == pytest.approx(64 * MIB, rel=0.15)


def test_peak_memory_leaves_out_what_was_held_before() -> None:
    held = torch.ones(64 * MIB // 4)
    gc.collect()
    assert peak_memory(lambda: torch.ones(16 * MIB // 4).sum()) < 32 * MIB
    assert held.numel()


BACKWARD = """
import torch
from swamla.bench.measuring import peak_memory_of_child
weight = torch.ones(2**24, requires_grad=True)
print(peak_memory_of_child(lambda: (weight * weight).sum().backward()), weight.grad is None)
"""


def test_memory_of_a_child_can_be_that_of_a_backward_pass_whose_gradients_are_lost() -> None:
    # In a process of its own: after a backward pass on another device, as of another test, autograd refuses to fork.
    done = subprocess.run([sys.executable, "-c", BACKWARD], capture_output=True, text=True)
    took, lost = done.stdout.split()
    assert int(took) >= 0.9 * 64 * MIB  # its gradient, at least
    assert lost == "True", done.stderr


def test_errors_of_a_child_come_back() -> None:
    def fail() -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        peak_memory_of_child(fail)


def test_a_child_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="ended without a result"):
        peak_memory_of_child(lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.gpu
def test_on_cuda_memory_is_that_of_tensors_and_ceilings_are_those_of_the_card() -> None:
    held = torch.ones(64 * MIB // 4, device="cuda")
    for _ in range(2):
        assert peak_memory(lambda: torch.ones(16 * MIB // 4, device="cuda").sum()) == pytest.approx(16 * MIB, rel=0.1)
    assert held.numel()
    assert ceilings("cuda", seconds=0.2)["bf16_flops"] > 1e12
