"""What computes a run: chosen when the model meets its device, told, kept, and refused before anything is written."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from swamla.errors import MissingBackendError
from swamla.train import train
from swamla.train.backends import describe, resolve_backends

from .helpers import MIXERS, model_of, run, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def with_backend(name, backend):
    """A model of one block whose mixer asks for `backend`."""
    model = model_of(name)
    block = replace(model.blocks[name], mixer=replace(MIXERS[name], backend=backend))
    return replace(model, blocks={name: block})


def test_a_mixer_without_a_choice_says_nothing_of_backends():
    assert resolve_backends(model_of("toy"), CPU) == {}
    assert resolve_backends(model_of("toy", "swa"), CPU) == {"attention": "torch"}


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "toy"])
def test_auto_is_resolved_by_device_and_a_name_is_taken_as_it_is(name):
    op = {"gdn": "delta rule", "kda": "channelwise delta rule"}.get(name.partition("_")[0], "attention")
    on_cuda = {
        "delta rule": "torch",
        "channelwise delta rule": "torch",
        "attention": "flex" if name == "swa" else "cudnn (packed rows: flex)",
    }
    also = ["convolution"] if op != "attention" else []  # told on a GPU only
    assert resolve_backends(model_of(name), CPU) == {op: "torch"}
    assert resolve_backends(model_of(name), CUDA) == dict.fromkeys(also, "torch") | {op: on_cuda[op]}
    assert resolve_backends(with_backend(name, "reference"), CUDA) == dict.fromkeys([*also, op], "reference")
    fp32 = resolve_backends(model_of(name), CUDA, "fp32")[op]
    assert fp32.startswith(on_cuda[op].partition(" ")[0])
    assert ("fp32: memory-efficient" in fp32) == fp32.startswith("cudnn")


def test_a_hybrid_tells_every_op_and_blocks_that_differ():
    assert describe(resolve_backends(model_of("gdn", "swa", "mla"), CPU)) == "attention: torch, delta rule: torch"
    model = model_of("swa", "mla")
    blocks = model.blocks | with_backend("mla", "reference").blocks
    assert describe(resolve_backends(replace(model, blocks=blocks), CPU)) == "attention: reference and torch"


@pytest.mark.parametrize("name", ["mha", "swa", "mla"])
def test_a_backend_that_the_device_has_not_is_refused_by_name_and_nothing_is_written(tmp_path, dataset, name):
    with pytest.raises(
        MissingBackendError, match=rf'^model\.blocks\.{name}\.mixer\.backend = "flex" needs a CUDA device'
    ):
        run(tiny_config(with_backend(name, "flex")), tmp_path / "run", dataset)
    assert not (tmp_path / "run").exists()


def test_the_choice_is_printed_and_kept_with_the_checkpoint_but_not_in_the_portable_config(tmp_path, dataset):
    out = io.StringIO()
    config = tiny_config(model_of("gdn", "mha"), steps=1)
    train(config, tmp_path / "run", dataset=dataset, console=Console(file=out))
    assert "backends: attention: torch, delta rule: torch\n" in out.getvalue()
    (state,) = (tmp_path / "run" / "checkpoints").glob("step-*/state.json")
    assert json.loads(state.read_text())["backends"] == {"attention": "torch", "delta rule": "torch"}
    blocks = json.loads((tmp_path / "run" / "config.json").read_text())["model"]["blocks"]
    assert {block["mixer"]["backend"] for block in blocks.values()} == {"auto"}
