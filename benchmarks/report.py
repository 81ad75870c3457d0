"""Writes the tables of docs/performance.md from the JSON of the newest run: python -m benchmarks.report

The page has blocks between `<!-- training -->` and `<!-- end of training -->`, which are replaced; the rest stays. No
figure is typed by hand, and missing rows are named.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.agreement import agreement
from benchmarks.markdown import Cell, Row, folded, listed, pivot, shown, table
from benchmarks.targets import Found, targets
from swamla.bench.results import Results, in_bytes, in_seconds
from swamla.errors import CorruptError, UsageError

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NOT_YET = "Not measured yet."
_CALL, _TOKEN = ("low_s", "median_s", "high_s"), ("token_low_s", "token_s", "token_high_s")
_NAME = re.compile(r"cpu-(\d{4}-\d\d-\d\d)(?:-(\d+))?\.json")


def runs(folder: Path = RESULTS) -> list[Path]:
    """The files of whole runs, the newest first."""
    found = [(name[1], int(name[2] or 1), file) for file in folder.glob("*") if (name := _NAME.fullmatch(file.name))]
    return [file for *_, file in sorted(found, reverse=True)]


def rewritten(page: str, found: Sequence[Results]) -> str:
    """The page with all blocks written from these runs, the newest first. Raises `UsageError` for unknown blocks."""
    blocks = rendered(found) if found else dict.fromkeys(BLOCKS, NOT_YET)
    there = re.findall(r"^<!-- (?!end of )(.+?) -->$", page, flags=re.MULTILINE)
    if sorted(there) != sorted(blocks):
        raise UsageError(f"the page has the blocks {', '.join(there)}: must be {', '.join(blocks)}, once each")
    for name, text in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not ended:
            raise UsageError(f"the block {name} of the page has no end: write {end} on a line of its own")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


def rendered(found: Sequence[Results]) -> dict[str, str]:
    """Every block as Markdown. Raises `CorruptError` for unknown tables or rows."""
    last = found[0]
    if "--quick" in last.command:
        raise UsageError("the results are of --quick, whose figures mean nothing: use those of a whole run")
    unknown = last.rows.keys() - _TABLES.keys()
    if unknown:
        raise CorruptError(f"results with a table {', '.join(sorted(unknown))}: known are {', '.join(_TABLES)}")
    try:
        return {name: block(found) for name, block in BLOCKS.items()}
    except KeyError as missing:
        raise CorruptError(f"results with a row that has no {missing}: this version cannot read them") from missing


def footed(results: Results, name: str, *tables: str) -> str:
    """Tables with a footer: the command, how much rounds differed, and what is missing."""
    rows = results.rows[name]
    rounds = [row["rounds"] for row in rows if "rounds" in row]
    distances = sorted(quartile_distance(row) for row in rows if row.get("rounds", 1) > 1)
    foot = f"`{results.command}`, {results.begun[:10]}"
    if rounds:
        foot += f"; rounds: {min(rounds)}" + f" to {max(rounds)}" * (max(rounds) > min(rounds))
    if distances:
        half, most = (f"{100 * value:.2g} %" for value in (distances[len(distances) // 2], distances[-1]))
        foot += f"; quartiles at most {half} from the median in half of the rows that have several, {most} in all"
    return "\n\n".join([*tables, folded(f"{foot}."), *_missing(rows)])


def quartile_distance(row: Row) -> float:
    """The distance of the further quartile from the median, as a share of the median."""
    low, median, high = (row[key] for key in (_TOKEN if "token_s" in row else _CALL))
    return max(high - median, median - low) / median


def _missing(rows: Sequence[Row]) -> list[str]:
    """Rows that were left out, by reason, and rows that failed, with their errors."""
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if "note" in row or "error" in row:
            reason = row.get("note") or f"failed, {row['error']}"
            keys = (row[key] for key in ("op", "axis", "length", "prompt", "dtype") if key in row)
            left_out.setdefault(reason, []).append(" ".join([shown(row["name"]), *map(str, keys)]))
    return [folded(f"{', '.join(names)}: {reason}.") for reason, names in left_out.items()]


def times(row: Row) -> str:
    """The ratio of a row, as text."""
    value = row["ratio"]
    return "" if value is None else f"{value:,.0f}×" if value >= 100 else f"{value:.2f}×"


def ceilings(results: Results) -> str:
    """The machine, and its peak rates before and after the run."""
    machine, rows = results.machine, results.rows["ceilings"]
    instructions = f", {machine['instructions']}" if "instructions" in machine else ""  # older results lack them
    about = (
        f"{machine['processor']}{instructions}, {machine['threads']} threads, {in_bytes(machine['memory_bytes'])}, "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}."
    )
    columns: dict[str, Cell] = {
        "": lambda row: f"{row['name']} all else",
        "fp32 matmul, GFLOP/s": lambda row: f"{row['fp32_flops'] / 1e9:,.0f}",
        "bf16 matmul, GFLOP/s": lambda row: f"{row['bf16_flops'] / 1e9:,.0f}",
        "copy, GB/s": lambda row: f"{row['copy_bytes'] / 1e9:,.1f}",
    }
    took = f"All tables together took {results.seconds / 60:.1f} minutes."
    return footed(results, "ceilings", about, listed(rows, columns), took)


def training(results: Results) -> str:
    rows = results.rows["training"]
    corner = "tokens of a row"
    speed = pivot(corner, rows, "length", lambda row: f"{row['tokens_per_s']:,.0f}{_ratio(row)}")
    share = pivot(corner, rows, "length", lambda row: f"{row['bf16_share']:.0%}")
    memory = pivot(corner, rows, "length", lambda row: in_bytes(row["peak_bytes"]))
    return footed(
        results,
        "training",
        f"Tokens/s, in brackets against {next(row['name'] for row in rows)}:\n\n{speed}",
        f"Share of the rate of bf16 matmuls in the same rounds that the model's own arithmetic takes:\n\n{share}",
        f"Peak memory of a step beyond weights and the optimizer's moments:\n\n{memory}",
    )


def _ratio(row: Row) -> str:
    return f" ({times(row)})" if row["ratio"] is not None else ""


def ops(results: Results) -> str:
    columns: dict[str, Cell] = {
        "op": lambda row: f"{row['op']}" + (f", vocabulary {row['vocabulary']:,}" if "vocabulary" in row else ""),
        "": lambda row: row["dtype"],
        "by": lambda row: row["name"],
        "time": lambda row: in_seconds(row["median_s"]),
        "times as fast as the first": times,
        "peak memory": lambda row: in_bytes(row["peak_bytes"]),
    }
    return footed(results, "ops", listed(results.rows["ops"], columns))


def optimizers(results: Results) -> str:
    columns: dict[str, Cell] = {
        "": lambda row: row["name"],
        "time of a step": lambda row: in_seconds(row["median_s"]),
        "times as fast as PyTorch's": times,
        "bytes a parameter": lambda row: f"{row['state_bytes'] / row['parameters']:.2f}",
    }
    return footed(results, "optimizers", listed(results.rows["optimizers"], columns))


def generation(results: Results) -> str:
    rows = results.rows["generation"]
    corner = "tokens of the prompt"
    decode = pivot(corner, rows, "prompt", lambda row: f"{row['decode_tokens_per_s']:,.0f}{_ratio(row)}")
    prefill = pivot(corner, rows, "prompt", lambda row: f"{row['prefill_tokens_per_s']:,.0f}")
    state = pivot(corner, rows, "prompt", lambda row: in_bytes(row["state_bytes"]))
    return footed(
        results,
        "generation",
        f"Decode, tokens/s, in brackets against GPT-2:\n\n{decode}",
        f"Prefill, tokens/s:\n\n{prefill}",
        f"State:\n\n{state}",
    )


def scaling(results: Results) -> str:
    columns: dict[str, Cell] = {
        "": lambda row: row["name"],
        "parameters (active)": lambda row: f"{row['parameters']:,} ({row['active_parameters']:,})",
        "tokens of a step": lambda row: f"{row['step_tokens']:,}",
        "time of a step": lambda row: in_seconds(row["median_s"]),
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "peak memory": lambda row: in_bytes(row["peak_bytes"]),
    }
    return footed(results, "scaling", listed(results.rows["scaling"], columns))


def profile(results: Results) -> str:
    kinds = [key for key, value in results.rows["profile"][0].items() if type(value) is float]
    columns: dict[str, Cell] = {"": lambda row: shown(row["name"])}
    columns |= {name: lambda row, name=name: f"{row[name]:.0%}" for name in kinds}
    return footed(results, "profile", listed(results.rows["profile"], columns))


def choices(results: Results) -> str:
    columns: dict[str, Cell] = {
        "": lambda row: f"{row['axis']}: {row['name']}",
        "tokens of a step": lambda row: f"{row['step_tokens']:,}",
        "time of a step": lambda row: in_seconds(row["median_s"]),
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "peak memory": lambda row: in_bytes(row["peak_bytes"]),
    }
    return footed(results, "choices", listed(results.rows["choices"], columns))


def data(results: Results) -> str:
    columns: dict[str, Cell] = {
        "": lambda row: f"{row['what']}: {row['name']}",
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "text": lambda row: f"{in_bytes(row['text_bytes_per_s'])}/s" if "text_bytes_per_s" in row else "",
        "of what is trained on, or of the first": times,
    }
    return footed(results, "data", listed(results.rows["data"], columns))


def startup(results: Results) -> str:
    columns: dict[str, Cell] = {"": lambda row: row["name"], "time": lambda row: in_seconds(row["median_s"])}
    return footed(results, "start-up", listed(results.rows["start-up"], columns))


def verdicts(results: Results) -> str:
    """Targets beside measured figures."""
    found = Found(results)
    lines = table(["target", "", "measured", ""], [target.cells(found) for target in targets()])
    return f"{lines}\n\n`{results.command}`, {results.begun[:10]}."


def repeated(found: Sequence[Results]) -> str:
    """The agreement of the newest run with the one before it."""
    return agreement(found[0], found[1]) if len(found) > 1 else "There is one run only."


def _of_last(name: str, block: Callable[[Results], str]) -> Callable[[Sequence[Results]], str]:
    return lambda found: block(found[0]) if name in found[0].rows else "Not part of this run."


_TABLES: dict[str, Callable[[Results], str]] = {
    "ceilings": ceilings,
    "training": training,
    "ops": ops,
    "optimizers": optimizers,
    "generation": generation,
    "scaling": scaling,
    "profile": profile,
    "choices": choices,
    "data": data,
    "start-up": startup,
}
BLOCKS: dict[str, Callable[[Sequence[Results]], str]] = {
    "targets": lambda found: verdicts(found[0]),
    **{name: _of_last(name, block) for name, block in _TABLES.items()},
    "repeated": repeated,
}


def main() -> int:
    """Rewrite the page."""
    files = runs()
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(rewritten(page, [Results.load(file) for file in files[:2]]), encoding="utf-8")
    print(f"{PAGE.name}: made of {', '.join(file.name for file in files[:2]) or 'no run'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
