"""What is measured of each run when it has ended: a line of measured.jsonl, so that nothing is measured twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.checkpoint import load
from swamla.data.dataset import Dataset
from swamla.data.tokenizer import Tokenizer
from swamla.evaluate import recall, validation
from swamla.evaluate.recall_grid import steps_to
from swamla.interpret.ablation import cut_effects
from swamla.interpret.attributing import attribution
from swamla.interpret.drawn import draw
from swamla.interpret.explaining import REPEAT_ROWS, repeat_size
from swamla.interpret.patterns import edge_scores, edges_between
from swamla.interpret.repeats import LayerInduction, Repeats, conv_width, induction, repeated_rows
from swamla.interpret.sections import as_plain
from swamla.interpret.verdicts import inducing_heads, induction_verdict
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.study.nanogpt_mla.plan import experiment_of, mixer_of
from swamla.study.runs import Outcome, run_folder
from swamla.tasks import Examples, Task, examples
from swamla.text import generate_text
from swamla.train.tracking.metrics import read_metrics

MEASURED = "measured"
LEVELS = (0.5, 0.9)  # of accuracy, to which steps are counted
ROWS_SEED = 1  # of held-out rows of the task; evaluations during training read those of seed 0
SCORED_ROWS = 512
SCORED_TOKENS = 1 << 17  # of held-out text, in rows spread over it
PROMPT, SAMPLE = 24, 160  # characters of held-out text that are continued, and tokens of the continuation
PROMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Held-out scores during training, by step. score: accuracy of repeats, nats a token of a text."""

    steps: tuple[int, ...]
    score: tuple[float, ...]


def periodic_rows(task: Task, rows: int) -> Examples:
    """Held-out rows of the task of random repeats, other ones than evaluations during training read."""
    return examples(task, ROWS_SEED, range(rows), held_out=True)


def beginnings(rows: Examples) -> tuple[Tensor, Tensor]:
    """Where the repeated ids of every row begin, behind its prefix, and where they begin anew, a period on; (B,) each.

    The latter is the first position that has a label.
    """
    again_B = (rows.labels_BT != NO_LABEL).int().argmax(dim=1)
    id_B1 = rows.tokens_BT.gather(1, again_B[:, None])
    return (rows.tokens_BT == id_B1).int().argmax(dim=1), again_B


