"""Everything that a report says of a model, measured once, each measure on as many rows as a minute allows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from swamla.data.tokenizer import Tokenizer
from swamla.errors import UsageError
from swamla.interpret.ablation import ablated
from swamla.interpret.attributing import copying
from swamla.interpret.context import InContext, behavioural_context, in_context, loss_by_position
from swamla.interpret.drawn import CLASSES, Text, draw, drawn_tokens, guesses, token_classes
from swamla.interpret.lens import logit_lens
from swamla.interpret.patterns import head_patterns
from swamla.interpret.repeats import Repeats, at_another_length, induction, repeated_rows
from swamla.interpret.routing import load_by_class
from swamla.interpret.sections import About, Explained, Layer, Lens, Needed, Patterns, Positions, Routing, Shown, Worth
from swamla.interpret.tracing import layout_of, walk
from swamla.interpret.verdicts import verdicts
from swamla.model.accounting import count_parameters, forward_flops
from swamla.model.language_model import LanguageModel
from swamla.version import __version__

REPEAT_LENGTH, REPEAT_ROWS, FEWEST_ROWS = 50, 64, 8  # tokens of a copy; rows at most and at least
DRAWN_COPY = 12  # tokens of a copy in the row whose attention is drawn
SHORT, LONG = 128, 512  # tokens of a row where every head is left out, or every layer reads the logits; at most
EARLY, LATE, WITHIN = 50, 500, 0.01  # of in-context learning, and of the context that is needed
PREDICTIONS = 8  # of a row, on which the context that is needed is tried
COPYING_IDS = 4096
# FLOPs of the forward passes that a measure may take: it gets fewer rows of a larger model. Together about half a
# minute of two cores, whatever the model, but where the fewest rows of repeats take longer.
_BUDGET = {"repeats": 2e12, "ablation": 6e11, "patterns": 2e11, "lens": 2e11, "position": 4e11, "context": 5e11}

_BOUNDS = (1e-12, 1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, math.inf)  # of what an explanation may miss

Progress = Callable[[str, float], None]
"""Told what is measured next, and the share of all the work that is done."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is explained, and with which texts.

    name: the model's, such as its folder's.  ids: from which random rows are drawn.  rows_BT: text to be measured on,
    in rows that begin with a document's start; None without text.  texts: which text each row is a piece of, for
    standard errors; None if each is of its own.  text: the ids whose attention is drawn, start included; empty without
    text.  source: where the text is from.  notes: what a reader must know of it.
    longest: tokens of the rows that the model was trained on, None if unknown; random repeats are no longer, but have
        nine tokens at least.
    """

    name: str
    ids: Sequence[int]
    rows_BT: Tensor | None = None
    texts: Sequence[int] | None = None
    text: Sequence[int] = ()
    source: str = ""
    notes: tuple[str, ...] = ()
    longest: int | None = None


@torch.no_grad()
def explained(
    model: LanguageModel,
    tokenizer: Tokenizer,
    subject: Subject,
    *,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
) -> Explained:
    """Measure a model in evaluation mode. Memory is bounded: a layer's weights of a few rows, or of some heads of one.

    seed: of the random rows. Raises `UsageError` for a mixer that has no `explain`, for fewer than four ids,
    and for losses that are NaN or infinite.
    """
    start = tokenizer.eos_id if tokenizer.start else None  # rows of a task have none
    length, rows = repeat_size(model, len(subject.ids) - (start is None), subject.longest)
    progress("random repeats", 0.02)
    repeats = induction(model, repeated_rows(subject.ids, start, length=length, rows=rows, seed=seed))
    if not math.isfinite(repeats.first_loss + repeats.second_loss):
        raise UsageError(f"{subject.name}: its losses are no finite numbers, so there is nothing to explain")
    shorter = repeated_rows(subject.ids, start, length=other_length(length), rows=rows, seed=seed)
    repeats = replace(repeats, other=at_another_length(model, shorter))
    progress("attention of every head", 0.3)
    copy = min(DRAWN_COPY, length)
    row = repeated_rows(subject.ids, start, length=copy, rows=1, seed=seed)[0].tolist()
    first = "An id" if start is None else "The start"
    note = f"{first}, {copy} random ids, the same again: induction reads, at each id, what followed it before."
    texts = [draw(model, tokenizer, row, name="random ids, twice", note=note)]
    if subject.text:
        texts.insert(0, draw(model, tokenizer, subject.text, name=subject.source, note=""))
    layers = _layers(model, texts[0], subject.ids)
    found = {"repeats": repeats, **_on_text(model, tokenizer, subject, progress)}
    return Explained(
        about=_about(model, subject, row, seed=seed, length=length, rows=rows),
        layers=layers,
        verdicts=verdicts([layer.mixer for layer in layers], **found),
        texts=tuple(texts),
        guesses=guesses(model, tokenizer, subject.text or row),
        shown=_first_shown(repeats),
        **found,
    )


def repeat_size(model: LanguageModel, n_ids: int, longest: int | None = None) -> tuple[int, int]:
    """Tokens of a copy and number of rows of random repeats: 50 and 64, fewer for few ids, positions or a large model,
    which has 8 rows still.

    longest: tokens of a row, as far as a copy of four allows.

    Raises `UsageError` for fewer than four ids or nine positions.
    """
    positions = model.config.learned_positions
    length = min(REPEAT_LENGTH, n_ids, (positions - 1) // 2 if positions else REPEAT_LENGTH)
    if longest is not None:
        length = min(length, max(4, (longest - 1) // 2))
    if length < 4:
        place = f" and {positions} positions" if positions else ""
        raise UsageError(f"{n_ids} ids{place}: random repeats need four different ids twice, and 9 positions")
    # Every layer's edges are cut in three ways, and the layers above run again; scores, attribution, losses: five more.
    passes = 5 + 3 * model.config.depth // 2
    rows = _affordable(model, "repeats", 1 + 2 * length, passes=passes, most=REPEAT_ROWS)
    return length, max(rows, min(FEWEST_ROWS, REPEAT_ROWS))


def other_length(length: int) -> int:
    """Tokens of a copy in the rows that show whether a model copies by position: about two thirds."""
    return length - max(1, length // 3)


def _on_text(model: LanguageModel, tokenizer: Tokenizer, subject: Subject, progress: Progress) -> dict[str, Any]:
    """The sections that are measured on text; None without one."""
    names, rows_BT = ("worth", "patterns", "lens", "positions", "learned", "needed", "routing"), subject.rows_BT
    if rows_BT is None:
        return dict.fromkeys(names)
    progress("every head and layer left out", 0.35)
    heads = sum(block.mixer.explained_heads + 2 for block in model.config.layers)
    worth_BT = _some(model, rows_BT[:, :SHORT], "ablation", passes=1 + heads // 2)
    worth = ablated(model, worth_BT)
    progress("what heads look at", 0.65)
    patterns_BT = _some(model, rows_BT[:, : 2 * SHORT], "patterns", passes=2)
    patterns = head_patterns(model, patterns_BT)
    progress("the logit lens", 0.72)
    lens_BT = _some(model, rows_BT[:, :SHORT], "lens", passes=2)
    lens = logit_lens(model, lens_BT)
    progress("the loss by position", 0.76)
    long_BT = _some(model, rows_BT, "position", passes=2)
    positions, learned = _positions(model, long_BT), _learned(model, long_BT, subject.texts)
    progress("the context that is needed", 0.84)
    needed = _needed(model, rows_BT, tokenizer.eos_id, subject.texts)
    progress("routers", 0.97)
    routing = load_by_class(model, lens_BT, token_classes(tokenizer, model.config.vocab_size).to(model.device))
    found = (
        Worth(tokens=worth_BT.numel(), loss=worth.loss, layers=worth.layers),
        Patterns(tokens=patterns_BT.numel(), length=patterns_BT.shape[1], layers=patterns),
        Lens(tokens=lens_BT.numel(), loss=lens.loss),
        positions,
        learned,
        needed,
        Routing(tokens=lens_BT.numel(), classes=CLASSES, layers=routing) if routing else None,
    )
    return dict(zip(names, found, strict=True))


def _affordable(model: LanguageModel, measure: str, length: int, *, passes: int, most: int) -> int:
    """How many rows of `length` tokens a measure can take, in that many forward passes; one at least."""
    return max(1, min(most, int(_BUDGET[measure] / (passes * forward_flops(model.config, length)))))


def _some(model: LanguageModel, rows_BT: Tensor, measure: str, *, passes: int) -> Tensor:
    return rows_BT[: _affordable(model, measure, rows_BT.shape[1], passes=passes, most=len(rows_BT))]


def _positions(model: LanguageModel, rows_BT: Tensor) -> Positions:
    """Means over 1, 2, 3–4, 5–8 … up to the rows' length."""
    found = loss_by_position(model, rows_BT)
    last = [min(2**power, len(found.loss)) for power in range(math.ceil(math.log2(len(found.loss))) + 1)]
    first = [1, *(end + 1 for end in last[:-1])]
    spans = [slice(begin - 1, end) for begin, end in zip(first, last, strict=True)]
    counts = [sum(found.tokens[span]) for span in spans]
    sums = [sum(map(math.prod, zip(found.loss[span], found.tokens[span], strict=True))) for span in spans]
    loss = tuple(total / count for total, count in zip(sums, counts, strict=True))
    return Positions(first=tuple(first), last=tuple(last), loss=loss, tokens=tuple(counts))


