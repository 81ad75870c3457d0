"""`swamla reproduce nanogpt-mla`, with tiny arms: killed, resumed, measured, and put into words."""

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swamla.checkpoint import load
from swamla.cli import main
from swamla.interpret.sections import Verdict
from swamla.interpret.verdicts import inducing_heads
from swamla.model.language_model import NO_LABEL
from swamla.study.nanogpt_mla.measured import (
    induction_behind,
    induction_edges,
    induction_on_task,
    moved_on,
    scored_rows,
)
from swamla.study.nanogpt_mla.page import page
from swamla.study.nanogpt_mla.plan import EXPERIMENTS, MIXERS, REPEATS, configs, text_of
from swamla.study.nanogpt_mla.words import not_said, verdicts
from swamla.tasks import Task, parse
from tests.browser import browser
from tests.interpret.models import build, induction_model

from .in_process import reproduced

TASKS = [parse(f"induction?length=24&prefix=4&shortest=4&longest=8&vocabulary=12&pieces={n}") for n in (0, 2, 3)]
TINY = "--width 16 --batch_size 2 --steps 2 --eval_interval 1 --eval_tokens 128"
KILLED_RUN = 4
BUDGETS = [each.slug for each in EXPERIMENTS if each.kind == "repeats" and each.seeds is None]
CUT_OFF = """
const frames = [...document.querySelectorAll('svg')];
return frames.filter(svg => [...svg.querySelectorAll('text')].some(text => {
  const inner = text.getBoundingClientRect(), outer = svg.getBoundingClientRect();
  return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
})).map(svg => svg.outerHTML.slice(0, 200));
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory):
    """A study that was killed with SIGKILL in its fourth run, and then ended by the same command."""
    folder = tmp_path_factory.mktemp("reproduce")
    text = folder / "text.txt"
    text.write_text("".join(f"line {n}: the quick brown fox, {n * n % 97}\n" for n in range(400)))
    output = folder / "study"
    arguments = ["nanogpt-mla", "-o", str(output), "--seeds", "2", "--data", str(text), "--flags", TINY, "--jobs", "1"]
    words = [sys.executable, str(Path(__file__).with_name("in_process.py")), str(KILLED_RUN), *arguments]
    killed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = (output / "results.jsonl").read_text().splitlines()
    started = reproduced(arguments)
    return SimpleNamespace(
        output=output,
        arguments=arguments,
        before=[json.loads(line)["run"] for line in before],
        started=started,
        result=json.loads((output / "result.json").read_text()),
        page=(output / "report.html").read_text(),
    )


def test_after_a_kill_the_same_command_resumes_the_run_under_way_and_repeats_none_that_ended(study):
    runs = sum(len(MIXERS) * min(2, each.seeds or 2) for each in EXPERIMENTS)
    assert len(study.before) == KILLED_RUN - 1
    assert len(study.started) == runs - len(study.before)
    first = study.started[0]
    assert first[:2] == ["train", "--resume"], "the run that was killed goes on from its checkpoint"
    named = {Path(words[words.index("--output_dir") + 1]).name for words in study.started[1:]}
    assert not named & {*study.before, Path(first[2]).name}
    assert len(study.result["runs"]) == len({row["run"] for row in study.result["runs"]}) == runs


def test_a_study_that_has_ended_trains_and_measures_nothing_again(study):
    measured = (study.output / "measured.jsonl").read_bytes()
    assert reproduced(study.arguments, pictures=False) == []
    assert (study.output / "measured.jsonl").read_bytes() == measured
    assert json.loads((study.output / "result.json").read_text()) == study.result


def test_another_study_in_the_folder_is_refused(study, capsys: pytest.CaptureFixture[str]):
    other = ["3" if word == "2" else word for word in study.arguments]
    assert main(["reproduce", *other]) == 2
    error = capsys.readouterr().err
    assert "holds another study, whose seeds is 2, not 3: name another folder with --output, or" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pattern mha", "--pattern is a setting of the arms: leave it out"),
        ("--output-dir here", "--output_dir is a setting of the arms: leave it out"),
        ("--widht 16", "unknown flag --widht; did you mean --width?"),
        ("--width 15", "n_heads"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_a_line(
    tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["reproduce", "nanogpt-mla", "-o", str(tmp_path / "new"), "--flags", flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert not (tmp_path / "new").exists()


def test_arms_differ_in_nothing_but_the_mixer(study):
    arms = {file.stem: json.loads(file.read_text()) for file in (study.output / "arms").iterdir()}
    for experiment in EXPERIMENTS:
        first, *others = (arms[f"{experiment.slug}-{mixer}"] for mixer in MIXERS)
        for plain in (first, *others):
            (block,) = plain["model"].pop("blocks").values()
            plain["model"]["rest_of_block"] = {name: value for name, value in block.items() if name != "mixer"}
            plain["model"]["pattern"] = len(plain["model"]["pattern"])
        assert all(other == first for other in others)


@pytest.mark.parametrize("mixer", MIXERS)
def test_arms_of_random_repeats_are_layers_of_attention_alone_that_differ_in_steps_and_rate(mixer: str):
    found = configs("text.txt", "char")
    short, long, longest, _ = (found[f"{each.slug}-{mixer}"] for each in EXPERIMENTS)
    assert short.model == long.model == longest.model
    assert (short.model.width, short.model.pattern, short.model.learned_positions) == (64, (mixer, mixer), 128)
    assert short.model.blocks[mixer].ffn.kind == "none"
    assert short.data.task == long.data.task == longest.data.task == parse(REPEATS)
    train = {name: getattr(short.train, name) for name in ("steps", "lr")}
    assert train == {"steps": 400, "lr": 1e-2}
    assert (long.train.steps, long.train.lr) == (1000, 4e-3)
    assert replace(longest.train, steps=1000, eval_interval=40, log_interval=100) == long.train


def test_sizes_are_those_of_the_trained_models(study):
    for row in study.result["runs"]:
        model, _ = load(study.output / "runs" / row["run"], "latest")
        (experiment,) = (each for each in study.result["experiments"] if each["slug"] == row["experiment"])
        sizes = experiment["sizes"][row["mixer"]]
        assert sizes["total"] == sizes["active"] == sum(p.numel() for p in model.parameters())
        mixers = sum(p.numel() for block in model.blocks for p in block.mixer.parameters())
        assert sizes["mixers"] == mixers


def test_the_page_holds_all_it_shows_and_loads_nothing(study):
    assert "src=" not in study.page
    assert "http://" not in study.page.replace("http://www.w3.org", "")
    assert "https://" not in study.page
    for verdict in study.result["verdicts"]:
        assert verdict["question"] in study.page
    for mixer in MIXERS:
        assert f'<th style="text-align:left">{mixer}</th>' in study.page, "samples stand side by side"
    for name in ("curves", f"maps-{EXPERIMENTS[0].slug}"):
        assert (study.output / f"{name}.png").stat().st_size > 10_000


def with_three_seeds(result: dict[str, Any]) -> dict[str, Any]:
    """The result as wide as that of the command's own three seeds: the last of two is there twice."""
    data = copy.deepcopy(result)
    for found in data["found"].values():
        for own in found.values():
            for each in (own, own.get("steps_to", {})):
                by_seed = {name: v for name, v in each.items() if isinstance(v, list) and v and name != "grown_rate"}
                each |= {name: [*values, values[-1]] for name, values in by_seed.items()}
            own["cut"] = [10.25 for _ in own["cut"]]
    return data


