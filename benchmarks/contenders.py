"""The models that are measured: ours, and those a user would pick instead, all of the same size.

They differ in nothing but what they are: depth, width, heads, vocabulary and, within 2 %, parameters are the same, the
weights random. Each computes its loss and generates the way its own library offers.
"""

import contextlib
import importlib.util
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from swamla.errors import UsageError
from swamla.model import (
    BlockConfig,
    DenseConfig,
    GDNConfig,
    LanguageModelConfig,
    MHAConfig,
    MLAConfig,
    Sampling,
    SWAConfig,
    count_parameters,
    training_flops_per_token,
)
from swamla.model.block import FFNConfig, MixerConfig

TOLERANCE = 0.02  # by which parameters may differ
GPT2, QWEN3_NEXT, DEEPSEEK_V3, NANOGPT = "GPT-2", "Qwen3-Next", "DeepSeek-V3", "nanoGPT"
TRANSFORMERS = (GPT2, QWEN3_NEXT, DEEPSEEK_V3)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all contenders have in common.

    width: of the residual stream.
    heads: of every mixer; they share out the width.
    depth: layers.
    vocabulary: token ids.
    window: of sliding-window attention.
    multiple: what hidden widths are a multiple of.
    """

    width: int = 384
    heads: int = 6
    depth: int = 6
    vocabulary: int = 4096
    window: int = 256
    multiple: int = 64

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def layer(self) -> int:
        """Parameters of a layer, GPT-2's: 4 D² of attention and 8 D² of FFN."""
        return 12 * self.width**2

    @property
    def parameters(self) -> int:
        """Of a whole model with a tied head."""
        return self.depth * self.layer + self.vocabulary * self.width

    def hidden(self, mixers: float) -> int:
        """Hidden width of a SwiGLU in a layer whose mixer has `mixers` parameters."""
        return round((self.layer - mixers) / (3 * self.width) / self.multiple) * self.multiple

    def mixer(self, name: str) -> MixerConfig:
        """Our mixer of that name; MLA's latent is a third of the width, half of a query or key head rotary."""
        half = self.head // 2
        mixers: dict[str, MixerConfig] = {
            "mha": MHAConfig(n_heads=self.heads),
            "swa": SWAConfig(n_heads=self.heads, window=self.window),
            "gdn": GDNConfig(n_heads=self.heads),
            "mla": MLAConfig(
                n_heads=self.heads,
                kv_lora_rank=self.width // 3,
                qk_nope_head_dim=half,
                qk_rope_head_dim=half,
                v_head_dim=self.head,
            ),
        }
        return mixers[name]

    def config(self, pattern: str, ffn: FFNConfig | None = None) -> LanguageModelConfig:
        """Our model of a pattern, such as "swa swa mla", that is repeated up to the depth."""
        names = tuple(pattern.split())
        blocks = {}
        for name in dict.fromkeys(names):
            mixer = self.mixer(name)
            blocks[name] = BlockConfig(
                mixer=mixer, ffn=ffn or DenseConfig(hidden=self.hidden(mixer.n_parameters(self.width)))
            )
        pattern_of_all = names * (self.depth // len(names))
        return LanguageModelConfig(vocab_size=self.vocabulary, width=self.width, blocks=blocks, pattern=pattern_of_all)


QUICK = Shape(width=96, heads=2, vocabulary=256, window=16, multiple=8)  # to try everything


class Contender(ABC):
    """A model to measure, whoever made it."""

    def __init__(self, name: str, model: nn.Module, twin: LanguageModelConfig, positions: int = 0) -> None:
        self.name = name
        self.model = model
        self.twin = twin
        self.n_parameters = sum(p.numel() for p in model.parameters()) - positions

    @abstractmethod
    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean nats a token, as its library computes them."""

    def flops_per_token(self, length: int) -> float:
        """Arithmetic of a training step: 6 for each parameter, and the mixing of positions as our twin counts it."""
        count = count_parameters(self.twin)
        weights = count.total - count.by_component["norms"]
        return 6 * self.n_parameters + training_flops_per_token(self.twin, length) - 6 * weights


class Ours(Contender):
    """A model of swamla."""

    def __init__(self, pattern: str, config: LanguageModelConfig) -> None:
        super().__init__(pattern, config.build(seed=0), config)

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model.loss(tokens_BT, labels_BT)[0] / labels_BT.numel()

    def flops_per_token(self, length: int) -> float:
        return training_flops_per_token(self.twin, length)

    def generate(self, prompt: list[int], count: int, on_token: Callable[[], None]) -> int:
        """Greedily continue the prompt by `count` tokens; returns the bytes of a state that holds all but the last.

        on_token() is called as soon as each is known.
        """
        self.model.generate([prompt], count, sampling=Sampling(temperature=0), on_token=lambda *_: on_token())
        return self.model.init_state(1, len(prompt) + count - 1).nbytes  # as `generate` makes it, and then drops it


class Transformers(Contender):
    """A model of transformers."""

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model(input_ids=tokens_BT, labels=labels_BT).loss

    def generate(self, prompt: list[int], count: int, on_token: Callable[[], None]) -> int:
        """Greedily continue the prompt by `count` tokens; returns the bytes of the cache, which lacks the last.

        on_token() is called as soon as each is known.
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
    """nanoGPT's own model; it generates without a cache, so it is measured in training alone."""

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model(tokens_BT, labels_BT)[1]


class _Streamer:
    """What `generate` of transformers hands tokens to: first the prompt, then each new one."""

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
    """The contender of that name for sequences of at most `length`; any name that is nobody else's is our pattern.

    ValueError where it is not as large as the others.
    """
    if name in TRANSFORMERS:
        found = _BUILDERS[name](shape, length)
    elif name == NANOGPT:
        found = _nanogpt(shape, length, nanogpt)
    else:
        found = Ours(name, shape.config(name))
    off = found.n_parameters / shape.parameters - 1
    if abs(off) > TOLERANCE:
        raise ValueError(f"{name} has {found.n_parameters:,} parameters, {off:+.1%} of what all have: not comparable")
    return found


def gpt2_twin(shape: Shape) -> LanguageModelConfig:
    """Our config whose arithmetic is GPT-2's."""
    block = BlockConfig(mixer=MHAConfig(n_heads=shape.heads, rope=None), ffn=DenseConfig(activation="gelu"))
    return LanguageModelConfig(
        vocab_size=shape.vocabulary, width=shape.width, blocks={"mha": block}, pattern=("mha",) * shape.depth
    )


def _gpt2(shape: Shape, length: int) -> Transformers:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=length,
        n_embd=shape.width,
        n_layer=shape.depth,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return Transformers(GPT2, GPT2LMHeadModel(config), gpt2_twin(shape), positions=length * shape.width)


def _qwen3_next(shape: Shape, length: int) -> Transformers:
    """Two linear layers to a full one, as `gdn gdn mha`; all FFNs dense."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    linear, full = shape.mixer("gdn").n_parameters(shape.width), 5 * shape.width**2  # full attention has a gate too
    config = Qwen3NextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden((2 * linear + full) / 3),
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head,
        linear_num_key_heads=shape.heads,
        linear_num_value_heads=shape.heads,
        linear_key_head_dim=shape.head,
        linear_value_head_dim=shape.head,
        mlp_only_layers=list(range(shape.depth)),
        layer_types=["linear_attention", "linear_attention", "full_attention"] * (shape.depth // 3),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return Transformers(QWEN3_NEXT, Qwen3NextForCausalLM(config), shape.config("gdn gdn mha"))


def _deepseek_v3(shape: Shape, length: int) -> Transformers:
    """The dimensions of our `mla`; all FFNs dense."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    mla = shape.mixer("mla")
    config = DeepseekV3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden(mla.n_parameters(shape.width)),
        num_hidden_layers=shape.depth,
        first_k_dense_replace=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        q_lora_rank=None,
        kv_lora_rank=shape.width // 3,
        qk_nope_head_dim=shape.head // 2,
        qk_rope_head_dim=shape.head // 2,
        v_head_dim=shape.head,
        max_position_embeddings=length,
        num_mtp_layers=0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return Transformers(DEEPSEEK_V3, DeepseekV3ForCausalLM(config), shape.config("mla"))


_BUILDERS = {GPT2: _gpt2, QWEN3_NEXT: _qwen3_next, DEEPSEEK_V3: _deepseek_v3}


def nanogpt_module(folder: Path) -> ModuleType:
    """nanoGPT's model.py, out of a checkout of it; UsageError where there is none."""
    file = folder / "model.py"
    if not file.is_file():
        raise UsageError(f"--nanogpt {folder}: has no model.py; give a checkout of https://github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nanogpt(shape: Shape, length: int, folder: Path | None) -> NanoGPT:
    assert folder is not None, "only where --nanogpt names a folder"
    module = nanogpt_module(folder)
    config = module.GPTConfig(
        block_size=length,
        vocab_size=shape.vocabulary,
        n_layer=shape.depth,
        n_head=shape.heads,
        n_embd=shape.width,
        dropout=0.0,
        bias=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model = module.GPT(config)
    return NanoGPT(NANOGPT, model, gpt2_twin(shape), positions=length * shape.width)