def _learned(model: LanguageModel, rows_BT: Tensor, texts: Sequence[int] | None) -> InContext | None:
    """In-context learning from token 50 to 500, in shorter rows from a tenth of their length; None below 20 tokens."""
    predictions = rows_BT.shape[1] - 1
    if predictions < 20:
        return None
    early = min(EARLY, predictions // 10)
    texts = texts and texts[: len(rows_BT)]
    return in_context(model, rows_BT, early=early, late=LATE, span=(early + 1) // 2, texts=texts)


def _needed(model: LanguageModel, rows_BT: Tensor, start: int, texts: Sequence[int] | None) -> Needed | None:
    """On as many predictions as can be paid for; None below eight tokens."""
    length = rows_BT.shape[1]
    if length < 8:
        return None
    rows_BT = _some(model, rows_BT, "context", passes=PREDICTIONS * math.ceil(math.log2(length)) // 2)
    texts = texts and texts[: len(rows_BT)]
    found = behavioural_context(model, rows_BT, within=WITHIN, queries=PREDICTIONS, start=start, texts=texts)
    return Needed(predictions=len(rows_BT) * min(PREDICTIONS, length - 1 - length // 2), found=found)


def _about(model: LanguageModel, subject: Subject, row: Sequence[int], *, seed: int, length: int, rows: int) -> About:
    missed = _missed(model, list(subject.text or row)[: drawn_tokens(model)])
    return About(
        name=subject.name,
        parameters=count_parameters(model.config).total,
        vocabulary=model.config.vocab_size,
        width=model.config.width,
        version=__version__,
        exact_to=next(bound for bound in _BOUNDS if missed <= bound),
        seed=seed,
        repeat_length=length,
        repeat_rows=rows,
        source=subject.source,
        notes=subject.notes,
    )


def _missed(model: LanguageModel, ids: Sequence[int]) -> float:
    """What the explanation of any layer misses of its mixer's output at most, as a share of its largest value."""
    tokens_BT = torch.tensor([list(ids)], device=model.device)
    seq = layout_of(tokens_BT, None)
    missed = 0.0
    for block, layer in zip(model.blocks, walk(model, tokens_BT, seq), strict=True):
        y_BTD = block.mixer(block.mixer_input(layer.before_BTD, seq), seq)
        apart = (layer.mixer.output() - y_BTD).abs().max() / y_BTD.abs().max().clamp(min=1e-30)
        missed = max(missed, apart.item()) if apart.isfinite() else math.inf  # max(0, NaN) would be exact
    return missed


def _layers(model: LanguageModel, text: Text, ids: Sequence[int]) -> tuple[Layer, ...]:
    copied = copying(model, ids=torch.tensor(ids[:: math.ceil(len(ids) / COPYING_IDS)], device=model.device))
    layers = []
    for index, (block, drawn) in enumerate(zip(model.config.layers, text.layers, strict=True)):
        taps = {name: taps_DW.abs().mean(dim=0) for name, taps_DW in model.blocks[index].taps().items()}
        layers.append(
            Layer(
                block=model.config.pattern[index],
                mixer=block.mixer.kind,
                ffn=block.ffn.kind,
                heads=len(drawn.heads),
                signed=any(weight < 0 for head in drawn.heads for row in head.weights for weight in row),
                taps={name: tuple((mean_W / mean_W.sum()).tolist()) for name, mean_W in taps.items()},
                copying=copied[index],
            )
        )
    return tuple(layers)


def _first_shown(repeats: Repeats) -> Shown:
    """The head whose largest weight is most often what followed before."""
    hits = {(index, head): hit for index, layer in enumerate(repeats.layers) for head, hit in enumerate(layer.hit)}
    layer, head = max(hits, key=hits.__getitem__)
    return Shown(layer=layer, head=head)
