"""`python -m benchmarks.lowered [PRESET …] [--kernels]`: what a compiled block moves and launches on a GPU.

No GPU is needed.

Dynamo and AOTAutograd trace a block of a preset as they would on CUDA, Inductor fuses the graphs for a pretended H100,
and its scheduler says how many bytes each kernel moves. Nothing is compiled to machine code, nothing runs, and no time
is known: `benchmarks.predicted` divides counts by the rates that a card has. Mixing itself (attention, delta rule) is
one opaque call here, whose bytes are those of its inputs and outputs. Needs Triton: pip install triton.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from benchmarks.gpu_models import preset
from benchmarks.gpu_running import Place
from benchmarks.markdown import table
from swamla.model import LanguageModelConfig
from swamla.model.block import Block
from swamla.ops.grouped_mm import _grouped_mm
from swamla.ops.layout import Layout

ROWS, LENGTH = 8, 2048  # 16,384 tokens, a step's
PRESETS = (("small", "swa"), ("small", "gdn"), ("base", "swa"), ("base", "gdn"), ("moe-1b", "swa"))
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    multi_processor_count=132,
    major=9,
    minor=0,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch: a call of a library or a fused kernel, the bytes it reads and writes, what it computes."""

    library: bool
    size: float
    operations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one graph: kernels that the compiler makes, calls of libraries (products, mixing), bytes that each move."""

    kernels: int
    kernel_bytes: float
    calls: int
    call_bytes: float
    each: tuple[Kernel, ...]


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A block's two graphs, and the bytes of activations that the first keeps for the second."""

    forward: Counts
    backward: Counts
    saved: float


def lowered(config: LanguageModelConfig, block: str, *, rows: int = ROWS, length: int = LENGTH) -> Lowered:
    """The compiled block of this name, in training under bf16 autocast, on whole rows."""
    with torch.no_grad():
        module = config.blocks[block].build(config.width, config.norm, 0.0)
    dtype = torch.bfloat16 if config.residual == "autocast" else torch.float32
    x = torch.zeros(rows, length, config.width, dtype=dtype, requires_grad=True)
    forward, backward = _traced(module.train(), x, Layout.one_document_per_row(rows, length))
    return Lowered(
        forward=_counts(forward, backward=False), backward=_counts(backward, backward=True), saved=_saved(forward)
    )


class _Traced(Exception):
    """Both graphs are known: nothing has to run."""


def _traced(block: Block, x: Tensor, seq: Layout) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward graph, as a GPU's compiler would be given them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[fx.GraphModule, fx.GraphModule]] = []

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        options.pop("static_lifetime_input_indices", None)
        graphs.append(min_cut_rematerialization_partition(joint, inputs, **options, compiler="inductor"))
        raise _Traced

    def untouched(graph: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        return graph

    backend = aot_autograd(
        fw_compiler=untouched,
        bw_compiler=untouched,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    compiled = torch.compile(block.whole, dynamic=False, backend=backend, fullgraph=True)
    try:
        with _as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
            compiled(x, seq)
    except Exception:
        if not graphs:
            raise
    return graphs[0]


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Let ops take the paths that they take on CUDA, and mixing be one opaque call."""
    _define_calls()
    with ExitStack() as stack:
        for name, function in _ON_CUDA.items():
            for module in [m for n, m in sys.modules.items() if n.startswith("swamla.") and hasattr(m, name)]:
                if callable(getattr(module, name)):
                    stack.enter_context(patch.object(module, name, function))
        yield


def _define_calls() -> None:
    """Mixing as calls that the compiler cannot look into, forward and backward; defined once."""
    if hasattr(torch.ops, "lowered") and hasattr(torch.ops.lowered, "mix"):
        return

    @torch.library.custom_op("lowered::mix", mutates_args=())
    def mix(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor]) -> Tensor:
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    @torch.library.custom_op("lowered::mix_backward", mutates_args=())
    def mix_backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, gates: list[Tensor]) -> list[Tensor]:
        return [torch.empty_like(x) for x in (q, k, v, *gates)]

    mix.register_fake(lambda q, k, v, gates: q.new_empty(*q.shape[:-1], v.shape[-1]))
    mix_backward.register_fake(lambda d_o, q, k, v, o, gates: [torch.empty_like(x) for x in (q, k, v, *gates)])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, gates = inputs
        ctx.save_for_backward(q, k, v, output, *gates)

    def gradients(ctx: Any, d_o: Tensor) -> tuple[Any, ...]:
        q, k, v, o, *gates = ctx.saved_tensors
        dq, dk, dv, *d_gates = torch.ops.lowered.mix_backward(d_o, q, k, v, o, gates)
        return dq, dk, dv, d_gates

    mix.register_autograd(gradients, setup_context=keep)


def _attention(q: Tensor, k: Tensor, v: Tensor, seq: Layout, **_: Any) -> Tensor:
    return torch.ops.lowered.mix(*(x.bfloat16() for x in (q, k, v)), [])


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
    return torch.ops.lowered.mix(q, k.to(q.dtype), v.to(q.dtype), [log_alpha, beta]), None


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight_D.to(x.dtype), eps)


def _fused(x: Tensor) -> bool:
    return True


# By the names under which modules of swamla know them.
_ON_CUDA: dict[str, Callable[..., Any]] = {
    "causal_attention": _attention,
    "windowed_attention": _attention,
    "gated_delta_rule": _delta_rule,
    "rms_norm": _rms_norm,
    "is_fused": _fused,
    "_outside": _grouped_mm,
}


def _counts(graph: fx.GraphModule, *, backward: bool) -> Counts:
    """What Inductor's scheduler makes of a graph."""
    found = _scheduled(graph, backward=backward)
    calls, kernels = [k.size for k in found if k.library], [k.size for k in found if k.size and not k.library]
    sizes = {"kernel_bytes": sum(kernels), "call_bytes": sum(calls)}
    return Counts(kernels=len(kernels), calls=len(calls), **sizes, each=tuple(found))


def _scheduled(graph: fx.GraphModule, *, backward: bool) -> list[Kernel]:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _pretended_gpu(), V.set_fake_mode(mode), tracing(TracingContext(mode)):
        inputs = _moved(graph, mode)
        view_to_reshape(graph)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        post_grad_passes(graph, False)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=False, is_backward=backward)
        debug = V.set_debug_handler(DebugContext())
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), debug:
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            return [_kernel(node) for node in lowering.scheduler.nodes]


