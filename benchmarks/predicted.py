"""`python -m benchmarks.predicted [PRESET …]`: a training step on an H100 by arithmetic, from lowered bytes and FLOPs.

Nothing here was measured: the bytes of fused kernels are what `benchmarks.lowered` counts, products are counted by the
model's own accounting, and both are divided by rates that such a card is known for. Needs Triton, as that does.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.lowered import LENGTH, ROWS, Lowered, lowered, require_triton, variants
from benchmarks.markdown import table
from swamla.model import LanguageModelConfig, count_parameters
from swamla.model.accounting import training_flops_per_token
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig

TOKENS = ROWS * LENGTH
TARGETS = {"small swa": 300e3, "base swa": 105e3, "moe-1b swa": 180e3, "small gdn": 240e3}  # tokens a second
NOMINAL = 989e12  # bf16 FLOP/s on the data sheet, which MFU is of

# FLOP/s that an H100 reaches in bf16, and bytes a second that it copies.
PRODUCTS, WIDE_PRODUCTS, HEAD, GROUPED = 620e12, 680e12, 700e12, 350e12
CUDNN, FLEX, FLASH = 450e12, 200e12, 300e12  # attention; in windows of computed tiles, masked or not
MEMORY = 2.9e12
WIDE = 1536  # of models whose products reach the second rate
TILE, FLASH_TILES = 128, 192  # of FlexAttention's mask; queries and keys that a tile of flash-attn has
LARGE = 4  # times as many tokens a step, by which the optimizer and the host cost less a token
RULE = 1.7e-3 / (8 * 256 * 16_384)  # seconds a head's key or value number and token: 1.7 ms a layer of 8 × (128 + 128)
LAUNCH = 2.5e-6  # seconds that a kernel costs the device at least
ADAMW, CLIP = 28, 12  # bytes a parameter: weight, gradient and two moments read, three written; norm and clipping
HOST = 0.5e-3  # that the device waits a step for the host: one read of a loss


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step, by what is computed."""

    products: float
    experts: float
    head: float
    causal: float
    windowed: float
    rule: float
    pointwise: float
    optimizer: float
    rest: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(vars(self).values())

    @property
    def of_large(self) -> float:
        """Seconds of `TOKENS` tokens of a step that has `LARGE` times as many."""
        return self.seconds - (self.optimizer + self.rest) * (1 - 1 / LARGE)


def predicted(config: LanguageModelConfig, blocks: dict[str, Lowered], *, flash: bool = False) -> Step:
    """A step of `TOKENS` tokens: blocks as they were lowered, products by the accounting.

    flash: whether flash-attn computes windows, else FlexAttention.
    """
    count, width = count_parameters(config), config.width
    head = width * config.vocab_size
    routed = sum(_routed(block.ffn, width) for block in config.layers)
    active = count.active - head - routed
    layers = [blocks[name] for name in config.pattern]
    fused = sum(layer.forward.kernel_bytes + layer.backward.kernel_bytes for layer in layers)
    launches = sum(layer.forward.kernels + layer.backward.kernels for layer in layers)
    mixers = [block.mixer for block in config.layers]
    chunk_logits = 4 * TOKENS * config.vocab_size * 2.0  # written, read and written by the softmax, read
    return Step(
        products=6 * active * TOKENS / (WIDE_PRODUCTS if width >= WIDE else PRODUCTS),
        experts=6 * routed * TOKENS / GROUPED,
        head=6 * head * TOKENS / HEAD + (chunk_logits + 4 * 12.0 * head) / MEMORY,
        causal=sum(_causal(mixer) for mixer in mixers) / CUDNN,
        windowed=sum(_windowed(mixer, width, flash=flash) for mixer in mixers) / (FLASH if flash else FLEX),
        rule=sum(_rule(mixer, width) for mixer in mixers),
        pointwise=fused / MEMORY + launches * LAUNCH / 4,  # a launch hides behind the kernel before it, mostly
        optimizer=(ADAMW + CLIP) * count.total / MEMORY,
        rest=HOST + (2 * 4.0 * head + TOKENS * width * 4 * 8) / MEMORY,
    )


def _routed(ffn: object, width: int) -> int:
    """Weights of the routed experts that a token uses."""
    n_activated = getattr(ffn, "n_activated", 0)
    if not n_activated:
        return 0
    inner, hidden = ffn.routed_dims(width)  # type: ignore[attr-defined]
    return 3 * inner * hidden * n_activated


def _causal(mixer: object) -> float:
    """FLOPs of latent attention on whole rows: forward two products, backward five."""
    if not isinstance(mixer, MLAConfig):
        return 0.0
    widths = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim + mixer.v_head_dim
    return 3.5 * 2 * mixer.n_heads * widths * (LENGTH / 2) * TOKENS


def _windowed(mixer: object, width: int, *, flash: bool) -> float:
    """FLOPs of the tiles that are computed; FlexAttention pads heads to a power of two."""
    if not isinstance(mixer, SWAConfig):
        return 0.0
    head = mixer.key_dim(width)
    if not flash:
        head = 1 << (head - 1).bit_length()
    keys = mixer.window + (FLASH_TILES if flash else 2 * TILE) + mixer.sinks
    return 3.5 * 2 * 2 * mixer.n_heads * head * keys * TOKENS


def _rule(mixer: object, width: int) -> float:
    """Seconds of flash-linear-attention's kernels: forward, again in the backward pass, and that one."""
    if not isinstance(mixer, GDNConfig):
        return 0.0
    key, value = mixer.head_dims(width)
    return RULE * mixer.n_heads * (key + value) * TOKENS


def _steps(names: list[str]) -> Iterator[tuple[str, LanguageModelConfig, Step]]:
    for name, config in variants(names):
        blocks = {block: lowered(config, block) for block in config.blocks}
        yield name, config, predicted(config, blocks)
        if config.residual == "autocast" and any(isinstance(block.mixer, SWAConfig) for block in config.layers):
            yield f"{name}, flash", config, predicted(config, blocks, flash=True)


def main(names: list[str]) -> int:
    """Print the table."""
    require_triton("benchmarks.predicted")
    lines = []
    for name, config, step in _steps(names):
        rates = [TOKENS / seconds for seconds in (step.seconds, step.of_large)]
        mfu = rates[1] * training_flops_per_token(config, LENGTH) / NOMINAL
        target = TARGETS.get(name.partition(",")[0])
        parts = [f"{1e3 * part:.1f}" for part in vars(step).values()]
        cells = [name, *parts, f"{1e3 * step.seconds:.1f}", *(f"{rate / 1e3:.0f}k" for rate in rates)]
        lines.append([*cells, f"{100 * mfu:.0f} %", f"{target / 1e3:.0f}k" if target else "–"])
        print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    header = [
        "model, residual stream",
        *Step.__dataclass_fields__,
        "sum, ms",
        "tokens/s",
        f"at {LARGE * TOKENS:,} a step",
    ]
    print(table([*header, "MFU then", "target"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
