"""A GPT of nanochat's shape (https://github.com/karpathy/nanochat, nanochat/gpt.py), written anew in plain PyTorch.

Rotary positions, queries and keys normed after the rotation, ReLU², norms without gains, also of the embedding, an
untied head whose logits are capped, no bias anywhere. What later versions added (windows, value embeddings, scales of
the residual stream) is left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shape import Shape
from swamla.ops.autocast import product_dtype

BASE = 10_000.0  # of the rotation's wavelengths
CAP = 15.0  # logits stay within ±


def hidden_width(shape: Shape) -> int:
    """Of the FFN: narrower than 4 D by what the second matrix of the vocabulary takes from every layer."""
    untied = shape.vocabulary * shape.width
    return round((8 * shape.width**2 - untied / shape.depth) / (2 * shape.width) / shape.multiple) * shape.multiple


class NanochatGPT(nn.Module):
    """The model, for sequences of at most `length` tokens, with torch's initial weights: it is there to be timed."""

    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.depth))
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        frequency = BASE ** -(torch.arange(0, shape.head, 2) / shape.head)
        angle_TK = torch.arange(length)[:, None] * frequency
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angle_TK.cos(), persistent=False)
        self.register_buffer("sin", angle_TK.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean nats a label."""
        x_BTD = self.embedding(tokens_BT)
        x_BTD = _norm(x_BTD.to(product_dtype(x_BTD)))  # its embedding is in bf16, and so is the residual stream
        time = tokens_BT.shape[1]
        turn = self.cos[:time].to(x_BTD.dtype), self.sin[:time].to(x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, *turn)
        logits_BTV = self.head(_norm(x_BTD)).float()
        capped_BTV = CAP * torch.tanh(logits_BTV / CAP)
        return F.cross_entropy(capped_BTV.flatten(0, 1), labels_BT.flatten())


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.up = nn.Linear(shape.width, hidden_width(shape), bias=False)
        self.down = nn.Linear(hidden_width(shape), shape.width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        split = self.qkv(_norm(x_BTD)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q_BHTK, k_BHTK, v_BHTK = split.unbind()
        q_BHTK, k_BHTK = (_norm(_turned(t, cos_TK, sin_TK)) for t in (q_BHTK, k_BHTK))
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.out(y_BHTK.transpose(1, 2).flatten(2))
        return x_BTD + self.down(self.up(_norm(x_BTD)).relu().square())


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _turned(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """The halves of every head as pairs, turned by their position's angles."""
    a, b = x_BHTK.chunk(2, dim=-1)
    return torch.cat((a * cos_TK + b * sin_TK, b * cos_TK - a * sin_TK), dim=-1)