def _kernel(node: Any) -> Kernel:
    library = type(node).__name__ == "ExternKernelSchedulerNode"
    inner = [part.node for part in node.get_nodes() if part.node is not None]
    operations = sorted({origin.name for part in inner for origin in part.get_origins()})
    return Kernel(library=library, size=node.get_read_write_buffers_sizes(), operations=tuple(operations))


def _moved(graph: fx.GraphModule, mode: Any) -> list[Any]:
    """The graph's inputs on the pretended device, and the graph with every device in it changed to that one."""
    cuda = torch.device("cuda", 0)

    def there(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda part: cuda if isinstance(part, torch.device) else part)

    inputs: list[Any] = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            if isinstance(value, Tensor):
                with mode:
                    value = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=cuda)
            inputs.append(value)
        elif node.op == "call_function":
            node.args, node.kwargs = there(node.args), there(node.kwargs)
    graph.recompile()
    return inputs


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    """Let Inductor believe in an H100."""
    import torch.utils._triton
    from torch._dynamo.device_interface import CudaInterface, register_interface_for_device
    from torch._inductor import config, scheduler
    from torch._inductor.fx_passes import reinplace
    from triton.runtime import driver

    scatter = reinplace._inplace_generalized_scatter

    def in_place(target: Any, source: Any, views: Any) -> Any:  # which would touch the fake tensor's memory
        fake = isinstance(target, torch._subclasses.FakeTensor)
        return torch.empty_like(target) if fake else scatter(target, source, views)

    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": H100,
        "is_bf16_supported": True,
    }
    interface: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_compute_capability": 90,
        "get_raw_stream": 0,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    worker: dict[str, Any] = {"get_device_properties": H100, "current_device": 0}
    with ExitStack() as stack:
        for owner, told in ((torch.cuda, answers), (CudaInterface, interface), (CudaInterface.Worker, worker)):
            for name, answer in told.items():
                replacement = _answering(answer)
                stack.enter_context(
                    patch.object(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)
                )
        for module in (torch.utils._triton, scheduler):
            stack.enter_context(patch.object(module, "has_triton", _answering(True)))
        stack.enter_context(patch.object(reinplace, "_inplace_generalized_scatter", in_place))
        # A build with CUDA would look for a driver.
        stack.enter_context(patch.object(torch._subclasses.fake_tensor, "init_gpu_context", _answering(None)))
        stack.enter_context(config.patch({"triton.autotune_at_compile_time": False, "compile_threads": 1}))
        for name in ("cuda", "cuda:0"):
            register_interface_for_device(name, CudaInterface)
        driver.set_active(_Driver())
        yield


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


class _Driver:
    """As much of Triton's driver as scheduling asks."""

    utils = SimpleNamespace(
        get_device_properties=_answering({"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32})
    )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    @classmethod
    def is_active(cls) -> bool:
        return True


def _saved(forward: fx.GraphModule) -> float:
    """Bytes of what the forward graph keeps for the backward one, its own inputs apart."""
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    kept = {node for node in output.args[0] if isinstance(node, fx.Node) and node.op != "placeholder"}
    values = (node.meta.get("val") for node in kept)
    return float(sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor)))


def variants(names: Sequence[str]) -> Iterator[tuple[str, LanguageModelConfig]]:
    """The presets by these names, or all, each with both residual streams, and what to call them."""
    for name, local in PRESETS:
        if not names or name in names:
            for residual, said in (("weights", "fp32"), ("autocast", "bf16")):
                plain = preset(name, local, Place())
                yield f"{name} {local}, {said}", replace(plain, residual=residual)  # type: ignore[arg-type]


def require_triton(module: str) -> None:
    """End the program, with status 2 and the way on, where there is none."""
    try:
        import triton  # noqa: F401
    except ImportError:
        print(f"{module} needs triton: pip install triton", file=sys.stderr)
        raise SystemExit(2) from None


def main(words: list[str]) -> int:
    """Print the table; with --kernels each kernel before it."""
    require_triton("benchmarks.lowered")
    detailed, lines = "--kernels" in words, []
    for name, config in variants([word for word in words if not word.startswith("-")]):
        for block in config.blocks:
            found = lowered(config, block)
            cells = [name, block]
            for counts in (found.forward, found.backward):
                cells += [f"{counts.kernels}", f"{counts.kernel_bytes / 1e6:,.0f}"]
                cells += [f"{counts.calls}", f"{counts.call_bytes / 1e6:,.0f}"]
                for kernel in counts.each if detailed else ():
                    kind = "call" if kernel.library else "    "
                    print(f"{kernel.size / 1e6:9.1f} MB {kind} {','.join(kernel.operations)[:100]}", flush=True)
            lines.append([*cells, f"{found.saved / 1e6:,.0f}"])
            print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    header = ["model, residual stream", "block"]
    header += [f"{way}: {what}" for way in ("forward", "backward") for what in ("kernels", "MB", "calls", "MB")]
    print(table([*header, "kept MB"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
