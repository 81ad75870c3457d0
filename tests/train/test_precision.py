"""The number format of a run is chosen once, by what the machine has; fp8 only when asked for."""

import copy
import io
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from torch import nn

import swamla
from swamla.errors import Interrupted, MissingBackendError
from swamla.model.block import BlockConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.ops.layout import Layout
from swamla.train import fp8, precision, train

from .helpers import MIXERS, held_out, losses, model_of, run, tiny_config, weights
from .test_resume import digests, stop_after

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_unmeasured_is_bf16_exactly_where_there_are_instructions_for_it(monkeypatch, fast, chosen):
    monkeypatch.setattr(precision, "has_bf16", lambda device: fast)
    assert precision.resolve_precision("auto", CPU) == chosen
    assert precision.resolve_precision("fp32", CPU) == "fp32"
    assert precision.resolve_precision("bf16", CPU) == "bf16"
    assert precision.resolve_precision("fp8", CPU) == "fp8"


@pytest.mark.parametrize(
    ("asked", "trained", "there", "expected"),
    [
        ("auto", "bf16", True, "bf16"),
        ("auto", "bf16", False, "fp32"),  # emulated, it would be slow
        ("auto", "fp32", True, "fp32"),
        ("auto", "", True, "bf16"),  # converted weights do not say
        ("bf16", "bf16", False, "bf16"),
        ("fp32", "fp32", True, "fp32"),
        ("fp8", "fp8", True, "bf16"),
    ],
)
def test_weights_are_computed_in_what_they_were_trained_in_where_it_can_be(
    monkeypatch, asked, trained, there, expected
):
    monkeypatch.setattr(precision, "has_bf16", lambda device: there)
    assert precision.resolve_as_trained(asked, trained, CPU) == expected


@pytest.mark.parametrize(
    ("chosen", "dtype"), [("bf16", torch.bfloat16), ("fp8", torch.bfloat16), ("fp32", torch.float32)]
)
def test_autocast_computes_in_what_was_chosen(chosen, dtype):
    x = torch.ones(2, 2)
    with precision.autocast(chosen, CPU):
        assert (x @ x).dtype == dtype


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.resolve_device("auto") == CPU
    with pytest.raises(MissingBackendError, match="no CUDA device"):
        precision.resolve_device("cuda")


needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: pip install 'swamla[fp8]'")


@pytest.fixture
def small_matrices_too(monkeypatch):
    """Tiny models have something to convert."""
    monkeypatch.setattr(fp8, "SHORTEST_SIDE", 16)
    monkeypatch.setattr(fp8, "NARROW_OUTPUT", 0)


