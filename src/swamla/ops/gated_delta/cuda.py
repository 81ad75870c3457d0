"""The gated delta rule by flash-linear-attention's Triton kernels, as custom ops that torch.compile can trace.

The ops call only flash-linear-attention's public function, which does not expose the tensors that its backward pass
needs. So the backward op runs the forward kernels again. Not measured on GPU.
"""

import re
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swamla.errors import is_out_of_memory
from swamla.ops.gated_delta.cpu import chunked_gated_delta_rule
from swamla.ops.gated_delta.reference import RuleInputs
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import PADDING, Layout

WIDEST = 256  # the largest key width that its kernels support
OLDEST = (0, 6)  # of flash-linear-attention: older versions refuse Hopper with Triton >= 3.4
WRONG_FROM, RIGHT_FROM = (3, 4), (3, 7, 1)  # Triton versions with wrong gradients on Hopper for blocks of 64 keys
# The size of a training step: Triton autotunes per head widths only, and keeps the choice made for the first shape.
PROBE_ROWS, PROBE_LENGTH = 8, 2048
PROBE_TOLERANCE = 0.05  # ‖found − expected‖ / ‖expected‖ in bf16; wrong kernels were off by 0.5


class Packing(NamedTuple):
    """Bounds of the N documents of B packed rows; padding counts as documents.

    bounds_M: each document's first index in the flattened B·T tokens, then B·T: M = N + 1 numbers (`cu_seqlens`).
    host_bounds_M: the same on the CPU.  first_B, last_B: each row's first document, and its last one without padding.
    """

    bounds_M: Tensor
    host_bounds_M: Tensor
    first_B: Tensor
    last_B: Tensor


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


def packing_of(seq: Layout) -> Packing:
    """The layout's `Packing`, built at its first use. If it was built eagerly, a compiled graph does not break here."""
    made = seq.made("fla")
    return _build_packing(seq) if made is None else made


@outside_graphs
def _build_packing(seq: Layout) -> Packing:
    return seq.table("fla", partial(_packing, seq))


def _packing(seq: Layout) -> Packing:
    # From `seq.runs`, which is on the host: no device synchronisation.
    (batch, time), device = seq.shape, seq.document_BT.device
    lengths = torch.tensor([length for count, length in seq.runs for _ in range(count)])
    host_bounds_M = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    bounds_M = host_bounds_M.to(device, non_blocking=True)
    first_B = torch.searchsorted(bounds_M, torch.arange(batch, device=device) * time)
    begin_N = bounds_M[:-1]
    row_N, index_N = begin_N // time, torch.arange(len(lengths), device=device)
    real_N = torch.where(seq.document_BT.flatten()[begin_N] == PADDING, first_B[row_N], index_N)
    last_B = first_B.scatter_reduce(0, row_N, real_N, "amax")
    for bounds in (bounds_M, host_bounds_M):  # their length differs between batches: compile once for all lengths
        torch._dynamo.maybe_mark_dynamic(bounds, 0)
    return Packing(bounds_M, host_bounds_M, first_B, last_B)


