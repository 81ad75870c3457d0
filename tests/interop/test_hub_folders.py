"""Folders as the hub has them: older names of settings, files cut in pieces, weights beside the language model's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swamla.errors import ConfigError, CorruptError, SwamlaError, UsageError
from swamla.interop import equal_architecture, load_pretrained, read_architecture, save_pretrained
from swamla.interop.architecture import architecture_of
from swamla.interop.folder import read_weights
from swamla.registry import members_of

from .cases import CASES, relative, tokens, weights_of


def architecture(kind: str) -> Any:
    from swamla.interop import Architecture

    return members_of(Architecture)[kind].example()


def saved(kind: str, folder: Path) -> Path:
    """A folder with the example of an architecture, with random weights."""
    save_pretrained(architecture(kind).language_model().build(seed=0), folder, to=kind)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    first, second = found.state_dict(), expected.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["deepseek_v3", "bailing_hybrid"])
def test_layers_that_predict_further_tokens_are_left_out_if_the_config_names_them(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "model")
    expected, weights = load_pretrained(folder), weights_of(folder)
    depth = expected.config.depth
    further = {f"model.layers.{depth}.{name}.weight": torch.ones(2, 2) for name in ("eh_proj", "mlp.up_proj")}
    save_file(weights | further, folder / "model.safetensors")
    with pytest.raises(SwamlaError, match="eh_proj"):
        load_pretrained(folder)
    change_config(folder, num_nextn_predict_layers=1)
    assert_same_weights(load_pretrained(folder), expected)


def test_ling_is_read_under_the_names_of_the_hub() -> None:
    plain = architecture("bailing_hybrid").plain()
    hub = {
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
        "num_experts_per_token": "num_experts_per_tok",
    }
    older = {hub.get(name, name): value for name, value in plain.items()}
    for name in ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_conv_kernel_dim", "rope_parameters"):
        del older[name]
    older |= {"layer_group_size": 3, "first_k_dense_replace": 1, "kda_lower_bound": -5}
    assert architecture_of(older, "config.json") == architecture_of(plain, "config.json")
    assert architecture_of(older | {"rope_theta": 1e4}, "config.json").rope_parameters.rope_theta == 1e4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kda_lower_bound": -3.0}, r"kda_lower_bound = -3.0 \(.*\): must be -5.0"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings = True \(.*\): must be False"),
        ({"q_lora_rank": 24}, r"q_lora_rank = 24 \(.*\): must be None"),
    ],
)
def test_a_ling_that_ours_cannot_be_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved("bailing_hybrid", tmp_path / "model")
    change_config(folder, **change)
    with pytest.raises(ConfigError, match=message):
        read_architecture(folder)


@pytest.mark.parametrize("factor", [8.0, 12.0])
def test_granites_factors_lose_no_more_than_fp32_does_of_weights_in_16_bits(factor: float, tmp_path: Path) -> None:
    folder = saved("granite", tmp_path / "model")
    halves = {name: tensor.bfloat16() for name, tensor in weights_of(folder).items()}
    save_file(halves, folder / "model.safetensors")
    change_config(folder, embedding_multiplier=factor, logits_scaling=factor)
    found = read_weights(folder, read_architecture(folder))
    dtype = torch.bfloat16 if factor == 8 else torch.float32
    for name, tensor in found:
        scaled = name.endswith(("o_proj.weight", "down_proj.weight")) or name == "norm.weight"
        assert tensor.dtype == (dtype if scaled else torch.bfloat16), name
        if name == "blocks.1.ffn.down_proj.weight":
            expected = halves["model.layers.1.mlp.down_proj.weight"].double() / factor
            torch.testing.assert_close(tensor.double(), expected, rtol=2**-23, atol=0)


def test_a_llama_is_written_as_one_and_not_as_a_granite_which_equals_it_too() -> None:
    model = architecture("llama").language_model()
    assert equal_architecture(model).kind == "llama"
    granite = equal_architecture(model, "granite")
    assert granite.plain()["attention_multiplier"] == 8**-0.5
    assert granite.plain()["embedding_multiplier"] == 1
    assert equal_architecture(architecture("granite").language_model()).kind == "granite"


def test_an_olmo_3_of_older_files_scales_positions_where_there_is_no_window() -> None:
    plain = architecture("olmo3").plain() | {"num_hidden_layers": 4}
    del plain["rope_parameters"], plain["layer_types"]
    yarn = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
    mixers = [block.mixer for block in architecture_of(plain | {"rope_scaling": yarn}, "").language_model().layers]
    assert [mixer.kind for mixer in mixers] == ["swa", "swa", "swa", "mha"]
    assert [mixer.rope.scaling is None for mixer in mixers] == [True, True, True, False]  # type: ignore[attr-defined]
    assert {mixer.rope.base for mixer in mixers} == {5e5}  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="must be a table of full_attention and sliding_attention"):
        architecture_of(plain | {"rope_parameters": yarn}, "")


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_of_a_qwen_that_sees_images_is_read(tied: bool, tmp_path: Path) -> None:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = CASES["qwen3_5"].settings | {"tie_word_embeddings": tied}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    torch.manual_seed(0)
    theirs = Qwen3_5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the part that sees images is left out"):
        ours = load_pretrained(tmp_path)
    ids = tokens()
    assert ours.config.tied_head == tied
    with torch.no_grad():
        assert relative(ours(ids), theirs(ids).logits) < 1e-5


def test_weights_in_several_files_with_an_index_are_read(tmp_path: Path) -> None:
    model = CASES["llama"].model()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same_weights(load_pretrained(tmp_path / "shards"), load_pretrained(tmp_path / "whole"))
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, tmp_path / "shards/consolidated.safetensors")
    assert_same_weights(load_pretrained(tmp_path / "shards"), load_pretrained(tmp_path / "whole"))
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    with pytest.raises(CorruptError, match="got nothing"):
        load_pretrained(tmp_path / "shards")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_weights_are_refused(key: str, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    change_config(folder, **{key: {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    assert read_architecture(folder).kind == "llama"  # what it describes can be told and counted
    with pytest.raises(ConfigError, match=f"{key} = 'fp8' .*: quantized weights are not read"):
        load_pretrained(folder)
    change_config(folder, **{key: None})
    load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantized_matrix_under_a_plain_name_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    weights, name = weights_of(folder), "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: weights[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(UsageError, match=rf"{name} is stored as [FI]8.*, must be one of F64, F32, F16, BF16"):
        load_pretrained(folder)
