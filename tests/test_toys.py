"""A mixer, an FFN, a norm, an optimizer and a source, each a file outside the package: a run of them does all that
runs do."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import swamla
from swamla.cli import main
from swamla.cli.self_check import tiny_model
from swamla.errors import ConfigError
from tests.toys import FILES, TOYS, registered
from tests.waiting import after_start

RECIPE = """
[model]
width = 32
pattern = ["toy", "swa"]
norm = "toy_norm"
learned_positions = 64
[model.blocks.toy]
mixer = { kind = "toy", inner = 24 }
ffn = { kind = "toy_ffn", hidden = 48 }
[model.blocks.swa]
mixer = { kind = "swa", n_heads = 2, window = 8 }
ffn = "toy_ffn"
[data]
source = "text.txt"
tokenizer = "byte"
[train]
steps = 8
batch_size = 4
block_size = 32
lr = 0.01
save_interval = 2
keep_last = 9
eval_interval = 4
precision = "fp32"
device = "cpu"
optimizer = { kind = "toy_sgd", momentum = 0.8 }
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a recipe of toys, and the run that it describes."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "text.txt").write_text("".join(f"{n} and {n * n % 97} are on the mat\n\n" for n in range(400)))
    (folder / "toys.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWAMLA_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        with registered():
            assert main(["train", "toys.toml", "--output_dir", "run"]) == 0
        yield folder


@pytest.fixture
def toys(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(home)
    with registered():
        yield home


def losses(run: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r[name]) for r in records for name in ("loss", "held_out_loss") if name in r]


def test_the_run_learns_and_its_config_names_the_files(toys: Path) -> None:
    found = [loss for _, loss in losses(toys / "run")]
    assert found[-1] < found[0]
    plain = json.loads((toys / "run/config.json").read_text())
    assert plain["model"]["blocks"]["toy"]["mixer"] == {"kind": "toy", "plugin": "toy_mixer.py", "inner": 24}
    assert plain["model"]["blocks"]["swa"]["ffn"] == {"kind": "toy_ffn", "plugin": "toy_ffn.py", "hidden": 64}
    assert plain["model"]["norm"]["plugin"] == "toy_norm.py"
    assert plain["train"]["optimizer"] == {"kind": "toy_sgd", "plugin": "toy_optimizer.py", "momentum": 0.8}


def test_it_resumes_to_the_bit(toys: Path, tmp_path: Path) -> None:
    shutil.copytree(toys / "run", tmp_path / "cut")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:08d}")
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert losses(tmp_path / "cut") == losses(toys / "run")
    mine, theirs = (swamla.load(run, "latest")[0].state_dict() for run in (tmp_path / "cut", toys / "run"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_it_generates_and_is_evaluated(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "run", "--prompt", "12 and", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("12 and")
    assert main(["evaluate", "run"]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_info_draws_and_counts_it(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "run"]) == 0
    shown = capsys.readouterr().out
    assert "norms, toy_norm " in shown
    assert "mixers T S" in shown
    assert "FFNs   q q" in shown
    assert main(["info", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["norm"] == {"kind": "toy_norm"}  # and nothing that is at its default
    counted = found["parameters"]["by_component"]
    assert counted["toy"] == 2 * 32 * 24
    assert counted["toy_ffn"] == 2 * 32 * 48 + 2 * 32 * 64
    assert counted["norms"] == 5 * 32
    assert found["parameters"]["total"] == sum(p.numel() for p in swamla.load("run")[0].parameters())
    assert found["training"]["bytes"]["optimizer_state"] == 4 * found["parameters"]["total"]


def test_info_names_the_source(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "toys.toml", "--data", "toy_text:200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["source"] == "toy_text:200"
    assert main(["info", "toys.toml", "--data", "toy_text:200"]) == 0
    assert "learned positions; on toy_text:200 " in " ".join(capsys.readouterr().out.split())


def test_doctor_lists_it_and_tries_it(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = {family: names[-1] for family, names in found["kinds"].items()}
    assert list(kinds.values()) == ["toy", "toy_ffn", "toy_norm", "toy_sgd", "toy_text", "toy_count"]
    assert found["ok"]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"(?m)^{family} .*, {kind}$", shown) for family, kind in kinds.items())
    assert "the loss falls with each of 4 norms and 4 optimizers" in shown
    tried = tiny_model(torch.device("cpu")).config
    assert {"toy", "swa", "gdn"} <= {block.mixer.kind for block in tried.layers}
    assert {"toy_ffn", "moe", "dense"} <= {block.ffn.kind for block in tried.layers}


@pytest.mark.parametrize(
    ("flags", "field", "expected"),
    [
        (["--toy_inner", "16"], ("blocks", "toy", "mixer", "inner"), 16),
        (["--toy_ffn_hidden", "40"], ("blocks", "swa", "ffn", "hidden"), 40),
        (["--pattern", "toy mha toy"], ("pattern",), ["toy", "mha", "toy"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_flags_change_it(
    toys: Path, capsys: pytest.CaptureFixture[str], flags: list[str], field: tuple[str, ...], expected: object
) -> None:
    assert main(["info", "toys.toml", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in field:
        found = found[name]
    assert found == expected


def test_a_pattern_may_name_the_toy_in_any_recipe(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "quickstart", "--pattern", "toy mla", "--norm", "toy_norm", "--optimizer", "toy_sgd"]) == 0
    assert "mixers T M" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate run --prompt a", "info run", "train --resume run"])
def test_without_its_plugin_a_run_is_refused_in_a_line_that_names_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(home)
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "of a plugin: name its file, --plugin toy_" in told
    with pytest.raises(ConfigError, match=r"mixer\.kind = 'toy' .*--plugin toy_mixer\.py"):
        swamla.load("run")


@pytest.fixture(scope="module")
def on_toy_text(home: Path) -> Path:
    """A run of parts of our own on the toy's text."""
    recipe = RECIPE.replace('"toy", "swa"', '"swa"').replace('norm = "toy_norm"', "").replace('ffn = "toy_ffn"', "")
    recipe = recipe.replace('{ kind = "toy_sgd", momentum = 0.8 }', '"adamw"').replace("text.txt", "toy_text:200")
    toy = recipe[recipe.index("[model.blocks.toy]") : recipe.index("[model.blocks.swa]")]
    (home / "on_toy_text.toml").write_text(recipe.replace(toy, ""))
    with pytest.MonkeyPatch.context() as patch, registered():
        patch.chdir(home)
        assert main(["train", "on_toy_text.toml", "--output_dir", "on_toy_text"]) == 0
    return home / "on_toy_text"


def test_a_run_on_a_toys_text_resumes_to_the_bit_and_keeps_the_name_of_its_file(
    on_toy_text: Path, toys: Path, tmp_path: Path
) -> None:
    (identity,) = json.loads((on_toy_text / "data.json").read_text())
    assert identity["plugin"] == "toy_source.py"
    shutil.copytree(on_toy_text, tmp_path / "cut")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:08d}")
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert losses(tmp_path / "cut") == losses(on_toy_text)
    assert json.loads((tmp_path / "cut/data.json").read_text()) == [identity]


def test_a_run_on_a_toys_text_needs_no_plugin_while_the_cache_has_it(
    on_toy_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(on_toy_text.parent)
    monkeypatch.setenv("SWAMLA_CACHE", str(on_toy_text.parent / "cache"))
    assert main(["evaluate", "on_toy_text"]) == 0
    shown = capsys.readouterr()
    assert "toy_text:200 is gone or unreadable: using its prepared tokens" in shown.err
    assert "the held-out part of toy_text:200" in shown.out
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "none"))
    commands = {
        "evaluate on_toy_text": "data.source = 'toy_text:200'",
        "train --resume on_toy_text": "--data toy_text:200",
    }
    for command, source in commands.items():
        assert main(command.split()) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert told.endswith(f"{source}: needs its plugin: --plugin toy_source.py\n")
    with registered():
        assert main(["evaluate", "on_toy_text"]) == 0  # made anew, it is the same


@pytest.mark.parametrize("extra", [["--stream", "2"], ["--buffer_docs", "20"]], ids=lambda flags: flags[0])
def test_a_toys_text_is_streamed_and_fitted(
    on_toy_text: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]
) -> None:
    monkeypatch.setattr("swamla.data.sources.UNIT_BYTES", 9000)
    run = str(tmp_path / "run")
    assert main(["train", "on_toy_text.toml", *extra, "--output_dir", run]) == 0
    assert main(["train", "--resume", run, "--steps", "10", "--schedule_steps", "8"]) == 0


def test_a_source_of_no_known_kind_is_refused_in_a_line_that_says_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prepare", "toy_text:200"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "or of a plugin: --plugin FILE" in told
    with registered():
        assert main(["prepare", "toy_text:many"]) == 2
    assert "must be toy_text, or toy_text:COUNT, e.g. toy_text:500" in capsys.readouterr().err


def test_the_page_on_adding_a_mixer_shows_the_toy_as_it_is() -> None:
    root = Path(__file__).parents[1]
    shown = (root / "docs/contributing.md").read_text(encoding="utf-8").split("```py\n")[1].split("```")[0]
    written = (root / "tests/plugins/toy_mixer.py").read_text(encoding="utf-8").splitlines()
    assert [line for line in shown.splitlines() if line not in written] == []
    assert "kind: ClassVar" in shown


def test_flags_of_a_toy_are_unknown_without_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TOYS["toy"].kind == "toy"
    assert main(["info", "quickstart", "--toy_inner", "16"]) == 2
    assert "toy_inner" in capsys.readouterr().err


def test_the_flag_takes_the_files_by_themselves(home: Path) -> None:
    """In a process of its own, as a user would."""
    plugins = [word for file in FILES for word in ("--plugin", str(file))]
    command = [sys.executable, "-m", "swamla", "info", "run", "--json"]
    done = subprocess.run([*command, *plugins], cwd=home, capture_output=True, text=True)
    assert json.loads(done.stdout)["parameters"]["by_component"]["toy"] == 2 * 32 * 24, done.stderr
    done = subprocess.run([*command, *plugins[2:]], cwd=home, capture_output=True, text=True)
    assert (done.returncode, len(after_start(done.stderr).splitlines())) == (2, 1)
    assert f"--plugin {FILES[0].name}" in done.stderr
