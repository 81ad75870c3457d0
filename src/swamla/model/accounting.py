"""Exact counts from the config alone, before a weight exists: parameters, FLOPs, state bytes."""

from collections import Counter
from dataclasses import dataclass

from swamla.model.config import LanguageModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """total = all parameters, a tied head counted once; active = those one token uses; by_component sums to total."""

    total: int
    active: int
    non_embedding: int
    by_component: dict[str, int]


def count_parameters(config: LanguageModelConfig) -> ParameterCount:
    """Parameters of the model, equal to those of the built module."""
    width = config.width
    parts: Counter[str] = Counter()
    parts["embedding"] = config.vocab_size * width
    if config.learned_positions:
        parts["positions"] = config.learned_positions * width
    inactive = 0
    for block in config.layers:
        parts[block.mixer.kind] += block.mixer.n_parameters(width)
        parts.update(block.ffn.components(width))
        parts["norms"] += 2 * config.norm.n_parameters(width)
        inactive += block.ffn.n_parameters(width) - block.ffn.n_active_parameters(width)
    parts["norms"] += config.norm.n_parameters(width)
    if not config.tied_head:
        parts["head"] = config.vocab_size * width
    total = sum(parts.values())
    embeddings = parts["embedding"] + parts["positions"] + parts["head"]
    return ParameterCount(
        total=total, active=total - inactive, non_embedding=total - embeddings, by_component=dict(+parts)
    )


def forward_flops(config: LanguageModelConfig, length: int) -> int:
    """Floating-point operations of a forward pass over one sequence of `length` tokens, the head included.

    Multiplications and additions of matrix products; attention counted causally and within its window, the delta
    rule by its chunked form. Norms, activations and softmax are not counted.
    """
    layers = sum(
        block.mixer.forward_flops(config.width, length) + block.ffn.forward_flops(config.width, length)
        for block in config.layers
    )
    return layers + 2 * config.width * config.vocab_size * length


def training_flops_per_token(config: LanguageModelConfig, length: int) -> float:
    """Floating-point operations a token costs in training at sequence length `length`: backward is twice forward."""
    return 3 * forward_flops(config, length) / length


def state_bytes(config: LanguageModelConfig, length: int, *, batch: int = 1, element_bytes: int = 4) -> int:
    """Bytes of the state of `batch` sequences that may grow to `length` tokens, `element_bytes` a number.

    Equal to `LanguageModel.init_state(batch, length).nbytes`; the delta rule's memories are always fp32.
    """
    return batch * sum(block.mixer.state_bytes(config.width, length, element_bytes) for block in config.layers)