@pytest.mark.parametrize("width", [900, 1280])
def test_in_a_browser_the_page_fits_the_window_loads_nothing_and_tells_what_the_pointer_is_at(
    study, width: int, tmp_path: Path
):
    (tmp_path / "report.html").write_text(page(with_three_seeds(study.result)))
    with browser(width, 1000) as window:
        window.open(tmp_path / "report.html")
        assert window.misfits() == []
        window.point_at(".map rect")
        assert window.text("#tip").splitlines()[0] == "mha, layer 0, head 0"
        assert window.run(CUT_OFF) == [], "no label is cut off"


def told(study, grown: dict[tuple[str, str], int], late: dict[tuple[str, str], int]) -> list[Verdict]:
    """The verdicts, if so many of two seeds have induction heads, and heads that read behind: (mixer, experiment).

    Of the experiments with two seeds, and the text.
    """
    data = copy.deepcopy(study.result)
    data["experiments"] = [each for each in data["experiments"] if each["slug"] in (*BUDGETS, "text")]
    for place, count in grown.items():
        rows = [row for row in data["runs"] if (row["mixer"], row["experiment"]) == place]
        reads = [number >= 2 - late.get(place, 0) for number in range(2)]
        for number, row in enumerate(rows):
            row["induction"] = "yes" if number < count else "no"
            if number < count or reads[number]:
                row["repeats"]["accuracy"] = 0.9
            if reads[number]:
                row["behind"] |= {"hit": 0.8, "cut": 2.0, "control": 0.01}
        data["found"][place[1]][place[0]] |= {"grown": count, "late": reads}
    return verdicts(data)


