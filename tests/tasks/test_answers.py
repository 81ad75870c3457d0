"""Every answer can be derived from what stands before it: by solvers that know the rules and nothing of the generators.

And what a row has at random is as random as it says: chi-square of fixed seeds, bounded at 10⁻⁶.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from swamla.registry import members_of
from swamla.tasks import Example, Task, parse

Solver = Callable[[list[str]], dict[int, str]]
"""From the names of a row's tokens to the answers by their positions."""


def pairs_solver(words: list[str]) -> dict[int, str]:
    """A key's value follows it; a key that was there with its value asks for that."""
    value, answers = dict[str, str](), {}
    for t, word in enumerate(words):
        follows = words[t + 1] if t + 1 < len(words) else ""
        if word[0] == "k" and follows[:1] == "v":
            value[word] = follows
        elif word in value:
            answers[t] = value[word]
    return answers


def copy_solver(words: list[str]) -> dict[int, str]:
    return after_the_bar(words, lambda before: before)


def palindrome_solver(words: list[str]) -> dict[int, str]:
    return after_the_bar(words, lambda before: before[::-1])


def selective_solver(words: list[str]) -> dict[int, str]:
    return after_the_bar(words, lambda before: [word for word in before if word != "_"])


def after_the_bar(words: list[str], answer: Callable[[list[str]], list[str]]) -> dict[int, str]:
    bar = words.index("|")
    return {bar + n: word for n, word in enumerate(answer(words[:bar]))}


def induction_solver(words: list[str]) -> dict[int, str]:
    """What followed the same token before, the last time."""
    latest = dict[str, int]()
    answers = {}
    for t, word in enumerate(words):
        if word in latest:
            answers[t] = words[latest[word] + 1]
        latest[word] = t
    return answers


def dyck_solver(words: list[str]) -> dict[int, str]:
    """By removing matched pairs from the text so far. The kind of bracket that comes is given by the next token."""
    answers = {}
    for t in range(len(words)):
        text, before = "".join(words[: t + 1]), None
        while text != before:
            before, text = text, re.sub(r"\((\d+)\)\1(?!\d)", "", text)
        assert ")" not in text, "closed, but not open"
        if text:
            answers[t] = ")" + text.rpartition("(")[2]
    return answers


def ngram_solver(words: list[str], n: int = 3) -> dict[int, str]:
    """By looking for the same n − 1 tokens before."""
    answers = dict[int, str]()
    for t in range(n - 2, len(words)):
        context = words[t - n + 2 : t + 1]
        followers = {
            words[s + n - 1]
            for s in range(t - n + 2)
            if words[s : s + n - 1] == context and "." not in words[s : s + n]
        }
        assert len(followers) <= 1, "two answers"
        if followers:
            answers[t] = followers.pop()
    return answers


def needle_solver(words: list[str]) -> dict[int, str]:
    text = " ".join(words)
    person = re.search(r"what is the code of (\w+) \?", text)
    assert person is not None
    (code,) = re.findall(rf"the code of {person[1]} is ((?:\d )+)\.", text)
    asked = words.index("?")
    return {asked + n: digit for n, digit in enumerate(code.split())}


def state_solver(words: list[str]) -> dict[int, str]:
    """By moving things: the permutation 231 puts a 2 where a 1 was."""
    if {"0", "1"} >= set(words):
        return {t: str(sum(map(int, words[: t + 1])) % 2) for t in range(len(words))}
    state, answers = sorted(words[0]), {}
    for t, word in enumerate(words):
        state = [word[int(thing) - 1] for thing in state]
        answers[t] = "".join(state)
    return answers


