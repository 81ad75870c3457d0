"""The gated delta rule by flash-linear-attention's Triton kernels, as ops that a graph of torch.compile can hold.

The op knows flash-linear-attention by its public function alone, which keeps what its backward pass needs out of
reach: the backward pass computes the forward pass again. Not measured on GPU.
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
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import PADDING, Layout

WIDEST = 256  # key heads that its kernels take
OLDEST = (0, 6)  # of flash-linear-attention: versions before refuse Hopper with every Triton since 3.4
WRONG_FROM, RIGHT_FROM = (3, 4), (3, 7, 1)  # Triton, whose Hopper code gives wrong gradients for a block of 64 keys
PROBE_ROWS, PROBE_LENGTH = 8, 2048  # a training step's: Triton's tuning is by widths alone and keeps the first shape's
PROBE_TOLERANCE = 0.05  # ‖found − expected‖ / ‖expected‖ in bf16; what is wrong is wrong by half


class Packing(NamedTuple):
    """Where the N documents of B packed rows begin and end; padding counts as documents.

    bounds_M: the first token of each document in the B·T, and the end: N + 1 numbers; on the device and on the host.
    first_B, last_B: each row's first document, and its last that is not padding.
    """

    bounds_M: Tensor
    host_bounds_M: Tensor
    first_B: Tensor
    last_B: Tensor


def fla_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    seq: Layout | None,
    initial_state_BHKV: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V) in fp32; q, k and v in 16 bits."""
    log_alpha_BTH, beta_BTH = log_alpha_BTH.float(), beta_BTH.float()
    if seq is not None and seq.padded:
        padding_BT1 = (seq.document_BT == PADDING)[..., None]
        q_BTHK = q_BTHK.masked_fill(padding_BT1[..., None], 0)
        log_alpha_BTH, beta_BTH = log_alpha_BTH.masked_fill(padding_BT1, 0), beta_BTH.masked_fill(padding_BT1, 0)
    packing = (None,) * 4 if seq is None or seq.whole_rows else made_packing(seq)
    initial = None if initial_state_BHKV is None else initial_state_BHKV.float()
    same = (x.to(q_BTHK.dtype) for x in (k_BTHK, v_BTHV))
    return torch.ops.swamla.fla_gated_delta_rule(q_BTHK, *same, log_alpha_BTH, beta_BTH, initial, *packing, scale)


def made_packing(seq: Layout) -> Packing:
    """The layout's `Packing`, made at its first use; made eagerly, it ends no graph."""
    made = seq.made("fla")
    return _make_packing(seq) if made is None else made


@outside_graphs
def _make_packing(seq: Layout) -> Packing:
    return seq.table("fla", partial(packing_of, seq))


def packing_of(seq: Layout) -> Packing:
    """Of the layout's runs, which the host knows."""
    (batch, time), device = seq.shape, seq.document_BT.device
    lengths = torch.tensor([length for count, length in seq.runs for _ in range(count)])
    host_bounds_M = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    bounds_M = host_bounds_M.to(device, non_blocking=True)
    first_B = torch.searchsorted(bounds_M, torch.arange(batch, device=device) * time)
    begin_N = bounds_M[:-1]
    row_N, index_N = begin_N // time, torch.arange(len(lengths), device=device)
    real_N = torch.where(seq.document_BT.flatten()[begin_N] == PADDING, first_B[row_N], index_N)
    last_B = first_B.scatter_reduce(0, row_N, real_N, "amax")
    for bounds in (bounds_M, host_bounds_M):  # of another length in every batch: one graph for all
        torch._dynamo.maybe_mark_dynamic(bounds, 0)
    return Packing(bounds_M, host_bounds_M, first_B, last_B)


