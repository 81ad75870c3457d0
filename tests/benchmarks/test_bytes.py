"""`python -m benchmarks.bytes`: bytes of single operations against arithmetic by hand, and of a whole step."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bytes as counting
from benchmarks.bytes import ByteCounter, Step, Subject, counted
from benchmarks.shape import QUICK
from swamla.train.optim import AdamWConfig, MuonConfig

A, B, C = 6, 8, 10
X, Y, W = torch.ones(A, B), torch.ones(A, B), torch.ones(B)
LOW, INDEX = X.bfloat16(), torch.tensor([1, 0, 1])


def bytes_of(run: Callable[[], object]) -> int:
    counter = ByteCounter()
    with counter:
        run()
    return counter.total


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X + Y, 3 * A * B * 4),
        (lambda: X.clone().add_(Y), (2 + 3) * A * B * 4),
        (lambda: X * W, (2 * A * B + B) * 4),
        (lambda: X.to(torch.bfloat16), A * B * (4 + 2)),
        (lambda: torch.empty(A, B).copy_(LOW), A * B * (2 + 4)),
        (lambda: torch.zeros(A, B), A * B * 4),
        (lambda: X @ torch.ones(B, C), (B * C + A * B + B * C + A * C) * 4),  # the ones are written too
        (lambda: torch.baddbmm(X[None], X[None], torch.ones(1, B, B), beta=0, alpha=2), (2 * B * B + 2 * A * B) * 4),
        (lambda: X.sum(dim=1), (A * B + A) * 4),
        (lambda: X[INDEX], len(INDEX) * (8 + 2 * B * 4)),
        (lambda: torch.empty(A, B).index_fill_(0, INDEX, 0), len(INDEX) * (8 + B * 4)),
        (lambda: torch.cat([X, Y]), 4 * A * B * 4),
        (lambda: F.silu(LOW), 2 * A * B * 2),
    ],
)
def test_an_operation_moves_what_it_reads_and_writes(run: Callable[[], object], expected: int) -> None:
    assert bytes_of(run) == expected


def test_views_and_allocations_are_free() -> None:
    assert bytes_of(lambda: X.view(-1).unsqueeze(0).expand(3, -1)[:, 2:].unflatten(1, (2, -1)).transpose(0, 1)) == 0
    assert bytes_of(lambda: torch.empty(A, B).new_empty(3)) == 0


def test_an_expanded_dimension_and_overlapping_windows_are_read_once() -> None:
    line = torch.ones(10)
    assert bytes_of(lambda: line[:1].expand(7).clone()) == (1 + 7) * 4
    assert bytes_of(lambda: line.unfold(0, 4, 2).clone()) == (10 + 4 * 4) * 4


def test_an_elementwise_operation_on_two_dtypes_makes_a_cast_copy() -> None:
    assert bytes_of(lambda: X * LOW) == A * B * (2 + 2 * 4 + 4 + 4)
    assert bytes_of(lambda: X.clone().add_(LOW)) == A * B * (2 * 4 + 2 + 2 * 4 + 2 * 4)


def test_storing_a_view_into_itself_is_free() -> None:
    def run() -> None:
        x = torch.empty(A, B)
        x[1:3] += Y[1:3]

    assert bytes_of(run) == 3 * 2 * B * 4


def test_what_autograd_functions_do_is_counted_in_both_passes() -> None:
    x, counter = torch.ones(A, B, requires_grad=True), ByteCounter()
    with counter:
        y = F.silu(x)
        counter.current = "backward"
        y.backward(X)
    assert (counter.of_pass("forward"), counter.of_pass("backward")) == (2 * A * B * 4, 3 * A * B * 4)


def test_fused_adamw_reads_four_tensors_and_writes_three() -> None:
    weight = torch.nn.Parameter(torch.ones(A, B))
    optimizer = AdamWConfig().build(torch.nn.ParameterList([weight]), lr=0.1, weight_decay=0.0)
    weight.grad = torch.ones(A, B)
    optimizer.step()
    counter = ByteCounter()
    with counter:
        optimizer.step()
    steps = counter.bytes["forward", "_foreach_add_"]
    assert counter.total - steps == 7 * A * B * 4 + 4  # and the number of updates


TINY = Subject(model=QUICK.config("gdn swa mla"), optimizer=AdamWConfig(), rows=4, length=64)


@pytest.mark.parametrize("subject", [TINY, replace(TINY, optimizer=MuonConfig(), packed=True)])
def test_every_byte_of_a_step_is_of_one_pass_and_one_kind(subject: Subject) -> None:
    counter = counted(Step(subject))
    passes = [counter.of_pass(name) for name in counting.PASSES]
    assert min(passes) > 0
    assert sum(passes) == counter.total == sum(map(counter.of_kind, [*counting.KINDS, counting.ELEMENTWISE]))
    assert counted(Step(subject)).bytes == counter.bytes


def test_the_defaults_are_the_models_of_the_training_table_and_the_quickstart() -> None:
    found = counting.subjects()
    assert list(found) == ["swa swa mla", "gdn gdn mla", "quickstart"]
    assert {(s.rows * s.length, s.model.width, s.model.vocab_size) for s in found.values()} == {
        (4096, 384, 4096),
        (4096, 256, 4096),
    }
    assert found["quickstart"].model.pattern == ("gdn", "swa", "gdn", "mla")


def test_the_table_has_a_line_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(counting, "subjects", lambda: {"one": TINY, "two": TINY})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert counting.main(["two", "--untimed", "--ops"]) == 0
    printed = capsys.readouterr().out
    assert f"| two | 4 × 64 | {counted(Step(TINY)).of_pass('forward') / 1e6:,.0f} |" in printed
    assert "| backward | mm |" in printed
