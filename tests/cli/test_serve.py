"""`swamla serve`: names and keys of what it serves, one-line errors before anything is loaded, and signals."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'swamla[serve]'")
pytest.importorskip("starlette", reason="needs starlette: pip install 'swamla[serve]'")

from swamla.cli import main, serve
from swamla.serve.engine import Engine
from swamla.serve.server import Server
from tests.test_readme import TINY
from tests.waiting import PATIENCE, running

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


# -- signals, to a server in a process of its own


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose greedy text never ends: it has seen one document."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "text.txt").write_text("import os\n" * 200)
    data = ["--data", f"{folder}/text.txt", "--tokenizer", "byte", "--cache_dir", f"{folder}/cache"]
    words = [*TINY.replace("--steps 1", "--steps 20").split(), *data, "--lr", "0.01", "--output_dir", f"{folder}/run"]
    assert main(["train", "quickstart", *words]) == 0
    return folder / "run"


@contextmanager
def streaming(
    run: Path, tokens: int, *flags: str
) -> Iterator[tuple["subprocess.Popen[str]", http.client.HTTPResponse]]:
    """A server, and a stream of so many tokens whose first event has come."""
    command = [sys.executable, "-m", "swamla", "serve", str(run), "--port", "0", *flags]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as server:
        too_late = threading.Timer(PATIENCE, server.kill)  # ends every wait
        too_late.start()
        assert server.stdout is not None
        ports = (re.search(r"http://127\.0\.0\.1:(\d+)/ ", line) for line in server.stdout)
        client = http.client.HTTPConnection("127.0.0.1", int(next(found[1] for found in ports if found)))
        body = {"prompt": "import ", "max_tokens": tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        client.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = client.getresponse()
        assert answer.readline().startswith(b"data: {")
        yield server, answer
        too_late.cancel()
        client.close()


def send(server: "subprocess.Popen[str]", number: signal.Signals) -> str:
    """The line that tells of a signal."""
    server.send_signal(number)
    assert server.stderr is not None
    return next(line for line in server.stderr if number.name in line)


def test_sigterm_ends_the_server_after_the_stream_that_is_under_way(run: Path) -> None:
    with streaming(run, 1500, "--drain", f"{PATIENCE}") as (server, answer):
        told = "SIGTERM: no new requests; those under way are answered"
        assert send(server, signal.SIGTERM) == f"swamla: {told}\n"
        *_, usage, done = answer.read().split(b"\n\n")[:-1]
        assert server.wait() == 0
    assert done == b"data: [DONE]"
    assert json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"] == 1500


def test_a_second_signal_ends_the_server_at_once(run: Path) -> None:
    """The stream is one of hours, and the server told to wait for days."""
    with streaming(run, 9_000_000, "--max_length", "10000000", "--drain", "1000000") as (server, answer):
        send(server, signal.SIGTERM)
        assert send(server, signal.SIGINT) == "swamla: SIGINT: stopping at once\n"
        assert server.wait() == 0
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