@pytest.mark.parametrize(
    ("mha", "mla", "latent", "late", "answer", "words"),
    [
        ((2, 2), (2, 2), (2, 2), 0, "no", "It does not hold for mla after 2 steps"),
        ((2, 2), (0, 0), (0, 0), 0, "yes", "It holds for mla after 2 steps, mla after 2 steps, latent after 2 steps"),
        ((2, 2), (2, 2), (0, 2), 0, "partly", "So what is found depends on the budget: steps and rate"),
        ((0, 0), (0, 0), (0, 0), 0, "partly", "It cannot be told, as no run of mha has such heads either"),
        ((2, 2), (2, 2), (2, 1), 0, "no", "Some seeds only have such heads in latent"),
        (
            (2, 2),
            (0, 0),
            (0, 0),
            2,
            "partly",
            "to the letter only, as the heads that answer read right behind what followed before, for mla",
        ),
    ],
)
def test_the_claim_is_judged_by_the_seeds_that_have_heads(study, mha, mla, latent, late: int, answer: str, words: str):
    counts = {"mha": mha, "mla": mla, "latent": latent}
    grown = {(mixer, slug): count[n] for mixer, count in counts.items() for n, slug in enumerate(BUDGETS)}
    first = told(study, grown, {("mla", BUDGETS[1]): late})[0]
    assert (first.answer, words in first.text) == (answer, True), first.text


def test_heads_that_read_behind_the_answer_are_another_circuit_and_named_as_such(study):
    short, long = BUDGETS
    grown = {(mixer, slug): 0 for mixer in MIXERS for slug in (short, long)} | {("mha", long): 2}
    found = {each.question: each for each in told(study, grown, {("mla", long): 2})}
    circuit = found["Is it the same circuit?"]
    assert (circuit.answer, "mla 2.00 nats (best head's hit rate 0.80, " in circuit.text) == ("no", True), circuit.text
    heads = found["Heads in mla, 2 steps?"]
    assert (heads.answer, heads.short) == ("partly", "read behind")
    assert "Answers otherwise?" not in found


