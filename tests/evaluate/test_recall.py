"""Recall: answers are those of decoding, intervals hold their level, bytes are those of a live state."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy.stats import binomtest
from torch import Tensor

from swamla.data.task_rows import TaskDataset
from swamla.errors import ConfigError, UsageError, require
from swamla.evaluate import Recall, recall, validation
from swamla.evaluate.recall_figure import draw_recall
from swamla.evaluate.recall_grid import SEED, Score, grid, right_answers, steps_to
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.shares import independent_trials, wilson
from swamla.tasks import Draws, Example, Task, examples
from swamla.tasks.induction import Induction
from swamla.tasks.mqar import MQAR
from swamla.train.tracking.metrics import read_metrics
from tests.model.helpers import MIXERS, build_model, hybrid_config, random_tokens
from tests.train.helpers import run, tiny_config, tiny_dataset

LENGTH = 23


def asked(tokens_BT: Tensor, seed: int = 5) -> Tensor:
    """Random labels at about a third of the tokens, at a different number of them in each row."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(31, tokens_BT.shape, generator=generator)
    return labels.where(torch.rand(tokens_BT.shape, generator=generator) < 0.35, torch.tensor(NO_LABEL))


@torch.no_grad()
def decoded(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    """The id with the largest logit after each token, one token at a time through the state."""
    state = model.init_state(len(tokens_BT), tokens_BT.shape[1])
    steps = [model.step(tokens_BT[:, t : t + 1], state) for t in range(tokens_BT.shape[1])]
    return torch.cat(steps, dim=1).argmax(dim=-1)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_answers_of_a_forward_pass_are_those_of_decoding_token_by_token(mixer: str) -> None:
    model = build_model(hybrid_config(pattern=(mixer, mixer))).double().eval()
    tokens = random_tokens(6, LENGTH)
    found, labels = decoded(model, tokens), asked(tokens)
    labels[::2] = labels[::2].where(labels[::2] == NO_LABEL, found[::2])  # half of the rows are what the model says
    right = right_answers(model, tokens, labels)
    assert torch.equal(right, (found == labels) & (labels != NO_LABEL))
    assert 0 < int(right.sum()) < int((labels != NO_LABEL).sum())


def test_many_queries_are_answered_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build_model(hybrid_config()).double().eval(), random_tokens(6, LENGTH)
    labels = decoded(model, tokens)
    labels[2:, ::3] = NO_LABEL
    whole = right_answers(model, tokens, labels)
    monkeypatch.setattr("swamla.evaluate.recall_grid.LOGITS_AT_ONCE", 7)
    assert torch.equal(right_answers(model, tokens, labels), whole)
    assert torch.equal(whole, labels != NO_LABEL)


@pytest.mark.parametrize("trials", [1, 3, 40, 5000])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_the_interval_is_scipys(trials: int, level: float) -> None:
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        found = wilson(successes, trials, level)
        assert (found[0] == 0, found[1] == 1) == (successes == 0, successes == trials)
        expected = binomtest(successes, trials).proportion_ci(level, method="wilson")
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("within_row", [0.0, 0.5, 1.0], ids=["independent", "alike", "all or nothing"])
@pytest.mark.parametrize("accuracy", [0.1, 0.5, 0.93])
def test_intervals_hold_the_truth_however_queries_of_a_row_depend(within_row: float, accuracy: float) -> None:
    rng, held, studies = np.random.default_rng(0), 0, 400
    for _ in range(studies):
        own_B = rng.random((100, 1)) < accuracy  # the row's common fate, which a query shares with this probability
        right_BQ = np.where(rng.random((100, 8)) < within_row, own_B, rng.random((100, 8)) < accuracy)
        right_B = right_BQ.sum(1).tolist()
        trials = independent_trials(right_B, [8] * 100)
        low, high = wilson(right_BQ.mean() * trials, trials)
        held += low <= accuracy <= high
    assert held / studies == pytest.approx(0.95, abs=0.03)


def test_independent_trials_are_the_queries_or_the_rows() -> None:
    assert independent_trials([4] * 30, [8] * 30) == 240  # rows that are more alike than chance say no more than chance
    assert independent_trials([8, 0] * 30, [8] * 60) == pytest.approx(60, rel=0.02)
    assert independent_trials([8] * 60, [8] * 60) == independent_trials([0] * 60, [8] * 60) == 60
    assert independent_trials([3], [8]) == 1


def test_the_answers_of_rows_are_counted() -> None:
    labels = torch.full((3, 5), NO_LABEL)
    labels[0, :4], labels[1, 2] = 7, 7
    right = torch.zeros(3, 5, dtype=torch.bool)
    right[0, 1:3] = True
    found = Score.of(right, labels)
    assert (found.right, found.queries, found.rows, found.accuracy) == (2, 5, 3, 0.4)
    low, high = found.interval
    assert low < 0.4 < high


def test_steps_to_an_accuracy_are_those_of_the_first_evaluation_that_has_it() -> None:
    records = [
        {"step": 10, "loss": 1.0},
        {"step": 10, "held_out_accuracy": 0.5},
        {"step": 20, "held_out_accuracy": None},
        {"step": 30, "held_out_accuracy": 0.99},
        {"step": 40, "held_out_accuracy": 1.0},
    ]
    assert steps_to(records) == 30
    assert steps_to(records, 0.3) == 10
    assert steps_to(records[:3]) is None


@dataclass(frozen=True, kw_only=True)
class Echo(Task):
    """Random ids, every third of which asks for the one before it."""

    kind: ClassVar[str] = "echo"
    length: int = 12
    vocabulary: int = 31

    def __post_init__(self) -> None:
        require(self.length > 2, "length", self.length, "must be > 2, e.g. 12")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def names(self) -> Sequence[str]:
        return [f"e{n}" for n in range(self.vocabulary)]

    def draw(self, random: Draws) -> Example:
        tokens = random.below(self.vocabulary, self.length)
        labels = np.full(self.length, NO_LABEL)
        labels[2::3] = tokens[1:-1:3]
        return Example(tokens, labels)


@pytest.mark.parametrize("rows", [1, 50])
def test_recall_is_the_share_of_held_out_queries_that_decoding_answers(rows: int) -> None:
    model, task = build_model(hybrid_config()).double().eval(), Echo()
    held_out = examples(task, 3, range(rows), held_out=True)
    asked_BT = held_out.labels_BT != NO_LABEL
    right = int(((decoded(model, held_out.tokens_BT) == held_out.labels_BT) & asked_BT).sum())
    shares: list[float] = []
    found = recall(model, task, rows=rows, seed=3, progress=shares.append)
    assert (found.score.right, found.score.queries, found.score.rows) == (right, int(asked_BT.sum()), rows)
    assert shares[-1] == 1
    assert shares == sorted(shares)


def test_a_model_that_trains_is_scored_without_dropout_and_trains_on() -> None:
    config = replace(hybrid_config(), dropout=0.5)
    model = build_model(config).double().eval()
    expected = recall(model, Echo(), rows=40)
    model.train()
    assert recall(model, Echo(), rows=40) == expected
    assert model.training


def test_equal_rows_count_once() -> None:
    model, task = build_model(hybrid_config()).double().eval(), Echo(length=3, vocabulary=10)
    rows = {tuple(row.tolist()) for row in examples(task, SEED, range(400), held_out=True).tokens_BT}
    found = recall(model, task, rows=400).score
    assert (found.rows, found.queries) == (len(rows), len(rows))
    assert len(rows) < 100


def test_the_rows_of_an_evaluation_in_training_give_its_accuracy_and_are_others_by_default() -> None:
    task = MQAR(length=16, pairs=2, vocabulary=30)
    model = build_model(hybrid_config()).double().eval()
    expected = validation(TaskDataset(task), 16, max_tokens=16 * 50)(model)
    found = recall(model, task, rows=50, seed=0).score
    assert (found.accuracy, found.queries) == (expected["accuracy"], expected["tokens"])
    evaluated, scored = (examples(task, seed, range(50), held_out=True).tokens_BT.tolist() for seed in (0, SEED))
    assert not any(row in evaluated for row in scored)


def test_recall_does_not_depend_on_how_many_rows_a_forward_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(hybrid_config()).double().eval()
    whole = recall(model, Echo(), rows=20)
    monkeypatch.setattr("swamla.evaluate.recall_grid.EVALUATION_TOKENS", 40)
    assert recall(model, Echo(), rows=20) == whole


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_bytes_are_those_of_the_live_state_after_a_row_of_that_length(mixer: str) -> None:
    config = replace(hybrid_config(pattern=(mixer, "mha")), ngram_buckets=())
    model = build_model(config).eval()
    for length in (12, 40):
        state = model.init_state(1, length)
        with torch.no_grad():
            model.step(random_tokens(1, length), state)
        assert recall(model, Echo(length=length), rows=2).state_bytes == sum(t.nbytes for t in state.tensors())


def test_a_model_in_which_the_answer_stands_is_always_right_and_its_opposite_never() -> None:
    config = replace(hybrid_config(pattern=("mha",)), ngram_buckets=(), logit_cap=0.0)
    model = build_model(config).eval()
    tokens = examples(Echo(), 0, range(8), held_out=True).tokens_BT
    with torch.no_grad():  # what a token is predicted to be followed by is itself: an embedding that is its own head
        for block in model.blocks:
            block.mixer.o_proj.weight.zero_()
            for parameter in block.ffn.parameters():
                parameter.zero_()
        model.embedding.weight.copy_(torch.randn(31, config.width, generator=torch.Generator().manual_seed(0)))
        model.head.weight = torch.nn.Parameter(model.embedding.weight.clone())
        model.norm.weight.fill_(1)
    assert bool(right_answers(model, tokens, tokens).all())
    assert not bool(right_answers(model, tokens, (tokens + 1) % 31).any())
    model.known_ids = 5  # an id that is never generated is never an answer
    assert torch.equal(right_answers(model, tokens, tokens), tokens < 5)


def test_what_does_not_fit_a_model_is_told_in_one_line() -> None:
    config = replace(hybrid_config(pattern=("mha",)), learned_positions=16)
    model = build_model(config).eval()
    for task, message in (
        (Echo(vocabulary=32), "has 32 ids, and the model knows 31: at most these fit"),
        (Echo(length=17), "has rows of 17 tokens, and the model 16 learned positions: at most so many tokens fit"),
    ):
        with pytest.raises(UsageError, match=message):
            recall(model, task)
    model.known_ids = 30
    with pytest.raises(UsageError, match="the model knows 30"):
        recall(model, Echo())
    with pytest.raises(ConfigError, match="rows = 0: must be > 0"):
        recall(model, Echo(), rows=0)


def test_a_grid_has_each_combination_in_order_or_why_it_cannot_be() -> None:
    found = list(grid(MQAR(power=0.5), {"pairs": [4, "8"], "length": [16, 32]}))
    assert [found[i] for i in (0, 1, 3)] == [
        MQAR(power=0.5, pairs=pairs, length=length) for pairs, length in ((4, 16), (4, 32), (8, 32))
    ]
    assert isinstance(found[2], ConfigError)
    assert list(grid(MQAR(), {})) == [MQAR()]


def shown(*, runs: int = 1, **sizes: list[int]) -> tuple[dict[str, list[Recall]], list[str]]:
    """Cells of a grid with made-up scores, for pictures."""
    tasks = [task for task in grid(MQAR(), sizes) if isinstance(task, MQAR)]
    score = Score(right=30, queries=60, rows=10, trials=50)
    found = {
        f"_run{n}": [Recall(task=task, score=score, state_bytes=64 * task.length << n) for task in tasks]
        for n in range(runs)
    }
    return found, [name for name, values in sizes.items() if len(values) > 1]


@pytest.mark.parametrize(
    ("runs", "sizes", "maps"),
    [
        (1, {"pairs": [2, 4], "length": [32, 64, 128]}, 1),
        (1, {"pairs": [2, 4, 16], "length": [32, 64]}, 1),  # a cell is missing
        (1, {}, 0),
        (3, {"pairs": [2, 4], "length": [32, 64]}, 0),
        (2, {"pairs": list(range(1, 13))}, 0),
    ],
)
def test_a_picture_has_a_point_for_each_cell_and_a_map_of_two_sizes_of_one_run(
    runs: int, sizes: dict[str, list[int]], maps: int, tmp_path: Path
) -> None:
    found, swept = shown(runs=runs, **sizes)
    figure = draw_recall(found, swept, title="mqar")
    points, *others = figure.axes
    places = sorted((float(c[0].get_xdata()[0]), float(c[0].get_ydata()[0])) for c in points.containers)
    assert places == sorted((one.state_bytes, 0.5) for cells in found.values() for one in cells)
    assert points.get_xscale() == "log"
    told = [text.get_text().strip() for text in points.get_legend().get_texts()]
    assert set(found) <= set(told)
    maps_drawn = [axes for axes in others if axes.images]
    assert len(maps_drawn) == maps
    for axes in maps_drawn:
        assert axes.get_xlabel() == "length"
        cells = [text.get_text() for text in axes.texts]
        assert cells.count("0.50") == len(found["_run0"])
        assert len(cells) == len(sizes["pairs"]) * len(sizes["length"])
    figure.savefig(tmp_path / "recall.png")
    assert imread(tmp_path / "recall.png").shape[0] > 100


def test_recall_at_each_evaluation_of_a_run_on_text_is_in_its_metrics(tmp_path: Path) -> None:
    dataset, task = tiny_dataset(tmp_path), Induction(length=9, prefix=1, shortest=2, longest=4, vocabulary=100)
    found: list[float] = []

    def evaluate(model: LanguageModel) -> dict[str, float]:
        found.append(recall(model, task, rows=20).score.accuracy)
        return validation(dataset, 32)(model) | {"induction": found[-1]}

    run(tiny_config(steps=4, eval_interval=2), tmp_path / "run", dataset, evaluate=evaluate)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["held_out_induction"] for r in records if "held_out_induction" in r] == found
    assert len(found) == 2
    assert steps_to(records, min(found), key="held_out_induction") == 2
    assert steps_to(records, 1.1, key="held_out_induction") is None
