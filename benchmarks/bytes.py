"""`python -m benchmarks.bytes [MODEL …] [--ops] [--untimed]`: the bytes that an eager training step on a CPU moves.

Every operation that PyTorch's dispatcher runs is counted, in forward pass, backward pass and optimizer, those inside
autograd functions too: the bytes of the tensors that it reads and of those that it writes, once each. Views are free.
An elementwise operation on several dtypes first makes cast copies of its operands, whose bytes count too.
Nothing else that happens inside a kernel is seen, nor what a cache saves: these are the bytes that the operations ask
for. The counts are for two threads, exact, and the same on every machine; times are this one's.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import median
from typing import Any

from swamla import process

process.prepare()  # as the command line does

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.markdown import shown, table
from benchmarks.shape import Shape
from benchmarks.tables.profile import ELEMENTWISE, KIND_OF, KINDS
from swamla.cli.run_config import resolve
from swamla.model import LanguageModelConfig
from swamla.ops.layout import Layout
from swamla.train.optim import AdamWConfig, OptimizerConfig
from swamla.train.precision import autocast

PASSES = ("forward", "backward", "optimizer")
STEPS = 5
THREADS = 2  # with one the short convolution has another path

# Operations that move other bytes than those of all their tensors.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # none
FILLS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # only write: they read a shape
OVERWRITES = {"copy_", "fill_", "zero_"}  # do not read what they write
PICKS = {"index", "index_select", "gather", "embedding"}  # read as much of the first tensor as they return
PUTS = {"index_put_", "scatter_"}  # write as much into the first tensor as they are given
ADDS = {"index_add_", "scatter_add_"}  # the same, and read it first
CLEARS = {"index_fill_"}  # write rows of the first tensor
READ_ONLY = {"_fused_adamw_": "grads"}  # mutable by the schema, but written only under a gradient scaler

# The profile table of `make bench` sees the kernels that these call.
COPIES = {"_to_copy", "clone", "stack", "embedding", "embedding_dense_backward", "index", "zeros", *FILLS}
KINDS_HERE = KIND_OF | dict.fromkeys(COPIES, "copies and casts") | {"softmax": "softmax and exponentials"}


def nbytes(*found: Tensor) -> int:
    """Bytes of the memory that tensors refer to: an expanded dimension or overlapping windows count once."""
    size = 0
    for x in found:
        own = [(length, stride) for length, stride in zip(x.shape, x.stride(), strict=True) if stride]
        extent = 1 + sum((length - 1) * stride for length, stride in own)
        size += min(math.prod(length for length, _ in own), extent) * x.element_size() if x.numel() else 0
    return size


def moved(op: Any, args: Sequence[Any], options: dict[str, Any], result: Any) -> int:
    """The bytes that a call of an operation reads and writes."""
    name = op.overloadpacket.__name__
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for index, argument in enumerate(op._schema.arguments):
        found = _tensors(args[index] if index < len(args) else options.get(argument.name))
        writable = argument.alias_info is not None and argument.alias_info.is_write
        is_written = writable and argument.name != READ_ONLY.get(name)
        is_target = is_written and (argument.kwarg_only or name in OVERWRITES)
        is_times_0 = argument.name == "self" and options.get("beta") == 0  # a product's summand
        writes += found if is_written else []
        reads += found if not is_target and not is_times_0 else []
    known = {x.untyped_storage().data_ptr() for x in [*reads, *writes]}
    new = [x for x in _tensors(result) if x.untyped_storage().data_ptr() not in known]
    if name in ALLOCATIONS or not (writes or new):  # without either it is a view
        return 0
    if name == "copy_" and _same_data(writes[0], reads[0]):  # `x[rows] += y` stores the view into itself, which is free
        return 0
    if name in FILLS:
        return nbytes(*new)
    if name in PICKS:
        return nbytes(*reads[1:]) + 2 * nbytes(*new)
    if name in CLEARS:
        return nbytes(args[2]) + nbytes(writes[0]) // writes[0].shape[args[1]] * len(args[2])
    if name in PUTS | ADDS:
        return nbytes(*reads[1:]) + nbytes(reads[-1]) * (2 if name in ADDS else 1)
    return nbytes(*reads, *writes, *new) + _cast_copies(op, reads, writes)


def _same_data(target: Tensor, source: Tensor) -> bool:
    return target.data_ptr() == source.data_ptr() and target.stride() == source.stride()


def _cast_copies(op: Any, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> int:
    """Bytes written to and read from the copies that elementwise operations make of operands of other dtypes."""
    operands = [x for x in reads if x.ndim and x.is_floating_point()]
    if torch.Tag.pointwise not in op.tags or op.overloadpacket.__name__ in ("copy_", "_to_copy") or not operands:
        return 0
    common = reduce(torch.promote_types, [x.dtype for x in operands])
    targets = [x for x in writes if x.is_floating_point()]
    elements = sum(nbytes(x) // x.element_size() for x in [*operands, *targets] if x.dtype != common)
    return 2 * elements * common.itemsize


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for each in value for x in _tensors(each)] if isinstance(value, (list, tuple)) else []


class ByteCounter(TorchDispatchMode):
    """Counts bytes and calls by pass and operation. current: the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.current = PASSES[0]
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if size := moved(op, args, kwargs or {}, result):
            self.bytes[self.current, op.overloadpacket.__name__] += size
            self.calls[self.current, op.overloadpacket.__name__] += 1
        return result

    def of_pass(self, name: str) -> int:
        """Bytes of one pass."""
        return sum(size for (where, _), size in self.bytes.items() if where == name)

    def of_kind(self, kind: str) -> int:
        """Bytes of one kind of operation, as the profile table of `make bench` divides them; one is the optimizer."""
        return sum(size for (where, op), size in self.bytes.items() if _kind(where, op) == kind)

    @property
    def total(self) -> int:
        """Bytes of the step."""
        return sum(self.bytes.values())


