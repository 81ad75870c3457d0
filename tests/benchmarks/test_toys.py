"""The table of toy models: every row is a run of a task, a stopped measurement goes on, cells say what was found."""

import json
import shlex
from pathlib import Path

import pytest

from benchmarks import toys
from benchmarks.toys import TOYS, Job, Toy, report
from swamla.cli.flags import parse
from swamla.cli.overrides import flags
from swamla.cli.run_config import resolve
from swamla.cli.train import Arguments as Train


def test_every_row_is_a_run_of_a_task_and_no_two_are_the_same() -> None:
    found = set()
    for toy in TOYS:
        _, given = parse(Train, [toy.recipe, *shlex.split(toy.flags)], command="swamla train", more=flags())
        config = resolve(toy.recipe, given).config
        assert config.data.task is not None
        found.add(str(config))
    assert len(found) == len(TOYS)


def test_a_cell_has_the_last_accuracy_and_the_first_step_with_99_percent() -> None:
    first = {"recipe": TOYS[0].recipe, "flags": TOYS[0].flags}
    rows = [
        first | {"seed": 0, "accuracy": {"50": 0.2, "100": 0.991, "150": 0.98, "200": 0.9975}},
        first | {"seed": 1, "accuracy": {"100": 0.25, "50": 0.5}},
        first | {"seed": 2, "error": "out of memory"},
    ]
    lines = report(rows).splitlines()
    assert lines[2] == "| `toy-mqar` | .99 by 500 | .9975@200, .99 by 100 | .250@100 | failed |"
    assert len(lines) == 2 + len(TOYS)


def test_what_was_measured_is_not_run_again_and_seeds_come_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, str, int]] = []

    def pretend(job: Job) -> dict:
        ran.append(job.key)
        return {"recipe": job.toy.recipe, "flags": job.toy.flags, "seed": job.seed, "accuracy": {"1": 0.5}}

    monkeypatch.setattr(toys, "run", pretend)
    monkeypatch.setattr(toys, "TOYS", (Toy(recipe="a", flags="", expected=""), Toy(recipe="b", flags="", expected="")))
    out = tmp_path / "rows.jsonl"
    known = {"recipe": "a", "flags": "", "seed": 1, "accuracy": {"1": 0.5}}
    killed = {"recipe": "b", "flags": "", "seed": 0, "error": "exit status -9"}
    out.write_text("".join(json.dumps(row) + "\n" for row in (known, killed)), encoding="utf-8")
    command = ["--jobs", "1", "--seeds", "2", "--output", str(out)]
    assert toys.main([*command, "--table"]) == 0
    assert ran == []
    for _ in range(2):
        assert toys.main(command) == 0
    assert ran == [("a", "", 0), ("b", "", 0), ("b", "", 1)]


def test_a_run_is_trained_and_its_accuracies_are_those_of_its_own_metrics() -> None:
    toy = Toy(recipe="toy-mqar", flags="--steps 2 --eval_interval 1 --eval_tokens 512 --batch_size 2", expected="")
    row = toys.run(Job(toy=toy, seed=3))
    assert row["seed"] == 3
    assert row["accuracy"].keys() == {1, 2}
    assert all(0 <= accuracy <= 1 for accuracy in row["accuracy"].values())
    failed = toys.run(Job(toy=Toy(recipe="toy-mqar", flags="--steps 0", expected=""), seed=0))
    assert "steps" in failed["error"]
