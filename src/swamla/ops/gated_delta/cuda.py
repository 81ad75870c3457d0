"""The gated delta rule by flash-linear-attention's Triton kernels, as custom ops that torch.compile can trace.

The ops call only flash-linear-attention's public function, which does not expose the tensors that its backward pass
needs. So the backward op runs the forward kernels again. Not measured on GPU.
"""

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor

from swamla.ops import fla, libraries
from swamla.ops.fla import packing_of
from swamla.ops.gated_delta.cpu import chunked_gated_delta_rule
from swamla.ops.gated_delta.reference import RuleInputs
from swamla.ops.layout import PADDING, Layout

WIDEST = 256  # the largest key width that its kernels support
WRONG_FROM, RIGHT_FROM = (3, 4), (3, 7, 1)  # Triton versions with wrong gradients on Hopper for blocks of 64 keys


def fla_gated_delta_rule(
    inputs: RuleInputs, initial_state_BHKV: Tensor | None, seq: Layout | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V) in fp32; q, k and v in 16 bits."""
    q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH = inputs
    log_alpha_BTH, beta_BTH = log_alpha_BTH.float(), beta_BTH.float()
    if seq is not None and seq.padded:
        padding_BT1 = (seq.document_BT == PADDING)[..., None]
        q_BTHK = q_BTHK.masked_fill(padding_BT1[..., None], 0)
        log_alpha_BTH, beta_BTH = log_alpha_BTH.masked_fill(padding_BT1, 0), beta_BTH.masked_fill(padding_BT1, 0)
    packing = (None,) * 4 if seq is None or seq.whole_rows else packing_of(seq)
    initial = None if initial_state_BHKV is None else initial_state_BHKV.float()
    k_BTHK, v_BTHV = k_BTHK.to(q_BTHK.dtype), v_BTHV.to(q_BTHK.dtype)
    return torch.ops.swamla.fla_gated_delta_rule(
        q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH, initial, *packing, scale
    )


def obstacle(device: torch.device, heads: int, key: int, value: int) -> str | None:
    """Why "fla" cannot compute these heads on `device`, as the rest of a sentence that begins with "fla"; else None.

    Runs the kernels once at the size of a training step and compares outputs and gradients with the backend "torch".
    """
    kernels = ("rule", str(heads), str(key), str(value))
    return fla.obstacle(device, kernels, partial(_obstacle, heads=heads, key=key, value=value))


def _obstacle(device: str, heads: int, key: int, value: int) -> str | None:
    if key > WIDEST:
        return f'takes keys of width {WIDEST} at most, not {key}: use "torch"'
    triton = fla.numbers(fla.version_of("triton"))
    if fla.is_hopper(device) and WRONG_FROM <= triton < RIGHT_FROM and 32 < key <= 64:
        said = ".".join(map(str, triton))
        wrong = f"is wrong at keys of width {key} on Hopper under Triton {said} (mended in 3.7.1)"
        return f'{wrong}: use width 128, or "torch"'
    if fla.is_hopper(device) and WRONG_FROM <= triton < RIGHT_FROM:
        _lift_version_check()
    return _probe(device, heads, key, value)


def _lift_version_check() -> None:
    """Let the library compute gradients on Hopper under these Triton versions, which it refuses for all widths.

    Only its blocks of 64 keys are wrong there (its issue 640). Other widths use other blocks, and `_probe` checks them.
    """
    with suppress(ImportError):  # a version without this module is tried as it is
        vars(import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True


@torch.inference_mode(False)  # generation, in inference mode, may be the first caller
def _probe(device: str, heads: int, key: int, value: int) -> str | None:
    """What fails or is wrong on whole rows or on packed rows, else None."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, key), (heads, key), (heads, 2 * value), (heads,), (heads,)]
    drawn = (torch.randn(fla.PROBE_ROWS, fla.PROBE_LENGTH, *shape, generator=generator).to(device) for shape in shapes)
    q, k, v, alpha, beta = drawn
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    # As in the mixer, values are a slice of a wider tensor.
    inputs = [q, k, v[..., :value], -alpha.exp(), beta.sigmoid()]
    packed = fla.probe_layout(device)
    return libraries.judged(partial(_compared, inputs, (None, packed), key**-0.5), fla.INSTEAD)


