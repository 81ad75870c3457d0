"""What the parity tests on a GPU share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}  # ‖found − reference‖ / ‖reference‖


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def poison() -> None:
    """Leave NaN in the memory that the next allocations get: what a kernel does not write is found."""
    held = [torch.full((1 << power,), torch.nan, device="cuda") for power in range(8, 25) for _ in range(4)]
    del held


def outputs_and_gradients(op: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What `op` returns, and the gradient of every input for a fixed upstream gradient; memory poisoned before both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    poison()
    outputs = list(op(*leaves))
    upstream = [randn(*o.shape, dtype=o.dtype, seed=1 + i) for i, o in enumerate(outputs)]
    poison()
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def assert_parity(
    fast: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    tolerance: float | None = None,
) -> None:
    """Outputs and gradients against those of `reference` on the same numbers in fp32."""
    tolerance = TOLERANCE[inputs[0].dtype] if tolerance is None else tolerance
    found = outputs_and_gradients(fast, inputs)
    expected = outputs_and_gradients(reference, [x.float() for x in inputs])
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        distance = (mine.float() - theirs.float()).norm().item()
        size = max(theirs.float().norm().item(), 0.1)  # a gradient may be zero but for rounding
        assert distance <= tolerance * size, f"result {index} is {distance} off, of {size}"


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
