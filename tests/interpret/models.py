"""Small models in fp64 that the tests of measures share: every mixer, and what stands around one."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.explanation import Weights
from swamla.model.mixers.mha import MHAConfig
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


def induction_model() -> LanguageModel:
    """One layer that predicts what followed the token's last occurrence, and nothing else, written down by hand.

    Ids are one-hot in both halves of the stream. The convolution leaves the first half and shifts the second by one
    token; queries read the token, keys the one before, values the token, which the output adds to the first half.
    """
    size = VOCABULARY
    mixer = MHAConfig(n_heads=1, head_dim=size, rope=None)
    block = BlockConfig(mixer=mixer, ffn=FFNS["none"], conv=2)
    config = LanguageModelConfig(
        vocab_size=size, width=2 * size, blocks={"one": block}, pattern=("one",), norm=NORMS["rmsnorm"], tied_head=False
    )
    model = config.build(seed=0).double().eval()
    one, none = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    layer = model.blocks[0]
    with torch.no_grad():
        model.embedding.weight.copy_(torch.cat((one, one), dim=1))
        layer.conv.weight.zero_()
        layer.conv.weight[size:, 0], layer.conv.weight[size:, 1] = 1.0, -1.0
        rows = [torch.cat((20 * one, none), dim=1), torch.cat((none, 20 * one), dim=1), torch.cat((one, none), dim=1)]
        layer.mixer.qkv_proj.weight.copy_(torch.cat(rows))
        layer.mixer.o_proj.weight.copy_(torch.cat((10 * one, none)))
        model.head.weight.copy_(torch.cat((one, -one), dim=1) * 10)
    return model


def numbers(value: Any) -> list[float]:
    """All numbers of a result, in order; of words there is nothing but what numbers say."""
    if isinstance(value, Tensor):
        return value.double().flatten().tolist()
    if isinstance(value, Weights):
        return numbers(value.all)
    if is_dataclass(value):
        return [each for field in fields(value) for each in numbers(getattr(value, field.name))]
    if isinstance(value, dict):
        return numbers(list(value.values()))
    if isinstance(value, list | tuple):
        return [each for one in value for each in numbers(one)]
    return [value] if isinstance(value, int | float) else []
