"""Softmax attention of packed documents: causal, windowed with sinks, and of new tokens to a cache."""

import torch
from torch import Tensor

from swamla.errors import MissingBackendError, UsageError, require
from swamla.ops.attention.cached import attend_to_cache
from swamla.ops.attention.cpu import attend_in_tiles, kept_keys
from swamla.ops.attention.cuda import cudnn_attention, flex_attention, made_block_mask, too_wide_for_flex
from swamla.ops.attention.flash import flash_attention, made_bounds, made_sinks, obstacle, preferred
from swamla.ops.attention.reference import attend_by_mask
from swamla.ops.attention.sdpa import attend_by_sdpa
from swamla.ops.layout import Layout

__all__ = [
    "BACKENDS",
    "WINDOWED_BACKENDS",
    "cached_attention",
    "causal_attention",
    "describe_backend",
    "kept_causal_keys",
    "kept_keys",
    "prepare_attention",
    "resolve_backend",
    "takes_flash",
    "windowed_attention",
]

BACKENDS = ("auto", "reference", "torch", "tiles", "sdpa", "flex", "flash", "cudnn")
WINDOWED_BACKENDS = ("auto", "reference", "torch", "tiles", "sdpa", "flex", "flash")
PATHS = {  # what computes it, once "auto" and "torch" are resolved
    "reference": attend_by_mask,
    "tiles": attend_in_tiles,
    "sdpa": attend_by_sdpa,
    "flex": flex_attention,
    "flash": flash_attention,
    "cudnn": cudnn_attention,
}


def resolve_backend(backend: str, device: torch.device | str, *, windowed: bool = False) -> str:
    """The backend that a name means on a device.

    "tiles" are our own matrix products, "sdpa" is PyTorch's `scaled_dot_product_attention`; "torch" is the one of them
    that most CPUs are fastest with: "sdpa" for causal attention in fp32 with keys as wide as values, else "tiles".
    "auto" is "torch", but on CUDA "cudnn", and "flex" for windowed attention ("sdpa" for wide keys in fp32, which flex
    cannot take); a training run on a CPU instead takes the one that is measured to be faster (`swamla.train.paths`).
    "flash" is the library flash-attn, which "auto" takes on CUDA where `takes_flash` says so. Raises UsageError for an
    unknown name and MissingBackendError for "cudnn" or "flex" without CUDA (FlexAttention has no backward elsewhere),
    and for "flash" without its library.
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
    """Whether "auto" gives windowed attention and packed rows to flash-attn: it is there and flex would widen heads."""
    if backend != "auto" or torch.device(device).type != "cuda" or not preferred(key, value, dtype):
        return False
    return obstacle(device, key) is None


def describe_backend(
    backend: str, device: torch.device, dtype: torch.dtype, *, key: int, value: int, windowed: bool = False
) -> str:
    """`resolve_backend` for people: names the kernels that "cudnn" leaves to others."""
    chosen = resolve_backend(backend, device, windowed=windowed)
    packed = "flash" if takes_flash(backend, device, dtype, key, value) else "flex"
    if windowed:
        return packed if chosen == "flex" else chosen
    fp32 = "fp32: memory-efficient, packed rows: flex, or sdpa for wide keys"
    others = f"packed rows: {packed}" if dtype.itemsize == 2 else fp32
    return f"cudnn ({others})" if chosen == "cudnn" else chosen


def causal_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """o (B, T, H, V): each token attends to its own document, up to itself.

    G key heads serve H query heads (G divides H); the value width V may differ from K. scale: K^-½ unless given.
    Padding gives finite outputs that mean nothing. Backends: see `resolve_backend`; "reference" writes out the mask,
    "cudnn" takes FlexAttention where documents share rows. Under autocast the inputs are cast to its dtype. Raises
    ConfigError for shapes that do not fit.
    """
    return _attention(q_BTHK, k_BTGK, v_BTGV, seq, None, 0, scale, backend)


def windowed_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    *,
    window: int,
    sinks: int,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """o (B, T, H, V): each token attends to its document's last `window` tokens, itself included, and first `sinks`.

    Sliding windows: arXiv 2004.05150; sinks: arXiv 2309.17453. Everything else as `causal_attention`; time and memory
    are linear in T, except on "reference".
    """
    require(window >= 1, "window", window, "must be >= 1, e.g. 256")
    require(sinks >= 0, "sinks", sinks, "must be >= 0, e.g. 4")
    return _attention(q_BTHK, k_BTGK, v_BTGV, seq, window, sinks, scale, backend)


def _attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: int | None,
    sinks: int,
    scale: float | None,
    backend: str,
) -> Tensor:
    _check(q_BTHK, k_BTGK, v_BTGV, seq)
    path = resolve_backend(backend, q_BTHK.device, windowed=window is not None)
    q, k, v = _autocast(q_BTHK, k_BTGK, v_BTGV)
    masked = window is not None or not seq.whole_rows
    if masked and path in ("flex", "cudnn") and takes_flash(backend, q.device, q.dtype, q.shape[-1], v.shape[-1]):
        path = "flash"
    if (backend, path) == ("auto", "flex") and too_wide_for_flex(q):
        path = "sdpa"
    if path == "torch":
        bf16, widths = q.dtype == torch.bfloat16, (q.shape[-1], v.shape[-1])
        tiled = window is not None or (q.device.type == "cpu" and in_tiles(bf16, *widths))
        path = "tiles" if tiled else "sdpa"
    return PATHS[path](q, k, v, seq, window=window, sinks=sinks, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def in_tiles(bf16: bool, key_width: int, value_width: int) -> bool:
    """Whether "torch" is "tiles" for causal attention on a CPU; else it is "sdpa".

    PyTorch's own kernel wants one width for keys and values, and without AMX gains nothing from bf16.
    """
    return bf16 or key_width != value_width


def kept_causal_keys(length: int, *, bf16: bool, key_width: int, value_width: int, backend: str) -> float:
    """How many weights a query keeps for the backward pass of causal attention on a CPU, on average."""
    tiled = backend == "tiles" or (backend in ("auto", "torch") and in_tiles(bf16, key_width, value_width))
    return kept_keys(length, length, 0) if tiled else 0.0


def prepare_attention(
    seq: Layout, backend: str, *, key: int, value: int, window: int | None = None, sinks: int = 0
) -> None:
    """Make the layout's masks for this attention eagerly, so that a graph that holds it need not end to make them."""
    device = seq.position_BT.device
    chosen = resolve_backend(backend, device, windowed=window is not None)
    masked = chosen == "flex" or (chosen == "cudnn" and not seq.whole_rows)
    flash = chosen == "flash" or (masked and takes_flash(backend, device, torch.bfloat16, key, value))
    if flash:
        made_bounds(seq)
        if window is not None and sinks:
            made_sinks(seq, window, sinks)
    # Without autocast the dtype of the heads is not known here, and flash takes 16 bits only: both tables.
    if masked and not (flash and torch.is_autocast_enabled(device.type)):
        made_block_mask(seq, window, sinks)


