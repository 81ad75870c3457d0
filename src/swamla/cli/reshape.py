"""Flags that reshape a whole model: its pattern, its depth, its heads.

Blocks that a pattern names are looked up among the recipe's, then among its spare ones (tables `[spare.NAME]`, which
only flags put to use), and last among the kinds of mixer.
"""

from collections.abc import Mapping

from swamla.cli.field_text import parse_text
from swamla.cli.plain import BLOCK_PARTS, Plain, choice, mixer_kind
from swamla.errors import UsageError

SHAPE = {
    "pattern": ("NAMES", 'blocks of the recipe or kinds of mixer, bottom first: "gdn gdn mla"'),
    "local_mixer": ("swa|gdn", "what every local layer of the pattern is: sliding windows or gated DeltaNet"),
    "n_layers": ("INT", "depth: the pattern is repeated, or cut, to it"),
    "n_heads": ("INT", "heads of every block's mixer"),
}
LOCAL = ("swa", "gdn")  # mixers whose cost and state do not grow with the distance to the document's start
PER_CYCLE = {"local": 2, "mla": 1}


def reshape(model: Plain, wanted: Mapping[str, str], spare: Plain, *, cycle: Mapping[str, int]) -> dict[str, str]:
    """Write the flags of `SHAPE` in `wanted` into `model`; returns dotted field -> flag.

    cycle: local and mla layers of one cycle; where it is not empty the pattern is made of such cycles, at its depth.
    Blocks that are no longer in the pattern go.
    """
    blocks, pattern, origins = model["blocks"], list(model["pattern"]), {}
    if "pattern" in wanted:
        pattern = wanted["pattern"].replace(",", " ").split()
        origins["model.pattern"] = "--pattern"
        for name in pattern:
            _provide(name, blocks, spare, "--pattern")
    if "local_mixer" in wanted:
        pattern = _with_local(wanted["local_mixer"], pattern, blocks, spare)
    if "n_layers" in wanted:
        depth = _depth(wanted["n_layers"])
        pattern = _repeat(pattern, depth) if pattern else []
    if cycle:
        pattern = _repeat(_cycle(pattern, blocks, spare, cycle), len(pattern))
    model["pattern"] = pattern
    model["blocks"] = {name: block for name, block in blocks.items() if name in pattern} if pattern else blocks
    if "n_heads" in wanted:
        for name, block in model["blocks"].items():
            choice(block, "mixer")["n_heads"] = parse_text(wanted["n_heads"], int)
            origins[f"model.blocks.{name}.mixer.n_heads"] = "--n_heads"
    return origins


def _depth(text: str) -> int:
    depth = parse_text(text, int)
    if not isinstance(depth, int) or depth < 1:
        raise UsageError(f"--n_layers {text}: must be a whole number > 0, e.g. 6")
    return depth


def _repeat(pattern: list[str], depth: int) -> list[str]:
    return [pattern[layer % len(pattern)] for layer in range(depth)]


def _with_local(kind: str, pattern: list[str], blocks: Plain, spare: Plain) -> list[str]:
    """The pattern with the block `kind` in the place of every local layer."""
    if kind not in LOCAL:
        raise UsageError(f"--local_mixer {kind}: must be one of {', '.join(LOCAL)}")
    local = {name for name in pattern if name in blocks and mixer_kind(blocks[name]) in LOCAL}
    if not local:
        raise UsageError(f"--local_mixer {kind}: no layer of the pattern is local: {' '.join(dict.fromkeys(pattern))}")
    _provide(kind, blocks, spare, "--local_mixer", like=next(name for name in pattern if name in local))
    return [kind if name in local else name for name in pattern]


def _cycle(pattern: list[str], blocks: Plain, spare: Plain, cycle: Mapping[str, int]) -> list[str]:
    """One cycle: so many local layers, then so many of latent attention."""
    local = next((name for name in pattern if mixer_kind(blocks[name]) in LOCAL), "swa")
    latent = next((name for name in pattern if mixer_kind(blocks[name]) == "mla"), "mla")
    counts = PER_CYCLE | dict(cycle)
    names = [local] * counts["local"] + [latent] * counts["mla"]
    if not names:
        raise UsageError("a cycle without any layer: give --local_layers_per_cycle or --mla_layers_per_cycle above 0")
    for name in set(names):
        _provide(name, blocks, spare, "--mla_layers_per_cycle")
    return names


def _provide(name: str, blocks: Plain, spare: Plain, flag: str, like: str = "") -> None:
    """Put the block `name` among `blocks`: a spare one, or one with that kind of mixer and otherwise like `like`."""
    if name in blocks:
        return
    kinds = BLOCK_PARTS["mixer"]
    if name in spare:
        blocks[name] = spare[name]
        return
    if name not in kinds:
        known = ", ".join(dict.fromkeys([*blocks, *spare, *kinds]))
        raise UsageError(f"{flag}: no block or mixer is called {name!r}; there are: {known}")
    model_block = blocks[like] if like else next(iter(blocks.values()))
    ffn = {"ffn": dict(choice(model_block, "ffn"))} if "ffn" in model_block else {}
    blocks[name] = {"mixer": {"kind": name, "n_heads": choice(model_block, "mixer").get("n_heads", 4)}, **ffn}
