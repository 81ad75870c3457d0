"""Messages name settings as they can be typed: flags on the command line, names in Python."""

import ast
import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from swamla import cli
from swamla.cli import main
from swamla.cli.console import Console, say
from swamla.cli.flags import parsed
from swamla.cli.overrides import data_flags, flags
from swamla.cli.spelling import as_typed, error_as_typed, flag_of
from swamla.config import field_types, from_plain
from swamla.data.config import DataConfig
from swamla.data.preparing import prepare
from swamla.errors import ConfigError, DataError
from swamla.registry import members_of

PACKAGE = Path(cli.__file__).parents[1]
LIBRARY = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "cli"]


@pytest.fixture
def train_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line that was parsed last is one of `train`."""
    assert main(["train", "--nosuch"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("message", "kind", "typed"),
    [
        ('replace such bytes with U+FFFD by invalid_utf8 = "replace"', "", "by --invalid_utf8 replace"),
        ("leave such rows out: on_bad_row = 'skip')", "", "out: --on_bad_row skip)"),
        ("data.source = '/x y': no such file", "", "--data '/x y': no such file"),
        ("must not exceed model.learned_positions = 8", "", "must not exceed --learned_positions 8"),
        ("must divide n_heads = 4.", "gdn", "must divide --gdn_n_heads 4."),
        ("must divide n_heads = 4", "", "must divide --n_heads 4"),
        ("give `steps` or `max_minutes`", "", "give --steps or --max_minutes"),
        ("compile = max needs triton; or compile = none", "", "--compile max needs triton; or --compile none"),
        ("or stream = None, hf_private = True", "", "or --stream none, --hf_private"),
        ("x: lr = -1.0 (--lr): must be > 0", "", "x: lr = -1.0 (--lr): must be > 0"),
        ("nosuch = 3, `other`, a = b, runs/lr = 3.txt", "", "nosuch = 3, `other`, a = b, runs/lr = 3.txt"),
        ("needs `kv_lora_rank`", "", "needs --mla_kv_lora_rank"),
        ("fewer `workers`; with `resume`", "", "fewer --workers; with --resume"),
        ("a higher `bias_rate`", "", "a higher --latent_moe_bias_rate or --moe_bias_rate"),
    ],
)
def test_settings_in_a_message_become_flags(message: str, kind: str, typed: str, train_flags: None) -> None:
    assert as_typed(message, kind=kind).endswith(typed)


def test_of_several_flags_those_on_the_command_line_are_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--swa_backend", "flex", "--device", "cpu", "--max_minutes", "none", "--steps", "1"]) == 2
    assert "--swa_backend flex needs a CUDA device" in capsys.readouterr().err
    assert flag_of("backend") == "--swa_backend"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --mla_kv_lora_rank 0", "model.blocks.mla.mixer.kv_lora_rank = 0 (--mla_kv_lora_rank): must be"),
        ("train --gdn_n_heads 3", "must divide the width 256, or give --gdn_head_k_dim and --gdn_head_v_dim"),
        ("train --swa_n_kv_heads 3", "must divide --swa_n_heads 4"),
        ("train --accumulation 3", "must divide --batch_size 8"),
        ("train --max_minutes none", "--steps none: give --steps or --max_minutes"),
        ("train --keep_last 1 --async_save", "(--keep_last): must be >= 2 with --async_save"),
        ("train --block_size 64 --learned_positions 8", "must not exceed --learned_positions 8"),
        ("train --data nowhere.txt", "--data nowhere.txt: no such file or folder"),
        ("prepare nowhere.txt", "DATA nowhere.txt: no such file or folder"),
        ("train --data latin.txt", "or replace such bytes with U+FFFD by --invalid_utf8 replace"),
        ("prepare latin.jsonl", "(or leave such rows out: --on_bad_row skip)"),
        ("prepare other.jsonl", "(choose by --text_column)"),
        ("generate a-run --top_p 2", "--top_p 2.0: must be in (0, 1]"),
        ("checkpoint convert a-run b --shards 0", "--shards 0: must be >= 1"),
        ("checkpoint convert a-run b --dtype bf16", "--dtype bf16 needs --weights_only"),
        ("train --output_dir full", "or continue it with --resume"),
        ("train --wandb_run_name x", "give --wandb_project too"),
        ("train --init_from nowhere", "--init_from nowhere: no such folder"),
        ("train --precision fp8 --device cuda", "--device cuda: torch sees no CUDA device here; use --device cpu"),
    ],
)
def test_what_an_error_names_can_be_typed(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n' * 9)
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n' * 9)
    assert main(shlex.split(line)) == 2
    error = capsys.readouterr().err
    assert said in error
    known = parsed()[0]
    for flag in re.findall(r"--([a-z][a-z_0-9]*)", error):
        assert flag.removeprefix("no_") in known, flag
    again = [word for word in re.findall(r"(?<![\w.])([a-z_]+) = ", error.split(": ", 2)[-1]) if word in known]
    assert again == []


def test_advice_of_an_error_has_flags_of_the_command_or_is_left_out(
    train_flags: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli._report(MemoryError()) == 2
    assert cli._report(MemoryError()) == 2
    said = (
        "swamla: error: out of memory; a smaller --batch_size, more --accumulation or a smaller --block_size needs less"
    )
    assert capsys.readouterr().err.splitlines() == [said, said]
    monkeypatch.setattr("swamla.cli.flags._parsed", {})
    assert cli._report(MemoryError()) == 2
    assert capsys.readouterr().err == "swamla: error: out of memory\n"


def test_in_python_the_same_message_is_in_pythons_terms(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    with pytest.raises(DataError, match=r'by invalid_utf8 = "replace"'):
        prepare(DataConfig(source=str(tmp_path / "latin.txt")))


def test_an_error_of_a_recipe_keeps_the_recipes_name_and_place(train_flags: None) -> None:
    error = ConfigError("train.accumulation", 3, "must divide batch_size = 8", "run.toml:7")
    assert error_as_typed(error) == "train.accumulation = 3 (run.toml:7): must divide --batch_size 8"


@pytest.mark.parametrize("family", ["MixerConfig", "FFNConfig"])
def test_a_refused_config_knows_its_kind(family: str) -> None:
    base = getattr(__import__("swamla.model", fromlist=[family]), family)
    for kind, cls in members_of(base).items():
        wrong = {name: -7 for name in ("n_heads", "hidden", "n_experts") if name in field_types(cls)}
        if not wrong:
            assert kind == "none"  # it has no settings
            continue
        with pytest.raises(ConfigError) as caught:
            from_plain(cls, wrong)
        assert caught.value.kind == kind


# Names that messages give to other things than settings.
_OTHERS = {"n_documents", "expert_parallel"}


def messages(file: Path) -> Iterator[tuple[int, str, bool]]:
    """The texts of a file that are not docstrings, with {} for what is computed; and whether it is what is allowed."""
    tree = ast.parse(file.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    refusing = [call for call in calls if ast.unparse(call.func) in ("require", "ConfigError", "self.fail")]
    allowed = {id(node) for call in refusing for node in ast.walk(call)}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    passed = {id(first.value) for first in firsts if isinstance(first, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed |= {id(part) for part in ast.walk(node) if part is not node}
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts)), id(node) in allowed
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed:
            yield node.lineno, node.value, id(node) in allowed


def test_no_message_of_the_library_names_a_flag_of_ours() -> None:
    known = set(flags()) | {"resume", "workers", "shards", "dtype", "weights_only", "executor", "output_dir"}
    commands = {"card.py", "hub.py", "reopening.py", "rank_watch.py"}  # whole command lines, or for those of torchrun
    found = [
        f"{file.relative_to(PACKAGE)}:{line}: {text}"
        for file in LIBRARY
        if file.name not in commands
        for line, text, _ in messages(file)
        if " " in text
        and text != "--resume {} {}"  # the end of a command line
        and any(flag in known for flag in re.findall(r"(?<!\w)--([a-z][a-z_0-9]*)", text))
    ]
    assert found == []


def test_every_setting_in_a_message_is_written_so_that_it_becomes_a_flag(train_flags: None) -> None:
    table = flags() | data_flags()
    names = {flag.field.rpartition(".")[2] for flag in table.values() if "_" in flag.field.rpartition(".")[2]}
    unspelled = []
    for file in LIBRARY:
        kind = file.stem
        for line, text, allowed in messages(file):
            if " " not in text or "\n" in text or (file.name in ("gpt2.py", "dataset.py") and not allowed):
                continue
            spelled = as_typed(text.replace("{}", "7"), kind=kind, bare=allowed)
            left = set(re.findall(r"(?<![\w./-])([a-z]+(?:_[a-z0-9]+)+) ?(?:=|\b)", spelled)) & names - _OTHERS
            if left:
                unspelled.append(f"{file.relative_to(PACKAGE)}:{line}: {left}: {text}")
    assert unspelled == []


def test_warnings_on_the_console_name_flags(train_flags: None, capsys: pytest.CaptureFixture[str]) -> None:
    say(Console(), "warning: no profile: lower `profile_warmup`")
    say(Console(), "a sample, with `lr` in it")
    assert capsys.readouterr().out == "warning: no profile: lower --profile_warmup\na sample, with `lr` in it\n"


def test_messages_of_workers_are_spelled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swamla.data.sources.UNIT_BYTES", 400)
    monkeypatch.chdir(tmp_path)
    rows = [b'{"text": "some words and more"}\n'] * 99
    (tmp_path / "rows.jsonl").write_bytes(b"".join([*rows, b'{"text": "caf\xe9"}\n']))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(["prepare", "rows.jsonl", "--tokenizer", "byte", "--workers", "1"]) == 2
    assert "--invalid_utf8 replace" in err.getvalue()
    assert "--on_bad_row skip" in err.getvalue()
