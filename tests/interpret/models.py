"""Small models in fp64 that the tests of measures share: every mixer, and what stands around one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.ops.layout import Layout
from tests.model.helpers import FFNS, MIXERS, NORMS, WIDTH, build_model, hybrid_config, packed

EXPLAINED = [name for name in MIXERS if name != "toy" and not name.startswith("plug")]
AROUND: dict[str, dict[str, Any]] = {
    "pre": {},
    "post, convolution": {"conv": 3, "norm_place": "post"},
    "no FFN, convolution": {"conv": 2, "ffn": FFNS["none"]},
}
VOCABULARY = 31


def build(
    *names: str,
    norm: str = "rmsnorm",
    around: str = "pre",
    mixers: Mapping[str, MixerConfig] = MIXERS,
    **settings: Any,
) -> LanguageModel:
    """Layers of mixers of these names, in evaluation mode."""
    blocks = {
        name: BlockConfig(**{"mixer": mixers[name], "ffn": FFNS["dense"], **AROUND[around]})
        for name in dict.fromkeys(names)
    }
    config = LanguageModelConfig(
        vocab_size=VOCABULARY, width=WIDTH, blocks=blocks, pattern=names, norm=NORMS[norm], **settings
    )
    return build_model(config).double().eval()


def hybrid(ffn: str = "dense", **settings: Any) -> LanguageModel:
    """gdn, swa, mla, mha; embeddings of n-grams, bounded logits."""
    return build_model(replace(hybrid_config(ffn=ffn), **settings)).double().eval()


def two_rows() -> tuple[Layout, Tensor]:
    """Two rows of documents and padding: their layout, and the index of each document's first token (B, T)."""
    document = torch.cat([packed(9, 1, 8, padding=2).document_BT, packed(5, 15).document_BT])
    seq = Layout.from_documents(document)
    return seq, torch.arange(20) - seq.position_BT