def _kind(where: str, op: str) -> str:
    return "optimizer" if where == "optimizer" else KINDS_HERE.get(op, ELEMENTWISE)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its optimizer and the shape of a step. packed: rows of several documents instead of one each."""

    model: LanguageModelConfig
    optimizer: OptimizerConfig
    rows: int
    length: int
    accumulation: int = 1
    packed: bool = False

    def layout(self) -> Layout:
        """The layout of a micro-batch: if packed, each row has documents of 1/2, 1/4, 1/8 and 1/8 of its tokens."""
        rows = self.rows // self.accumulation
        if not self.packed:
            return Layout.one_document_per_row(rows, self.length)
        starts_T = torch.arange(self.length) * 8 // self.length
        document_T = (starts_T >= 4).long() + (starts_T >= 6) + (starts_T >= 7)
        return Layout.from_documents(document_T.expand(rows, -1))


def subjects() -> dict[str, Subject]:
    """What is counted by default: two models of the training table, and the recipe of `make quickstart`."""
    found = {
        pattern: Subject(model=Shape().config(pattern), optimizer=AdamWConfig(), rows=4, length=1024)
        for pattern in ("swa swa mla", "gdn gdn mla")
    }
    run = resolve("quickstart", {"vocab_size": 4096}).config
    train = run.train
    found["quickstart"] = Subject(
        model=run.model, optimizer=train.optimizer, rows=train.batch_size, length=train.block_size, packed=True
    )
    return found


class Step:
    """A training step under bf16 autocast, on random tokens; the optimizer's state exists already."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.model = subject, subject.model.build(seed=0)
        self.optimizer = subject.optimizer.build(self.model, lr=1e-6, weight_decay=0.1, precision="bf16")
        shape = subject.rows // subject.accumulation, subject.length
        generator = torch.Generator().manual_seed(0)
        self.tokens, self.labels = (
            torch.randint(subject.model.vocab_size, shape, generator=generator) for _ in range(2)
        )
        self()

    def __call__(self, entering: Callable[[str], None] = lambda _: None) -> None:
        """Take a step. entering: called with the name of each pass before it."""
        n_labels = self.subject.rows * self.subject.length
        with autocast("bf16", self.model.device):
            for _ in range(self.subject.accumulation):
                entering("forward")
                loss = self.model.loss(self.tokens, self.labels, self.subject.layout())[0] / n_labels
                entering("backward")
                with autocast("fp32", self.model.device):
                    loss.backward()
        entering("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad()


def counted(step: Step) -> ByteCounter:
    """The bytes of a step."""
    counter = ByteCounter()
    with counter:
        step(lambda name: setattr(counter, "current", name))
    return counter


def seconds(step: Step) -> float:
    """The median time of a step."""

    def timed() -> float:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    return median(timed() for _ in range(STEPS))


def main(words: list[str]) -> int:
    """Print the table; with --ops the operations of every model before it."""
    torch.set_num_threads(THREADS)
    names = [word for word in words if not word.startswith("-")]
    lines = []
    for name, subject in subjects().items():
        if names and name not in names:
            continue
        step = Step(subject)
        counter = counted(step)
        if "--ops" in words:
            print(f"{name}\n{by_operation(counter)}\n")
        sizes = [*(counter.of_pass(one) for one in PASSES), counter.total, *map(counter.of_kind, [*KINDS, ELEMENTWISE])]
        shape = f"{subject.rows} × {subject.length}"
        time_ms = [] if "--untimed" in words else [f"{1e3 * seconds(step):,.0f}"]
        lines.append([shown(name), shape, *(f"{size / 1e6:,.0f}" for size in sizes), *time_ms])
    times = [] if "--untimed" in words else ["ms"]
    print(table(["MB", "tokens", *PASSES, "step", *KINDS, ELEMENTWISE, *times], lines))
    return 0


def by_operation(counter: ByteCounter) -> str:
    """The operations of every pass, those that move most first."""
    rows = [(size, *place, counter.calls[place]) for place, size in counter.bytes.items()]
    lines = [[where, op, f"{calls:,}", f"{size / 1e6:,.1f}"] for size, where, op, calls in sorted(rows, reverse=True)]
    return table(["pass", "operation", "calls", "MB"], lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
