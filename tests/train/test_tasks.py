"""Runs on tasks: resumed at the very next row, scored by the accuracy of answers, without bytes."""

import math
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from swamla.data import DataConfig, TaskDataset
from swamla.errors import ConfigError, DataError, Interrupted
from swamla.evaluate import evaluate_answers, validation
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import NO_LABEL, LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.tasks import parse
from swamla.train.tracking.metrics import read_metrics

from .helpers import model_of, run, tiny_config, weights
from .test_resume import stop_after

TASK = parse("mqar?pairs=2&length=12&vocabulary=16")
DATA = TaskDataset(TASK)


def config_of(**settings):
    data = DataConfig(source=DATA.source, tokenizer="names")
    return replace(tiny_config(model_of("mha", "gdn"), block_size=12, eval_interval=2, **settings), data=data)


def test_a_resumed_run_takes_the_very_next_rows(tmp_path, monkeypatch):
    read = []
    real = type(DATA.rows(12, 0)).batch
    monkeypatch.setattr(
        type(DATA.rows(12, 0)), "batch", lambda self, first, count: (read.append(first), real(self, first, count))[1]
    )
    evaluate = validation(DATA, 12, max_tokens=240)
    whole = run(config_of(), tmp_path / "whole", DATA, evaluate=evaluate)
    assert sorted(set(read)) == [0, 4, 8, 12, 16, 20]
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGTERM)
        with pytest.raises(Interrupted):
            run(config_of(), tmp_path / "run", DATA, evaluate=evaluate)
    read.clear()
    state = run(config_of(), tmp_path / "run", TaskDataset(TASK), evaluate=evaluate, resume=True)
    assert min(read) == 12  # the fourth step's rows: three steps of four rows were taken
    for name, weight in weights(whole).items():
        assert torch.equal(weights(state)[name], weight), name
    records = [
        [
            (r["step"], r.get("loss"), r.get("held_out_accuracy"))
            for r in read_metrics(tmp_path / each / "metrics.jsonl")
        ]
        for each in ("whole", "run")
    ]
    assert records[0] == records[1]


def test_a_run_on_other_rows_is_not_resumed(tmp_path):
    run(config_of(), tmp_path / "run", DATA)
    other = TaskDataset(replace(TASK, power=0.5))
    with pytest.raises(DataError, match="the data changed since the checkpoint"):
        run(
            replace(config_of(), data=DataConfig(source=other.source, tokenizer="names")),
            tmp_path / "run",
            other,
            resume=True,
        )


def test_a_window_of_all_tokens_trains_as_mha_does_to_the_digit(tmp_path):
    records, trained = [], []
    for name, mixer in {
        "mha": MHAConfig(n_heads=2, backend="reference"),
        "swa": SWAConfig(n_heads=2, window=TASK.length, sinks=0, backend="reference"),
    }.items():
        blocks = {"mixer": BlockConfig(mixer=mixer, conv=4, ffn=DenseConfig(hidden=32))}
        model = LanguageModelConfig(width=16, blocks=blocks, pattern=("mixer", "mixer"))
        trained.append(weights(run(replace(config_of(), model=model), tmp_path / name, DATA)))
        records.append([(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert len(records[0]) == config_of().train.steps
    assert records[0] == records[1]
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


def test_metrics_have_accuracy_and_no_bytes(tmp_path):
    run(config_of(), tmp_path / "run", DATA, evaluate=validation(DATA, 12, max_tokens=240))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    evaluated = [record for record in records if "held_out_loss" in record]
    assert [record["step"] for record in evaluated] == [2, 4, 6]
    assert all(0 <= record["held_out_accuracy"] <= 1 for record in evaluated)
    assert {record["held_out_tokens"] for record in evaluated} == {2 * 240 // 12}
    assert not [name for record in records for name in record if "byte" in name]
    assert [record["tokens"] for record in records if "loss" in record] == [8 * n for n in range(1, 7)]  # labels


def test_accuracy_is_the_share_of_labels_that_are_the_likeliest_token():
    model = replace(model_of("mha"), vocab_size=17).build()
    batches = list(DATA.held_out_rows(7, 23 * 12))
    found = evaluate_answers(model, batches)
    model.eval()
    nats, right, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            for tokens, labels in zip(batch.tokens_BT, batch.labels_BT, strict=True):
                logits = model(tokens[None])[0]
                for t in torch.nonzero(labels != NO_LABEL)[:, 0]:
                    nats -= float(F.log_softmax(logits[t].double(), -1)[labels[t]])
                    right += int(logits[t].argmax()) == int(labels[t])
                    count += 1
    assert (found.tokens, found.accuracy) == (count, right / count) == (46, right / 46)
    assert math.isclose(found.loss, nats / count, rel_tol=1e-5)


def test_rows_without_labels_cannot_be_scored():
    model = replace(model_of("mha"), vocab_size=17).build()
    batch = next(DATA.held_out_rows(2))
    with pytest.raises(DataError, match="no position of these rows has a label"):
        evaluate_answers(model, [replace(batch, labels_BT=torch.full_like(batch.labels_BT, NO_LABEL))])


def test_a_run_has_the_tasks_length_and_no_curriculum():
    with pytest.raises(ConfigError, match=r"train\.block_size = 12: must be 64, the task's length"):
        replace(config_of(), data=DataConfig(source="task:mqar", tokenizer="names"))
    with pytest.raises(ConfigError, match=r"train\.curriculum = .*: a row of a task cannot be cut"):
        config_of(curriculum="6:0.5,12:inf")
