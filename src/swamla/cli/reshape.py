"""Flags that reshape a whole model: its pattern, its depth, its heads.

Blocks that a pattern names are looked up among the recipe's, then among its spare ones (tables `[spare.NAME]`, which
only flags put to use), and last among the kinds of mixer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from swamla.cli.field_text import parse_text
from swamla.cli.plain import BLOCK_PARTS, Plain, choice, mixer_kind
from swamla.config import field_types
from swamla.errors import UsageError

SHAPE = {
    "pattern": ("NAMES", 'blocks of the recipe or kinds of mixer, bottom first: "gdn gdn mla"'),
    "local_mixer": ("swa|gdn", "what every local layer of the pattern is: sliding windows or gated DeltaNet"),
    "n_layers": ("INT", "depth: the pattern is repeated, or cut, to it"),
    "n_heads": ("INT", "heads of every block's mixer"),
}
LOCAL = ("swa", "gdn")  # mixers whose cost and state do not grow with the distance to the document's start
PER_CYCLE = {"local": 2, "mla": 1}


@dataclass(frozen=True, kw_only=True)
class Reshaping:
    """What the command line wants of a model's shape; every entry with the flag that says so, as it was typed.

    wanted: values of `SHAPE`.  cycle: local and mla layers of one cycle; where it is not empty the pattern is made of
    such cycles, at its depth.  implied: a flag that means gated DeltaNet for the local mixer, unless there is some.
    """

    wanted: Mapping[str, tuple[str, str]]
    cycle: Mapping[str, tuple[int, str]]
    implied: str = ""


def reshape(model: Plain, asked: Reshaping, spare: Plain) -> dict[str, str]:
    """Write what was asked into `model`; returns dotted field -> flag. Blocks that are no longer in the pattern go."""
    wanted, blocks, pattern = dict(asked.wanted), model["blocks"], list(model["pattern"])
    before, said, origins = [*pattern], [], {}
    if "pattern" in wanted:
        text, flag = wanted["pattern"]
        pattern = text.replace(",", " ").split()
        said.append(flag.split()[0])
        for name in pattern:
            _provide(name, blocks, spare, "--pattern")
    if asked.implied and not any(mixer_kind(blocks[name]) == "gdn" for name in pattern if name in blocks):
        wanted["local_mixer"] = ("gdn", asked.implied)
    if "local_mixer" in wanted:
        kind, flag = wanted["local_mixer"]
        said.append(flag)
        pattern = _with_local(kind, flag, pattern, blocks, spare)
    if "n_layers" in wanted:
        said.append("--n_layers")
        depth = _depth(wanted["n_layers"][0])
        pattern = _repeat(pattern, depth) if pattern else []
    if asked.cycle:
        said.extend(flag for _, flag in asked.cycle.values())
        pattern = _repeat(_cycle(pattern, blocks, spare, asked.cycle), len(pattern))
    model["pattern"] = pattern
    if said and (pattern != before or "pattern" in wanted):
        origins["model.pattern"] = ", ".join(said)
    model["blocks"] = {name: block for name, block in blocks.items() if name in pattern} if pattern else blocks
    if "n_heads" in wanted:
        for name, block in model["blocks"].items():
            choice(block, "mixer")["n_heads"] = parse_text(wanted["n_heads"][0], int)
            origins[f"model.blocks.{name}.mixer.n_heads"] = "--n_heads"
    return origins


def _depth(text: str) -> int:
    depth = parse_text(text, int)
    if not isinstance(depth, int) or depth < 1:
        raise UsageError(f"--n_layers {text}: must be a whole number > 0, e.g. 6")
    return depth


def _repeat(pattern: list[str], depth: int) -> list[str]:
    return [pattern[layer % len(pattern)] for layer in range(depth)]


def _with_local(kind: str, flag: str, pattern: list[str], blocks: Plain, spare: Plain) -> list[str]:
    """The pattern with the block `kind` in the place of every local layer."""
    if kind not in LOCAL:
        raise UsageError(f"{flag}: must be one of {', '.join(LOCAL)}")
    local = {name for name in pattern if name in blocks and mixer_kind(blocks[name]) in LOCAL}
    if not local:
        raise UsageError(f"{flag}: no layer of the pattern is local: {' '.join(dict.fromkeys(pattern))}")
    _provide(kind, blocks, spare, flag, like=next(name for name in pattern if name in local))
    return [kind if name in local else name for name in pattern]


def _cycle(pattern: list[str], blocks: Plain, spare: Plain, cycle: Mapping[str, tuple[int, str]]) -> list[str]:
    """One cycle: so many local layers, then so many of latent attention."""
    local = next((name for name in pattern if mixer_kind(blocks[name]) in LOCAL), "swa")
    latent = next((name for name in pattern if mixer_kind(blocks[name]) == "mla"), "mla")
    counts = PER_CYCLE | {kind: count for kind, (count, _) in cycle.items()}
    names = [local] * counts["local"] + [latent] * counts["mla"]
    if not names:
        flags = ", ".join(flag for _, flag in cycle.values())
        raise UsageError(f"{flags}: a cycle without any layer: one of them must be above 0")
    for name in names:
        _provide(name, blocks, spare, "")
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
    neighbour = choice(model_block, "mixer")
    fitting, taken = field_types(kinds[name]), {"n_heads": 4} | neighbour
    alike = {field: taken[field] for field in ("n_heads", "bias") if field in taken and field in fitting}
    mixer: Plain = {"kind": name} | alike
    blocks[name] = {"mixer": mixer, **ffn}
