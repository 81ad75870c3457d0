"""Flex attention's kernels, compiled for a Hopper card without one: python -m benchmarks.flex_kernels

Says what each kernel needs: shared memory, registers, spilled bytes. Needs Triton, the Linux wheel alone, beside any
build of torch: pip install --no-deps triton==3.6.0. Says nothing about time, and runs nothing. Inductor lowers the
graphs of our own call for a pretended H100; Triton and its ptxas compile what it wrote.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from swamla.ops.attention import cuda
from swamla.ops.attention.reference import Window
from swamla.ops.layout import Layout

SHARED_MEMORY = 232_448  # bytes a block may have on an H100 or H200
TARGET, ARCHITECTURE = ("cuda", 90, 32), "sm_90a"
BATCH, TIME, DOCUMENT = 2, 2048, 300


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Shapes that kernels are compiled for; window None: causal attention."""

    name: str
    key: int
    value: int
    window: int | None
    heads: int = 16
    groups: int = 16
    dtype: torch.dtype = torch.bfloat16


PRESETS = (
    Heads(name="swa 64, bf16", key=64, value=64, window=256),
    Heads(name="swa 96, bf16", key=96, value=96, window=256),
    Heads(name="swa 128, bf16", key=128, value=128, window=256),
    Heads(name="mha 64, bf16", key=64, value=64, window=None),
    Heads(name="mha 128, bf16", key=128, value=128, window=None),
    Heads(name="mla 192/128, bf16", key=192, value=128, window=None),
    Heads(name="swa 64, fp32", key=64, value=64, window=256, dtype=torch.float32),
    Heads(name="swa 128, fp32", key=128, value=128, window=256, dtype=torch.float32),
)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a compiled kernel needs; bytes, but `registers` a thread."""

    way: str  # "forward" or "backward"
    tiles: str
    warps: int
    stages: int
    shared: int
    registers: int
    spilled: int  # stores and loads


def kernels(heads: Heads, options: dict[str, Any] | None) -> list[Kernel]:
    """The kernels of one forward and backward pass of packed rows under these options (None: ours)."""
    found = []
    with pretended_hopper():
        for way, graph in zip(("forward", "backward"), graphs(heads, options), strict=True):
            found += [compile_kernel(way, *each) for each in sources(lowered(graph, way == "backward"))]
    return found


def graphs(heads: Heads, options: dict[str, Any] | None) -> tuple[Any, Any]:
    """The forward and the backward graph of our call, as the compiler partitions them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    captured: list[tuple[Any, Any]] = []

    def partition(joint: Any, inputs: Any, **settings: Any) -> Any:
        settings.pop("static_lifetime_input_indices", None)
        captured.append(min_cut_rematerialization_partition(joint, inputs, **{**settings, "compiler": "inductor"}))
        raise StopIteration  # what the graphs are is known

    generator = torch.Generator().manual_seed(0)
    document_BT = (torch.rand(BATCH, TIME, generator=generator) < 1 / DOCUMENT).cumsum(1)
    seq = Layout.from_documents(document_BT)
    window = Window(heads.window, 0 if heads.window is None else 4)
    cuda.block_mask_of(seq, window)
    shapes = ((heads.heads, heads.key), (heads.groups, heads.key), (heads.groups, heads.value))
    q, k, v = (torch.zeros(BATCH, TIME, *shape, dtype=heads.dtype, requires_grad=True) for shape in shapes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cuda.flex_attention(q, k, v, seq, window, heads.key**-0.5)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph,
        bw_compiler=lambda graph, _: graph,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    chosen = {} if options is None else {"kernel_options": lambda *_: {**cuda.KERNEL, **options}}
    with patch.multiple(cuda, **chosen) if chosen else patch.dict({}):
        try:
            torch.compile(attend, dynamic=False, backend=backend, fullgraph=True)(q, k, v)
        except Exception:
            if not captured:
                raise
    return captured.pop()


def lowered(graph: Any, backward: bool) -> str:
    """Inductor's Python source for a graph whose tensors are all moved to the pretended card."""
    from torch._inductor.compile_fx import view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    card, mode, inputs = torch.device("cuda", 0), FakeTensorMode(allow_non_fake_inputs=True), []
    with patch.object(torch.cuda, "is_available", lambda: True), mode:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder":
                moved = isinstance(value, Tensor)
                like = {"dtype": value.dtype, "device": "cuda"} if moved else {}
                inputs.append(torch.empty_strided(value.size(), value.stride(), **like) if moved else value)
            elif node.op == "call_function":
                node.kwargs = {k: card if k == "device" and x is not None else x for k, x in node.kwargs.items()}
        graph.recompile()
    context = torch._guards.TracingContext(mode)
    with patch.object(torch.cuda, "is_available", lambda: True), V.set_fake_mode(mode), torch._guards.tracing(context):
        view_to_reshape(graph)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        modes = {"is_inference": False, "is_backward": backward, "cpp_wrapper": False, "aot_mode": False}
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=None, **modes)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
    return code if isinstance(code, str) else code.value


def sources(code: str) -> Iterator[tuple[str, str]]:
    """(Name, source) of each attention kernel in Inductor's source."""
    for name, source in re.findall(r"async_compile\.triton\('(\w+)',\s*'''(.*?)'''", code, re.DOTALL):
        if name.startswith("triton_tem_"):  # a template's; the rest are elementwise
            yield name, source