def _compared(
    inputs: list[Tensor], layouts: Iterable[Layout | None], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, final states and gradients of these kernels, and those of the backend "torch" in fp32."""
    results: tuple[list[Tensor], list[Tensor]] = [], []
    for seq, precise in product(layouts, (False, True)):
        leaves = [(x.float() if precise else x).detach().requires_grad_() for x in inputs]
        compute = partial(chunked_gated_delta_rule, chunk=64) if precise else fla_gated_delta_rule
        with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            o, final = compute(RuleInputs(*leaves), None, seq, scale=scale)
            gradients = torch.autograd.grad(o.float().square().sum() + final.sum(), leaves)
        results[precise].extend([o, final, *gradients])
    return results


@torch.library.custom_op("swamla::fla_gated_delta_rule", mutates_args=())
def _forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTH: Tensor,
    beta_BTH: Tensor,
    initial_BHKV: Tensor | None,
    bounds_M: Tensor | None,
    host_bounds_M: Tensor | None,
    first_B: Tensor | None,
    last_B: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    inputs = [x.contiguous() for x in (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH)]
    if bounds_M is None or first_B is None or last_B is None:
        o_BTHV, final_BHKV = _compute(inputs, initial_BHKV, None, None, scale)
        return o_BTHV.contiguous(), final_BHKV.contiguous()
    initial_NHKV = _of_documents(initial_BHKV, first_B, len(bounds_M) - 1)
    o_1NHV, final_NHKV = _compute([_as_one_row(x) for x in inputs], initial_NHKV, bounds_M, host_bounds_M, scale)
    return o_1NHV.contiguous().view(v_BTHV.shape), final_NHKV[last_B]


@torch.library.custom_op("swamla::fla_gated_delta_rule_backward", mutates_args=())
def _backward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTH: Tensor,
    beta_BTH: Tensor,
    initial_BHKV: Tensor | None,
    bounds_M: Tensor | None,
    host_bounds_M: Tensor | None,
    first_B: Tensor | None,
    last_B: Tensor | None,
    scale: float,
    d_o_BTHV: Tensor | None,
    d_final_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs and of the initial state (an empty tensor without an initial state)."""
    inputs, initial = [q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH], initial_BHKV
    if bounds_M is not None and first_B is not None and last_B is not None:
        inputs = [_as_one_row(x) for x in inputs]
        initial = _of_documents(initial_BHKV, first_B, len(bounds_M) - 1)
        d_o_BTHV = None if d_o_BTHV is None else _as_one_row(d_o_BTHV)
        d_final_BHKV = _of_documents(d_final_BHKV, last_B, len(bounds_M) - 1)
    # Inside a custom op autograd records only the library's own function, so its arguments must be the leaves.
    leaves = [x.detach().contiguous().requires_grad_() for x in inputs]
    start = None if initial is None else initial.detach().contiguous().requires_grad_()
    with torch.enable_grad():
        outputs = _compute(leaves, start, bounds_M, host_bounds_M, scale)
        asked = [(o, d) for o, d in zip(outputs, (d_o_BTHV, d_final_BHKV), strict=True) if d is not None]
        wanted = leaves if start is None else [*leaves, start]
        found = torch.autograd.grad([o for o, _ in asked], wanted, [d.to(o.dtype).contiguous() for o, d in asked])
    dq, dk, dv, d_log_alpha, d_beta = (
        d.contiguous().view(x.shape)
        for d, x in zip(found, (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH), strict=False)
    )
    if initial_BHKV is None:
        return dq, dk, dv, d_log_alpha, d_beta, beta_BTH.new_empty(0)
    return dq, dk, dv, d_log_alpha, d_beta, found[5].contiguous() if first_B is None else found[5][first_B]


def _compute(
    inputs: list[Tensor], initial: Tensor | None, bounds: Tensor | None, host_bounds: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs and final states of contiguous inputs."""
    chunk_gated_delta_rule = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    q, k, v, log_alpha, beta = inputs
    documents = {} if bounds is None else {"cu_seqlens": bounds, "cu_seqlens_cpu": host_bounds}
    state = {"initial_state": initial, "output_final_state": True}
    with torch.autocast(q.device.type, enabled=False):  # as in the backward pass, which runs without autocast
        return chunk_gated_delta_rule(q, k, v, g=log_alpha, beta=beta, scale=scale, **state, **documents)


def _as_one_row(x_BTX: Tensor) -> Tensor:
    """(B, T, …) → (1, B·T, …)."""
    return x_BTX.flatten(0, 1)[None]


def _of_documents(x_BHKV: Tensor | None, index_B: Tensor, count: int) -> Tensor | None:
    """One state (H, K, V) per document: row b's at `index_B[b]`, zeros elsewhere."""
    if x_BHKV is None:
        return None
    return x_BHKV.new_zeros(count, *x_BHKV.shape[1:]).index_copy_(0, index_B, x_BHKV)


@_forward.register_fake
def _fake_forward(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, _time, heads, key = q_BTHK.shape
    state = q_BTHK.new_empty(batch, heads, key, v_BTHV.shape[-1], dtype=torch.float32)
    return q_BTHK.new_empty(v_BTHV.shape), state


@_backward.register_fake
def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, initial = arguments[:6]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    empty = inputs[-1].new_empty(0)
    return *gradients, empty if initial is None else torch.empty_like(initial, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o_BTHV: Tensor | None, d_final_BHKV: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = torch.ops.swamla.fla_gated_delta_rule_backward(*tensors, ctx.scale, d_o_BTHV, d_final_BHKV)
    *of_inputs, of_initial = found
    return *of_inputs, None if tensors[5] is None else of_initial, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
