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
from swamla.interpret.repeats import LayerInduction, Repeats, accuracy_of, conv_width, induction, repeated_rows
from swamla.interpret.sections import as_plain
from swamla.interpret.verdicts import ACCURACY, CONTROL, CUT, HIT, inducing_heads, induction_verdict
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
BEHIND = 3  # tokens behind those that followed before, up to which a head is looked for that reads late


Rows = Sequence[Mapping[str, Any]]  # lines of measured.jsonl


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Held-out scores during training, by step. score: accuracy of repeats, nats a token of a text."""

    steps: tuple[int, ...]
    score: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Behind:
    """A layer that reads late: `offset` tokens behind those that followed before, where the loss owes most to it.

    A lower layer that spreads each token over the next ones makes the answer readable there. hit: share of queries
    whose largest |weight| is such an edge, of the best head.  cut: rise of the loss without exactly these edges.
    control: without as many that are neither these nor those of another offset, nor induction's.
    """

    offset: int
    layer: int
    hit: float
    cut: float
    control: float


def scored_rows(task: Task, rows: int) -> Examples:
    """Held-out rows of the task of random repeats, other ones than evaluations during training read."""
    return examples(task, ROWS_SEED, range(rows), held_out=True)


def again(rows: Examples) -> Tensor:
    """Where the first id of every row comes again, (B,): the first position that has a label."""
    return (rows.labels_BT != NO_LABEL).int().argmax(dim=1)


def induction_edges(rows: Examples) -> dict[str, Tensor]:
    """Sets of edges, bool (B, T, T), from queries to earlier tokens, by which ids are equal.

    induction: to all tokens that followed the query's token before, the last of which is the answer: a head that reads
    content alone cannot tell them apart, and most of them are it.  duplicate: to the earlier tokens equal to the
    query's.  other: as many as of induction, drawn from the tokens so far that neither followed the query's token nor
    equal the answer.  previous: from every token but the first to the one before.
    """
    tokens_BT, labels_BT = rows.tokens_BT, rows.labels_BT
    time = tokens_BT.shape[1]
    index_T = torch.arange(time)
    equal_BTS = (tokens_BT[:, :, None] == tokens_BT[:, None]) & (index_T[:, None] > index_T)
    asked_BT1 = (labels_BT != NO_LABEL)[:, :, None]
    followed_BTS = asked_BT1 & F.pad(equal_BTS[:, :, :-1], (1, 0))
    return {
        "induction": followed_BTS,
        "duplicate": equal_BTS & asked_BT1,
        "other": others(rows, followed_BTS, followed_BTS),
        "previous": edges_between(time, index_T[1:], index_T[:-1]),
    }


def moved_on(edges_BTS: Tensor, offset: int) -> Tensor:
    """The edges to the tokens `offset` behind the sources, but sources themselves and what is later than the query."""
    index_T = torch.arange(edges_BTS.shape[1])
    behind_BTS = F.pad(edges_BTS, (offset, 0))[:, :, : len(index_T)]
    return behind_BTS & ~edges_BTS & (index_T[:, None] >= index_T)


def others(rows: Examples, edges_BTS: Tensor, used_BTS: Tensor) -> Tensor:
    """As many edges of every query as `edges_BTS` has, drawn from those that are not used nor lead to the answer."""
    index_T = torch.arange(edges_BTS.shape[1])
    answer_BTS = rows.tokens_BT[:, None] == rows.labels_BT[:, :, None]
    beside_BTS = (index_T[:, None] >= index_T) & ~used_BTS & ~answer_BTS
    count_BT1 = edges_BTS.sum(dim=-1, keepdim=True)
    assert (beside_BTS.sum(dim=-1, keepdim=True) >= count_BT1).all(), "a query has too few other tokens"
    drawn_BTS = torch.rand(edges_BTS.shape, generator=torch.Generator().manual_seed(0)).where(beside_BTS, -1.0)
    return drawn_BTS.argsort(dim=-1, descending=True).argsort(dim=-1) < count_BT1


@torch.no_grad()
def induction_on_task(model: LanguageModel, rows: Examples) -> Repeats:
    """What `induction` measures, on rows of the task: a query may read what followed each occurrence of its token.

    first_loss: of the tokens up to the first that comes again; accuracy and second_loss: of the queries.  chance: of
    guessing among the ids that come again.
    """
    tokens_BT, labels_BT = rows.tokens_BT, rows.labels_BT
    edges = induction_edges(rows)
    other = edges.pop("other")
    scores = edge_scores(model, tokens_BT, edges)
    attributed = attribution(model, tokens_BT, edges["induction"], labels_BT)
    cuts = cut_effects(model, tokens_BT, {"induction": edges["induction"], "other": other}, labels_BT)
    first, second, right_B, asked_B = _losses(model, rows)
    layers = tuple(
        LayerInduction(
            previous=score["previous"].share,
            duplicate=score["duplicate"].share,
            induction=score["induction"].share,
            induction_conv=score["induction"].share,
            hit_conv=score["induction"].hit,
            hit=score["induction"].hit,
            attribution=own.score,
            conv=conv_width(block),
            cut=cuts[index]["induction"],
            cut_conv=cuts[index]["induction"],
            control=cuts[index]["other"],
        )
        for index, (score, own, block) in enumerate(zip(scores, attributed, model.blocks, strict=True))
    )
    later = zip(tokens_BT.tolist(), again(rows).tolist(), strict=True)
    chance = sum(1 / len({*tokens[first:]}) for tokens, first in later) / len(tokens_BT)
    answered = accuracy_of(right_B.tolist(), asked_B.tolist())
    return Repeats(**answered, chance=chance, first_loss=first, second_loss=second, layers=layers)


@torch.no_grad()
def induction_behind(model: LanguageModel, rows: Examples) -> Behind:
    """The offset, from 1 to `BEHIND`, and the layer whose edges behind those of induction have the largest cut."""
    edges_BTS = induction_edges(rows)["induction"]
    sets = {offset: moved_on(edges_BTS, offset) for offset in range(1, BEHIND + 1)}
    used_BTS = torch.stack([edges_BTS, *sets.values()]).any(dim=0)
    named = {str(offset): each for offset, each in sets.items()}
    controls = {f"other {name}": others(rows, each, used_BTS) for name, each in named.items()}
    scores = edge_scores(model, rows.tokens_BT, named)
    cuts = cut_effects(model, rows.tokens_BT, named | controls, rows.labels_BT)
    found = [
        Behind(
            offset=int(name),
            layer=layer,
            hit=max(score[name].hit),
            cut=cuts[layer][name],
            control=cuts[layer][f"other {name}"],
        )
        for layer, score in enumerate(scores)
        for name in named
    ]
    return max(found, key=lambda each: each.cut)


def _losses(model: LanguageModel, rows: Examples) -> tuple[float, float, Tensor, Tensor]:
    """Nats a token before the first that comes again and at the queries; of each row how many queries are answered
    rightly and how many there are, (B,).
    """
    tokens_BT, labels_BT = rows.tokens_BT, rows.labels_BT
    logits_BTV = model(tokens_BT)
    before_BT = torch.arange(tokens_BT.shape[1]) < again(rows)[:, None] - 1
    next_BT = F.pad(tokens_BT[:, 1:], (0, 1), value=NO_LABEL)
    first_BT = torch.where(before_BT, next_BT, NO_LABEL)
    first, second = (
        F.cross_entropy(logits_BTV.flatten(0, 1), each.flatten(), ignore_index=NO_LABEL).item()
        for each in (first_BT, labels_BT)
    )
    asked_BT = labels_BT != NO_LABEL
    right_BT = (logits_BTV.argmax(dim=-1) == labels_BT) & asked_BT
    return first, second, right_BT.sum(dim=1), asked_BT.sum(dim=1)


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
    rows = scored_rows(task, REPEAT_ROWS)
    note = f"A held-out row: {int(again(rows)[0])} different ids, then pieces of their last ones in any order."
    return {
        "accuracy": recall(model, task, rows=SCORED_ROWS, seed=ROWS_SEED).score.accuracy,
        "steps_to": {f"{level:g}": steps_to(records, level) for level in LEVELS},
        "repeats": induction_on_task(model, rows),
        "behind": induction_behind(model, rows),
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


def reads_behind(row: Mapping[str, Any]) -> bool:
    """Whether a run without induction heads answers by heads that read behind the answer, by the same rules."""
    late = row["behind"]
    agree = late["hit"] >= HIT and late["cut"] >= CUT and abs(late["control"]) <= CONTROL * late["cut"]
    return row["induction"] != "yes" and row["repeats"]["accuracy"] >= ACCURACY and agree


def best_layer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The layer that owes most to its induction edges."""
    found: Mapping[str, Any] = max(row["repeats"]["layers"], key=lambda layer: layer["cut"])
    return found