def compile_kernel(way: str, name: str, source: str) -> Kernel:
    """Compile Triton's source for the card, and read ptxas' own account."""
    triton = importlib.import_module("triton")
    heuristics = importlib.import_module("torch._inductor.runtime.triton_heuristics")
    kept: dict[str, Any] = {}

    def template(**settings: Any) -> Callable[[Any], Any]:
        kept.update(settings)
        return lambda function: function

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.py")  # Triton reads a kernel's source from its file
        file.write_text(source)
        spec = spec_from_file_location("kernel", file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        with (
            patch.object(heuristics, "template", template),
            patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"),
        ):
            spec.loader.exec_module(module)
        meta = kept["triton_meta"]
        attributes = {k: v for each in meta["configs"] for k, v in each.items()}
        asked = importlib.import_module("triton.compiler").ASTSource(
            getattr(module, name), dict(meta["signature"]), constexprs=dict(meta["constants"]), attrs=attributes
        )
        target = importlib.import_module("triton.backends.compiler").GPUTarget(*TARGET)
        settings = {"num_warps": kept["num_warps"], "num_stages": kept["num_stages"]}
        made = triton.compile(asked, target=target, options=settings)
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(made.asm["ptx"])
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [ptxas, f"-arch={ARCHITECTURE}", "-v", ptx, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = registers_and_spills(said)
    sizes = re.findall(r"^ +(BLOCK_\w+) : tl.constexpr = (\d+)$", source, re.MULTILINE)
    return Kernel(
        way=way,
        tiles=" × ".join(dict(sizes).values()),
        warps=settings["num_warps"],
        stages=settings["num_stages"],
        shared=made.metadata.shared,
        registers=registers,
        spilled=spilled,
    )


def registers_and_spills(said: str) -> tuple[int, int]:
    """Registers a thread, and bytes of spill stores and loads, of what `ptxas -v` says."""
    registers = re.search(r"Used (\d+) registers", said)
    if registers is None:
        raise ValueError(f"ptxas tells no registers: {said!r}")
    return int(registers[1]), sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))


@contextmanager
def pretended_hopper() -> Iterator[None]:
    """What torch and Triton ask of a card is answered as an H100 would, so that Inductor writes kernels for it."""
    import torch._dynamo.device_interface as interface
    import torch._inductor.config as inductor
    import torch.utils._triton as has

    front = importlib.import_module("torch.nn.attention.flex_attention")
    higher_order = importlib.import_module("torch._higher_order_ops.flex_attention")  # `import … as` gives the function
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED_MEMORY, L2_cache_size=50 << 20,
        shared_memory_per_multiprocessor=233472, gcnArchName="",
    )  # fmt: skip
    cuda_interface, worker = interface.CudaInterface, interface.CudaInterface.Worker
    answers = {
        "is_available": True, "current_device": 0, "device_count": 1, "get_raw_stream": 0, "is_triton_capable": True,
        "raise_if_triton_unavailable": None, "get_compute_capability": 90,
    }  # fmt: skip
    of_torch = {"get_device_properties": properties, "get_device_capability": (9, 0), "current_device": 0,
                "device_count": 1, "is_bf16_supported": True}  # fmt: skip
    apply_options, driver = front._apply_kernel_options, importlib.import_module("triton.runtime").driver

    def with_sums(*arguments: Any, **settings: Any) -> Any:  # traced on the CPU, where training would keep none
        return {**apply_options(*arguments, **settings), "OUTPUT_LOGSUMEXP": True}

    driver.set_active(_Driver())
    interface.register_interface_for_device("cuda", interface.CudaInterface)
    interface.register_interface_for_device("cuda:0", interface.CudaInterface)
    with (
        patch.multiple(torch.cuda, **{name: _answer(value) for name, value in of_torch.items()}),
        patch.multiple(cuda_interface, **{name: staticmethod(_answer(x)) for name, x in answers.items()}),
        patch.object(cuda_interface, "get_device_properties", staticmethod(_answer(properties))),
        patch.object(worker, "get_device_properties", staticmethod(_answer(properties))),
        patch.object(worker, "current_device", staticmethod(_answer(0))),
        patch.object(has, "has_triton", _answer(True)),
        patch.multiple(front, _validate_device=_answer(None), _apply_kernel_options=with_sums),
        patch.object(higher_order, "_permute_strides", _dense_like),
        inductor.patch({"triton.autotune_at_compile_time": False, "compile_threads": 1, "fx_graph_cache": False}),
    ):
        yield


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _dense_like(out: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Torch's own asks a library that knows no pretended tensors."""
    dense, size = [0] * len(strides), 1
    for axis in sorted(range(len(strides)), key=lambda i: (strides[i], i)):
        dense[axis] = size
        size *= out.shape[axis]
    return out.new_empty_strided(out.shape, dense)


class _Driver:
    """Triton's driver of a card that is not there."""

    utils = SimpleNamespace(
        get_device_properties=lambda device=0: {
            "max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32,
            "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
        }
    )  # fmt: skip

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget(*TARGET)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="heads whose name contains this")
    parser.add_argument("--options", action="append", default=[], help="kernel options as JSON, in place of ours")
    arguments = parser.parse_args()
    if find_spec("triton") is None:
        print("flex_kernels: needs triton: pip install --no-deps triton==3.6.0", file=sys.stderr)
        return 2
    print("| heads | options | | tiles | warps | stages | shared | registers | spilled |")
    print("| --- " * 9 + "|")
    for heads in PRESETS:
        if arguments.only not in heads.name:
            continue
        for said in arguments.options or ["{}", "ours"]:
            try:
                found = kernels(heads, None if said == "ours" else json.loads(said))
            except Exception as error:
                print(f"| {heads.name} | {said} | {type(error).__name__}: {str(error)[:200]!r} |", flush=True)
                continue
            for x in found:
                figures = (x.way, x.tiles, x.warps, x.stages, f"{x.shared:,}", x.registers, f"{x.spilled:,}")
                print(f"| {heads.name} | {said} | " + " | ".join(map(str, figures)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
