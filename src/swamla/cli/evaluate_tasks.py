"""`swamla evaluate RUN --tasks …`: tasks of lm-eval on a trained model."""

import json
import logging
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from swamla.checkpoint import find_checkpoint, load
from swamla.cli.console import Console, say
from swamla.cli.info_tables import WIDTH
from swamla.cli.progress import shown_progress
from swamla.cli.running import checked, run_folder
from swamla.config import to_plain
from swamla.errors import UsageError
from swamla.files import write_text_atomically
from swamla.train.precision import resolve_device
from swamla.version import __version__


def evaluate_tasks(
    run: str,
    checkpoint: str,
    names: str,
    *,
    num_fewshot: int | None,
    limit: int,
    batch_size: int,
    include_path: str,
    out: str,
    samples: bool,
    as_json: bool,
) -> None:
    """Run the tasks and print their table, or what `out` holds as JSON; "list" prints the tasks that there are."""
    for name, number, least in (
        ("num_fewshot", num_fewshot or 0, 0),
        ("limit", limit, 0),
        ("batch_size", batch_size, 1),
    ):
        if number < least:
            raise UsageError(f"--{name} {number}: must be >= {least}")
    wanted = [name for name in names.split(",") if name]
    if not wanted:
        raise UsageError(f"--tasks {names}: must name one task at least, e.g. hellaswag")
    if samples and not (out or as_json):
        raise UsageError("--samples needs --out FILE, or --json")
    if out and not checked(out).absolute().parent.is_dir():
        raise UsageError(f"--out {out}: its folder does not exist")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task leaves to it
    from swamla.evaluate.harness import HarnessModel
    from swamla.evaluate.tasks import evaluate_tasks as evaluate
    from swamla.evaluate.tasks import find_tasks, list_tasks

    if names == "list":
        print("\n".join(f"{name:<40} {kind}" for name, kind in list_tasks(include_path)))
        return
    console = Console(stderr=True)
    found = find_checkpoint(run_folder(run), checkpoint)
    model, tokenizer = load(run_folder(run), str(found.step), device=resolve_device("auto"))
    tasks = find_tasks(wanted, include_path)
    with shown_progress(console) as progress:
        lm = HarnessModel(
            model, tokenizer, batch_size=batch_size, progress=lambda stage, share: progress(stage, 0, 0, share)
        )
        results = evaluate(lm, tasks, num_fewshot=num_fewshot, limit=limit or None, samples=samples)
    results["config"] = {
        "run": str(run),
        "checkpoint": found.step,
        "tasks": names,
        "num_fewshot": num_fewshot,
        "limit": limit or None,
        "batch_size": batch_size,
        "precision": "fp32",
        "device": str(model.device),
        "model": to_plain(model.config),
    }
    results["date"] = time.time()
    packages = {"swamla": __version__, "lm_eval": version("lm_eval"), "torch": torch.__version__}
    results |= {f"{package}_version": number for package, number in packages.items()}
    text = json.dumps(results, indent=2, default=_plain)
    if out:
        write_text_atomically(Path(out), text + "\n")
    if as_json:
        print(text)
        return
    show(results)
    if out:
        say(console, f"results are in {out}")


def _plain(value: Any) -> Any:
    """What JSON lacks: numbers of numpy as Python's, sets as lists, else its text."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(value) if isinstance(value, set) else str(value)


def show(results: dict[str, Any]) -> None:
    """Metrics with their standard errors, as lm-eval prints them, at most 80 columns wide."""
    console = Console(width=min(WIDTH, Console().width))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in ("shots", "value", "± stderr"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)


def rows(results: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Task (where it begins; indented in its group), metric, examples in the context, value and standard error."""
    members: dict[str, list[str]] = results.get("group_subtasks", {})

    def tree(names: Iterable[str], depth: int) -> Iterator[tuple[str, int]]:
        for name in names:
            yield name, depth
            yield from tree(members.get(name, ()), depth + 1)

    inside = {name for group in members.values() for name in group}
    for task, depth in tree([name for name in results["results"] if name not in inside], 0):
        values = results["results"].get(task, {})
        name, shots = " " * 2 * depth + values.get("alias", task), str(results["n-shot"].get(task, ""))
        better = results["higher_is_better"].get(task, {})
        for key in sorted(key for key in values if "," in key and "_stderr," not in key):
            metric, _, extracted = key.partition(",")
            sign = {True: " ↑", False: " ↓"}.get(better.get(metric), "")
            label = f"{metric}{sign}" + (f" ({extracted})" if extracted != "none" else "")
            yield name, label, shots, _number(values[key]), _number(values.get(f"{metric}_stderr,{extracted}", ""))
            name = shots = ""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
