"""`swamla serve`: names and keys of what it serves, and one-line errors before anything is loaded for long."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'swamla[serve]'")
pytest.importorskip("starlette", reason="needs starlette: pip install 'swamla[serve]'")

from swamla.cli import main, serve
from swamla.serve.engine import Engine
from swamla.serve.server import Server

from .test_chat_and_sample import PLAIN, model_of


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "load", lambda *_: (model_of(PLAIN), PLAIN))
    monkeypatch.setattr(Server, "run", lambda self, sockets: None)


def test_the_address_and_the_models_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "a"), str(tmp_path / "b"), "--port", "0"]) == 0
    assert "a, b at http://127.0.0.1:" in capsys.readouterr().out


def test_runs_of_one_name_are_called_by_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (tmp_path / name / "run" for name in "ab")
    assert main(["serve", str(first), str(second), "--port", "0"]) == 0
    assert str(second) in capsys.readouterr().out.replace("\n", "")
    assert main(["serve", str(first), str(first), "--port", "0"]) == 2
    assert "two runs are called" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantized", "flags", "decoding"),
    [
        ("", [], "eager"),
        ("int4", [], "int8"),
        ("int8", ["--slots", "32"], "eager"),
        ("int8", ["--decoding", "eager"], "eager"),
        ("", ["--decoding", "int8"], "int8"),
    ],
)
def test_a_run_of_rounded_weights_is_decoded_with_them_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, quantized: str, flags: list[str], decoding: str
) -> None:
    model, engines = model_of(PLAIN), []
    monkeypatch.setattr(model, "quantized", quantized)
    monkeypatch.setattr(serve, "load", lambda *_: (model, PLAIN))

    class Kept(Engine):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            engines.append(self)

    monkeypatch.setattr("swamla.serve.server.Engine", Kept)
    assert main(["serve", "a", "--port", "0", *flags]) == 0
    assert [engine.decoding for engine in engines] == [decoding]


def test_an_open_address_without_a_key_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "a", "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "--api_key_env NAME asks for a key" in capsys.readouterr().out
    monkeypatch.setenv("THE_KEY", "k")
    assert main(["serve", "a", "--port", "0", "--host", "0.0.0.0", "--api_key_env", "THE_KEY"]) == 0
    assert "--api_key_env" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--api_key_env", "NO_SUCH_VARIABLE"], "the variable must hold a key"),
        (["--max_seconds", "0"], "--max_seconds 0.0: must be > 0"),
        (["--drain", "inf"], "--drain inf: must be > 0 and finite"),
        (["--max_length", "1"], "--max_length 1: must be > 1"),
        (["--prefix_cache", "-1"], "--prefix_cache -1: must be >= 0"),
        (["--slots", "0"], "--slots 0: must be > 0"),
        (["--slots", "17", "--decoding", "int8"], "--slots 17: must be 16 at most with --decoding int8"),
        (["--port", "70000"], "cannot listen on 127.0.0.1 port 70000"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "a", *flags]) == 2
    assert error in capsys.readouterr().err
