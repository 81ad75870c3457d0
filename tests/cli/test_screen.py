"""What every command shows on a narrow terminal and on one that has ASCII only."""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from swamla import cli
from swamla.cli import main
from swamla.cli.bench_tables import COLUMNS, Screen
from swamla.cli.console import Console
from swamla.cli.outputs import SUBSTITUTES, open_outputs, substitute

TRAINED = (
    "--data text.txt --tokenizer byte --held_out_fraction 0.1 --width 16 --n_heads 2 --mla_kv_lora_rank 8 "
    "--mla_qk_nope_head_dim 4 --mla_qk_rope_head_dim 4 --mla_v_head_dim 8 --swa_window 8 --batch_size 2 "
    "--block_size 16 --steps 3 --max_minutes none --eval_seconds none --eval_interval 2 --log_interval 1 --threads 1"
)
LINES = [
    f"train {TRAINED} --output_dir new --verbose",
    f"train {TRAINED} --output_dir another",
    "evaluate a-run",
    "evaluate a-run --data text.txt",
    "generate a-run --prompt “é” --greedy --stats --max_new_tokens 9",
    "generate a-run --prompt a --prompt b --greedy --max_new_tokens 9",
    "prepare text.txt --tokenizer bpe:300",
    "info quickstart",
    "info moe-1b",
    "info moe-1b --compare small",
    "runs .",
    "checkpoint list a-run",
    "checkpoint verify a-run",
    "plot a-run --output curves.png",
    "explain a-run",
    f"quickstart {TRAINED} --output_dir quick",
    "doctor",
    "--help",
    "checkpoint --help",
    *(f"{name} --help" for name in cli.COMMANDS if name != "checkpoint"),
]
REFUSED = ["info nosuch…", "train --lr –1", "evaluate “nowhere”", "trian", "prepare ‘x’", "generate a-run --top_p 2"]
# What may be wider than the terminal: a step's line, which programs read, and a path, which is copied.
WIDE = re.compile(r"Step \d|.*/[^ ]{20}|  \S*(swamla|python)")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text("".join(f"line {i}, which is {i * i}\n\n" for i in range(300)))
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", *shlex.split(TRAINED), "--output_dir", "a-run"]) == 0
    return folder


def shown(home: Path, line: str, encoding: str) -> tuple[int, str, str]:
    """The status and outputs of a command, on outputs of an encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with contextlib.chdir(home), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(shlex.split(line))
        except SystemExit as end:
            status = int(end.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    return status, *texts


@pytest.mark.parametrize("line", LINES)
def test_every_command_fits_60_columns_and_ascii(line: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for folder in ("new", "another", "quick"):
        if (home / folder).exists():
            (home / folder).rename(home / f"old-{len(list(home.iterdir()))}")
    status, out, err = shown(home, line, "ascii")
    assert status == 0, err
    assert out
    text = re.sub(r"(?ms)^=== a sample: .*?(?=^Held out: )", "", out + err)
    sample = line.startswith(("generate", "quickstart"))  # what a model writes may be any character
    assert sample or "\\u" not in text, re.findall(r".*\\u.*", text)
    assert sample or not re.search(r"\\x[0-9a-f]", text), re.findall(r".*\\x.*", text)
    if not line.startswith(("generate", "runs", "plot")):
        wide = [each for each in text.partition("=== before")[0].splitlines() if len(each) > 60]
        assert [each for each in wide if not WIDE.match(each) and len(each.split("  ")[-1].split()) > 1] == []


@pytest.mark.parametrize("line", REFUSED)
def test_errors_have_readable_substitutes_too(line: str, home: Path) -> None:
    status, out, err = shown(home, line, "ascii")
    assert (status, out) == (2, "")
    assert err.startswith("swamla: error: ")
    assert err.count("\n") == 1
    assert "\\u" not in err


def test_what_cannot_be_substituted_has_its_number_and_letters_lose_their_accents() -> None:
    assert [substitute(c) for c in "…×±→✓✗é³₂▏━│╇⠋“”"] == [
        *("...", "x", "+/-", "->", "ok", "FAILED", "e", "^3", "2", "+", "-", "|", "+", "*", '"', '"')
    ]
    assert [substitute(c) for c in "ш世\udce9"] == ["\\u0448", "\\u4e16", "\\udce9"]
    assert all(text.isascii() and text.isprintable() for text in SUBSTITUTES.values())


def test_every_character_that_the_package_prints_has_a_substitute() -> None:
    without = set()
    for file in Path(cli.__file__).parents[1].rglob("*.py"):
        tree = ast.parse(file.read_text())
        bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and node.body]
        of_configs = {"cli", "data", "model", "train"} & set(file.parts)  # whose docstrings --help shows
        docs = set() if of_configs else {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
        texts = [n.value for n in ast.walk(tree) if _is_text(n) and id(n) not in docs]
        without |= {c for c in "".join(texts) if not c.isascii() and substitute(c).startswith("\\")}
    assert without <= {"\ufeff"}  # which has no other form


def test_a_run_in_the_locale_c_is_trained_evaluated_and_read(home: Path) -> None:
    (home / "café.txt").write_text("".join(f"línea {i} … {i * i}\n\n" for i in range(99)), encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    train = TRAINED.replace("text.txt", "café.txt")
    for line in (f"train {train} --output_dir r-é", "evaluate r-é", "generate r-é --prompt é", "prepare café.txt"):
        command = [sys.executable, "-m", "swamla", *shlex.split(line)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).isascii()
        assert b"\\u2026" not in done.stdout + done.stderr


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "backslashreplace"])
def test_one_place_serves_both_outputs(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors))
    open_outputs()
    for stream in (sys.stdout, sys.stderr):
        stream.write("a … b ✗")
        stream.flush()
        assert stream.buffer.getvalue() == b"a ... b FAILED"  # type: ignore[attr-defined]


def test_a_table_of_bench_that_does_not_fit_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = dict.fromkeys(("median_s", "low_s", "high_s", "forward_s", "backward_s", "optimizer_s"), 0.000123)
    row = {"name": "8 × 2,048 packed", "tokens_per_s": 987654.0, "rounds": 9, "peak_bytes": 10**9} | seconds
    with Screen(Console(force_terminal=True, width=60, color_system=None)) as screen:
        screen.row("training", row)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert max(map(len, plain.splitlines())) <= 60
    assert "…" not in plain
    for heading in COLUMNS["training"]:
        assert heading == "matmul" or heading in plain
    assert "987,654/s" in plain
