"""Softmax attention on packed documents: causal, sliding-window with sinks, and of new tokens to a cache."""

import torch
from torch import Tensor

from swamla.errors import MissingBackendError, UsageError, require
from swamla.ops.attention.cached import attend_to_cache
from swamla.ops.attention.cpu import attend_in_tiles
from swamla.ops.attention.cpu import kept_keys as kept_keys
from swamla.ops.attention.cuda import block_mask_of, cudnn_attention, flex_attention, too_wide_for_flex
from swamla.ops.attention.flash import bounds_of, flash_attention, obstacle, preferred, sinks_of
from swamla.ops.attention.reference import CAUSAL, Window, attend_by_mask
from swamla.ops.attention.sdpa import attend_by_sdpa
from swamla.ops.autocast import autocast_dtype
from swamla.ops.layout import Layout

BACKENDS = ("auto", "reference", "torch", "tiles", "sdpa", "flex", "flash", "cudnn")
WINDOWED_BACKENDS = ("auto", "reference", "torch", "tiles", "sdpa", "flex", "flash")
PATHS = {  # after "auto" and "torch" are resolved
    "reference": attend_by_mask,
    "tiles": attend_in_tiles,
    "sdpa": attend_by_sdpa,
    "flex": flex_attention,
    "flash": flash_attention,
    "cudnn": cudnn_attention,
}


def resolve_backend(backend: str, device: torch.device | str, *, windowed: bool = False) -> str:
    """The backend that a name means on a device.

    "tiles" is our own blockwise implementation, "sdpa" is PyTorch's `scaled_dot_product_attention`. "torch" is the one
    of the two that is faster on most CPUs: "sdpa" for causal attention in fp32 with equal key and value widths, else
    "tiles". "auto" is "torch" on a CPU. On CUDA it is "cudnn" for causal attention and "flex" for windowed attention
    ("sdpa" for fp32 keys that are too wide for flex, "flash" where `takes_flash`). Training on a CPU measures both and
    takes the faster one (`swamla.train.backends`). Raises UsageError for an unknown name, MissingBackendError for
    "cudnn" or "flex" without CUDA (FlexAttention has a backward pass on CUDA only), and for "flash" without flash-attn.
    """
    backends = WINDOWED_BACKENDS if windowed else BACKENDS
    if backend not in backends:
        kind = "windowed attention" if windowed else "attention"
        raise UsageError(f"backend = {backend!r}: {kind} has {', '.join(map(repr, backends))}")
    cuda = torch.device(device).type == "cuda"
    if backend == "auto":
        return ("flex" if windowed else "cudnn") if cuda else "torch"
    if backend in ("cudnn", "flex") and not cuda:
        needs = f'backend = "{backend}" needs a CUDA device, these tensors are on {device}: use "torch"'
        raise MissingBackendError(needs)
    if backend == "flash" and (reason := obstacle(device)) is not None:
        raise MissingBackendError(f'backend = "flash" {reason}')
    return backend


def takes_flash(backend: str, device: torch.device | str, dtype: torch.dtype, key: int, value: int) -> bool:
    """Whether "auto" is flash-attn for windows and packed rows: it is installed, and flex would pad these heads."""
    if backend != "auto" or torch.device(device).type != "cuda" or not preferred(key, value, dtype):
        return False
    return obstacle(device, key) is None


def describe_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    key: int,
    value: int,
    windowed: bool = False,
    sink_logit: bool = False,
) -> str:
    """`resolve_backend` as a text to print: names the kernels that "cudnn" falls back to."""
    chosen = resolve_backend(backend, device, windowed=windowed)
    packed = "flash" if takes_flash(backend, device, dtype, key, value) else "flex"
    if windowed or sink_logit:
        return packed if chosen in ("flex", "cudnn") else chosen
    fp32 = "fp32: memory-efficient, packed rows: flex, or sdpa for wide keys"
    others = f"packed rows: {packed}" if dtype.itemsize == 2 else fp32
    return f"cudnn ({others})" if chosen == "cudnn" else chosen


def causal_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    *,
    scale: float | None = None,
    sink_logit_H: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """o (B, T, H, V): each token attends to the tokens of its document up to itself.

    H query heads share G key heads (G divides H). The value width V may differ from K. scale: K^-½ unless given.
    sink_logit: of each query head, the score of a token with a value of zeros that every token attends to besides.
    Outputs of padding are finite and undefined. Backends: see `resolve_backend`; "reference" uses an explicit mask,
    "cudnn" uses FlexAttention for packed rows. Under autocast the inputs are cast to its dtype. Raises ConfigError for
    shapes that do not fit, and as `resolve_backend` does. Source: arXiv 1706.03762; shared heads: 2305.13245; sink
    logits: 2508.10925.
    """
    return _attention(q_BTHK, k_BTGK, v_BTGV, seq, CAUSAL, scale, sink_logit_H, backend)


def windowed_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    *,
    window: int,
    sinks: int,
    scale: float | None = None,
    sink_logit_H: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """o (B, T, H, V): each token attends to its document's last `window` tokens, itself included, and first `sinks`.

    Time and memory are linear in T, except for "reference". Everything else as in `causal_attention`. Source: sliding
    windows, arXiv 2004.05150; attention sinks, arXiv 2309.17453.
    """
    require(window >= 1, "window", window, "must be >= 1, e.g. 256")
    require(sinks >= 0, "sinks", sinks, "must be >= 0, e.g. 4")
    return _attention(q_BTHK, k_BTGK, v_BTGV, seq, Window(window, sinks), scale, sink_logit_H, backend)


