"""Tiny models in both forms, ours and transformers', with the same weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swamla.interop.transformers import SwamlaConfig, SwamlaForCausalLM
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from tests.model.helpers import build_model, hybrid_config

PAD = 0
SHORT, MIDDLE, LONG = 5, 14, 23  # lengths of three prompts: less and more than the window of swa
LENGTHS = (LONG, SHORT, MIDDLE)


def of(model: LanguageModel, **others: Any) -> SwamlaForCausalLM:
    """The same model in transformers' form."""
    theirs = SwamlaForCausalLM(SwamlaConfig.of(model.config, pad_token_id=PAD, **others))
    theirs.model.load_state_dict(model.state_dict())
    return theirs.train(model.training)


def pair(config: LanguageModelConfig | None = None) -> tuple[LanguageModel, SwamlaForCausalLM]:
    """A model and the same in transformers' form, in evaluation mode; by default with every mixer and n-grams."""
    model = build_model(config or hybrid_config()).eval()
    return model, of(model)


def without_ngrams(**changes: Any) -> LanguageModelConfig:
    """Every mixer, and embeddings of nothing but tokens."""
    return replace(hybrid_config(), ngram_buckets=(), **changes)


def ids(*lengths: int, seed: int = 1, vocab_size: int = 31) -> list[Tensor]:
    """Texts of these lengths, without the id of padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (length,), generator=generator) for length in lengths]


def padded(texts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask. side: left, right, or both: some on either side and some between the tokens."""
    width = max(map(len, texts)) + (2 if side == "both" else 0)
    tokens, mask = torch.full((len(texts), width), PAD), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        free = width - len(text)
        places = torch.arange(len(text)) + {"left": free, "right": 0, "both": free // 2}[side]
        if side == "both" and free > 1:
            places[len(text) // 2 :] += 1
        tokens[row, places], mask[row, places] = text, 1
    return tokens, mask