def obstacle(device: torch.device, heads: int, key: int, value: int) -> str | None:
    """Why "fla" cannot compute these heads on `device`, as the rest of a sentence that begins with "fla"; else None.

    Runs the kernels once at the size of a training step and compares outputs and gradients with the backend "torch".
    The answer is cached, unless memory ran out. If it was asked eagerly, a compiled graph does not break here.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    asked = (str(device), heads, key, value)
    return _OBSTACLES[asked] if asked in _OBSTACLES else _find_obstacle(*asked)


_OBSTACLES: dict[tuple[str, int, int, int], str | None] = {}  # not `lru_cache`, through which the compiler traces


@outside_graphs
def _find_obstacle(device: str, heads: int, key: int, value: int) -> str | None:
    try:
        found = _obstacle(device, heads, key, value)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 'finds no memory on this device to be tried in: free some, or use "torch"'
    _OBSTACLES[device, heads, key, value] = found
    return found


def _obstacle(device: str, heads: int, key: int, value: int) -> str | None:
    if not installed():
        return "needs flash-linear-attention: pip install 'swamla[gpu]'"
    said = _version("fla-core") or _version("flash-linear-attention")
    if _numbers(said) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"needs flash-linear-attention >= {oldest}, {said} is installed: pip install --upgrade 'swamla[gpu]'"
    if not has_kernels(device):
        return f'needs a CUDA device, these tensors are on {device}: use "torch"'
    if key > WIDEST:
        return f'takes keys of width {WIDEST} at most, not {key}: use "torch"'
    triton = _numbers(_version("triton"))
    if is_hopper(device) and WRONG_FROM <= triton < RIGHT_FROM and 32 < key <= 64:
        said = ".".join(map(str, triton))
        wrong = f"is wrong at keys of width {key} on Hopper under Triton {said} (mended in 3.7.1)"
        return f'{wrong}: use width 128, or "torch"'
    if is_hopper(device) and WRONG_FROM <= triton < RIGHT_FROM:
        _lift_version_check()
    return _probe(device, heads, key, value)


def _lift_version_check() -> None:
    """Let the library compute gradients on Hopper under these Triton versions, which it refuses for all widths.

    Only its blocks of 64 keys are wrong there (its issue 640). Other widths use other blocks, and `_probe` checks them.
    """
    with suppress(ImportError):  # a version without this module is tried as it is
        vars(import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True


def installed() -> bool:
    """Whether flash-linear-attention is installed."""
    return find_spec("fla") is not None


def has_kernels(device: str) -> bool:
    """Whether Triton kernels run on this device."""
    return torch.device(device).type == "cuda" and torch.cuda.is_available()


def is_hopper(device: str) -> bool:
    """Whether the device has compute capability 9.x: H100, H200 and the like."""
    return torch.cuda.get_device_capability(device)[0] == 9


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _numbers(version_: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version_)[:3])


@torch.inference_mode(False)  # generation, in inference mode, may be the first caller
def _probe(device: str, heads: int, key: int, value: int) -> str | None:
    """What fails or is wrong on whole rows or on packed rows, else None."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, key), (heads, key), (heads, 2 * value), (heads,), (heads,)]
    drawn = (torch.randn(PROBE_ROWS, PROBE_LENGTH, *shape, generator=generator).to(device) for shape in shapes)
    q, k, v, alpha, beta = drawn
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    # As in the mixer, values are a slice of a wider tensor.
    inputs = [q, k, v[..., :value], -alpha.exp(), beta.sigmoid()]
    document_BT = (torch.arange(PROBE_LENGTH) * 5 // (2 * PROBE_LENGTH)).expand(PROBE_ROWS, -1)
    packed = Layout.from_documents(document_BT).to(device)
    try:
        errors = [_probe_error(inputs, seq, key**-0.5) for seq in (None, packed)]
    except Exception as error:  # any failure of the library becomes the reason that the user reads
        if is_out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        return f'fails on this device: {type(error).__name__}: {first_line}: use "torch"'
    if not max(errors) <= PROBE_TOLERANCE:
        return f'is wrong on this device by {max(errors):.1e} of the expected: use "torch"'
    return None


def _probe_error(inputs: list[Tensor], seq: Layout | None, scale: float) -> float:
    """The largest relative error of outputs, final states and gradients, against the backend "torch" in fp32."""
    results = []
    for compute, precise in ((fla_gated_delta_rule, False), (partial(chunked_gated_delta_rule, chunk=64), True)):
        leaves = [(x.float() if precise else x).detach().requires_grad_() for x in inputs]
        with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            o, final = compute(RuleInputs(*leaves), None, seq, scale=scale)
            results.append([o, final, *torch.autograd.grad(o.float().square().sum() + final.sum(), leaves)])
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(*results, strict=True))


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
