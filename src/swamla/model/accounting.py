"""Counts from the config, before a weight exists: parameters, FLOPs, state bytes; an estimate of activation memory."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from swamla.model.block import BlockConfig, Checkpointing
from swamla.model.language_model import LanguageModelConfig
from swamla.ops.layout import PADDING

ID_BYTES = 8  # of an id in the state


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """total: a tied head counts once.  active: parameters that one token uses.  by_component: sums to total."""

    total: int
    active: int
    non_embedding: int
    by_component: dict[str, int]


def count_parameters(config: LanguageModelConfig) -> ParameterCount:
    """Parameters of the model, before a weight exists: the same numbers as of the built module.

    total, active (one token uses), non_embedding, and by_component: component → parameters.
    """
    width = config.width
    counts: Counter[str] = Counter()
    counts["embedding"] = config.vocab_size * width
    if config.learned_positions:
        counts["positions"] = config.learned_positions * width
    counts["ngrams"] = sum(config.ngram_buckets) * width
    inactive = 0
    for block in config.layers:
        counts[block.mixer.kind] += block.mixer.n_parameters(width)
        counts.update(block.ffn.components(width))
        counts["convolution"] += block.conv_parameters(width)
        counts["norms"] += block.n_norms * config.norm.n_parameters(width)
        inactive += block.ffn.n_parameters(width) - block.ffn.n_active_parameters(width)
    counts["norms"] += config.norm.n_parameters(width)
    if not config.tied_head:
        counts["head"] = config.vocab_size * width
    total = sum(counts.values())
    embeddings = counts["embedding"] + counts["positions"] + counts["ngrams"] + counts["head"]
    return ParameterCount(
        total=total, active=total - inactive, non_embedding=total - embeddings, by_component=dict(+counts)
    )


def forward_flops(config: LanguageModelConfig, length: int) -> int:
    """Floating-point operations of a forward pass over one sequence of `length` tokens, including the head.

    Counts multiplications and additions of matrix products: attention by the query-key pairs that its mask allows, the
    delta rule by its chunked form. Norms, activations and softmax are not counted.
    """
    layers = sum(block.forward_flops(config.width, length) for block in config.layers)
    return layers + 2 * config.width * config.vocab_size * length


def training_flops_per_token(config: LanguageModelConfig, length: int) -> float:
    """Training FLOPs per token at sequence length `length`; the backward pass counts as two forward passes."""
    return 3 * forward_flops(config, length) / length


class TrainingFlops:
    """Counts the FLOPs of training on packed rows: three times `forward_flops` of each document by itself.

    Does not count padding, masked pairs that a fast path computes anyway, and recomputation by activation
    checkpointing. Costs are cached by length.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        self._config = config
        self._of_length: dict[int, int] = {}

    def of(self, document_BT: Tensor) -> int:
        """Floating-point operations of a training step on rows with these document ids (on the CPU; -1 is padding)."""
        ids = np.pad(document_BT.numpy(), ((0, 0), (1, 0)), constant_values=PADDING - 1)  # a row starts a document
        begins = np.flatnonzero(np.diff(ids, axis=1))
        lengths = np.diff(begins, append=document_BT.numel())[ids[:, 1:].flat[begins] != PADDING]
        counted = zip(*(found.tolist() for found in np.unique(lengths, return_counts=True)), strict=True)
        return sum(count * self._of_one(length) for length, count in counted)

    def _of_one(self, length: int) -> int:
        if length not in self._of_length:
            self._of_length[length] = 3 * forward_flops(self._config, length)
        return self._of_length[length]


def state_bytes(config: LanguageModelConfig, length: int, *, batch: int = 1, element_bytes: int = 4) -> int:
    """Bytes of the state of `batch` sequences of at most `length` tokens, with `element_bytes` per element.

    Equal to `LanguageModel.init_state(batch, length).nbytes`. The delta rule's state matrices are at least fp32.
    """
    last_ids = max(0, len(config.ngram_buckets) - 1) * ID_BYTES
    return batch * (last_ids + sum(b.state_bytes(config.width, length, element_bytes) for b in config.layers))


