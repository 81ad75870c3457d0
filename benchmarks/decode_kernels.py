"""How many kernels a compiled decoding step launches on a GPU; needs no GPU.

    python -m benchmarks.decode_kernels [--depth 3] [--combine] [PRESET/MIXER …]

Every tensor is a fake one on a pretended H100: the step is traced, and its graph lowered by Inductor up to the kernels
that it would write, which are counted, not compiled. Needs Triton and a C++ compiler beside a PyTorch without CUDA.
Attention stands for one kernel, and its mask is a kernel of its own, as for PyTorch's memory-efficient attention.
Nothing here says how long a kernel takes.
"""

import argparse
import ctypes
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu_models import preset
from benchmarks.gpu_running import Place
from benchmarks.lowered import H100
from swamla.inference.decoding import one_step
from swamla.model.language_model import LanguageModelConfig
from swamla.ops.attention import cached

PRESETS = ("small/swa", "base/swa", "small/gdn")
ROOM = 2304  # tokens of the state: a prompt of 2048 and what follows
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""
NO_KERNEL = {"MultiOutput", "NopKernel", "NopKernelSchedulerNode"}


@torch.library.custom_op("decode_kernels::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Stands for PyTorch's, whose choice of a kernel asks the device."""
    return q.new_empty(*q.shape[:-1], v.shape[-1])


attention.register_fake(lambda q, k, v, bias: q.new_empty(*q.shape[:-1], v.shape[-1]))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
    """`scaled_dot_product_attention`, with the mask as numbers, as PyTorch makes it."""
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    return torch.ops.decode_kernels.attention(q, k, v, bias)


class Counted(Exception):
    """Ends a compilation once its kernels are known."""


def pretend_a_gpu() -> None:
    """Let torch trace and lower for an H100, in this process, from now on."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor import config
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        root = Path(torch.__file__).parent
        paths = [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, *paths, "-o", library], check=True)
        ctypes.CDLL(str(library))

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_device_interface = staticmethod(lambda: torch.cuda)
        is_active = staticmethod(lambda: True)

    triton.runtime.driver.set_active(Driver())
    answers: dict[str, Any] = {
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_compute_capability": 90,
        "current_device": 0,
        "device_count": 1,
        "get_raw_stream": 0,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    cuda: Any = device_interface.CudaInterface
    for name, answer in answers.items():
        if hasattr(torch.cuda, name):
            setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        setattr(cuda, name, staticmethod(lambda *_, answer=answer, **__: answer))
    cuda.is_available = staticmethod(lambda: True)
    cuda.Worker.get_device_properties = staticmethod(lambda *_, **__: H100)
    cuda.Worker.current_device = staticmethod(lambda: 0)
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, cuda)
    _triton.has_triton = lambda *_, **__: True
    config.fx_graph_cache, config.compile_threads = False, 1
    config.joint_graph_constant_folding = False  # which would compute constants on the GPU


def kernels(config: LanguageModelConfig, options: dict[str, Any]) -> Counter[str]:
    """Kernels of one compiled step of one row, those of libraries and those that Inductor would write."""
    from torch._inductor.scheduler import Scheduler

    found: Counter[str] = Counter()

    def count(scheduler: Any) -> None:
        for node in scheduler.nodes:
            kind = type(node).__name__
            found["library" if kind == "ExternKernelSchedulerNode" else "written"] += (
                type(node.node if kind == "ExternKernelSchedulerNode" else node).__name__ not in NO_KERNEL
            )
        raise Counted

    model = config.skeleton().to(torch.bfloat16)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        model.tie()
        state = model.eval().init_state(1, ROOM, device="cuda", dtype=torch.bfloat16)
        tokens_B1 = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        with (
            patch.object(cached, "scaled_dot_product_attention", masked_attention),
            patch.object(Scheduler, "codegen", count),
        ):
            step = torch.compile(one_step, fullgraph=True, dynamic=False, options=options)
            try:
                step(model, tokens_B1, state, ROOM)
            except Exception:  # the compiler's, around ours
                if not found:
                    raise
    return found


def main() -> None:
    """Print a row for every preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PRESETS, metavar="PRESET/MIXER")
    parser.add_argument("--depth", type=int, help="count this many layers, not all: a cycle is much faster to compile")
    parser.add_argument("--combine", action="store_true", help="let Inductor join kernels that do not share inputs")
    asked = parser.parse_args()
    pretend_a_gpu()
    options = {"combo_kernels": True, "benchmark_combo_kernel": False} if asked.combine else {}
    print("| preset | layers | kernels | of libraries | written by Inductor |")
    print("|---|---|---|---|---|")
    for name in asked.presets:
        config = preset(*name.split("/"), Place())
        pattern = config.pattern[: asked.depth]
        config = replace(config, pattern=pattern, blocks={key: config.blocks[key] for key in dict.fromkeys(pattern)})
        found = kernels(config, options)
        torch._dynamo.reset()
        row = (name, config.depth, found.total(), found["library"], found["written"])
        print("|", *" | ".join(map(str, row)).split(), "|", flush=True)


if __name__ == "__main__":
    main()
