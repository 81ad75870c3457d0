"""Rows grow with the tokens seen; their tokens, and the order in which they come, do not change."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from swamla.data.packing import Batch, PackedRows
from swamla.errors import ConfigError, Interrupted
from swamla.train import TrainConfig, train
from swamla.train import loop as loop_module
from swamla.train.curriculum import Stages, cut

from .helpers import losses, model_of, run, tiny_config, weights
from .test_resume import digests, stop_after


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Most of a tiny run's time."""
    monkeypatch.setattr("swamla.train.loop.plot_losses", lambda *args, **options: None)


# Steps are of 4 × 32 = 128 tokens: two of length 8, one of 16 (it begins at 256, before 330), the rest of 32.
STAGES = "8:130,16:0.2K,32:inf"


def test_a_stage_holds_for_its_tokens_and_the_last_for_ever():
    curriculum = Stages.lengths("512:500M, 1024:2B,2048:inf", 2048)
    million = 10**6
    seen = [curriculum.at(n, 0.5) for n in (0, 500 * million - 1, 500 * million, 2500 * million - 1, 2500 * million)]
    assert seen == [512, 512, 1024, 1024, 2048]
    assert curriculum.at(10**15, 0.5) == 2048
    assert Stages.lengths("8:1.5k,16:10,32:inf", 32).ends == (1500, 1510)
    assert Stages.lengths("", 32).at(0, 0.0) == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "curriculum = '8': must be LENGTH:TOKENS, tokens with K, M, B or inf, e.g."),
        ("8:5T,32:inf", "curriculum = '8:5T': must be LENGTH:TOKENS"),
        ("8:-5,32:inf", "curriculum = '8:-5': must be LENGTH:TOKENS"),
        ("8:0M,32:inf", "curriculum = '8:0M': a stage must last for at least one token"),
        ("8:nan,32:inf", "curriculum = '8:nan': must be"),
        ("8:5M", "curriculum = '8:5M': the last stage must last for ever, 8:inf"),
        ("8:inf,32:inf", "curriculum = '8:inf': only the last stage lasts for ever"),
        ("8:5M,16:inf", "curriculum = '16:inf': the last length must be block_size = 32"),
        ("12:5M,32:inf", "curriculum = 12: every length must divide block_size = 32"),
        ("0:5M,32:inf", "curriculum = 0: every length must divide block_size = 32"),
        ("8:5M,,32:inf", "curriculum = '': must be LENGTH:TOKENS"),
    ],
)
def test_what_is_no_curriculum_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(steps=1, block_size=32, curriculum=text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cutting_keeps_every_position_in_its_place():
    index_BT = torch.arange(24).view(2, 12)
    shorter = cut(Batch(index_BT, index_BT + 1, index_BT // 5), 4)
    assert shorter.tokens_BT.shape == (6, 4)
    for found, whole in ((shorter.tokens_BT, index_BT), (shorter.labels_BT, index_BT + 1)):
        assert torch.equal(found.flatten(), whole.flatten())


def batches_of(monkeypatch):
    """What the training steps are given."""
    real, seen = loop_module.training_step, []

    def noted(state, batch, *rest):
        seen.append(batch)
        return real(state, batch, *rest)

    monkeypatch.setattr(loop_module, "training_step", noted)
    return seen


def test_a_run_reads_the_same_tokens_in_the_same_order_in_rows_that_grow(tmp_path, monkeypatch, dataset):
    seen, printed = batches_of(monkeypatch), io.StringIO()
    config = tiny_config(curriculum=STAGES)
    state = train(config, tmp_path / "run", dataset=dataset, console=Console(file=printed))
    assert [tuple(batch.tokens_BT.shape) for batch in seen] == [(16, 8)] * 2 + [(8, 16)] + [(4, 32)] * 3
    rows = PackedRows(dataset.train, 32, 0, dataset.tokenizer.eos_id)
    for step, batch in enumerate(seen):
        assert torch.equal(batch.tokens_BT.flatten(), rows.batch(4 * step, 4).tokens_BT.flatten())
    assert state.tokens == 6 * 128
    told = [line for line in printed.getvalue().splitlines() if line.startswith("sequence length")]
    assert told == [
        "sequence length 8 from step 1, 0 tokens",
        "sequence length 16 from step 3, 256 tokens",
        "sequence length 32 from step 4, 384 tokens",
    ]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_run_interrupted_in_any_stage_resumes_to_the_bit(tmp_path, monkeypatch, dataset, step):
    config = tiny_config(model_of("gdn", "mla"), curriculum=STAGES, accumulation=2)
    expected = run(config, tmp_path / "whole", dataset)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run", dataset)
    torch.manual_seed(99)
    state = run(config, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(state).items())


def test_a_resumed_run_keeps_its_curriculum(tmp_path, dataset):
    config = tiny_config(curriculum=STAGES, steps=2)
    run(config, tmp_path / "run", dataset)
    other = replace(config, train=replace(config.train, curriculum=""))
    with pytest.raises(ConfigError, match=r"train.curriculum = '': the run to resume had '8:130"):
        run(other, tmp_path / "run", dataset, resume=True)