def error(found, expected):
    """The norm of the difference, of the norm."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def one_pass(model, x, chosen):
    x = x.clone().requires_grad_()
    with precision.autocast(chosen, CPU):
        y = model(x)
    (y.float() ** 2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@needs_torchao
def test_a_converted_layer_is_the_fp32_one_within_the_rounding_of_fp8_forward_and_backward(small_matrices_too):
    # Operands have 4 significant bits forward (e4m3), of which rounding leaves an error of 2.6 % of each in the mean
    # square, and 3 in gradients (e5m2); bf16 has 8. Two layers add up to less than a tenth.
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64, bias=False))
    model = copy.deepcopy(reference)
    fp8.convert_to_fp8(model, CPU)
    x = torch.randn(3, 10, 64)  # 30 tokens: no multiple of 16
    expected = one_pass(reference, x, "fp32")
    errors = [error(*pair) for pair in zip(one_pass(model, x, "fp8"), expected, strict=True)]
    in_bf16 = [error(*pair) for pair in zip(one_pass(copy.deepcopy(reference), x, "bf16"), expected, strict=True)]
    assert max(errors) < 0.1
    assert min(errors) > 0.02  # so it was fp8, in every product
    assert max(in_bf16) < 0.01


@needs_torchao
def test_head_routers_experts_and_small_matrices_are_left_as_they_are_and_this_is_said(monkeypatch):
    monkeypatch.setattr(fp8, "SHORTEST_SIDE", 16)
    monkeypatch.setattr(fp8, "NARROW_OUTPUT", 16)
    moe = BlockConfig(mixer=MIXERS["gdn"], ffn=MoEConfig(n_experts=4, n_activated=2, expert_hidden=32))
    config = replace(model_of("mha"), blocks={"moe": moe, "mha": model_of("mha").blocks["mha"]}, pattern=("moe", "mha"))
    model = replace(config, vocab_size=64).build()
    names = {name: p.shape for name, p in model.named_parameters()}
    said = fp8.convert_to_fp8(model, CPU)
    converted = {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    assert {"blocks.0.mixer.qkvz_proj", "blocks.1.ffn.gate_up_proj"} <= converted
    assert not any(part in name for name in converted for part in ("head", "router", "ba_proj", "o_proj"))
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert said.startswith(f"fp8: {len(converted)} of {linears} linear layers (emulated: no faster); not ")
    assert "mixer.o_proj ×2" in said
    assert "head" in said
    assert {name: p.shape for name, p in model.named_parameters()} == names
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_matrices_that_gain_from_fp8_are_long_on_both_sides_and_wide_where_they_write():
    def suits(inputs, outputs, name="blocks.0.mixer.qkv_proj"):
        return fp8.suits_fp8(name, nn.Linear(inputs, outputs, device="meta"), {"blocks.3.ffn.router.weight"})

    assert suits(1536, 1536)
    assert suits(8192, 1024)
    assert not suits(1024, 1024)  # a narrow output
    assert not suits(256, 4096)  # a short sum
    assert not suits(1536, 1544)  # no multiple of 16
    assert not suits(4096, 50304, "head")
    assert not suits(4096, 4096, "blocks.3.ffn.router")


def fp8_config(**settings):
    return tiny_config(model_of("gdn", "mla"), precision="fp8", **settings)


@needs_torchao
def test_an_fp8_run_learns_says_what_it_did_and_loads_without_torchao(
    tmp_path, monkeypatch, dataset, small_matrices_too
):
    printed = io.StringIO()
    state = train(
        fp8_config(steps=8),
        tmp_path / "run",
        dataset=dataset,
        evaluate=held_out(dataset),
        console=Console(file=printed, width=200),
    )
    assert "fp8 on cpu" in printed.getvalue()
    assert "linear layers (emulated: no faster); not " in printed.getvalue()
    found = [loss for _, loss in losses(tmp_path / "run")]
    run(tiny_config(model_of("gdn", "mla"), steps=8), tmp_path / "fp32", dataset)
    in_fp32 = [loss for _, loss in losses(tmp_path / "fp32")]
    assert found != in_fp32
    assert found == pytest.approx(in_fp32, rel=0.02)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)  # importing it raises ImportError
    model, _ = swamla.load(tmp_path / "run", "latest")
    assert all(torch.equal(p, weights(state)[name]) for name, p in model.named_parameters())
    assert type(model.blocks[0].mixer.qkvz_proj) is nn.Linear
    loss = held_out(dataset)(model)["loss"]
    assert loss == pytest.approx(state.best_loss, rel=0.02)


@needs_torchao
def test_an_fp8_run_resumes_to_the_bit_with_activations_checkpointed(
    tmp_path, monkeypatch, dataset, small_matrices_too
):
    config = fp8_config(steps=4)
    run(config, tmp_path / "whole", dataset)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run", dataset)
    again = replace(config, train=replace(config.train, checkpointing="all"))
    run(again, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert digests(tmp_path / "run", 4) == digests(tmp_path / "whole", 4)


def test_without_torchao_fp8_is_an_error_with_the_install_command(tmp_path, monkeypatch, dataset):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(MissingBackendError, match=r"precision = fp8 needs torchao: pip install 'swamla\[fp8\]'"):
        run(fp8_config(), tmp_path / "run", dataset)
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(MissingBackendError, match=r"this GPU has no fp8 .* use bf16"):
        fp8.convert_to_fp8(nn.Linear(16, 16), torch.device("cuda"))


@needs_torchao
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_a_converted_model_reads_any_number_of_tokens(small_matrices_too, tokens):
    model = replace(model_of("mha"), vocab_size=64).build().eval()
    tokens_BT = torch.arange(tokens)[None]
    seq = Layout.one_document_per_row(1, tokens)
    expected = model(tokens_BT, seq)
    fp8.convert_to_fp8(model, CPU)
    with precision.autocast("fp8", CPU):
        assert error(model(tokens_BT, seq), expected) < 0.1
