"""Adapters trained on a model of transformers, merged and written again: transformers computes the adapted model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from swamla.interop import load_pretrained, read_architecture, save_pretrained
from swamla.model.adapters import attach, is_adapter, merged
from tests.interop.cases import CASES, VOCABULARY

KINDS = ("gpt2", "llama", "granite_swa", "qwen3_5", "qwen3_next", "deepseek_v3", "kimi_linear", "bailing_hybrid")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_adapters_survive_the_mapping_to_an_architecture(kind: str, tmp_path: Path) -> None:
    """In fp64, as in test_architectures.py."""
    CASES[kind].model().save_pretrained(tmp_path / "theirs")
    adapted, plain = (load_pretrained(tmp_path / "theirs") for _ in range(2))
    architecture = read_architecture(tmp_path / "theirs").kind
    attach(adapted, rank=2, scale=2.0, seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if name.endswith(".b"):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    whole = adapted.state_dict()
    adapters = {name: tensor for name, tensor in whole.items() if is_adapter(name)}
    plain.load_state_dict(merged(plain.state_dict(), adapters, plain.config, origin="here"))
    assert save_pretrained(plain, tmp_path / "out", to=architecture).kind == architecture
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if hasattr(theirs.config, "num_experts_per_tok"):
        theirs.set_experts_implementation("eager")
    tokens = torch.randint(1, VOCABULARY, (2, 9), generator=generator)
    found, expected = theirs.double()(tokens).logits, adapted.double()(tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    changed = load_pretrained(tmp_path / "theirs").double()(tokens) - expected
    assert changed.abs().max() > 1e-2
