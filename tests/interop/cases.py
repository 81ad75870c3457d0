"""Random models of transformers, one for each way in which a mapping can differ. A table: `python -m tests.interop`."""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamla.interop import Architecture
from swamla.interop.folder import Weights
from swamla.model.language_model import LanguageModel

VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of transformers.

    config: the class of its config; "Config" becomes "ForCausalLM" for that of the model.  settings: of the config.
    to: the architecture that it is written as again, None for its own.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    to: str | None = None

    def model(self) -> Any:
        """With random weights and gains, in evaluation mode."""
        import transformers

        config = getattr(transformers, self.config)(**self.settings, attn_implementation="eager")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        if hasattr(config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # the only one in fp64
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            balances = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
            for parameter in (*model.parameters(), *balances):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.eval()


YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 128}
GDN = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
FACTORS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.1,
}
LING = {
    "q_lora_rank": None,
    "head_dim": 12,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
CASES = {
    "gpt2": Case(
        config="GPT2Config",
        settings={
            "vocab_size": VOCABULARY,
            "n_positions": 256,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "attn_pdrop": 0.0,
        },
    ),
    "llama": Case(config="LlamaConfig", settings=GROUPED),
    "llama, all biases, tied, wide heads": Case(
        config="LlamaConfig",
        settings={**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama, YaRN": Case(config="LlamaConfig", settings={**GROUPED, "rope_parameters": YARN}),
    "llama, linear positions": Case(
        config="LlamaConfig",
        settings={**SHAPE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama 3.2": Case(
        config="LlamaConfig",
        settings={
            **GROUPED,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    ),
    "granite": Case(config="GraniteConfig", settings={**GROUPED, **FACTORS, "tie_word_embeddings": True}, to="granite"),
    "granite, biases": Case(
        config="GraniteConfig",
        settings={**GROUPED, **FACTORS, "attention_bias": True, "mlp_bias": True, "logits_scaling": 1.0},
        to="granite",
    ),
    "granite_swa": Case(
        config="GraniteSWAConfig", settings={**GROUPED, **FACTORS, "sliding_window": 7}, to="granite_swa"
    ),
    "granite_swa, positions by layer": Case(
        config="GraniteSWAConfig",
        settings={
            **GROUPED,
            "attention_multiplier": 0.25,
            "sliding_window": 7,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "layer_rope_theta": [1e4, 0.0, 3e5],
        },
    ),
    "mistral": Case(config="MistralConfig", settings={**GROUPED, "sliding_window": 7}),
    "mistral without a window": Case(config="MistralConfig", settings={**GROUPED, "sliding_window": None}),
    "ministral": Case(
        config="MinistralConfig",
        settings={
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2": Case(config="Qwen2Config", settings=GROUPED, to="llama"),
    "qwen3": Case(config="Qwen3Config", settings={**GROUPED, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "qwen3_5": Case(config="Qwen3_5TextConfig", settings={**GROUPED, **GDN, "head_dim": 16}),
    "qwen3_5, all of a head rotated, tied": Case(
        config="Qwen3_5TextConfig",
        settings={
            **SHAPE,
            **GDN,
            "head_dim": 8,
            "linear_num_key_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": Case(
        config="DeepseekV3Config", settings={**SHAPE, **LATENT, **EXPERTS, "n_group": 2, "topk_group": 1}
    ),
    "deepseek_v3, full-rank queries, halves, YaRN": Case(
        config="DeepseekV3Config",
        settings={
            **SHAPE,
            **LATENT,
            **EXPERTS,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "rope_interleave": False,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v2": Case(
        config="DeepseekV2Config",
        settings={**SHAPE, **LATENT, **EXPERTS, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v2, greedy": Case(
        config="DeepseekV2Config",
        settings={**SHAPE, **LATENT, **EXPERTS, "topk_method": "greedy", "routed_scaling_factor": 2.0},
    ),
    "qwen3_moe": Case(
        config="Qwen3MoeConfig",
        settings={**GROUPED, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe, some layers dense, weights normalised": Case(
        config="Qwen3MoeConfig",
        settings={
            **GROUPED,
            "head_dim": 12,
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_next": Case(
        config="Qwen3NextConfig",
        settings={
            **GROUPED,
            **GDN,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_next, weights not normalised": Case(
        config="Qwen3NextConfig",
        settings={
            **GROUPED,
            **GDN,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "norm_topk_prob": False,
        },
    ),
    "kimi_linear": Case(
        config="KimiLinearConfig",
        settings={
            **SHAPE,
            **LATENT,
            **{name: value for name, value in EXPERTS.items() if name != "n_routed_experts"},
            "num_local_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": None,
            "linear_head_dim": 12,
            "linear_num_heads": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "bailing_hybrid": Case(
        config="BailingHybridConfig",
        settings={
            **SHAPE,
            **LATENT,
            **LING,
            "first_k_dense_replace": 1,
            "layer_group_size": 3,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "bailing_hybrid, unbounded decays, YaRN": Case(
        config="BailingHybridConfig",
        settings={
            **SHAPE,
            **LATENT,
            **LING,
            "kda_safe_gate": False,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "olmo2": Case(config="Olmo2Config", settings=GROUPED),
    "olmo3": Case(
        config="Olmo3Config",
        settings={
            **GROUPED,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": YARN,
            },
        },
    ),
    "olmo_hybrid": Case(config="OlmoHybridConfig", settings={**SHAPE, **GDN, "linear_num_key_heads": 4}),
    "olmo_hybrid, β up to 1, no positions": Case(
        config="OlmoHybridConfig",
        settings={
            **GROUPED,
            **GDN,
            "linear_allow_neg_eigval": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Differences:
    """The largest ones, relative to the largest value of theirs. text: generated ids until the first that differs."""

    logits: float
    gradients: float
    text: int


def tokens(batch: int = 2, time: int = 48) -> Tensor:
    """Random ids, none of them the end of a text."""
    return torch.randint(1, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(2))


def compare(ours: LanguageModel, theirs: Any, architecture: Architecture, n_text: int) -> Differences:
    """Logits, the loss's gradients by every weight, and `n_text` ids of greedy text."""
    ids = tokens()
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    theirs.zero_grad()
    ours.zero_grad()
    found, expected = ours(ids), theirs(ids, labels=ids)
    expected.loss.backward()
    ours(ids, labels=labels).backward()
    return Differences(
        logits=relative(found, expected.logits),
        gradients=max(
            relative(own, their) for own, their in _gradients(ours, stored(theirs, architecture), architecture)
        ),
        text=_equal_text(ours, theirs, n_text),
    )


def stored(theirs: Any, architecture: Architecture) -> Mapping[str, Tensor]:
    """Their gradients as their files have weights: saved as if they were some, since saving renames and cuts."""
    gradients = copy.deepcopy(theirs)
    with torch.no_grad():
        for parameter, own in zip(gradients.parameters(), theirs.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(own) if own.grad is None else own.grad)
    with tempfile.TemporaryDirectory() as folder:
        gradients.save_pretrained(folder)
        return dict(Weights(Path(folder), architecture))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value, or of .01 where all are smaller.

    Gradients of decay rates are small sums of large terms of both signs, which transformers adds in fp32.
    """
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=0.01)).item()


def _gradients(
    ours: LanguageModel, theirs: Mapping[str, Tensor], architecture: Architecture
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each rule the gradients by their weights, flat: ours follow from those by our weight through `join`."""
    own = dict(ours.named_parameters())
    for rule in architecture.rules():
        if rule.theirs and rule.ours in own:
            expected = [theirs[name] for name in rule.theirs]
            leaves = [torch.zeros_like(gradient, requires_grad=True) for gradient in expected]
            rule.join(leaves).backward(own[rule.ours].grad)
            found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            yield torch.cat([each.flatten() for each in found]), torch.cat([each.flatten() for each in expected])


def _equal_text(ours: LanguageModel, theirs: Any, n_text: int) -> int:
    prompt = tokens(1, 5)
    settings = {"max_new_tokens": n_text, "do_sample": False}
    theirs.generation_config.eos_token_id = None  # so that no text ends early
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, 5:].tolist()
    found = ours.generate(prompt, max_new_tokens=n_text, temperature=0.0)[0].tolist()
    return next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's one file."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
