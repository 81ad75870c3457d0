"""The parser of flags: how they may be written, what is told of them, and what --plugin imports before them."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from swamla.cli import COMMANDS, console, main
from swamla.cli.flags import ALSO_CALLED, Flag, argument, parse
from swamla.cli.overrides import flags
from swamla.cli.train import Arguments as Train
from swamla.errors import ConfigError, UsageError
from swamla.recipes import recipe_names
from tests.waiting import after_start


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """One of everything.

    run: a folder.
    words: several.
    count, rate: numbers.
    mode: one of two.
    deep: on by default.
    where: perhaps without a value.
    """

    run: str = argument(positional=True)
    more: str = argument("none", positional=True)
    words: tuple[str, ...] = argument((), annotation=str, repeated=True)
    top_k: int = 3
    rate: float | None = None
    mode: Literal["fast", "slow"] = "fast"
    deep: bool = True
    loud: bool = argument(False, switch=True)
    where: str = argument("", bare="here")


def read(*words: str, more: dict[str, Flag] | None = None) -> Arguments:
    return parse(Arguments, words, command="swamla try", more=more or {})[0]


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--top_k", "5"], "top_k", 5),
        (["--top-k", "5"], "top_k", 5),
        (["--top-k=5"], "top_k", 5),
        (["--top_k", "-5"], "top_k", -5),
        (["--rate", "-1e-3"], "rate", -1e-3),
        (["--rate", "-.5e2"], "rate", -50.0),
        (["--rate", "none"], "rate", None),
        (["--rate=NONE"], "rate", None),
        (["--mode", "slow"], "mode", "slow"),
        (["--no-deep"], "deep", False),
        (["--deep"], "deep", True),
        (["--loud"], "loud", True),
        (["--words", "a", "--words=b"], "words", ("a", "b")),
        (["--words", "- an item"], "words", ("- an item",)),
        (["--words", "--- a-rule ---"], "words", ("--- a-rule ---",)),
        (["--words=--top-k"], "words", ("--top-k",)),
        (["--words", ""], "words", ("",)),
        (["--words", "two\nlines"], "words", ("two\nlines",)),
        (["--where"], "where", "here"),
        (["--where", "there"], "where", "there"),
        (["--where="], "where", ""),
        (["--where", "--loud"], "where", "here"),
    ],
)
def test_a_flag_may_be_written_in_any_of_these_ways_before_and_behind_the_other_words(
    words: list[str], field: str, value: Any
) -> None:
    for line in (["RUN", *words], [*words, "--mode=fast", "RUN"] if field != "mode" else [*words, "RUN"]):
        arguments = read(*line)
        assert (getattr(arguments, field), arguments.run) == (value, "RUN")


def test_words_may_stand_among_flags_and_behind_two_dashes_nothing_is_a_flag() -> None:
    arguments = read("a", "--top_k", "1", "b")
    assert (arguments.run, arguments.more, arguments.top_k) == ("a", "b", 1)
    arguments = read("--top_k", "1", "--", "--loud")
    assert (arguments.run, arguments.loud) == ("--loud", False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN; swamla try --help tells more"),
        (["a", "b", "c"], "unrecognized arguments: c"),
        (["a", "--top_k"], "--top_k: expected one argument"),
        (["a", "--top_k", "--loud"], "--top_k: expected one argument"),
        (["a", "--top_k", "1.5"], "--top_k 1.5: must be a whole number"),
        (["a", "--top_k="], "--top_k '': must be a whole number"),
        (["a", "--rate", "fast"], "--rate fast: must be a number or none"),
        (["a", "--mode", "medium"], "--mode medium: must be one of fast, slow"),
        (["a", "--loud=yes"], "--loud: ignored explicit argument 'yes'"),
        (["a", "--no_loud"], "unknown flag --no_loud; did you mean --loud?"),
        (["a", "--top", "1"], "unknown flag --top; did you mean --top_k?"),
        (["a", "--chat"], "unknown flag --chat; swamla chat RUN holds a conversation"),
        (["--run", "a"], "unknown flag --run; RUN stands without a flag: a"),
        (["a", "--top-k", "1", "--top_k=2"], "--top_k is given twice"),
        (["a", "--deep", "--no-deep"], "--deep is given twice"),
        (["a", "-x"], "unrecognized arguments: -x"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_word(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_value_that_a_config_cannot_have_is_told_by_the_configs_field() -> None:
    with pytest.raises(ConfigError, match=r"^train\.lr = 'fast' \(--lr\): must be a number$"):
        parse(Train, ["--lr", "fast"], command="swamla train", more=flags())


def test_what_others_call_a_flag_is_none_of_ours_and_leads_to_one() -> None:
    known = {*flags(), "output_dir", "resume", "workers"}
    assert set(ALSO_CALLED.values()) <= known
    assert not ALSO_CALLED.keys() & known
    for other, ours in ALSO_CALLED.items():
        with pytest.raises(UsageError, match=rf"^unknown flag --{other}; did you mean --{ours}\?$"):
            parse(Train, [f"--{other}", "1"], command="swamla train", more=flags())


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(list(words))
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_help_of_train_fits_two_screens_and_has_the_recipes_own_flags(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    told = shown(capsys, "train", recipe, "--help")
    assert len(told.splitlines()) <= 100
    assert max(map(len, told.splitlines())) <= 100
    assert f"[…] is the value in {recipe}" in told
    without = {"gpt2", "gpt2-latent", "servable", "shakespeare-char", "shakespeare-char-latent"}
    without |= {"toy-induction", "toy-mqar", "toy-state-tracking"}
    assert ("--mla_kv_lora_rank" in told) == (recipe not in without)
    assert "--learning_rate" not in told


def test_help_is_about_the_recipe_and_not_about_a_flags_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text("[]")
    assert "[…] is the value in quickstart" in shown(capsys, "train", "--data", "rows.json", "--help")
    assert "[…] is the value in small" in shown(capsys, "train", "--data", "rows.json", "small", "--help")
    assert "[…] is the value in quickstart" in shown(capsys, "train", "-h", "--no-such-flag", "1")
    assert main(["train", "quikstart", "--help"]) == 2
    assert 'did you mean "quickstart"?' in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_all_tells_every_flag(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = set(shown(capsys, "train", "--help", "all").replace(",", " ").split())
    assert {f"--{name}" for name in flags()} <= words
    assert {f"--no_{name}" for name, flag in flags().items() if flag.annotation is bool} <= words


@pytest.mark.parametrize(
    "command",
    [*sorted(COMMANDS.keys() - {"checkpoint", "cache"}), "checkpoint list", "checkpoint convert", "cache list"],
)
def test_every_command_tells_what_each_of_its_usual_flags_is_for(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    told = shown(capsys, *command.split(), "--help")
    assert told.startswith(f"usage: swamla {command} ")
    lines = told.partition("[…] is")[0].splitlines()
    for index, line in enumerate(lines):
        if line.startswith("  --"):
            behind = line.split("  ")[2:] or [lines[index + 1]]
            assert "".join(behind).strip(), line


def test_help_into_a_pipe_that_closes_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    line = [sys.executable, "-m", "swamla", "generate", "--help"]
    done = subprocess.run(line, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert after_start(done.stderr) == ""


def test_a_plugin_is_imported_before_the_command_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "PLUGINS", [])
    for name in ("one", "two"):
        Path(f"{name}.py").write_text(f"from pathlib import Path\nPath('{name}.txt').write_text('imported')\n")
    assert main(["--plugin", "one.py", "info", "quickstart", "--plugin=two.py", "--json"]) == 0
    assert Path("one.txt").exists()
    assert Path("two.txt").exists()
    assert console.program().endswith(" --plugin one.py --plugin two.py")
    capsys.readouterr()
    for line in (["info", "--plugin"], ["info", "--plugin="], ["--plugin", "--json", "info"]):
        assert main(line) == 2
        assert capsys.readouterr().err.startswith("swamla: error: --plugin needs a Python file, e.g. ")
    assert main(["info", "--plugin", "none.py"]) == 2
    assert "none.py" in capsys.readouterr().err
