"""The tables of `swamla info`, at most 80 columns wide."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from swamla.cli.console import Console
from swamla.cli.plain import BLOCK_PARTS

WIDTH = 80
_CELLS = 36  # of the drawing, in a line
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def short(number: float, unit: str = "") -> str:
    """A number in at most four digits: 756.6 M, 1.48 G; `unit` follows the prefix."""
    for prefix, size in _PREFIXES:
        if number >= 0.9995 * size:
            digits = 2 if number < 9.995 * size else 1
            return f"{number / size:.{digits}f} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def show(facts: dict[str, Any]) -> None:
    """One model."""
    console = Console(width=min(WIDTH, Console().width))
    console.print(_headline(facts), highlight=False, markup=False)
    _draw(console, facts)
    console.print(_parameters(facts))
    console.print(_by_length(facts))
    console.print(_memory(facts["training"]))


def compare(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two models side by side."""
    console = Console(width=min(WIDTH, Console().width))
    names = [first["name"], second["name"]]
    if names[0] == names[1]:
        names = [f"{names[0]} (changed)", f"{names[1]}"]
    for name, facts in zip(names, (first, second), strict=True):
        console.print(_headline(facts | {"name": name}), highlight=False, markup=False)
        _draw(console, facts)
    table = Table("", width=None)
    for heading in (*names, "ratio"):
        table.add_column(heading, justify="right", overflow="fold")
    theirs = dict(_rows(second))
    for label, value, unit in ((label, *rest) for label, rest in _rows(first)):
        if label in theirs:
            other = theirs[label][0]
            ratio = f"{value / other:.3g}" if other else "–"
            table.add_row(label, short(value, unit), short(other, unit), ratio)
    console.print(table)


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, tuple[float, str]]]:
    """Label, number and unit of each row of --compare."""
    parameters = facts["parameters"]
    for name in ("total", "active", "non_embedding"):
        yield f"parameters, {name.replace('_', '-')}", (parameters[name], "")
    for index, length in enumerate(facts["lengths"]):
        yield f"training FLOP a token at {length:,}", (facts["training_flops_per_token"][index], "")
    for index, length in enumerate(facts["lengths"]):
        yield f"state at {length:,}", (facts["state_bytes"][index], "B")
    training = facts["training"]["bytes"]
    for name in ("weights", "gradients", "optimizer_state", "activations_estimate", "sum"):
        yield f"training memory, {name.replace('_estimate', ' (about)').replace('_', ' ')}", (training[name], "B")


def _headline(facts: dict[str, Any]) -> str:
    shape = f"{len(facts['pattern'])} layers of width {facts['width']:,}, vocabulary {facts['vocab_size']:,}"
    head = "tied head" if facts["tied_head"] else "head of its own"
    positions = f", {facts['learned_positions']:,} learned positions" if facts["learned_positions"] else ""
    rows = " and ".join(f"{size:,}" for size in facts["ngram_buckets"])
    ngrams = f", {rows} rows of n-grams" if rows else ""
    return f"{facts['name']}: {shape}, {head}{positions}{ngrams}; on {facts['data']['source']}"


def _draw(console: Console, facts: dict[str, Any]) -> None:
    """Draw the stack as rows of letters, bottom layer first, with a legend."""
    blocks = facts["blocks"]
    ffns = {block["ffn"]["kind"] for block in blocks.values()}
    for start in range(0, len(facts["pattern"]), _CELLS):
        layers = [blocks[name] for name in facts["pattern"][start : start + _CELLS]]
        console.print(_cells([layer["mixer"]["kind"] for layer in layers], "mixer"))
        if ffns != {"dense"}:
            console.print(_cells([layer["ffn"]["kind"] for layer in layers], "ffn"))
    legend = Table.grid(padding=(0, 1), pad_edge=True)
    for block in blocks.values():
        around = _told({name: value for name, value in block.items() if name not in ("count", *BLOCK_PARTS)})
        for part in BLOCK_PARTS:
            kind = block[part]["kind"]
            settings = _told({name: value for name, value in block[part].items() if name != "kind"})
            if part == "mixer" and around:
                settings += f"; block: {around}"
            legend.add_row(BLOCK_PARTS[part][kind].sign, kind, f"×{block['count']}", settings)
    console.print(legend, highlight=False)


def _cells(kinds: list[str], part: str) -> Text:
    row = Text(f"{'FFNs' if part == 'ffn' else 'mixers':<7}")
    for kind in kinds:
        config = BLOCK_PARTS[part][kind]
        row.append(config.sign, style=config.style).append(" ")
    return row


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in settings.items() if value not in (0, False))


def _plain(value: Any) -> str:
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else f"{value}"


def _parameters(facts: dict[str, Any]) -> Table:
    counted = facts["parameters"]
    table = Table("parameters")
    for heading in ("", "exactly", "share"):
        table.add_column(heading, justify="right")
    totals = [(name, counted[name]) for name in ("total", "active", "non_embedding")]
    by_name = {f"norms, {facts['norm']['kind']}" if k == "norms" else k: n for k, n in counted["by_component"].items()}
    parts = sorted(by_name.items(), key=lambda item: -item[1])
    for index, (name, count) in enumerate([*totals, *parts]):
        label = name.replace("_", "-") if index < len(totals) else f"  {name}"
        last_total = index == len(totals) - 1
        table.add_row(label, short(count), f"{count:,}", f"{count / counted['total']:.1%}", end_section=last_total)
    return table


def _by_length(facts: dict[str, Any]) -> Table:
    table = Table()
    for heading in ("tokens", "training FLOP/token", "state (fp32)", "all-MHA state", "ratio"):
        table.add_column(heading, justify="right")
    columns = ("lengths", "training_flops_per_token", "state_bytes", "all_mha_state_bytes")
    for length, flops, state, everything in zip(*(facts[name] for name in columns), strict=True):
        ratio = f"1 / {everything / state:.1f}" if everything >= state else f"{state / everything:.1f}"
        table.add_row(f"{length:,}", short(flops), short(state, "B"), short(everything, "B"), ratio)
    return table


def _memory(training: dict[str, Any]) -> Table:
    rows, length = training["micro_batch"]
    table = Table(f"training memory ({training['optimizer']}, {training['precision']})", show_header=True)
    table.add_column("", justify="right")
    for name, size in training["bytes"].items():
        label = name.replace("_", " ")
        if name == "activations_estimate":
            label = f"activations of {rows} × {length:,} tokens, about"
            label += "" if training["checkpointing"] == "none" else f" (checkpointing {training['checkpointing']})"
        if size:
            table.add_row(label, short(size, "B"), end_section=name == "activations_estimate")
    return table
