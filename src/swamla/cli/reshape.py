"""Flags that reshape a whole model: its pattern, its depth, its heads.

Names in a pattern are looked up among the recipe's blocks, then its spare ones (tables `[spare.NAME]`, which only flags
use), then the kinds of mixer.
"""

from collections.abc import Mapping
from typing import Any

from swamla.cli.flags import Flag
from swamla.cli.plain import BLOCK_PARTS, Plain, choice, is_local, mixer_kind
from swamla.config import did_you_mean, field_types
from swamla.errors import UsageError

_HELP: dict[str, tuple[Any, str, str]] = {
    "pattern": (str, "NAMES", 'blocks of the recipe or kinds of mixer, bottom first: "gdn gdn mla"'),
    "local_mixer": (
        str,
        "KIND",
        "mixer of local layers, e.g. swa or gdn",
    ),
    "n_layers": (int, "", "depth, to which the pattern is repeated or cut"),
    "n_heads": (int, "", "heads of every block's mixer"),
}
SHAPE = {
    name: Flag(name=name, annotation=annotation, metavar=shown, help=text, group="model")
    for name, (annotation, shown, text) in _HELP.items()
}


def reshape(model: Plain, given: Mapping[str, Any], spare: Plain) -> dict[str, str]:
    """Write the flags of `SHAPE` that are `given` into `model`; returns dotted field -> flag.

    Removes blocks that are no longer in the pattern. Raises `UsageError` for a pattern that names nothing known.
    """
    if not SHAPE.keys() & given.keys():
        return {}
    blocks, pattern = model["blocks"], list(model["pattern"])
    before, said, origins = [*pattern], [], {}
    if "pattern" in given:
        said.append("--pattern")
        pattern = given["pattern"].replace(",", " ").split()
        for name in pattern:
            _provide(name, model, given, spare, "--pattern")
    if "local_mixer" in given:
        said.append(f"--local_mixer {given['local_mixer']}")
        pattern = _with_local(said[-1], pattern, model, given, spare)
    if "n_layers" in given:
        said.append("--n_layers")
        depth = given["n_layers"]
        if depth < 1:
            raise UsageError(f"--n_layers {depth}: must be a whole number > 0, e.g. 6")
        pattern = repeat(pattern, depth) if pattern else []
    model["pattern"] = pattern
    if said and (pattern != before or "pattern" in given):
        origins["model.pattern"] = ", ".join(said)
    model["blocks"] = {name: block for name, block in blocks.items() if name in pattern} if pattern else blocks
    if "n_heads" in given:
        for name, block in model["blocks"].items():
            choice(block, "mixer")["n_heads"] = given["n_heads"]
            origins[f"model.blocks.{name}.mixer.n_heads"] = "--n_heads"
    return origins


def fit_ranks(model: Plain, given: Mapping[str, Any], spare: Plain) -> dict[str, str]:
    """Scale the mixers' ranks with a width that a flag makes smaller; returns dotted field -> flag.

    A rank larger than the width would be refused, although nobody chose it. Ranks that have flags stay theirs. Spare
    blocks are scaled too, before `reshape` uses them.
    """
    before, now = model.get("width"), given.get("width")
    if not isinstance(before, int) or not isinstance(now, int) or not 0 < now < before:
        return {}
    origins = {}
    kinds: Mapping[str, Any] = BLOCK_PARTS["mixer"]
    for name, block in (spare | model["blocks"]).items():
        mixer, kind = choice(block, "mixer"), mixer_kind(block)
        for field in kinds[kind].ranks if kind in kinds else ():
            if f"{kind}_{field}" not in given and isinstance(rank := mixer.get(field), int) and rank > 0:
                mixer[field] = max(1, rank * now // before)
                origins[f"model.blocks.{name}.mixer.{field}"] = "--width"
    return origins


def repeat(pattern: list[str], depth: int) -> list[str]:
    """The pattern repeated or cut to `depth` layers."""
    return [pattern[layer % len(pattern)] for layer in range(depth)]


def _with_local(flag: str, pattern: list[str], model: Plain, given: Mapping[str, Any], spare: Plain) -> list[str]:
    """The pattern with every local layer replaced by the block that the flag `local_mixer` names."""
    kind, blocks = given["local_mixer"], model["blocks"]
    known = [name for name in BLOCK_PARTS["mixer"] if is_local(name)]
    if kind not in known:
        raise UsageError(f"{flag}: is no local kind of mixer; {did_you_mean(kind, known)}")
    local = {name for name in pattern if name in blocks and is_local(mixer_kind(blocks[name]))}
    if not local:
        raise UsageError(f"{flag}: no layer of the pattern is local: {' '.join(dict.fromkeys(pattern))}")
    _provide(kind, model, given, spare, flag, like=next(name for name in pattern if name in local))
    return [kind if name in local else name for name in pattern]


def _provide(name: str, model: Plain, given: Mapping[str, Any], spare: Plain, flag: str, like: str = "") -> None:
    """Add the block `name` to the model: a spare one, or one with that kind of mixer and the settings of `like`."""
    blocks = model["blocks"]
    if name in blocks:
        return
    kinds: Mapping[str, Any] = BLOCK_PARTS["mixer"]
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
    width, heads = given.get("width", model.get("width")), given.get("n_heads", taken["n_heads"])
    sized = all(isinstance(number, int) and number > 0 for number in (width, heads))  # else it is refused later
    mixer: Plain = {"kind": name} | (kinds[name].fitting(width, heads) if sized else {}) | alike
    blocks[name] = {"mixer": mixer, **ffn}
