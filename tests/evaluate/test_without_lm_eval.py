"""Without lm-eval, --tasks says what to install, and nothing else needs it."""

import sys

import pytest

from swamla.cli import main


def test_tasks_without_lm_eval_are_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    for name in ("harness", "tasks"):
        monkeypatch.delitem(sys.modules, f"swamla.evaluate.{name}", raising=False)
    assert main(["evaluate", "run", "--tasks", "list"]) == 2
    assert "tasks need lm-eval: pip install 'swamla[eval]'" in capsys.readouterr().err