def cached_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, allowed_BTS: Tensor | None, *, scale: float | None = None
) -> Tensor:
    """o (B, T, H, V): T new tokens attend to those of the S cached ones that the bool mask allows.

    Without a mask (None) the new tokens are the last T of the cached ones, and see all but later ones; so nothing is
    spent on a mask. A query that may see nothing gives zeros. Keys that nobody may see must be finite. scale: K^-½
    unless given. Under autocast the inputs are cast to its dtype. Raises ConfigError for shapes that do not fit.
    """
    _check_heads(q_BTHK, k_BSGK, v_BSGV)
    if allowed_BTS is None:
        time, cached = q_BTHK.shape[1], k_BSGK.shape[1]
        require(time <= cached, "q.shape", tuple(q_BTHK.shape), f"must have no more tokens than the cache, {cached}")
    else:
        expected = (*q_BTHK.shape[:2], k_BSGK.shape[1])
        require(allowed_BTS.shape == expected, "allowed_BTS.shape", tuple(allowed_BTS.shape), f"must be {expected}")
    q, k, v = _autocast(q_BTHK, k_BSGK, v_BSGV)
    return attend_to_cache(q, k, v, allowed_BTS, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def _check(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout) -> None:
    _check_heads(q_BTHK, k_BTGK, v_BTGV)
    for name, x in (("q", q_BTHK), ("k", k_BTGK), ("v", v_BTGV)):
        require(x.shape[:2] == seq.shape, f"{name}.shape", tuple(x.shape), f"must begin with the layout's {seq.shape}")


def _check_heads(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> None:
    heads, groups = q_BTHK.shape[2], k_BSGK.shape[2]
    require(heads % groups == 0, "key heads", groups, f"must divide the {heads} query heads")
    require(
        v_BSGV.shape[:3] == k_BSGK.shape[:3], "v.shape", tuple(v_BSGV.shape), f"must begin as k's {tuple(k_BSGK.shape)}"
    )
    require(
        q_BTHK.shape[3] == k_BSGK.shape[3], "q.shape", tuple(q_BTHK.shape), f"must end as k's {tuple(k_BSGK.shape)}"
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to PyTorch's own attention: fp32 inputs become its dtype, double stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # Not cast where nothing changes: on a CPU, a compiled graph would hold these casts and nothing else.
    return tuple(x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in tensors)
