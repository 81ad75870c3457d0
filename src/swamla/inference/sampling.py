"""Sampling the next token: temperature, top-k, top-p."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.errors import UsageError, require

SMALLEST = torch.finfo(torch.float32).tiny  # temperatures and top_p below it are raised to it


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample the next token. temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens.

    Row i of a batch draws from its own generator with the seed `seed + i`, so that a prompt's continuation does not
    depend on the other prompts of the batch. Source of top_p: nucleus sampling, arXiv 1904.09751.
    Raises `ConfigError` for a setting out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        require(finite, "temperature", self.temperature, "must be >= 0 (0: greedy), e.g. 0.8")
        require(self.top_k >= 0, "top_k", self.top_k, "must be >= 0 (0: all tokens), e.g. 50")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1], e.g. 0.95")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2**63)")

    def generators(self, batch: int) -> list[torch.Generator]:
        """One random generator per row, on the CPU."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(batch)]

    def choose(self, logits_BV: Tensor, generators: list[torch.Generator]) -> list[int]:
        """The next token of each row. Raises `UsageError` for logits that are not finite."""
        best_B, index_B = logits_BV.max(dim=-1)  # NaN if any logit is NaN
        if not all(map(math.isfinite, best_B.tolist())):
            raise UsageError("the model's logits are not finite: its weights diverged, or are damaged")
        if self.temperature == 0:
            return index_B.tolist()
        probabilities_BV = self.probabilities(logits_BV).cpu()
        # A race of exponential times: the draw of `torch.multinomial`, whose checks take most of its time.
        times_BV = torch.empty_like(probabilities_BV)
        for times_V, generator in zip(times_BV, generators, strict=True):
            times_V.exponential_(generator=generator)
        return (probabilities_BV / times_BV).argmax(dim=-1).tolist()

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """The distribution (B, V) to sample from: temperature, then the top_k likeliest tokens, then the fewest of them
        whose probabilities sum to top_p. Among equally likely tokens top_p prefers lower ids.
        """
        logits_BV = logits_BV.float()
        # Subtract the maximum before dividing, so that the likeliest token stays finite at any temperature.
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / max(self.temperature, SMALLEST)
        if 0 < self.top_k < logits_BV.shape[-1]:
            top = logits_BV.topk(self.top_k, dim=-1)
            logits_BV = torch.full_like(logits_BV, -math.inf).scatter(-1, top.indices, top.values)
        probabilities_BV = logits_BV.softmax(dim=-1)
        if self.top_p < 1:
            sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
            before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV  # the likeliest token always stays
            beyond_BV = before_BV >= max(self.top_p, SMALLEST)
            dropped_BV = torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)
            probabilities_BV = probabilities_BV.masked_fill(dropped_BV, 0.0)
        return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
