"""The table of mutations fits the code that it mutates, and covers what it should."""

import ast
from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, mutated
from tests.mutants.table import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_has_one_place_and_leaves_valid_code_that_says_something_else(mutation: Mutation) -> None:
    text = mutated(mutation)
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse((ROOT / mutation.file).read_text(encoding="utf-8")))
    changed = set(text.splitlines()) ^ set((ROOT / mutation.file).read_text(encoding="utf-8").splitlines())
    assert len(changed) == 2, "it is one line"


def test_there_are_forty_at_least_with_names_of_their_own_and_tests_that_there_are() -> None:
    assert len(MUTATIONS) >= 40
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    for test in {test for mutation in MUTATIONS for test in mutation.tests.split()}:
        file, _, name = test.partition("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, test


def test_a_mutation_without_its_one_place_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.mutants.__main__.ROOT", tmp_path)
    for text, count in (("a = 1\n", 0), ("b = 2\nb = 2\n", 2)):
        (tmp_path / "file.py").write_text(text)
        with pytest.raises(ValueError, match=f"is {count} times in file.py"):
            mutated(Mutation("one", "file.py", "b = 2", "b = 3", ""))
