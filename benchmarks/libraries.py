"""Models of other libraries in a given shape, with random weights."""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType

from torch import nn

from benchmarks.shape import Shape
from swamla.errors import UsageError


def gpt2(shape: Shape, length: int) -> nn.Module:
    """GPT-2 of transformers, with biases and learned positions, without dropout."""
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
    return GPT2LMHeadModel(config)


def qwen3_next(shape: Shape, length: int) -> nn.Module:
    """Qwen3-Next with two linear-attention layers per full one, like `gdn gdn mha`; all FFNs are dense."""
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
    return Qwen3NextForCausalLM(config)


def deepseek_v3(shape: Shape, length: int) -> nn.Module:
    """DeepSeek-V3 with the dimensions of our `mla`; all FFNs are dense."""
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
    return DeepseekV3ForCausalLM(config)


def nanogpt_module(folder: Path) -> ModuleType:
    """nanoGPT's model.py from a checkout. Raises `UsageError` if there is none."""
    file = folder / "model.py"
    if not file.is_file():
        raise UsageError(f"--nanogpt {folder}: has no model.py; give a checkout of https://github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt(shape: Shape, length: int, folder: Path) -> nn.Module:
    """nanoGPT's GPT-2 without biases, as in its own configurations."""
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
        return module.GPT(config)
