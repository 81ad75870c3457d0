"""The contract of every task, over the registry. What the rows mean is held in test_answers.py."""

import hashlib
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from swamla.data.packing import NO_LABEL
from swamla.errors import ConfigError, UsageError
from swamla.registry import members_of
from swamla.tasks import HELD_OUT, IGNORED, Draws, Task, examples, is_held_out, parse
from tests.toys import plugged

KINDS = sorted({*members_of(Task), *plugged(Task)})  # with those of $SWAMLA_TEST_PLUGINS


def task_of(kind: str) -> Task:
    return cast(Task, members_of(Task)[kind].example())


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a.tokens_T, b.tokens_T) and np.array_equal(a.labels_T, b.labels_T))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_length_and_ids_that_the_task_says(kind: str) -> None:
    task = task_of(kind)
    rows = examples(task, 0, range(200))
    assert rows.tokens_BT.shape == rows.labels_BT.shape == (200, task.length)
    assert rows.tokens_BT.dtype == rows.labels_BT.dtype == torch.int64
    asked = rows.labels_BT != IGNORED
    assert asked.any(1).all()
    for ids in (rows.tokens_BT, rows.labels_BT[asked]):
        assert ids.min() >= 0
        assert ids.max() < task.vocab_size
    for row in range(5):
        query_Q = task.row(0, row).query_Q
        assert np.array_equal(query_Q, np.flatnonzero(asked[row].numpy()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_has_a_name_of_its_own_without_spaces(kind: str) -> None:
    task = task_of(kind)
    names = list(task.names())
    assert len(names) == len(set(names)) == task.vocab_size
    assert all(name and "".join(name.split()) == name for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_row_depends_on_seed_and_index_alone_in_any_order_and_batch(kind: str, held_out: bool) -> None:
    task, indices = task_of(kind), [7, 3, 11, 3, 1 << 40]
    whole = examples(task, 5, indices, held_out=held_out)
    for place, index in reversed(list(enumerate(indices))):
        alone = examples(task_of(kind), 5, [index], held_out=held_out)
        assert torch.equal(alone.tokens_BT[0], whole.tokens_BT[place])
        assert torch.equal(alone.labels_BT[0], whole.labels_BT[place])
    assert len({examples(task, seed, [3]).tokens_BT.numpy().tobytes() for seed in range(5)}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_equal_text_are_all_for_training_or_all_held_out(kind: str) -> None:
    task = task_of(kind)
    sides = [
        {task.row(seed, index, held_out=held_out).tokens_T.tobytes() for seed in (0, 1) for index in range(150)}
        for held_out in (False, True)
    ]
    assert all(len(side) > 1 for side in sides)
    assert not sides[0] & sides[1]
    assert all(is_held_out(np.frombuffer(row, np.int64)) for row in sides[1])


def test_small_tasks_have_no_row_on_both_sides_though_rows_come_again() -> None:
    task = parse("state_tracking?group=parity&length=8")  # 256 different rows
    train, held_out = (
        {tuple(row) for row in examples(task, 0, range(3000), held_out=out).tokens_BT.tolist()} for out in (False, True)
    )
    assert len(train | held_out) == 256
    assert not train & held_out


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_of_twenty_is_held_out(kind: str) -> None:
    task = task_of(kind)
    count = 4000
    held_out = sum(is_held_out(task.draw(Draws(9, index)).tokens_T) for index in range(count))
    assert abs(held_out / count - HELD_OUT) < 5 * (HELD_OUT * (1 - HELD_OUT) / count) ** 0.5


def test_the_side_of_a_row_is_said_by_the_sha_256_of_its_ids() -> None:
    for row in (np.arange(5), np.array([3, 1, 4, 1, 5, 9, 2, 6])):
        number = int(hashlib.sha256(b"".join(int(i).to_bytes(8, "little") for i in row)).hexdigest()[:16], 16)
        first = int.from_bytes(number.to_bytes(8, "big"), "little")
        assert is_held_out(row) == (first < 2**64 / 20)
        assert is_held_out(row.astype(np.int32)) == is_held_out(row)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_spelled_in_one_line_and_read_back(kind: str) -> None:
    task = task_of(kind)
    assert parse(str(task)) == parse(f"task:{task}") == parse(kind) == task
    longer = replace(task, length=2 * task.length)
    assert parse(f"{kind}?length={longer.length}") == longer != task


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_changes_the_rows(kind: str) -> None:
    task = task_of(kind)
    other: dict[str, Any] = {"group": "s5", "moves": "swaps", "power": 0.1, "depth": 5, "n": 2}
    other |= {"longest": 20, "prefix": 8, "filler": "any"}
    for field in fields(task):
        value = other.get(field.name) or getattr(task, field.name) + 2
        changed = replace(task, **{field.name: value})
        rows = [examples(each, 0, range(20)).tokens_BT for each in (task, changed)]
        assert rows[0].shape != rows[1].shape or not torch.equal(*rows), field.name


REFUSED = {
    "copy": ["length=7", "length=2", "vocabulary=2"],
    "dyck": ["brackets=1", "depth=0", "length=8&depth=8"],
    "induction": [
        "prefix=-1",
        "shortest=1",
        "longest=8&shortest=8",
        "length=63",
        "vocabulary=39",
        "pieces=1",
        "pieces=8",
        "pieces=-2",
    ],
    "mqar": [
        "pairs=0",
        "length=65",
        "length=30",
        "vocabulary=16",
        "vocabulary=129",
        "power=0",
        "power=1.5",
        "filler=values",
    ],
    "needle": ["depth=10", "depth=-2", "digits=0", "needles=0", "needles=17", "length=89"],
    "ngram": ["n=1", "run=2", "length=24", "vocabulary=2", "vocabulary=20", "n=5"],
    "palindrome": ["length=7", "length=2", "vocabulary=2"],
    "selective_copy": ["symbols=0", "length=16", "vocabulary=3"],
    "state_tracking": ["length=1", "group=s4", "moves=some", "group=parity&moves=swaps"],
}


def test_every_task_is_tried_with_sizes_out_of_range() -> None:
    assert {kind for kind in KINDS if members_of(Task)[kind].__module__.startswith("swamla.")} == REFUSED.keys()


@pytest.mark.parametrize("spec", [f"{kind}?{query}" for kind, queries in REFUSED.items() for query in queries])
def test_a_size_out_of_range_is_refused_in_one_line(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"task:{spec}")
    message = str(caught.value)
    assert "\n" not in message
    assert f"(task:{spec})" in message
    assert "must be" in message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mqra", r"^mqra: no task is called 'mqra'; did you mean \"mqar\"\?$"),
        ("task:", r"no task is called ''; there are: copy, "),
        ("mqar?pears=8", r'pears = .8. \(mqar\?pears=8\): no such setting; did you mean "pairs"\?'),
        ("mqar?pairs=many", r"pairs = 'many' \(.*\): must be a whole number"),
        ("mqar?pairs=2.5", r"pairs = 2\.5 \(.*\): must be a whole number"),
        ("mqar?pairs=nan", r"pairs = nan \(.*\): must be a whole number"),
        ("mqar?pairs", r"'pairs' is no size: sizes are written as in task:mqar\?pairs=8&length=64"),
        ("mqar?pairs=8&", r"'' is no size"),
        ("mqar?pairs=8&pairs=8", r"pairs is given twice"),
    ],
)
def test_what_is_no_task_is_refused_with_what_there_is(spec: str, message: str) -> None:
    with pytest.raises((UsageError, ConfigError), match=message):
        parse(spec)


def test_negative_seeds_and_indices_are_refused() -> None:
    for seed, index in ((-1, 0), (0, -1), (1 << 63, 0)):
        with pytest.raises(ConfigError, match="must be >= 0"):
            parse("mqar").row(seed, index)


def test_a_task_with_too_few_rows_to_hold_any_out_says_so() -> None:
    task = parse("state_tracking?group=parity&length=2")  # four rows
    with pytest.raises(UsageError, match=r"length=2.*too few different rows for held-out ones: raise its length"):
        task.row(0, 0, held_out=True)


def test_no_label_is_the_one_of_batches() -> None:
    assert IGNORED == NO_LABEL


def test_random_numbers_are_the_ones_they_were() -> None:
    """A change here changes every row of every run."""
    random = Draws(1, 2, 3)
    assert random.below(1000, 4).tolist() == [765, 30, 526, 943]
    assert random.distinct(10, 4).tolist() == [9, 1, 8, 3]