SOLVERS: dict[str, Solver] = {
    "copy": copy_solver,
    "dyck": dyck_solver,
    "induction": induction_solver,
    "mqar": pairs_solver,
    "needle": needle_solver,
    "ngram": ngram_solver,
    "palindrome": palindrome_solver,
    "selective_copy": selective_solver,
    "state_tracking": state_solver,
}
SPECS = [
    *SOLVERS,
    "copy?length=16&vocabulary=3",
    "dyck?length=200&brackets=12&depth=3",
    "dyck?depth=1&length=24",
    "induction?prefix=5&shortest=2&longest=3&length=20&vocabulary=30",
    "induction?prefix=0",
    "induction?pieces=6",
    "induction?pieces=2&prefix=3&shortest=3&longest=5&length=30&vocabulary=9",
    "mqar?pairs=32&length=128&vocabulary=256",
    "mqar?pairs=8&power=0.01",
    "mqar?pairs=8&filler=any",
    "mqar?pairs=16&filler=any",
    "mqar?pairs=63&length=300",
    "needle?needles=16&length=400&digits=5",
    "needle?depth=0",
    "needle?depth=9&needles=4&length=160",
    "ngram?run=3&vocabulary=5&length=40",
    "palindrome?length=6",
    "selective_copy?symbols=31",
    "state_tracking?group=parity",
    "state_tracking?group=s5&length=32",
    "state_tracking?moves=swaps",
    "state_tracking?group=s5&moves=swaps",
]


def rows_of(spec: str, count: int, seed: int = 0) -> Iterator[tuple[list[str], dict[int, str]]]:
    """The names of each row's tokens, and of its labels by position."""
    task = parse(spec)
    names = task.names()
    for index in range(count):
        row = task.row(seed, index, held_out=index % 8 == 0)
        labels = {int(t): names[row.labels_T[t]] for t in row.query_Q}
        yield [names[i] for i in row.tokens_T], labels


def test_every_task_has_a_solver() -> None:
    assert {kind for kind, cls in members_of(Task).items() if cls.__module__.startswith("swamla.")} == SOLVERS.keys()


@pytest.mark.parametrize("spec", SPECS)
def test_every_answer_is_derived_by_a_solver_from_the_tokens_up_to_it(spec: str) -> None:
    solver = SOLVERS[spec.partition("?")[0]]
    for words, labels in rows_of(spec, 60):
        derived = solver(words)
        assert {t: derived[t] for t in labels} == labels
        for t in list(labels)[:: max(1, len(labels) // 4)]:  # nothing after the position is needed
            assert solver(words[: t + 1])[t] == labels[t]


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if not spec.startswith(("dyck", "ngram", "mqar")) and "pieces" not in spec]
)
def test_all_that_can_be_answered_is_asked(spec: str) -> None:
    solver = SOLVERS[spec.partition("?")[0]]
    for words, labels in rows_of(spec, 20):
        assert solver(words).keys() == labels.keys()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.startswith("dyck")])
def test_every_closing_bracket_is_asked_for_and_no_more_are_open_than_allowed(spec: str) -> None:
    depth = getattr(parse(spec), "depth")  # noqa: B009
    deepest = 0
    for words, labels in rows_of(spec, 60):
        coming = {t for t in range(len(words) - 1) if words[t + 1][0] == ")"}
        assert coming <= labels.keys() <= coming | {len(words) - 1}
        opened = np.cumsum([1 if word[0] == "(" else -1 for word in words])
        assert opened.min() >= 0
        assert opened.max() <= depth
        deepest = max(deepest, int(opened.max()))
    assert deepest == depth


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.startswith("ngram")])
def test_all_of_an_ngram_seen_before_is_asked_but_at_the_end_of_a_run(spec: str) -> None:
    for words, labels in rows_of(spec, 30):
        answerable = ngram_solver(words)
        ends = {t for t in range(len(words)) if t == len(words) - 1 or words[t + 1] == "."}
        assert answerable.keys() - ends <= labels.keys() <= answerable.keys()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.startswith("mqar")])
