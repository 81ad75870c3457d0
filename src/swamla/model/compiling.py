"""torch.compile, block by block: equal layers share their graphs, so compile time does not grow with depth."""

import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from swamla.errors import MissingBackendError, UsageError
from swamla.model.block import Block, BlockFunctions
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout

T = TypeVar("T")
Compile = Literal["auto", "none", "default", "reduce-overhead", "max-autotune"]


def resolve_compile(mode: Compile, device: torch.device) -> Compile:
    """The mode that "auto" means on a device: "default" on CUDA with Triton, else "none". Other modes stay."""
    if mode != "auto":
        return mode
    return "default" if device.type == "cuda" and find_spec("triton") else "none"


class OfBlocks(Protocol):
    """What is compiled here of a `LanguageModel`, which imports this module."""

    config: Any
    blocks: Sequence[Block]


def compile_blocks(model: OfBlocks, mode: Compile, device: torch.device) -> str:
    """Compile the functions of every block that training calls; returns a line about it. Parameters stay as they are.

    Graphs break around the ops that are `outside_graphs`: on a CPU a mixer and a mixture of experts have two breaks
    each; on a GPU only backends other than the default have any. Evaluations are compiled on a GPU, but not on a CPU,
    where compiling takes longer than it saves. Dropout draws the same numbers as uncompiled. Raises
    `MissingBackendError` if the machine cannot compile.
    """
    _require_compiler(mode, device)
    # One graph for each kind of block and each shape, of which a curriculum has several. With dynamic shapes, a resumed
    # run could compile other graphs, and so differ in its last bits.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(model.config.blocks))
    # Backward passes run outside autocast, as they do uncompiled. Otherwise products that are in fp32 on purpose, such
    # as those of routers and norms, would be traced in autocast's dtype.
    torch._functorch.config.backward_pass_autocast = "off"
    options = {**torch._inductor.list_mode_options(mode), "fallback_random": True, "cpp.simdlen": vector_bits()}
    for config, block in zip(model.config.layers, model.blocks, strict=True):
        prepare = partial(config.prepare, width=model.config.width)
        whole = _prepared(torch.compile(block.whole, dynamic=False, options=options), prepare)
        block.functions = BlockFunctions(
            whole=whole,
            mix=_prepared(torch.compile(block.mix, dynamic=False, options=options), prepare),
            feed=torch.compile(block.feed, dynamic=False, options=options),
            evaluated=block.whole if device.type == "cpu" else whole,
        )
    return f"compile: {mode}, block by block; the first steps wait for it"


@outside_graphs
def refuse_whole() -> None:
    """Raise `UsageError` while a compiler traces a whole model: for a model of two tiny layers that takes minutes."""
    raise UsageError(
        "torch.compile(model) would trace all layers at once, for minutes, and again for other documents: call "
        "model.compile(), which compiles block by block, and use the model as it is"
    )


def vector_bits() -> int | None:
    """The width of the vectors that CPU kernels compute with here; None where torch does not say: it chooses.

    It has to be named: the compiler's cache does not distinguish instruction sets, so that a graph made for one width
    would be taken for another one, and compute something else (torch 2.13, with ATEN_CPU_CAPABILITY or a cache that
    several machines share).
    """
    if platform.machine() not in ("x86_64", "AMD64"):  # elsewhere "DEFAULT" is what vectors of 128 bits are called
        return None
    return {"DEFAULT": 1, "AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability())


def _prepared(compiled: Callable[[Tensor, Layout], T], prepare: Callable[[Layout], None]) -> Callable[..., T]:
    def run(x_BTD: Tensor, seq: Layout) -> T:
        prepare(seq)
        return compiled(x_BTD, seq)

    return run


def begin_step(mode: Compile) -> None:
    """To be called before an optimizer step's first forward pass: the last step's CUDA graph memory may be reused."""
    if mode in ("reduce-overhead", "max-autotune"):
        torch.compiler.cudagraph_mark_step_begin()


def _require_compiler(mode: Compile, device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise MissingBackendError(f"compile = {mode} needs triton on a GPU: pip install triton; or compile = none")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        needs = f"compile = {mode} needs a C++ compiler on a CPU: apt install g++ (or set CXX); or compile = none"
        raise MissingBackendError(needs) from error
