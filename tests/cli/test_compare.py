"""`swamla compare`: plan, runs and verdict by one command, which goes on where it was stopped."""

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest

from swamla.checkpoint import load
from swamla.cli import compare, main
from swamla.cli.outputs import Ended
from swamla.cli.overrides import flags as flags_of_train
from swamla.data.task_rows import TaskDataset
from swamla.evaluate import recall, validation
from swamla.model.accounting import state_bytes
from swamla.study import running
from swamla.study.evidence import read_measured
from swamla.study.folder import begin, opened, read_outcomes, read_tests
from swamla.study.plan import Asked, budget
from swamla.tasks import parse
from tests.study.played import results_of

RECIPE = """
[model]
width = 32
pattern = ["mha"]
[model.blocks.mha]
mixer = { kind = "mha", n_heads = 2 }
ffn = { kind = "dense", hidden = 64 }
[data]
source = "texts"
tokenizer = "byte"
held_out_fraction = 0.3
[train]
steps = 3
batch_size = 2
block_size = 32
lr = 1e-2
device = "cpu"
precision = "fp32"
"""
STUDY = """
question = "Is a state as good as attention?"
expectation = "At this length, yes."
recipe = "tiny.toml"
rates = "recipe"
seeds = 2
margin = 0.5

[arms]
attention = "--pattern mha"
state = "--pattern gdn"
"""


class Here:
    """A run of this process: what the command line does, without another start of torch."""

    started: ClassVar[list[str]] = []

    def __init__(self, words: list[str], log: Path, lock: int | None = None) -> None:
        if "--steps" not in words:  # the short run that is timed for the plan
            Here.started.append(" ".join(words))
        self.status = main(words)

    def poll(self) -> int:
        return self.status

    def wait(self) -> int:
        return self.status

    def terminate(self) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "texts").mkdir()
    for index in range(30):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"text {index}, which says {'so ' * (index % 9 + 3)}" * 4)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(running, "start", Here)
    monkeypatch.setattr(compare, "beside", lambda *_: nullcontext())  # runs without an end, which are no processes here
    monkeypatch.setattr(running, "POLL", 0.0)
    monkeypatch.setattr(Here, "started", [])
    return tmp_path


def test_a_study_file_is_planned_trained_scored_and_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "study.toml", "--plan"]) == 0
    said = capsys.readouterr().out
    assert not Here.started
    assert "Is a state as good as attention?" in said
    assert "At this length, yes." in said
    assert re.search(r"^time +about \d+ s", said, re.MULTILINE)
    folder = home / "studies" / "study"
    commands = re.findall(r" train (studies/study/arms/\S+) --lr 0.01 --seed (\d)", said)
    assert commands == [(f"studies/study/arms/{arm}.json", seed) for seed in "12" for arm in ("attention", "state")]

    assert main(["compare", "study.toml"]) == 0
    said = capsys.readouterr().out
    assert len(Here.started) == 4
    assert "[4/4] state, lr 0.01, seed 2: " in said
    assert "what this does not say:" in said
    assert ("are equivalent" in said) or ("undecided" in said) or ("than attention by" in said)
    assert {one.status for one in read_outcomes(folder).values()} == {"finished"}
    assert len(read_tests(folder)) == 4
    written = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert len(written["measured.jsonl"].splitlines()) == 4
    assert b"Is a state as good as attention?" in written["report.html"]

    for line in (["study.toml"], ["--report", "study.toml"], ["studies/study", "--report"]):
        assert main(["compare", *line]) == 0
        said = capsys.readouterr().out
        assert len(Here.started) == 4, "nothing is trained twice"
        assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == written
        assert "studies/study/report.html: open it in a browser" in said
    (home / "study.toml").rename(home / "away.toml")
    assert main(["compare", "--report", "study.toml"]) == 0, "the folder alone is enough"
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == written