def test_each_key_is_asked_once_and_no_pair_is_overwritten(spec: str) -> None:
    pairs, filler = (getattr(parse(spec), name) for name in ("pairs", "filler"))
    for words, labels in rows_of(spec, 60):
        keys, values = words[0 : 2 * pairs : 2], words[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert Counter(words[t] for t in labels) == Counter(keys)
        assert {words[t]: label for t, label in labels.items()} == dict(zip(keys, values, strict=True))
        assert min(labels) >= 2 * pairs
        after = words[2 * pairs :]
        assert sum(word in keys for word in after) == pairs  # no key of the row but those that are asked
        assert not set(after) & set(values)
        assert all(word[0] == "k" for asked, word in pairwise(after) if asked in keys)  # none is bound again
        assert filler == "any" or all(word[0] == "k" for word in after)


def test_mqar_has_any_ids_of_no_pair_between_its_queries_if_told_so() -> None:
    """All that may stand there, equally often, but after a query."""
    task = parse("mqar?pairs=1&length=16&vocabulary=16&filler=any")
    seen = []
    for index in range(ROWS):
        tokens_T, query = (row := task.row(0, index)).tokens_T, int(row.query_Q[0])
        at = next(t for t in range(2, 16) if t not in (query, query + 1))
        pair = sorted(int(i) for i in tokens_T[:2])
        seen.append(int(tokens_T[at]) - sum(tokens_T[at] > i for i in pair))  # its number among the ids of no pair
    uniform(seen, 14)


def fits(counts: Any, shares: Any) -> bool:
    """Whether chi-square is below a bound that it exceeds with probability < 10⁻⁶ (Laurent and Massart, 2000)."""
    expected, free, x = np.sum(counts) * np.asarray(shares), len(counts) - 1, -np.log(1e-6)
    return bool(np.sum((counts - expected) ** 2 / expected) < free + 2 * np.sqrt(free * x) + 2 * x)


def uniform(observed: Any, among: int) -> None:
    """What was observed is uniform over 0 … among − 1."""
    counts = np.bincount(np.asarray(list(observed)), minlength=among)
    assert len(counts) == among
    assert fits(counts, np.full(among, 1 / among)), counts


ROWS = 3000


def test_mqar_has_uniform_keys_values_and_filler() -> None:
    task = parse("mqar?pairs=4&length=32&vocabulary=32")
    rows = [task.row(0, index) for index in range(ROWS)]
    uniform((row.tokens_T[0] for row in rows), 16)
    uniform((row.tokens_T[7] - 16 for row in rows), 16)
    uniform((i for row in rows for i in np.delete(row.tokens_T[8:], row.query_Q - 8)[:1]), 16)
    uniform((list(row.tokens_T[:8:2]).index(row.tokens_T[row.query_Q[0]]) for row in rows), 4)  # which is asked first


def test_mqar_asks_soon_after_the_pairs_or_anywhere_as_its_power_says() -> None:
    """The first of zoology's distances, d ∝ d^(power − 1); for one pair exactly that distribution."""
    for power in (0.01, 0.5, 1.0):
        task = parse(f"mqar?pairs=1&length=18&vocabulary=32&power={power}")
        at = [int(task.row(0, index).query_Q[0] - 2) for index in range(ROWS)]
        counts = np.bincount(at, minlength=16)
        assert counts[1::2].sum() == 0
        expected = np.arange(1, 9) ** (power - 1)
        assert fits(counts[::2], expected / expected.sum())


def test_copied_symbols_are_uniform_and_selected_ones_stand_anywhere() -> None:
    for kind in ("copy", "palindrome"):
        task = parse(f"{kind}?length=8&vocabulary=9")
        uniform((i for index in range(ROWS) for i in task.row(0, index).tokens_T[:4]), 8)
    task = parse("selective_copy?length=20&symbols=3&vocabulary=10")
    rows = [task.row(0, index).tokens_T[:17] for index in range(ROWS)]
    uniform((i for row in rows for i in row[row < 8]), 8)
    uniform((t for row in rows for t in np.flatnonzero(row < 8)), 17)


def prefix_and_period(row: Example) -> tuple[int, int]:
    """Where the first id that is asked about was before, and how far back that is."""
    first = int(row.query_Q[0])
    prefix = row.tokens_T.tolist().index(row.tokens_T[first])
    return prefix, first - prefix


def test_prefixes_and_periods_of_induction_are_uniform_and_so_are_its_tokens() -> None:
    task = parse("induction?prefix=4&shortest=3&longest=10&length=24&vocabulary=14")
    rows = [task.row(0, index) for index in range(ROWS)]
    sizes = [prefix_and_period(row) for row in rows]
    uniform((8 * prefix + period - 3 for prefix, period in sizes), 5 * 8)
    for column in (0, 2, 5):  # of the prefix, of both, of the period
        uniform((row.tokens_T[column] for row in rows), 14)
    for row, (prefix, period) in zip(rows, sizes, strict=True):
        ids = row.tokens_T.tolist()
        assert len(set(ids)) == prefix + period
        assert not set(ids[:prefix]) & set(ids[prefix:]), "an id of the prefix comes again"


def test_the_period_of_induction_is_told_by_no_position() -> None:
    """Neither how far back the answer stands nor where the repeats begin is the same in more than a few rows."""
    task = parse("induction")
    sizes = [prefix_and_period(task.row(1, index)) for index in range(ROWS)]
    for column in zip(*sizes, strict=True):
        assert max(Counter(column).values()) < ROWS / 17 * 1.5


def seen_longest_ago(words: list[str]) -> str:
    """The id whose last occurrence is the earliest."""
    return min(set(words), key=lambda word: last(words, word))


def that_came_again(words: list[str]) -> str:
    """The same among the ids that came more than once, of which there is always one where something is asked."""
    return min((word for word in set(words) if words.count(word) > 1), key=lambda word: last(words, word))


def followed_most_often(words: list[str]) -> str:
    """What most often followed the same token; of several the first."""
    followed = Counter(after for word, after in pairwise(words) if word == words[-1])
    return followed.most_common(1)[0][0]


def last(words: list[str], word: str) -> int:
    return len(words) - 1 - words[::-1].index(word)


def score(spec: str, guess: Callable[[list[str]], str], rows: int = 200) -> float:
    """The share of queries that a guess by the row so far answers."""
    found = [label == guess(words[: t + 1]) for words, labels in rows_of(spec, rows) for t, label in labels.items()]
    return sum(found) / len(found)


def test_the_id_seen_longest_ago_answers_induction_in_rows_without_a_prefix_alone() -> None:
    """Which needs no induction: so accuracy proves none. Of ids that repeat it is the answer behind a prefix too."""
    assert score("induction?prefix=0", seen_longest_ago) == 1
    assert score("induction", seen_longest_ago) < 0.1  # one row in 17 has no prefix


PIECES = ["induction?pieces=2", "induction?pieces=6", "induction?prefix=0&pieces=6"]


@pytest.mark.parametrize("spec", PIECES)
def test_in_pieces_what_followed_before_is_right_and_the_id_seen_longest_ago_is_not(spec: str) -> None:
    assert score(spec, lambda words: induction_solver(words)[len(words) - 1]) == 1
    assert score(spec, followed_most_often) > 0.9
    assert score(spec, seen_longest_ago) < 0.15
    assert score(spec, that_came_again) < 0.15


@pytest.mark.parametrize("spec", PIECES)
def test_in_pieces_no_distance_back_is_right_in_more_than_a_few_queries(spec: str) -> None:
    """Nor is the most frequent distance in a row, from which an answer of whole periods always stands equally far."""
    by_distance, asked = Counter[int](), 0
    for words, labels in rows_of(spec, 200):
        asked += len(labels)
        for t, label in labels.items():
            by_distance.update(t + 1 - s for s in range(t + 1) if words[s] == label)
    assert max(by_distance.values()) / asked < 0.15


def test_pieces_begin_anywhere_in_the_period_and_have_uniform_lengths() -> None:
    """But neither with the id that the piece before ended with nor with its next, so that every piece ends for sure."""
    task = parse("induction?prefix=0&shortest=6&longest=7&length=60&vocabulary=7&pieces=5")
    jumps, lengths = dict[int, list[int]](), list[int]()
    for index in range(ROWS // 4):
        row = task.row(0, index)
        period, ids = int(row.query_Q[0]), row.tokens_T.tolist()
        places = [ids.index(i) for i in ids]
        steps = [(after - before) % period for before, after in pairwise(places)]
        begins = [t + 1 for t in range(period - 1, len(steps)) if steps[t] != 1]
        assert begins[0] == period
        lengths += [after - before for before, after in pairwise(begins)]
        jumps.setdefault(period, []).extend(steps[t - 1] for t in begins)
    uniform((length - 2 for length in lengths), 4)
    for period, found in jumps.items():
        uniform((step - 2 for step in found), period - 2)


def test_in_pieces_all_is_asked_whose_latest_occurrence_went_on_as_it_does_now() -> None:
    for words, labels in rows_of("induction?pieces=6", 60):
        derived = induction_solver(words)
        right = {t for t, word in derived.items() if t + 1 < len(words) and words[t + 1] == word}
        assert labels.keys() - {len(words) - 1} == right


def test_brackets_open_and_close_alike_and_have_uniform_kinds() -> None:
    task = parse("dyck?length=41&brackets=5&depth=40")
    rows = [task.row(0, index).tokens_T for index in range(ROWS)]
    uniform((row[0] for row in rows), 5)
    uniform((row[1] >= 5 for row in rows), 2)
    uniform((row[1] for row in rows if row[1] < 5), 5)


def test_ngrams_are_followed_by_uniform_symbols_in_a_language_of_each_row() -> None:
    task = parse("ngram?n=2&run=6&vocabulary=9&length=56")
    rows = [task.row(0, index) for index in range(ROWS)]
    uniform((row.tokens_T[1] for row in rows), 8)
    uniform((row.tokens_T[2] for row in rows), 8)
    uniform((8 * row.tokens_T[1] + row.tokens_T[2] for row in rows), 64)


def test_moves_are_uniform_and_so_are_the_states() -> None:
    for spec, elements, states in (("parity", 2, 2), ("s3", 6, 6), ("s5", 120, 120), ("s3&moves=swaps", 3, 3)):
        task = parse(f"state_tracking?group={spec}&length=9")
        rows = [task.row(0, index) for index in range(ROWS)]
        for column, count in ((lambda row: row.tokens_T[4], elements), (lambda row: row.labels_T[8], states)):
            found = [int(column(row)) for row in rows]
            known = {value: place for place, value in enumerate(sorted(set(found)))}
            uniform((known[value] for value in found), count)


def test_needles_stand_at_ten_depths_with_uniform_codes() -> None:
    rows = list(rows_of("needle?length=200", ROWS // 2))
    uniform((int(label) for _, labels in rows for label in labels.values()), 10)
    asked = [words[words.index("?") - 1] for words, _ in rows]
    people = sorted(set(asked))
    uniform((people.index(person) for person in asked), 16)
    at = [" ".join(words).split("the code of")[0].count(" . ") for words, _ in rows]  # sentences before it
    depths = sorted(set(at))
    uniform((depths.index(depth) for depth in at), 10)


def test_a_needle_at_depth_0_is_first_and_at_depth_9_is_right_before_the_question() -> None:
    for words, _ in rows_of("needle?depth=0&needles=3&length=200", 20):
        person = words[words.index("?") - 1]
        assert " ".join(words).startswith(f"the code of {person} is")
    for words, _ in rows_of("needle?depth=9&needles=3&length=200", 20):
        asked = words.index("?")
        assert words[asked - 15 : asked - 11] == ["the", "code", "of", words[asked - 1]]


def test_no_answer_stands_at_one_distance_in_all_rows_of_the_tasks_that_ask_for_content() -> None:
    for kind in ("mqar", "induction", "selective_copy", "needle"):
        distances = set()
        for words, labels in rows_of(kind, 60):
            t = max(labels)
            distances.add(t - max(s for s in range(t + 1) if words[s] == labels[t]))
        assert len(distances) > 5, kind