@pytest.mark.parametrize(
    ("missing", "words", "heads"),
    [
        ("mla", "No run finished of mla after 2 steps", "no run"),
        ("mha", "It cannot be told, as no run of mha finished, for mla after 2 steps", "no run of mha"),
    ],
)
def test_a_mixer_without_a_finished_run_is_told_as_such_whatever_mha_has(study, missing: str, words: str, heads: str):
    data = copy.deepcopy(study.result)
    data["experiments"] = [each for each in data["experiments"] if each["slug"] in (*BUDGETS, "text")]
    for slug in BUDGETS:
        found = data["found"][slug]
        found["mha"]["grown"] = 0 if missing == "mha" else 2
        found["mla"]["grown"], found["mla"]["late"] = 0, [False, False]
        for each in (found[missing], found[missing]["steps_to"]):
            each |= {name: [] for name, values in each.items() if isinstance(values, list)}
    data["runs"] = [row for row in data["runs"] if row["mixer"] != missing or row["experiment"] == "text"]
    claim, *others = verdicts(data)
    assert words in claim.text
    assert "no run of mha has such heads either, for mla" not in claim.text
    assert next(each for each in others if each.question == "Heads in mla, 2 steps?").short == heads


def test_what_the_verdicts_do_not_say_names_the_margins_what_p_is_adjusted_for_and_lost_runs(study):
    assert study.result["not_said"] == not_said(study.result)
    said = " ".join(study.result["not_said"])
    assert "by Holm over the 2 mixers of a budget alone" in said
    assert "the program's: 0.05 in accuracy, 0.01 in bits per byte; the one in study.json is not used" in said
    assert "did not finish" not in said
    lost = study.result | {"failed": [{"run": "a-seed1", "status": "diverged", "error": ""}]}
    assert any(text.endswith("nor in the number of seeds: a-seed1.") for text in not_said(lost))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_induction_edges_lead_to_what_followed_the_same_token_and_others_to_none_of_it(task: Task):
    rows = scored_rows(task, 8)
    edges = induction_edges(rows)
    for row in range(8):
        tokens, labels = rows.tokens_BT[row].tolist(), rows.labels_BT[row].tolist()
        for query in range(task.length):
            asked = labels[query] != NO_LABEL
            followed = [s for s in range(1, query + 1) if asked and tokens[s - 1] == tokens[query]]
            assert edges["induction"][row, query].nonzero().flatten().tolist() == followed
            assert not asked or tokens[followed[-1]] == labels[query], "the latest is the answer"
            same = [s for s in range(query) if asked and tokens[s] == tokens[query]]
            assert edges["duplicate"][row, query].nonzero().flatten().tolist() == same
            other = edges["other"][row, query].nonzero().flatten().tolist()
            assert len(other) == len(followed)
            assert not set(other) & set(followed)
            assert all(s <= query and tokens[s] != labels[query] for s in other)
            for offset in (1, 3):
                behind = moved_on(edges["induction"], offset)[row, query].nonzero().flatten().tolist()
                assert behind == [s + offset for s in followed if s + offset <= query and s + offset not in followed]
            previous = edges["previous"][query].nonzero().flatten().tolist()
            assert previous == [query - 1] * (query > 0)


def test_a_layer_built_to_be_an_induction_head_is_found_on_rows_in_pieces_and_an_untrained_one_is_not():
    """It reads all that followed its token evenly, which is wrong where another id followed as often."""
    task = parse("induction?length=60&prefix=6&shortest=8&longest=12&vocabulary=24&pieces=5")
    rows = scored_rows(task, 16)
    found = induction_on_task(induction_model(), rows)
    assert found.accuracy > 0.9
    assert found.layers[0].hit == (1.0,)
    assert found.layers[0].cut > 1
    assert abs(found.layers[0].control) < 0.01
    assert 1 / 12 <= found.chance <= 1 / 8
    assert inducing_heads(found) == [(0, 0)]
    late = induction_behind(induction_model(), rows)
    assert late.cut < 0.1 * found.layers[0].cut
    assert late.hit < 0.1
    assert inducing_heads(induction_on_task(build("mha"), rows)) == []


def test_a_text_that_is_not_here_is_not_fetched(tmp_path: Path):
    assert text_of("", tmp_path) == ("stdlib", "byte")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "shakespeare.txt").write_text("x")
    assert text_of("", tmp_path) == ("shakespeare", "char")
    assert text_of("mine.txt", tmp_path) == ("mine.txt", "char")
    assert os.listdir(tmp_path / "sources") == ["shakespeare.txt"]