def obstacle(device: torch.device, heads: int, key: int, value: int) -> str | None:
    """Why these heads cannot be computed on `device`, to follow the word "fla"; None where they can.

    Tries the kernels once at the size of a training step, and compares outputs and gradients with the backend "torch";
    again the next time where there was no memory for it. Asked eagerly, it ends no graph.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    asked = (str(device), heads, key, value)
    return _OBSTACLES[asked] if asked in _OBSTACLES else _find_obstacle(*asked)


_OBSTACLES: dict[tuple[str, int, int, int], str | None] = {}  # no `lru_cache`: the compiler traces through one


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
    """Let the library compute gradients on Hopper under these Tritons, which it refuses for all widths.

    Only its block of 64 keys is wrong there (its issue 640); other widths take other blocks, and `_probe` decides.
    """
    with suppress(ImportError):  # a version that has moved it is tried as it is
        vars(import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True


def installed() -> bool:
    """Whether flash-linear-attention is there."""
    return find_spec("fla") is not None


def has_kernels(device: str) -> bool:
    """Whether Triton computes on this device."""
    return torch.device(device).type == "cuda" and torch.cuda.is_available()


def is_hopper(device: str) -> bool:
    """Whether the device is an H100, H200 or their kin."""
    return torch.cuda.get_device_capability(device)[0] == 9


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _numbers(version_: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version_)[:3])


@torch.inference_mode(False)  # a generation may be the first to ask
def _probe(device: str, heads: int, key: int, value: int) -> str | None:
    """What goes wrong with whole rows or with packed ones, or None."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, key), (heads, key), (heads, 2 * value), (heads,), (heads,)]
    drawn = (torch.randn(PROBE_ROWS, PROBE_LENGTH, *shape, generator=generator).to(device) for shape in shapes)
    q, k, v, alpha, beta = drawn
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    inputs = [q, k, v[..., :value], -alpha.exp(), beta.sigmoid()]  # a mixer's values are part of a wider tensor, too
    document_BT = (torch.arange(PROBE_LENGTH) * 5 // (2 * PROBE_LENGTH)).expand(PROBE_ROWS, -1)
    packed = Layout.from_documents(document_BT).to(device)
    try:
        errors = [_probe_error(inputs, seq, key**-0.5) for seq in (None, packed)]
    except Exception as error:  # whatever it cannot do is what the user wants to know
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
            o, final = compute(*leaves, seq=seq, initial_state_BHKV=None, scale=scale)
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
    o_1NHV, final_NHKV = _compute([_joined(x) for x in inputs], initial_NHKV, bounds_M, host_bounds_M, scale)
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
    """Gradients of the five inputs and of the initial state, which is empty where there was none."""
    inputs, initial = [q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH], initial_BHKV
    if bounds_M is not None and first_B is not None and last_B is not None:
        inputs = [_joined(x) for x in inputs]
        initial = _of_documents(initial_BHKV, first_B, len(bounds_M) - 1)
        d_o_BTHV = None if d_o_BTHV is None else _joined(d_o_BTHV)
        d_final_BHKV = _of_documents(d_final_BHKV, last_B, len(bounds_M) - 1)
    # Inside an op nothing is recorded but the library's own function: what it is given must be the leaves themselves.
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
    with torch.autocast(q.device.type, enabled=False):  # backwards there is none
        return chunk_gated_delta_rule(q, k, v, g=log_alpha, beta=beta, scale=scale, **state, **documents)


def _joined(x_BTX: Tensor) -> Tensor:
    """All rows as one."""
    return x_BTX.flatten(0, 1)[None]


def _of_documents(x_BHKV: Tensor | None, index_B: Tensor, count: int) -> Tensor | None:
    """One a document: the rows' at `index_B`, zeros for the others."""
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o_BTHV: Tensor | None, d_final_BHKV: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = torch.ops.swamla.fla_gated_delta_rule_backward(*tensors, ctx.scale, d_o_BTHV, d_final_BHKV)
    *of_inputs, of_initial = found
    return *of_inputs, None if tensors[5] is None else of_initial, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
