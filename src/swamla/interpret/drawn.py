"""What the page draws of a text: every head's weights on it, and the model's guesses layer by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.data.tokenizer import Tokenizer
from swamla.interpret.context import losses_by_token
from swamla.interpret.lens import logit_lens
from swamla.interpret.tracing import walk
from swamla.model.language_model import LanguageModel

MOST_WEIGHTS, MOST_TOKENS, FEWEST_TOKENS = 300_000, 96, 16  # of a text: weights of all heads together, tokens
LENS_TOKENS = 12  # whose guesses are printed
START = "⟨start⟩"
CLASSES = ("word begins", "word goes on", "number", "punctuation", "white space", "other")


@dataclass(frozen=True, kw_only=True)
class HeadWeights:
    """What each token reads of each earlier one: row t has weights[t][s] · unit for s = 0 … t, integers of 3 digits."""

    unit: float
    weights: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """The heads of a layer on a text. largest: their largest |weight|."""

    largest: float
    heads: tuple[HeadWeights, ...]


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """The likeliest next token by the logit lens, and its probability, at the last tokens of a text that is drawn.

    read: these tokens.  follows: what follows each; "" behind the last.  tokens, probability: a row for the stream
    before each layer, and one for that behind the last.
    """

    read: tuple[str, ...]
    follows: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    probability: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that is drawn. losses: of each token in nats, none for the first.  query: the token shown at first."""

    name: str
    note: str
    tokens: tuple[str, ...]
    losses: tuple[float | None, ...]
    query: int
    layers: tuple[LayerWeights, ...]


@torch.no_grad()
def draw(model: LanguageModel, tokenizer: Tokenizer, ids: Sequence[int], *, name: str, note: str) -> Text:
    """The attention of every head on a text, cut to what a page can hold; the note says so."""
    most = drawn_tokens(model)
    if len(ids) > most:
        note = f"{note} Only the first {most} tokens are drawn.".strip()
    ids = ids[:most]
    tokens_BT = torch.tensor([list(ids)], device=model.device)
    losses_BT, _ = losses_by_token(model, tokens_BT)
    return Text(
        name=name,
        note=note,
        tokens=tuple(token_texts(tokenizer, ids)),
        losses=(None, *losses_BT[0, :-1].tolist()),
        query=len(ids) - 1,
        layers=tuple(_layer_weights(layer.mixer.weight_BHTS[0]) for layer in walk(model, tokens_BT)),
    )


def drawn_tokens(model: LanguageModel) -> int:
    """How many tokens are drawn: fewer the more heads there are."""
    heads = sum(block.mixer.explained_heads for block in model.config.layers)
    return max(FEWEST_TOKENS, min(MOST_TOKENS, math.isqrt(2 * MOST_WEIGHTS // heads)))


@torch.no_grad()
def guesses(model: LanguageModel, tokenizer: Tokenizer, ids: Sequence[int]) -> Guesses:
    """What the model would say behind each layer, at the last of the tokens that are drawn."""
    ids = ids[: drawn_tokens(model)]
    lens = logit_lens(model, torch.tensor([list(ids)], device=model.device))
    last = slice(max(0, len(ids) - LENS_TOKENS), None)
    read = token_texts(tokenizer, ids[last])
    return Guesses(
        read=tuple(read),
        follows=(*read[1:], ""),
        tokens=tuple(tuple(token_texts(tokenizer, row)) for row in lens.top_LBTK[:, 0, last, 0].tolist()),
        probability=tuple(map(tuple, lens.probability_LBTK[:, 0, last, 0].tolist())),
    )


def _layer_weights(weight_HTS: Tensor) -> LayerWeights:
    heads = tuple(_head_weights(weight_TS.double()) for weight_TS in weight_HTS)
    return LayerWeights(largest=weight_HTS.abs().max().item(), heads=heads)


def _head_weights(weight_TS: Tensor) -> HeadWeights:
    """Integers of at most three digits (1000 for 1), in units of a power of ten."""
    largest = weight_TS.abs().max().item()
    unit = 10.0 ** (math.ceil(math.log10(largest)) - 3) if largest > 0 else 1.0
    rows = (weight_TS / unit).round().long().tolist()
    return HeadWeights(unit=unit, weights=tuple(tuple(row[: index + 1]) for index, row in enumerate(rows)))


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text within a text; of the start its name, of an id that cannot be read by itself the id, in
    brackets.
    """
    texts, start = [], tokenizer.decode([tokenizer.eos_id])
    for each in ids:
        if each == tokenizer.eos_id:
            text = START
        elif each < tokenizer.vocab_size:
            # Behind the start: decoders of SentencePiece's kind drop the space of a text's first word.
            text = tokenizer.decode([tokenizer.eos_id, each]).removeprefix(start)
        else:
            text = ""
        readable = text and all(sign.isprintable() or sign in "\n\r\t" for sign in text)
        texts.append(text if readable and "\N{REPLACEMENT CHARACTER}" not in text else f"⟨{each}⟩")
    return texts


def token_classes(tokenizer: Tokenizer, vocabulary: int) -> Tensor:
    """The class of every id, a number into `CLASSES`, by its text; (vocabulary,). "other": the start, parts of
    characters, ids that the tokenizer lacks.
    """
    return torch.tensor([CLASSES.index(_class_of(text)) for text in token_texts(tokenizer, range(vocabulary))])


def _class_of(text: str) -> str:
    bare = text.strip()
    if text.startswith("⟨"):
        return "other"
    if not bare:
        return "white space"
    if bare[0].isalpha() or bare[0] == "_":
        return "word begins" if text[0].isspace() else "word goes on"
    return "number" if bare[0].isdigit() else "punctuation"
