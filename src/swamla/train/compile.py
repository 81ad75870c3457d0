"""torch.compile, block by block: layers alike share their graphs, so that a deep model starts as soon as a flat one."""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from swamla.errors import MissingBackendError
from swamla.model.block import BlockFunctions
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout

T = TypeVar("T")
Compile = Literal["none", "default", "reduce-overhead", "max-autotune"]


def compile_blocks(model: LanguageModel, mode: Compile, device: torch.device) -> str:
    """Compile what training runs of every block, and say so; parameters and their names stay as they are.

    Graphs end before the ops that are `outside_graphs` and begin anew behind them: on a CPU two in a mixer and two in a
    mixture of experts, on a GPU only backends that its own are not. Without gradients a block runs uncompiled. Dropout
    draws the numbers that it draws uncompiled. Raises `MissingBackendError` where the machine cannot compile.
    """
    _require_compiler(mode, device)
    # A graph for each kind of block and each shape, of which a curriculum has several. Graphs that serve many shapes
    # would be other ones after an interruption, and so might be the last bits of a resumed run.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(model.config.blocks))
    # Backward passes run outside autocast, as they do uncompiled; else products that are in fp32 on purpose, such as
    # those of routers and norms, would be traced in autocast's dtype.
    torch._functorch.config.backward_pass_autocast = "off"
    options = {**torch._inductor.list_mode_options(mode), "fallback_random": True}
    for config, block in zip(model.config.layers, model.blocks, strict=True):
        whole, mix, feed = block.trained
        prepare = partial(config.mixer.prepare, width=model.config.width)
        block.trained = BlockFunctions(
            _prepared(torch.compile(whole, dynamic=False, options=options), prepare),
            _prepared(torch.compile(mix, dynamic=False, options=options), prepare),
            torch.compile(feed, dynamic=False, options=options),
        )
    return f"compile: {mode}, block by block; the first steps wait for it"


def _prepared(compiled: Callable[[Tensor, Layout], T], prepare: Callable[[Layout], None]) -> Callable[..., T]:
    def run(x_BTD: Tensor, seq: Layout) -> T:
        prepare(seq)
        return compiled(x_BTD, seq)

    return run


def begin_step(mode: Compile) -> None:
    """Call before the first forward pass of an optimizer step: the last step's CUDA graphs may be overwritten."""
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