def periodic_edges(rows: Examples) -> dict[str, Tensor]:
    """Sets of edges, bool (B, T, T), of rows that repeat with a period each behind a prefix each.

    induction: from a query to all tokens that followed its token before.  duplicate: to that token itself.  other: half
    a period beside induction, and as many.  previous: from every token but the first to the one before.
    """
    time = rows.labels_BT.shape[1]
    index_T = torch.arange(time, device=rows.labels_BT.device)
    away_TS = index_T[:, None] - index_T
    begin_B11, again_B11 = (each_B[:, None, None] for each_B in beginnings(rows))
    period_B11 = again_B11 - begin_B11
    asked_BT1 = (rows.labels_BT != NO_LABEL)[:, :, None]

    def to(offset: Tensor | int) -> Tensor:
        """From a query at t to t − n · period + offset, for n = 1, 2 … while t − n · period is behind the prefix."""
        back_BTS = away_TS + offset
        most_BT1 = index_T[:, None] - begin_B11
        return asked_BT1 & (away_TS >= 0) & (back_BTS > 0) & (back_BTS <= most_BT1) & (back_BTS % period_B11 == 0)

    return {
        "induction": to(1),
        "duplicate": to(0),
        "other": to(1 + period_B11 // 2),
        "previous": edges_between(time, index_T[1:], index_T[:-1]),
    }


@torch.no_grad()
def induction_on_task(model: LanguageModel, rows: Examples) -> Repeats:
    """What `induction` measures, on rows of any period: a query may read each earlier occurrence of its token."""
    tokens_BT, labels_BT = rows.tokens_BT, rows.labels_BT
    edges = periodic_edges(rows)
    other = edges.pop("other")
    scores = edge_scores(model, tokens_BT, edges)
    attributed = attribution(model, tokens_BT, edges["induction"], labels_BT)
    cuts = cut_effects(model, tokens_BT, {"induction": edges["induction"], "other": other}, labels_BT)
    first, second, accuracy = _losses(model, rows)
    layers = tuple(
        LayerInduction(
            previous=score["previous"].share,
            duplicate=score["duplicate"].share,
            induction=score["induction"].share,
            induction_conv=score["induction"].share,
            hit=score["induction"].hit,
            attribution=own.score,
            conv=conv_width(block),
            cut=cuts[index]["induction"],
            cut_conv=cuts[index]["induction"],
            control=cuts[index]["other"],
        )
        for index, (score, own, block) in enumerate(zip(scores, attributed, model.blocks, strict=True))
    )
    begin_B, again_B = beginnings(rows)
    chance = (1 / (again_B - begin_B).double()).mean().item()
    return Repeats(accuracy=accuracy, chance=chance, first_loss=first, second_loss=second, layers=layers)


def _losses(model: LanguageModel, rows: Examples) -> tuple[float, float, float]:
    """Nats a token up to the first period's end and at the queries, and the share of queries answered rightly."""
    tokens_BT, labels_BT = rows.tokens_BT, rows.labels_BT
    logits_BTV = model(tokens_BT)
    before_BT = torch.arange(tokens_BT.shape[1]) < beginnings(rows)[1][:, None] - 1
    next_BT = F.pad(tokens_BT[:, 1:], (0, 1), value=NO_LABEL)
    first_BT = torch.where(before_BT, next_BT, NO_LABEL)
    first, second = (
        F.cross_entropy(logits_BTV.flatten(0, 1), each.flatten(), ignore_index=NO_LABEL).item()
        for each in (first_BT, labels_BT)
    )
    asked_BT = labels_BT != NO_LABEL
    right = (logits_BTV.argmax(dim=-1) == labels_BT)[asked_BT]
    return first, second, right.double().mean().item()


def measure(folder: Path, outcome: Outcome, task: Task, text: Dataset) -> dict[str, Any]:
    """All figures of a finished run, as JSON data."""
    experiment, run = experiment_of(outcome.arm), run_folder(folder, outcome.run)
    model, tokenizer = load(run, "latest")
    records = [record for record in read_metrics(run / "metrics.jsonl") if "held_out_loss" in record]
    key = "held_out_accuracy" if experiment.kind == "repeats" else "held_out_loss"
    found: dict[str, Any] = {
        "run": outcome.run,
        "experiment": experiment.slug,
        "mixer": mixer_of(outcome.arm),
        "seed": outcome.seed,
        "seconds": outcome.seconds,
        "curve": Curve(steps=tuple(r["step"] for r in records), score=tuple(r[key] for r in records)),
    }
    if experiment.kind == "repeats":
        found |= _on_repeats(model, tokenizer, task, records)
    else:
        found |= _on_text(model, tokenizer, text)
    repeats = found["repeats"]
    found |= {"heads": inducing_heads(repeats), "induction": induction_verdict(repeats).answer}
    return as_plain(found)


def _on_repeats(
    model: LanguageModel, tokenizer: Tokenizer, task: Task, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    rows = periodic_rows(task, REPEAT_ROWS)
    begin, again = (int(each_B[0]) for each_B in beginnings(rows))
    note = f"A held-out row: {begin} ids that never come again, then {again - begin} others, over and over."
    return {
        "accuracy": recall(model, task, rows=SCORED_ROWS, seed=ROWS_SEED).score.accuracy,
        "steps_to": {f"{level:g}": steps_to(records, level) for level in LEVELS},
        "repeats": induction_on_task(model, rows),
        "drawn": draw(model, tokenizer, rows.tokens_BT[0].tolist(), name="", note=note),
    }


def _on_text(model: LanguageModel, tokenizer: Tokenizer, text: Dataset) -> dict[str, Any]:
    block = model.config.learned_positions
    ids = sorted(set(text.train.tokens[: 1 << 20].tolist()) - {tokenizer.eos_id})
    length, rows = repeat_size(model, len(ids))
    repeated_BT = repeated_rows(ids, tokenizer.eos_id, length=length, rows=rows)
    scored = validation(text, block, SCORED_TOKENS)(model)
    prompts = prompts_of(text)
    done = generate_text(model, tokenizer, prompts, SAMPLE, crop=True)
    return {
        "bits_per_byte": scored["bits_per_byte"],
        "loss": scored["loss"],
        "repeats": induction(model, repeated_BT),
        "samples": [each.text for each in done.completions],
    }


def prompts_of(text: Dataset) -> list[str]:
    """The first words of lines that are spread over the held-out text: the same ones for every run."""
    split, found = text.held_out, []
    for part in range(PROMPTS):
        document = part * split.n_documents // PROMPTS
        ids = split.document(document)
        begin = len(ids) * part // PROMPTS if split.n_documents < PROMPTS else 0
        lines = text.tokenizer.decode(ids[begin : begin + 2000].tolist()).splitlines()[1:] or ["\n"]
        line = next((line for line in lines if len(line) > PROMPT // 2 and line.isprintable()), lines[0])
        found.append(line if len(line) <= PROMPT else line[:PROMPT].rpartition(" ")[0] or line[:PROMPT])
    return found
