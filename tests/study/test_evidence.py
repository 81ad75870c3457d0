"""What a page shows beside the scores: the score by position, curves paired by seed, caches, steps timed in turns."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from swamla.data.packing import HeldOutRows
from swamla.data.task_rows import TaskDataset
from swamla.errors import UsageError
from swamla.evaluate import part_of, recall, validation
from swamla.interpret import induction, repeated_rows
from swamla.interpret.verdicts import induction_verdict
from swamla.model.accounting import state_bytes
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.ops.layout import Layout
from swamla.study.evidence import (
    Evidence,
    Measured,
    caches,
    curves,
    loss_by_position,
    measure_runs,
    peak_memory,
    read_measured,
    with_closing,
)
from swamla.study.runs import Outcome, seed_runs
from swamla.tasks import Examples, Task, examples
from swamla.train import speed
from tests.train.helpers import tiny_dataset

from .helpers import arm_of, study_of
from .played import of_task

LENGTH = 32


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    return tiny_dataset(tmp_path_factory.mktemp("texts"))


def model_of(name: str) -> LanguageModel:
    model = arm_of(name).config.model.build()
    model.reset_parameters(seed=3)
    return model.eval()


def test_losses_by_position_are_those_of_the_score(dataset) -> None:
    model, split = model_of("gdn"), part_of(dataset.held_out, "test", dataset.tokenizer.decode)
    found = loss_by_position(model, split, eos_id=dataset.tokenizer.eos_id, block_size=LENGTH)
    score = validation(dataset, LENGTH, part="test")(model)
    assert sum(found.tokens) == score["tokens"]
    total = sum(loss * tokens for loss, tokens in zip(found.loss, found.tokens, strict=True))
    assert total / sum(found.tokens) == pytest.approx(score["loss"], rel=1e-5)


def test_losses_by_position_count_what_of_the_document_a_row_has_before_them(dataset) -> None:
    model, split = model_of("mha"), part_of(dataset.held_out, "test", dataset.tokenizer.decode)
    losses: dict[int, list[float]] = {}
    for batch in HeldOutRows(split, LENGTH, dataset.tokenizer.eos_id).batches(1):
        read, before = 0, None
        with torch.no_grad():
            row_T = model.token_losses(batch.tokens_BT, batch.labels_BT, Layout.from_documents(batch.document_BT))[0]
        for at, document in enumerate(batch.document_BT[0].tolist()):
            read = read + 1 if document == before else 1
            before = document
            if batch.labels_BT[0, at] != NO_LABEL:
                losses.setdefault((read - 1).bit_length(), []).append(row_T[at].item())
    found = loss_by_position(model, split, eos_id=dataset.tokenizer.eos_id, block_size=LENGTH)
    assert found.last == tuple(2**power for power in sorted(losses))
    assert found.first == (1, 2, 3, 5, 9, 17)[: len(losses)]
    assert found.tokens == tuple(len(losses[power]) for power in sorted(losses))
    assert found.loss == pytest.approx([sum(losses[power]) / len(losses[power]) for power in sorted(losses)], rel=1e-5)


def outcome(arm: str, seed: int, status: str = "finished") -> Outcome:
    run = f"{arm}-lr0.01-seed{seed}"
    return Outcome(run=run, arm=arm, purpose="seed", rate=0, lr=0.01, seed=seed, status=status, wall=4.0)


def write_metrics(folder: Path, run: str, losses: list[float], memory: int = 0) -> None:
    where = folder / "runs" / run
    where.mkdir(parents=True)
    lines = [{"step": at, "loss": loss, "peak_memory": memory} for at, loss in enumerate(losses, 1)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": len(losses), "held_out_loss": 1.0}])
    (where / "metrics.jsonl").write_text(text)


def test_curves_are_means_over_spans_and_differences_are_paired_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swamla.study.evidence.POINTS", 10)  # of 20 steps: spans of two
    one = [5 - 0.1 * at for at in range(20)]
    write_metrics(tmp_path, "mha-lr0.01-seed1", one, 7)
    write_metrics(tmp_path, "mha-lr0.01-seed2", [loss + 1 for loss in one], 9)
    write_metrics(tmp_path, "gdn-lr0.01-seed1", [loss + 0.5 for loss in one])
    write_metrics(tmp_path, "gdn-lr0.01-seed3", [0.0] * 20)  # no partner: in no difference
    ones = [outcome("mha", 1), outcome("mha", 2), outcome("gdn", 1), outcome("gdn", 3), outcome("gdn", 4, "failed")]
    outcomes = {each.run: each for each in ones}
    mha, gdn = curves(tmp_path, study_of(seeds=3), outcomes)
    assert mha.tokens == [128 * (2 * at + 1) for at in range(10)]  # 4 rows of 32 tokens a step, at a span's middle
    means = [(one[2 * at] + one[2 * at + 1]) / 2 for at in range(10)]
    assert mha.loss[0] == pytest.approx([mean + 0.5 for mean in means])
    assert (mha.loss[1], mha.loss[2]) == (pytest.approx(means), pytest.approx([mean + 1 for mean in means]))
    assert mha.difference == ([], [], [])
    assert gdn.difference[0] == gdn.difference[1] == gdn.difference[2] == pytest.approx([0.5] * 10)
    assert peak_memory(tmp_path, outcomes) == {"mha": 9}


def test_seeds_at_a_rate_that_is_not_chosen_any_more_are_in_no_curve_and_not_measured(tmp_path: Path) -> None:
    scores = {-2: 3.0, -1: 2.5, 0: 2.0, 1: 2.4, 2: 2.8}
    rates = [
        replace(outcome("mha", 0), run=f"rate{rate}", purpose="rate", rate=rate, validation=score)
        for rate, score in scores.items()
    ]
    now, before = outcome("mha", 1), replace(outcome("mha", 1), run="z-of-a-rate-before", rate=1)
    outcomes = {one.run: one for one in (*rates, now, before)}
    write_metrics(tmp_path, now.run, [1.0] * 20)
    write_metrics(tmp_path, before.run, [9.0] * 20)
    lines = [json.dumps(asdict(Measured(run=one.run, arm="mha", seed=1))) + "\n" for one in (now, before)]
    (tmp_path / "measured.jsonl").write_text("".join(lines))
    found = Evidence.read(tmp_path, study_of(), outcomes)
    assert set(found.curves[0].loss[0]) == {1.0}
    assert [one.run for one in found.measured] == [now.run]
    assert list(seed_runs(study_of(), outcomes)) == [now.run]


def test_a_rest_of_steps_that_fills_no_span_is_no_point_of_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swamla.study.evidence.POINTS", 3)  # of 20 steps: spans of seven, and a rest of six
    write_metrics(tmp_path, "mha-lr0.01-seed1", [float(at) for at in range(1, 21)])
    (found,) = curves(tmp_path, study_of(), {"mha-lr0.01-seed1": outcome("mha", 1)})
    assert found.tokens == [3.5 * 128, 10.5 * 128]
    assert found.loss[0] == [4.0, 11.0], "the mean step of a span, whose middle is half a step before it"


def test_caches_are_those_of_the_accounting_and_end_where_positions_do() -> None:
    study = study_of()
    short = replace(study.arms[1].config.model, learned_positions=256)
    arms = (study.arms[0], replace(study.arms[1], config=replace(study.arms[1].config, model=short)))
    found = caches(replace(study, arms=arms))
    assert max(found["mha"]) == 32768
    assert max(found["gdn"]) == 256
    assert found["mha"][2048] == state_bytes(arms[0].config.model, 2048, element_bytes=4) == 2 * 2048 * 32 * 4


def test_steps_are_timed_in_turns_behind_one_of_each_that_is_not_and_no_random_number_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    def step_of(config, dataset):
        def step() -> None:
            torch.rand(3)
            done.append(config)

        return step

    monkeypatch.setattr(speed, "_step_of", step_of)
    before = torch.random.get_rng_state()
    found = speed.step_seconds({"a": "A", "b": "B"}, None, rounds=3, seconds=1e9)
    assert done == ["A", "B"] * 4
    assert {name: len(each) for name, each in found.items()} == {"a": 3, "b": 3}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(speed.step_seconds({"a": "A"}, None, rounds=3, seconds=0.0)["a"]) == 1


def test_closing_is_that_of_one_run_times_all_seeds_and_arms_slower_ones_longer_and_the_test_part_is_not_read(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[str] = []
    monkeypatch.setattr("swamla.study.evidence.as_trained", lambda *_: (model_of("mha"), "fp32"))
    monkeypatch.setattr("swamla.study.evidence.part_of", lambda split, part, _: parts.append(part) or split)
    monkeypatch.setattr("swamla.study.evidence.validation", lambda *_, part: parts.append(part) or (lambda model: {}))
    clock = iter([100.0, 102.0])
    monkeypatch.setattr("swamla.study.evidence.time.monotonic", lambda: next(clock))
    study = study_of(seeds=3)
    slower = (study.arms[0], replace(study.arms[1], seconds_per_step=2.5 * study.arms[0].seconds_per_step))
    study = replace(study, arms=slower)
    found = with_closing(study, dataset, tmp_path).closing_seconds
    timing = 20 * 3.5 * study.arms[0].seconds_per_step  # twenty rounds of steps, and generation takes 20 s at most
    assert found == pytest.approx(2.0 * 3 + 2.0 * 2.5 * 3 + timing + 20, abs=0.05)
    assert set(parts) == {"validation"}


def test_closing_of_a_task_draws_no_test_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, seeds = of_task(study_of()), set()
    task = study.task
    assert task is not None

    def seen(task: Task, seed: int, indices: range, **held_out: bool) -> Examples:
        seeds.add(seed)
        return examples(task, seed, indices, **held_out)

    for module in ("swamla.evaluate.recall_grid", "swamla.data.task_rows"):
        monkeypatch.setattr(f"{module}.examples", seen)
    model = replace(arm_of("mha").config.model, vocab_size=task.vocab_size).build()
    model.reset_parameters(seed=3)
    monkeypatch.setattr("swamla.study.evidence.as_trained", lambda *_: (model.eval(), "fp32"))
    assert with_closing(study, TaskDataset(task), tmp_path).closing_seconds > 0
    assert seeds == {0}
    list(TaskDataset(task).held_out_rows(8, 8, test=True))
    recall(model, task, rows=4)
    assert seeds == {0, 1}, "the seed of test rows"


def test_a_model_whose_attention_cannot_be_told_is_measured_but_for_that(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model, tokens_BT):
        assert 9 <= tokens_BT.shape[1] <= LENGTH, "as long as the rows of training at most"
        raise UsageError("mixer 'x' has no explain")

    monkeypatch.setattr("swamla.study.evidence.induction", refused)
    monkeypatch.setattr("swamla.study.evidence.load_run", lambda *_: (model_of("mha"), "fp32"))
    one = outcome("mha", 1)
    (found,) = measure_runs(tmp_path, study_of(), {one.run: one}, dataset)
    assert (found.repeats, found.why) == (None, "mixer 'x' has no explain")
    assert sum(found.positions.tokens) > 0
    monkeypatch.setattr("swamla.study.evidence.load_run", lambda *_: pytest.fail("measured again"))
    assert measure_runs(tmp_path, study_of(), {one.run: one}, dataset) == [found]


def test_what_was_measured_before_there_were_hits_of_convolved_values_can_be_read_still(tmp_path: Path) -> None:
    """And what is measured now is read as it was written."""
    model = model_of("gdn")
    repeats = replace(induction(model, repeated_rows(range(20), None, length=6, rows=2)), other=None)
    now = Measured(run="one", arm="gdn", seed=1, repeats=repeats, length=6, rows=2)
    line = asdict(now)
    (tmp_path / "measured.jsonl").write_text(json.dumps(line) + "\n")
    assert read_measured(tmp_path) == [now]
    for name in ("predictions", "interval", "other"):
        del line["repeats"][name]
    for layer in line["repeats"]["layers"]:
        del layer["hit_conv"]
    (tmp_path / "measured.jsonl").write_text(json.dumps(line) + "\n")
    layers = tuple(replace(layer, hit_conv=()) for layer in repeats.layers)
    before = replace(repeats, predictions=0, interval=None, layers=layers)
    assert read_measured(tmp_path) == [replace(now, repeats=before)]
    assert induction_verdict(before).text.startswith(f"No induction: accuracy {before.accuracy:g}, second copy ")
