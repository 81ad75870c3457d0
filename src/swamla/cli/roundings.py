"""What rounded weights cost and save: the table of `swamla evaluate RUN --quantize int8,int4`."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from torch import Tensor

from swamla.bench.generation import measure_generation
from swamla.checkpoint import dequantized, load_into, quantize, quantized_bytes
from swamla.checkpoint.quantized import Weights
from swamla.cli.console import Console, say_wrapped
from swamla.cli.scoring import Scoring
from swamla.errors import UsageError
from swamla.inference.decoding import decodings_on
from swamla.model.accounting import count_parameters
from swamla.model.language_model import LanguageModel
from swamla.ops.rounding import FORMATS

PROMPT = 128  # tokens before those whose decoding is timed
SECONDS = 5.0  # of timing for a row


def rounded_copy(model: LanguageModel, weights: Weights, origin: str) -> LanguageModel:
    """The same model with these weights, in fp32."""
    rounded = copy.deepcopy(model)
    load_into(rounded, dequantized(weights), origin=origin)
    return rounded


def show_roundings(
    model: LanguageModel,
    weights: Mapping[str, Tensor],
    formats: Sequence[str],
    scoring: Scoring,
    *,
    as_json: bool,
) -> None:
    """Print size, score and decoding speed of the weights themselves and of each format.

    Raises `UsageError` for an unknown format.
    """
    for format in formats:
        if format not in FORMATS:
            raise UsageError(f"--quantize {format}: must be of {', '.join(FORMATS)}, with commas between")
    rows = [_row("fp32", 4 * _stored(model), model, scoring, "eager")]
    int8 = "int8" if "int8" in decodings_on(model.device.type) else "eager"
    for format in formats:
        rounded = rounded_copy(model, quantize(weights, model.config, format), format)
        rows.append(_row(format, quantized_bytes(model.config, format), rounded, scoring, int8))
    if as_json:
        print(json.dumps([row | {"precision": scoring.precision} for row in rows]))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("weights", no_wrap=True)
    for heading in ("size", scoring.unit, "decoding", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        size, score, speed = f"{row['bytes'] / 1e6:.2f} MB", f"{row[scoring.figure]:.4f}", row["tokens_per_s"]
        table.add_row(row["weights"], size, score, row["decoding"], f"{speed:,.0f}")
    Console().print(table)
    told = (
        f"{scoring.unit} computed in {scoring.precision}; tokens/s of one text after {PROMPT} random tokens, the median"
    )
    say_wrapped(Console(), told)


def _row(name: str, size: int, model: LanguageModel, scoring: Scoring, decoding: str) -> dict[str, Any]:
    positions = model.config.learned_positions
    prompt = min(PROMPT, positions // 2) if positions else PROMPT
    speed = measure_generation(model, prompt, limit=SECONDS, decoding=decoding)["decode_tokens_per_s"]
    return {
        "weights": name,
        "bytes": size,
        scoring.figure: scoring.score(model)[scoring.figure],
        "decoding": decoding,
        "tokens_per_s": speed,
    }


def _stored(model: LanguageModel) -> int:
    """Numbers of all tensors, a tied head's once: parameters, and the buffers of routers."""
    return count_parameters(model.config).total + sum(buffer.numel() for buffer in model.buffers())