def _attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: Window,
    scale: float | None,
    sink_logit_H: Tensor | None,
    backend: str,
) -> Tensor:
    _check_heads(q_BTHK, k_BTGK, v_BTGV, sink_logit_H)
    for name, x in (("q", q_BTHK), ("k", k_BTGK), ("v", v_BTGV)):
        require(x.shape[:2] == seq.shape, f"{name}.shape", tuple(x.shape), f"must begin with the layout's {seq.shape}")
    path = resolve_backend(backend, q_BTHK.device, windowed=window != CAUSAL)
    q, k, v = _autocast(q_BTHK, k_BTGK, v_BTGV)
    masked = window != CAUSAL or not seq.whole_rows or sink_logit_H is not None
    if masked and path in ("flex", "cudnn") and takes_flash(backend, q.device, q.dtype, q.shape[-1], v.shape[-1]):
        path = "flash"
    if (backend, path) == ("auto", "flex") and too_wide_for_flex(q):
        path = "sdpa"
    if path == "torch":
        bf16, widths = q.dtype == torch.bfloat16, (q.shape[-1], v.shape[-1])
        tiled = window != CAUSAL or (q.device.type == "cpu" and in_tiles(bf16, *widths))
        path = "tiles" if tiled else "sdpa"
    return PATHS[path](q, k, v, seq, window, q.shape[-1] ** -0.5 if scale is None else scale, sink_logit_H)


def in_tiles(bf16: bool, key_width: int, value_width: int) -> bool:
    """Whether "torch" means "tiles" for causal attention on a CPU; else it means "sdpa".

    PyTorch's CPU kernel needs equal key and value widths, and without AMX is not faster in bf16 than in fp32.
    """
    return bf16 or key_width != value_width


def kept_causal_keys(
    length: int, *, bf16: bool, key_width: int, value_width: int, backend: str, sink_logit: bool = False
) -> float:
    """Attention weights per query that causal attention on a CPU saves for the backward pass, on average."""
    tiled = backend == "tiles" or (backend in ("auto", "torch") and in_tiles(bf16, key_width, value_width))
    return kept_keys(length, length, 0, int(sink_logit)) if tiled else 0.0


def prepare_attention(
    seq: Layout, backend: str, window: Window = CAUSAL, *, key: int, value: int, sink_logit: bool = False
) -> None:
    """Build the layout's masks and bounds eagerly, so that compiled attention has no graph break."""
    device = seq.position_BT.device
    chosen = resolve_backend(backend, device, windowed=window != CAUSAL)
    masked = chosen == "flex" or (chosen == "cudnn" and (sink_logit or not seq.whole_rows))
    flash = chosen == "flash" or (masked and takes_flash(backend, device, torch.bfloat16, key, value))
    if flash:
        bounds_of(seq)
        if window.size is not None and window.sinks:
            sinks_of(seq, window)
    # Without autocast the heads' dtype is not known here, and flash takes 16 bits only: both tables.
    if masked and not (flash and torch.is_autocast_enabled(device.type)):
        block_mask_of(seq, window)


def cached_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    allowed_BTS: Tensor | None,
    *,
    scale: float | None = None,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, V): T new tokens attend to those of S cached tokens that the bool mask allows.

    Without a mask (None) the queries are the last T of the S tokens, under the causal mask, which is never built. A
    query without an allowed key gives zeros. Keys that no query may attend to must be finite. scale: K^-½ unless given.
    Under autocast the inputs are cast to its dtype. Raises ConfigError for shapes that do not fit.
    """
    _check_heads(q_BTHK, k_BSGK, v_BSGV, sink_logit_H)
    if allowed_BTS is None:
        time, cached = q_BTHK.shape[1], k_BSGK.shape[1]
        require(time <= cached, "q.shape", tuple(q_BTHK.shape), f"must have no more tokens than the cache, {cached}")
    else:
        expected = (*q_BTHK.shape[:2], k_BSGK.shape[1])
        require(allowed_BTS.shape == expected, "allowed_BTS.shape", tuple(allowed_BTS.shape), f"must be {expected}")
    q, k, v = _autocast(q_BTHK, k_BSGK, v_BSGV)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend_to_cache(q, k, v, allowed_BTS, scale=scale, sink_logit_H=sink_logit_H)


def _check_heads(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, sink_logit_H: Tensor | None) -> None:
    heads, groups = q_BTHK.shape[2], k_BSGK.shape[2]
    require(heads % groups == 0, "key heads", groups, f"must divide the {heads} query heads")
    require(
        v_BSGV.shape[:3] == k_BSGK.shape[:3], "v.shape", tuple(v_BSGV.shape), f"must begin as k's {tuple(k_BSGK.shape)}"
    )
    require(
        q_BTHK.shape[3] == k_BSGK.shape[3], "q.shape", tuple(q_BTHK.shape), f"must end as k's {tuple(k_BSGK.shape)}"
    )
    logits = (heads,) if sink_logit_H is None else tuple(sink_logit_H.shape)
    require(logits == (heads,), "sink_logit.shape", logits, f"must be {(heads,)}: one for each query head")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast does for PyTorch's own attention: fp32 inputs are cast to its dtype, fp64 inputs are not."""
    device = tensors[0].device.type
    dtype = autocast_dtype(device)
    if dtype is None:
        return tensors
    # No cast to the same dtype: on a CPU, torch.compile would make a graph of these casts and nothing else.
    return tuple(x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in tensors)