def test_runs_of_a_study_leave_the_test_part_unread_and_are_ordinary_ones(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "study.toml", "--jobs", "1"]) == 0
    run = home / "studies" / "study" / "runs" / "state-lr0.01-seed1"
    outcome = read_outcomes(home / "studies" / "study")[run.name]
    scored = {}
    for part in ("validation", "test"):
        capsys.readouterr()
        assert main(["evaluate", str(run), "--part", part, "--json"]) == 0
        scored[part] = json.loads(capsys.readouterr().out)["bits_per_byte"]
    (test,) = (test for test in read_tests(home / "studies" / "study") if test.run == run.name)
    assert outcome.validation == pytest.approx(scored["validation"], rel=1e-6)
    assert test.bits_per_byte == pytest.approx(scored["test"], rel=1e-6)


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (Ended(15), 143)], ids=["Ctrl-C", "TERM"])
def test_whoever_stops_a_study_reads_that_it_goes_on(
    raised: BaseException, status: int, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(words: list[str], log: Path, lock: int | None = None) -> Here:
        if "--steps" in words:
            return Here(words, log)
        raise raised

    monkeypatch.setattr(running, "start", stopped)
    assert main(["compare", "study.toml"]) == status
    assert "all is saved in studies/study, and the same command goes on" in capsys.readouterr().err


def test_an_executor_of_datatrove_trains_and_scores_the_study(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datatrove")
    line = ["compare", "study.toml", "--executor", "local", "--parts", "2", "--executor_options", "workers=1"]
    assert main(line) == 0
    folder = home / "studies" / "study"
    assert len(read_outcomes(folder)) == len(read_tests(folder)) == len(Here.started) == 4
    assert {file.name for file in folder.glob("results*.jsonl")} == {"results-1-of-2.jsonl"}, "the first left nothing"
    capsys.readouterr()
    assert main(["compare", "study.toml"]) == 0
    assert "what this does not say:" in capsys.readouterr().out
    assert len(Here.started) == 4


def test_a_study_of_a_task_compares_accuracy_on_its_test_rows_beside_bytes_of_state(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "task.toml").write_text(
        RECIPE.replace('"texts"', '"task:mqar?pairs=2&length=16"')
        .replace('tokenizer = "byte"\nheld_out_fraction = 0.3', 'tokenizer = "names"')
        .replace("block_size = 32", "block_size = 16")
    )
    line = [
        "compare",
        "mha",
        "gdn",
        "--recipe",
        "task.toml",
        "--seeds",
        "2",
        "--rates",
        "recipe",
        "--output_dir",
        "tasks",
    ]
    assert main([*line, "--match", "none"]) == 0
    said = capsys.readouterr().out
    assert "accuracy on the test rows, higher is better" in said
    assert "nats an answer after" in said
    folder = home / "tasks"
    model, _ = load(folder / "runs" / "gdn-lr0.01-seed1", "latest")
    task = parse("mqar?pairs=2&length=16")
    (test,) = (test for test in read_tests(folder) if test.run == "gdn-lr0.01-seed1")
    assert test.accuracy == validation(TaskDataset(task), 16, part="test")(model)["accuracy"]
    assert test.loss > 0
    (measured,) = (one for one in read_measured(folder) if one.run == "gdn-lr0.01-seed1")
    assert measured.answers is not None
    assert measured.answers.accuracy == recall(model, task).score.accuracy
    assert measured.answers.state_bytes == state_bytes(model.config, 16)
    page = (folder / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert "Recall against memory" in headings
    assert "Loss by what was read" not in headings
    assert "bits per byte" not in page


def test_a_study_of_two_sizes_is_one_folder_and_one_page(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", "study.toml", "--sizes", "32,48", "--output_dir", "sizes"]
    assert main([*line, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "widths 32, 48, each matched and compared by itself" in " ".join(said.split())
    assert main(line) == 0
    said = capsys.readouterr().out
    assert len(Here.started) == 8
    assert "[8/8] " in said
    assert "At width 48, state and attention" in " ".join(said.split())
    assert "From width 32 to 48, " in said
    runs = {path.name for path in (home / "sizes" / "runs").iterdir()}
    assert runs == {
        f"{arm}-w{size}-lr0.01-seed{n}" for arm in ("attention", "state") for size in (32, 48) for n in (1, 2)
    }
    model, _ = load(home / "sizes" / "runs" / "state-w48-lr0.01-seed2", "latest")
    assert (model.config.width, model.config.blocks["gdn"].mixer.__dict__["n_heads"]) == (48, 3)
    page = (home / "sizes" / "report.html").read_text()
    assert "<h2>By size</h2>" in page
    assert main(["compare", "sizes", "--report"]) == 0
    assert (home / "sizes" / "report.html").read_text() == page
    assert len(json.loads((home / "sizes" / "decoding.json").read_text())) == 4


def test_arms_on_the_command_line_are_patterns_of_one_depth(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", "mha", "gdn mha", "--recipe", "tiny.toml", "--flags", "--width 16", "--plan"]
    assert main([*line, "--tokens", "640"]) == 0
    study = opened(home / "studies" / "mha-vs-gdn-mha")
    assert study is not None
    assert [arm.config.model.pattern for arm in study.arms] == [("mha", "mha"), ("gdn", "mha")]
    assert {arm.config.model.width for arm in study.arms} == {16}
    assert {arm.steps for arm in study.arms} == {10}
    assert "20 or a few more" in capsys.readouterr().out
    assert abs(study.arms[1].costs.parameters / study.arms[0].costs.parameters - 1) <= 0.01


@pytest.mark.parametrize(
    ("arms", "flags", "patterns"),
    [
        ({"a": "--pattern=mha", "b": "--pattern='gdn gdn mla'"}, "", ["mha mha mha", "gdn gdn mla"]),
        ({"a": "--pattern mha", "b": "--pattern=gdn,mla"}, "", ["mha mha", "gdn mla"]),
        ({"swa mla": "", "gdn gdn mla": ""}, "", ["swa mla swa", "gdn gdn mla"]),
        ({"a": "--pattern mha", "b": "--pattern 'gdn mla'"}, "--n-layers 3", ["mha mha mha", "gdn mla gdn"]),
        ({"a": "--pattern mha --n_layers=1", "b": "--pattern 'gdn mla'"}, "", ["mha", "gdn mla"]),
        ({"a": "--lr 1e-3", "b": "--pattern 'gdn mla'"}, "", ["mha", "gdn mla"]),
    ],
)
def test_patterns_are_repeated_or_cut_to_the_longest_however_their_flags_are_written(
    arms: dict[str, str], flags: str, patterns: list[str], home: Path
) -> None:
    asked = Asked(arms=arms, recipe="tiny.toml", flags=flags)
    configs = [compare.config_of(asked, arm, words) for arm, words in compare.flags_of(asked).items()]
    assert [" ".join(config.model.pattern) for config in configs] == patterns


def test_what_a_study_sets_anew_are_flags_that_it_refuses(home: Path) -> None:
    asked = Asked(arms={"mha": "", "gdn": ""}, recipe="tiny.toml")
    config = compare.config_of(asked, "mha", "--pattern mha")
    busy = replace(
        config.train, seed=9, threads=3, save_interval=7, keep_last=9, async_save=True, eval_interval=2, profile=True
    )
    busy = replace(busy, tensorboard=True, eval_tokens=9, max_minutes=1.0, eval_part="all", hf_repo_id="me/x", lr=0.5)
    set_anew = budget(replace(config, train=busy), asked).train
    changed = {f.name for f in fields(busy) if getattr(busy, f.name) != getattr(set_anew, f.name)}
    assert len(changed) == 12
    assert changed <= compare.DECIDED.keys() <= set(flags_of_train())


def test_a_report_of_a_study_that_was_begun_with_flags_beside_its_file_is_asked_for_by_its_folder(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "study.toml", "--seeds", "3", "--plan"]) == 0
    (home / "studies" / "study" / "runs").mkdir()
    assert main(["compare", "--report", "study.toml"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("swamla: error: ")]
    assert line.endswith("name the folder, swamla compare studies/study --report")


def test_the_folder_of_a_study_is_told_what_goes_on_with_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "study.toml", "--plan"]) == 0
    assert main(["compare", "studies/study"]) == 2
    said = capsys.readouterr().err
    assert "studies/study is the folder of a study: the command that began it goes on with it" in said
    assert "swamla compare studies/study --report writes its page anew" in said


def test_a_study_that_has_not_ended_has_no_report(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "study.toml", "--plan"]) == 0
    assert main(["compare", "study.toml", "--report"]) == 2
    assert "the study has not ended: the command that began it goes on" in capsys.readouterr().err


def test_a_study_whose_rate_changed_as_a_run_was_tried_again_has_a_report_of_the_seeds_at_the_new_one(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, folder = results_of(0.05), home / "again"
    before = [
        replace(one, run=one.run.replace("lr0.01", "lr0.0316"), rate=2, lr=0.0316)
        for one in results.outcomes
        if one.purpose == "seed" and one.arm == "gdn"
    ]
    old = [replace(one, run=one.run.replace("lr0.01", "lr0.0316"), bits_per_byte=9.0) for one in results.tests[-5:]]
    begin(folder, results.study)
    for name, lines in (("results", [*results.outcomes, *before]), ("test", [*results.tests, *old])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in lines))
    assert main(["compare", "again", "--report"]) == 0
    (words,) = (one.words() for one in results.comparisons)
    said = " ".join(capsys.readouterr().out.split())
    assert words in said
    assert "gdn-lr0.0316-seed5 are in no figure" in said
    page = (folder / "report.html").read_text()
    assert (page.count("<td>nothing</td>"), page.count("<td>the verdict</td>")) == (5, 10)
    (folder / "test.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in [*results.tests[:-1], *old]))
    assert main(["compare", "again", "--report"]) == 2, "a seed at the new rate is not scored yet"


def test_flags_win_over_the_file(home: Path) -> None:
    assert main(["compare", "study.toml", "--plan", "--seeds", "3", "--match", "none", "--output_dir", "mine"]) == 0
    study = opened(home / "mine")
    assert study is not None
    assert (study.asked.seeds, study.asked.match, study.asked.margin) == (3, "none", 0.5)
    assert study.arms[1].config.model.blocks["gdn"].ffn.widths(32) == {"hidden": 64}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mha", "--recipe", "tiny.toml"], "ARMS mha: must be two or more"),
        (["mha", "mha", "--recipe", "tiny.toml"], "the arm 'mha' is given twice"),
        (["study.toml", "mha"], "study.toml names its arms itself: leave mha out"),
        (["mha", "gnd", "--recipe", "tiny.toml"], "arm 'gnd': --pattern: no block or mixer is called 'gnd'"),
        (["mha", "gdn", "--recipe", "tiny.toml", "--seeds", "1"], "seeds = 1 (--seeds): must be >= 2"),
        (["mha", "gdn", "--recipe", "tiny.toml", "--flags", "--widht 64"], "arm 'mha': unknown flag --widht; did you"),
        (
            ["mha", "gdn", "--recipe", "tiny.toml", "--flags", "--seed 3"],
            "arm 'mha': --seed does nothing in a study: its runs have seed 0 in the search, and then 1 to",
        ),
        (
            ["mha", "gdn", "--recipe", "tiny.toml", "--tokens", "640", "--flags", "--steps 3"],
            "arm 'mha': --steps does nothing in a study: a run ends after the study's",
        ),
        (["study.toml", "--part", "3/2"], "3/2"),
        (["study.toml", "--sizes", "1"], "sizes = 1 (--sizes): must be 2 to 6, each twice as wide as the last, or"),
        (["study.toml", "--sizes", "48,32"], "sizes = [48, 32] (--sizes): must be two or more widths, rising"),
        (["study.toml", "--sizes", "32,40"], "arm 'attention' at size 40: mha.mixer.n_heads = 2 becomes 2.5: must be"),
        (["nowhere", "--report"], "nowhere: holds no study (it has no study.json)"),
        (["study.toml", "--report", "--seeds", "3"], "--report takes the study's folder, or its file, alone: leave"),
        (["study.toml", "--executor", "k8s", "--parts", "2"], "must be one of local, slurm, ray"),
        (
            ["study.toml", "--executor", "local", "--parts", "2", "--part", "1/2"],
            "--part does nothing beside --executor",
        ),
        (["study.toml", "--executor", "local", "--parts", "2", "--jobs", "2"], "--jobs does nothing beside --executor"),
        (["study.toml", "--parts", "2"], "--parts does nothing without --executor: leave it out"),
        (["study.toml", "--executor_options", "a=b"], "--executor_options does nothing without --executor"),
        (
            ["mha", "gdn", "--recipe", "tiny.toml", "--match", "state", "--flags", "--ffn none"],
            "arm 'gdn': cannot have",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line_before_anything_is_trained(
    words: list[str], says: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("swamla: error: ")]
    assert says in line
    assert not Here.started


def test_a_plan_that_is_refused_leaves_nothing_and_what_was_there(home: Path) -> None:
    assert main(["compare", "mha", "gnd", "--recipe", "tiny.toml", "--output_dir", "new"]) == 2
    assert not (home / "new").exists()
    (home / "mine").mkdir()
    (home / "mine" / "thesis.tex").write_text("")
    assert main(["compare", "mha", "gnd", "--recipe", "tiny.toml", "--output_dir", "mine"]) == 2
    assert [path.name for path in (home / "mine").iterdir()] == ["thesis.tex"]


def test_a_study_that_has_run_is_not_replaced_by_another(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "study.toml"]) == 0
    capsys.readouterr()
    assert main(["compare", "study.toml", "--margin", "0.1"]) == 2
    assert "holds another study, whose margin is 0.5, not 0.1: name another folder with --output_dir" in (
        capsys.readouterr().err
    )


def test_a_typo_in_a_study_file_is_named_with_its_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "study.toml").write_text(STUDY.replace("margin", "marign"))
    assert main(["compare", "study.toml"]) == 2
    assert 'marign = 0.5 (study.toml:7): no such setting; did you mean "margin"?' in capsys.readouterr().err


def test_another_text_than_was_planned_with_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "study.toml", "--plan"]) == 0
    (home / "texts" / "new.txt").write_text("another text, which changes what is held out " * 9)
    assert main(["compare", "study.toml"]) == 2
    assert "the data changed since the study was planned" in capsys.readouterr().err


def test_the_flags_that_state_a_study_are_keys_of_its_file() -> None:
    from swamla.cli.compare import Arguments

    stated = {"recipe", "flags", "question", "match", "margin", "tokens", "seeds", "rates", "threads"}
    stated |= {"sizes", "larger_seeds"}
    assert stated <= {*Arguments.__dataclass_fields__} & {*Asked.__dataclass_fields__}
    for name in stated:
        assert Arguments.__dataclass_fields__[name].default == Asked.__dataclass_fields__[name].default
