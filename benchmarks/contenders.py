"""The models that are compared: ours, and those that a user would choose instead, all of the same size.

They have the same depth, width, heads, vocabulary and, within 2 %, parameters; weights are random. Each computes its
loss and generates by its own library.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import libraries
from benchmarks.nanochat import NanochatGPT
from benchmarks.shape import QUICK, Shape, gpt2_twin
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model import LanguageModelConfig, count_parameters, training_flops_per_token

__all__ = [
    "DEEPSEEK_V3",
    "GPT2",
    "NANOCHAT",
    "NANOGPT",
    "QUICK",
    "QWEN3_NEXT",
    "TRANSFORMERS",
    "Contender",
    "NanoGPT",
    "Nanochat",
    "Ours",
    "Shape",
    "Transformers",
    "contender",
    "gpt2_twin",
]

TOLERANCE = 0.02  # largest relative difference in parameters
GPT2, QWEN3_NEXT, DEEPSEEK_V3, NANOGPT = "GPT-2", "Qwen3-Next", "DeepSeek-V3", "nanoGPT"
NANOCHAT = "nanochat"
INT8 = ", int8"  # after a pattern: decodes with 8-bit weights
TRANSFORMERS = (GPT2, QWEN3_NEXT, DEEPSEEK_V3)


class Contender(ABC):
    """A model to measure, of any library."""

    def __init__(self, name: str, model: nn.Module, twin: LanguageModelConfig, positions: int = 0) -> None:
        self.name = name
        self.model = model
        self.twin = twin
        self.n_parameters = sum(p.numel() for p in model.parameters()) - positions

    @abstractmethod
    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean loss in nats per token, as its library computes it."""

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a training step per token: 6 per parameter, and for mixing positions what our twin counts."""
        count = count_parameters(self.twin)
        weights = count.total - count.by_component["norms"]
        return 6 * self.n_parameters + training_flops_per_token(self.twin, length) - 6 * weights


class Ours(Contender):
    """A model of swamla."""

    def __init__(self, pattern: str, config: LanguageModelConfig, *, int8: bool = False) -> None:
        super().__init__(pattern, config.build(seed=0), config)
        self.int8 = int8  # decode with weights rounded to 8 bits

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model.loss(tokens_BT, labels_BT)[0] / labels_BT.numel()

    def flops_per_token(self, length: int) -> float:
        return training_flops_per_token(self.twin, length)

    def generate(self, prompt: list[int], count: int, on_token: Callable[[], None]) -> int:
        """Greedily generate `count` tokens; returns the bytes of a state for all tokens but the last.

        on_token() is called after every token.
        """
        greedy, decoding = Sampling(temperature=0), "int8" if self.int8 else "eager"
        Decoder(self.model, decoding).generate([prompt], count, sampling=greedy, on_token=lambda *_: on_token())
        return self.model.init_state(
            1, len(prompt) + count - 1
        ).nbytes  # a state like the one that `generate` has freed


class Transformers(Contender):
    """A model of transformers."""

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model(input_ids=tokens_BT, labels=labels_BT).loss

    def generate(self, prompt: list[int], count: int, on_token: Callable[[], None]) -> int:
        """Greedily generate `count` tokens; returns the bytes of the cache, which holds all tokens but the last.

        on_token() is called after every token.
        """
        generated = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=_Streamer(on_token),
        )
        return sum(t.nbytes for layer in generated.past_key_values.layers for t in _tensors(vars(layer)))


class NanoGPT(Contender):
    """nanoGPT's own model, measured in training only, because it generates without a cache."""

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model(tokens_BT, labels_BT)[1]


class Nanochat(Contender):
    """A GPT of nanochat's shape; measured in training alone."""

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model(tokens_BT, labels_BT)

    def flops_per_token(self, length: int) -> float:
        """As of the others, without the embedding: its head is another matrix, and the embedding multiplies nothing."""
        return super().flops_per_token(length) - 6 * self.twin.vocab_size * self.twin.width


class _Streamer:
    """Receives tokens from `generate` of transformers: first the prompt, then every new token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.on_token = on_token
        self.prompt_seen = False

    def put(self, _: Tensor) -> None:
        if self.prompt_seen:
            self.on_token()
        self.prompt_seen = True

    def end(self) -> None:
        pass


def _tensors(tree: dict[Any, Any]) -> list[Tensor]:
    """Tensors in a dictionary of dictionaries."""
    found = []
    for value in tree.values():
        found += [value] if torch.is_tensor(value) else _tensors(value) if type(value) is dict else []
    return found


def contender(name: str, shape: Shape, length: int, nanogpt: Path | None = None) -> Any:
    """The contender of this name for sequences of at most `length`. Names of no library's model are our patterns.

    Raises `ValueError` if its number of parameters differs from the others'.
    """
    found = _made(name, shape, length, nanogpt)
    off = found.n_parameters / shape.parameters - 1
    if abs(off) > TOLERANCE:
        raise ValueError(
            f"{name} has {found.n_parameters:,} parameters, {off:+.1%} from the common size: not comparable"
        )
    return found


def _made(name: str, shape: Shape, length: int, nanogpt: Path | None) -> Contender:
    positions = length * shape.width
    if name == GPT2:
        return Transformers(name, libraries.gpt2(shape, length), gpt2_twin(shape), positions)
    if name == QWEN3_NEXT:
        return Transformers(name, libraries.qwen3_next(shape, length), shape.config("gdn gdn mha"))
    if name == DEEPSEEK_V3:
        return Transformers(name, libraries.deepseek_v3(shape, length), shape.config("mla"))
    if name == NANOGPT:
        assert nanogpt is not None, "a contender only where its folder was named"
        return NanoGPT(name, libraries.nanogpt(shape, length, nanogpt), gpt2_twin(shape), positions)
    if name == NANOCHAT:
        return Nanochat(name, NanochatGPT(shape, length), gpt2_twin(shape))
    pattern = name.removesuffix(INT8)
    return Ours(pattern, shape.config(pattern), int8=name != pattern)