def all_mha_state_bytes(config: LanguageModelConfig, length: int, *, batch: int = 1, element_bytes: int = 4) -> int:
    """`state_bytes` of a model of the same depth and width that caches all keys and values in every layer."""
    return batch * config.depth * 2 * config.width * length * element_bytes


class ParameterSpec(NamedTuple):
    """A parameter's name and unsharded shape. vectors: whether it is a set of vectors, see `MixerConfig.vectors`."""

    name: str
    shape: tuple[int, ...]
    vectors: bool = False


def parameter_specs(config: LanguageModelConfig) -> list[ParameterSpec]:
    """Every parameter of the model; a tied head and the embedding are one."""
    import torch

    with torch.device("meta"):
        model = config.build()
    return [ParameterSpec(name, tuple(p.shape), name in config.vectors) for name, p in model.named_parameters()]


def activation_bytes(
    config: LanguageModelConfig,
    tokens: int,
    *,
    element_bytes: int = 4,
    checkpointing: Checkpointing = "none",
    length: int | None = None,
    device: str = "cpu",
) -> int:
    """An estimate of the activation bytes that a training step on `tokens` tokens saves for its backward pass.

    length: tokens of a document, by default all.  element_bytes: of the dtype of matrix products. Counts the input and
    the output of every matrix; the residual stream before each norm, in its dtype; with 2-byte elements the weights'
    copies in that dtype; on a CPU the attention weights that the backward pass does not recompute. With
    `checkpointing`, recomputed mixers and FFNs save their input only, and the largest of them counts once in full. Does
    not count other tensors of elementwise operations, the loss's chunk of logits, and buffers inside operations:
    measured, a model saves 0.9 to 1.4 times the estimate.
    """
    residual = (min(4, element_bytes) if config.residual == "autocast" else 4) * config.width
    saved_by_block = {name: _saved_elements(block, config.width) for name, block in config.blocks.items()}
    if device == "cpu":
        for name, block in config.blocks.items():
            mixer, ffn = saved_by_block[name]
            mixer += block.mixer.kept_weights(config.width, length or tokens, bf16=element_bytes == 2)
            saved_by_block[name] = mixer, ffn
    recomputes = (checkpointing in ("attention", "all"), checkpointing in ("ffn", "all"))  # mixer, FFN
    saved = largest = 0.0
    for name in config.pattern:
        n_halves = config.blocks[name].n_norms  # without an FFN the mixer alone
        is_recomputed = recomputes[:n_halves]
        # A norm saves its input: the residual stream, or an output that is counted with its matrix.
        before_norm = residual if config.blocks[name].norm_place == "pre" else 0
        halves = [elements * element_bytes + before_norm for elements in saved_by_block[name][:n_halves]]
        recomputed = sum(half for half, yes in zip(halves, is_recomputed, strict=True) if yes)
        saved += sum(halves) - recomputed + residual * any(is_recomputed)
        largest = max(largest, recomputed)
    copies = _matrix_weights(config) * element_bytes if element_bytes < 4 else 0
    return round(tokens * (saved + largest)) + copies


def _saved_elements(block: BlockConfig, width: int) -> tuple[float, float]:
    """Elements per token that the matrices of the mixer and of the FFN, and the convolution, read and write."""
    import torch

    from swamla.model.ffns.experts import Experts

    with torch.device("meta"):
        mixer, ffn = block.mixer.build(width), block.ffn.build(width)
    used = 1.0  # experts per token
    stacked = [p for module in ffn.modules() if isinstance(module, Experts) for p in module.parameters()]
    if stacked:
        unused = block.ffn.n_parameters(width) - block.ffn.n_active_parameters(width)
        used = stacked[0].shape[0] * (1 - unused / sum(p.numel() for p in stacked))
    return (
        sum(sum(p.shape) for p in mixer.parameters() if p.ndim == 2) + (width if block.conv else 0),
        sum(sum(p.shape) for p in ffn.parameters() if p.ndim == 2) + used * sum(sum(p.shape[1:]) for p in stacked),
    )


def _matrix_weights(config: LanguageModelConfig) -> int:
    return sum(
        math.prod(spec.shape)
        for spec in parameter_specs(config)
        if len(spec.shape) >= 2 and spec.name.startswith("blocks.")
    )
