"""Steps have more rows as a run goes on; which rows, and in which order, does not change."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from swamla import distributed
from swamla.data.packing import PackedRows
from swamla.errors import ConfigError, Interrupted
from swamla.train import TrainConfig, train
from swamla.train.curriculum import Stages
from swamla.train.tracking.metrics import read_metrics

from .helpers import MODEL, losses, model_of, run, tiny_config, tiny_dataset, weights
from .ranks import on_ranks
from .test_curriculum import batches_of
from .test_resume import digests, stop_after

RAMP = "1:0.3,2:0.3,4:inf"  # of six steps two of one row (progress 0, 1/6), two of two rows (2/6, 3/6), two of four

STILL = replace(MODEL, dropout=0.0)  # every rank draws its own


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Most of a tiny run's time."""
    monkeypatch.setattr("swamla.train.loop.plot_losses", lambda *args, **options: None)


def test_a_stage_holds_for_its_share_of_the_run_or_for_its_tokens():
    stages = Stages.rows("2:0.1,4:0.3,8:inf", 8)
    assert [stages.at(0, share) for share in (0.0, 0.099, 0.1, 0.399, 0.4, 1.0)] == [2, 2, 4, 4, 8, 8]
    by_tokens = Stages.rows("2:1k,8:inf", 8)
    assert [by_tokens.at(tokens, 1.0) for tokens in (0, 999, 1000)] == [2, 2, 8]
    assert Stages.rows("", 8).at(0, 0.0) == 8
    assert Stages.lengths("8:0.5,32:inf", 32).at(10**9, 0.4) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:0.5", "batch_ramp = '2:0.5': the last stage must last for ever, 2:inf, e.g."),
        ("2", "batch_ramp = '2': must be ROWS:TOKENS, tokens with K, M, B or inf, e.g."),
        ("2:0.5,8:inf", "batch_ramp = '8:inf': the last rows must be batch_size = 4"),
        ("5:0.5,4:inf", "batch_ramp = 5: must be 1 … batch_size = 4"),
        ("0:0.5,4:inf", "batch_ramp = 0: must be 1 … batch_size = 4"),
        ("1:0.5,2:0.5,4:inf", "batch_ramp = '1:0.5,2:0.5,4:inf': shares of the run must add up to less than 1"),
        ("1:0.5,2:1K,4:inf", "batch_ramp = '1:0.5,2:1K,4:inf': shares of the run must add up to less than 1"),
        ("1:1K,2:0.5,4:inf", "batch_ramp = '1:1K,2:0.5,4:inf': either every stage has tokens, or every one a share"),
    ],
)
def test_what_is_no_ramp_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(steps=1, batch_size=4, batch_ramp=text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_reads_the_same_rows_in_the_same_order_in_batches_that_grow(tmp_path, monkeypatch, dataset):
    seen, printed = batches_of(monkeypatch), io.StringIO()
    config = tiny_config(batch_ramp=RAMP)
    state = train(config, tmp_path / "run", dataset=dataset, console=Console(file=printed))
    assert [len(batch.tokens_BT) for batch in seen] == [1, 1, 2, 2, 4, 4]
    rows = PackedRows(dataset.train, 32, 0, dataset.tokenizer.eos_id).batch(0, 14)
    assert torch.equal(torch.cat([batch.tokens_BT for batch in seen]), rows.tokens_BT)
    assert (state.sample, state.tokens) == (14, 14 * 32)
    told = [line for line in printed.getvalue().splitlines() if " a step from" in line]
    assert told == [
        "1 row a step from step 1, 0 tokens",
        "2 rows a step from step 3, 64 tokens",
        "4 rows a step from step 5, 192 tokens",
    ]


def test_rows_may_grow_in_number_and_in_length_at_once(tmp_path, monkeypatch, dataset):
    seen = batches_of(monkeypatch)
    run(tiny_config(batch_ramp=RAMP, curriculum="8:0.5,32:inf"), tmp_path / "run", dataset)
    assert [tuple(batch.tokens_BT.shape) for batch in seen] == [(4, 8), (4, 8), (8, 8), (2, 32), (4, 32), (4, 32)]


def test_in_a_run_bounded_by_time_the_share_is_of_the_time(tmp_path, monkeypatch, dataset):
    seen = batches_of(monkeypatch)
    run(tiny_config(batch_ramp="2:0.5,4:inf", schedule_minutes=1e-9), tmp_path / "run", dataset)
    # All of the time is spent in the first step; the rows of the second are mostly read before, by the clock till then.
    assert [len(batch.tokens_BT) for batch in seen] in ([2, 2, 4, 4, 4, 4], [2, 4, 4, 4, 4, 4])


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_run_interrupted_in_any_stage_resumes_to_the_bit(tmp_path, monkeypatch, dataset, step):
    config = tiny_config(model_of("gdn", "mla"), batch_ramp=RAMP, batch_rule="sqrt", accumulation=2)
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


def test_the_learning_rate_follows_the_root_of_the_batch(tmp_path, dataset):
    rates = {}
    for rule in ("none", "sqrt"):
        run(tiny_config(batch_ramp=RAMP, batch_rule=rule), tmp_path / rule, dataset)
        rates[rule] = [r["lr"] for r in read_metrics(tmp_path / rule / "metrics.jsonl") if "lr" in r]
    factors = [math.sqrt(rows / 4) for rows in (1, 1, 2, 2, 4, 4)]
    assert rates["sqrt"] == pytest.approx([lr * f for lr, f in zip(rates["none"], factors, strict=True)], rel=1e-12)


def test_a_smaller_batch_has_no_larger_micro_batches_and_no_more_of_them():
    config = TrainConfig(steps=1, batch_size=8, accumulation=4, batch_ramp="1:0.1,3:0.1,8:inf")
    assert [config.micro_batches(rows) for rows in (1, 2, 3, 4, 8)] == [1, 1, 2, 2, 4]


def ramped_on_ranks(folder):
    dataset = tiny_dataset(folder)
    run(tiny_config(STILL, batch_ramp="2:0.5,4:inf", parallel="ddp"), folder / "two", dataset)
    refused = tiny_config(batch_ramp=RAMP, parallel="ddp")
    with pytest.raises(Exception, match=r"train\.batch_ramp = 1: must be a multiple of 2 processes"):
        run(refused, folder / "refused", dataset)
    assert distributed.world_size() == 2


def test_ranks_share_the_rows_of_every_stage_and_what_they_cannot_share_is_refused(tmp_path):
    dataset = tiny_dataset(tmp_path)
    run(tiny_config(STILL, batch_ramp="2:0.5,4:inf"), tmp_path / "one", dataset)
    on_ranks(2, ramped_on_ranks, tmp_path)
    one, two = (dict(losses(tmp_path / name)) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
