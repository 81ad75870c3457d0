"""`swamla evaluate RUN --tasks`: tasks of a folder, their figures computed another way, the table, the file, errors."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'swamla[eval]'")

import swamla
from swamla.cli import main
from swamla.data.tokenizer import Tokenizer
from swamla.evaluate.tasks import find_tasks
from swamla.model.language_model import LanguageModel
from tests.cli.test_prepare import TINY

WORDS = ["cat", "dog", "mouse", "bird", "horse"]
QUESTIONS = [
    {"q": f"A {a} and a {b}: the second is a", "choices": [a, b, "tree"], "gold": 1}
    for a, b in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)
]
TEXTS = [{"text": f"The {word} is no {other}. " * 3} for word, other in zip(WORDS, reversed(WORDS), strict=True)]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
metadata: {{version: 2.5}}
"""
TASKS = {
    "own_choice": """
task: own_choice
tag: own_words
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "own_shots": """
task: own_shots
tag: own_words
output_type: multiple_choice
fewshot_split: test
fewshot_config: {sampler: first_n}
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "own_rolling": """
task: own_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "own_generation": """
task: own_generation
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [" "], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "own_word": """
task: own_word
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: " {{choices[gold]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
}
GROUP = (
    "group: own_group\ntask: [own_choice, own_shots]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and one of tasks whose data are files there."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tasks").mkdir()
    for name, rows in (("questions", QUESTIONS), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = folder / ("texts.jsonl" if name == "own_rolling" else "questions.jsonl")
        (folder / "tasks" / f"{name}.yaml").write_text(task + COMMON.format(data=data, cache=folder / "datasets"))
    (folder / "tasks" / "own_group.yaml").write_text(GROUP)
    broken = {
        "own_gone": (TASKS["own_rolling"], "no.jsonl"),
        "own_wrong": (TASKS["own_rolling"].replace("{{text}}", "{{nothing}}"), "texts.jsonl"),
        "own_later": (
            TASKS["own_choice"].replace("{{q}}", "{{q if 'A cat' in q else nothing}}").replace("tag: own_words\n", ""),
            "questions.jsonl",
        ),
    }
    for name, (task, file) in broken.items():
        text = re.sub(r"task: \w+", f"task: {name}", task) + COMMON.format(
            data=folder / file, cache=folder / "datasets"
        )
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    data = {"source": str(folder / "texts.jsonl"), "tokenizer": "byte", "cache_dir": str(folder / "cache")}
    (folder / "run.json").write_text(json.dumps({**TINY, "data": data}))
    assert main(["train", str(folder / "run.json"), "--output_dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(home: Path) -> tuple[LanguageModel, Tokenizer]:
    return swamla.load(home / "run")


@torch.no_grad()
def log_p(loaded: tuple[LanguageModel, Tokenizer], context: str, continuation: str) -> float:
    """By one forward pass: log p(continuation | context)."""
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(context + continuation)])
    found = model(ids[None, :-1])[0].double().log_softmax(-1).gather(1, ids[1:, None])
    return found[len(tokenizer.encode(context)) :].sum().item()


def run(home: Path, tasks: str, *more: str) -> int:
    return main(["evaluate", str(home / "run"), "--tasks", tasks, "--include_path", str(home / "tasks"), *more])


def results(home: Path, capsys: pytest.CaptureFixture[str], tasks: str, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(home, tasks, "--json", *more) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def shots(number: int) -> str:
    """The first questions with their answers, as lm-eval puts them before another."""
    return "".join(f"{row['q']} {row['choices'][row['gold']]}\n\n" for row in QUESTIONS[:number])


def accuracy(loaded: tuple[LanguageModel, Tokenizer], before: str = "", normed: bool = False) -> list[float]:
    right = []
    for row in QUESTIONS:
        scores = [
            log_p(loaded, before + row["q"], f" {choice}") / (len(choice) if normed else 1) for choice in row["choices"]
        ]
        right.append(float(scores.index(max(scores)) == row["gold"]))
    return right


def standard_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def test_choices_are_scored_as_by_hand(
    home: Path, loaded: tuple[LanguageModel, Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(home, capsys, "own_choice")["results"]["own_choice"]
    for name, right in (("acc", accuracy(loaded)), ("acc_norm", accuracy(loaded, normed=True))):
        assert found[f"{name},none"] == pytest.approx(sum(right) / len(right))
        assert found[f"{name}_stderr,none"] == pytest.approx(standard_error(right))


def test_examples_go_before_the_question(
    home: Path, loaded: tuple[LanguageModel, Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(home, capsys, "own_shots", "--num_fewshot", "2", "--limit", "3", "--samples")
    assert found["n-shot"] == {"own_shots": 2}
    assert found["n-samples"]["own_shots"] == {"original": 5, "effective": 3}
    for sample in found["samples"]["own_shots"]:
        nats = [log_p(loaded, sample["arguments"][0][0], f" {choice}") for choice in sample["doc"]["choices"]]
        assert sample["arguments"][0][0].endswith(sample["doc"]["q"])
        assert sample["arguments"][0][0].count("the second is a") == 3
        assert [each[0][0] for each in sample["resps"]] == pytest.approx(nats, abs=1e-3)


def test_the_perplexity_of_last_words_has_a_standard_error_and_stdout_the_results_alone(
    home: Path, loaded: tuple[LanguageModel, Tokenizer], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # of lm-eval's bootstrap, else in a process for each core
    monkeypatch.setattr("swamla.evaluate.tasks.BOOTSTRAPS", 2000)
    found = results(home, capsys, "own_word")["results"]["own_word"]
    nats = torch.tensor([log_p(loaded, row["q"], " " + row["choices"][row["gold"]]) for row in QUESTIONS]).double()
    assert found["perplexity,none"] == pytest.approx(math.exp(-nats.mean()), rel=1e-5)
    drawn = nats[torch.randint(5, (4000, 5), generator=torch.Generator().manual_seed(0))].mean(dim=1)
    assert found["perplexity_stderr,none"] == pytest.approx((-drawn).exp().std().item(), rel=0.1)


def test_texts_are_measured_in_bits_per_byte(
    home: Path, loaded: tuple[LanguageModel, Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(home, capsys, "own_rolling")["results"]["own_rolling"]
    nats = sum(log_p(loaded, "", row["text"]) for row in TEXTS)
    n_bytes = sum(len(row["text"].encode()) for row in TEXTS)
    assert found["bits_per_byte,none"] == pytest.approx(-nats / n_bytes / math.log(2), rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(-nats / n_bytes), rel=1e-5)


def test_answers_are_generated_up_to_the_stop(
    home: Path, loaded: tuple[LanguageModel, Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded
    found = results(home, capsys, "own_generation", "--samples", "--batch_size", "2")
    answers = []
    for row in QUESTIONS:
        ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(row["q"])])
        new = model.generate(ids, 6, temperature=0, stop_id=tokenizer.eos_id).tolist()
        answers.append(tokenizer.decode(new).partition(" ")[0])
    assert [sample["resps"][0][0] for sample in found["samples"]["own_generation"]] == answers
    right = [float(answer == row["choices"][row["gold"]]) for answer, row in zip(answers, QUESTIONS, strict=True)]
    assert found["results"]["own_generation"]["exact_match,none"] == sum(right) / len(right)


def test_the_file_says_what_was_run_with_what_and_has_samples_only_if_asked(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    assert run(home, "own_choice,own_rolling", "--out", str(out), "--limit", "2") == 0
    found = json.loads(out.read_text())
    assert "samples" not in found
    assert found["versions"] == {"own_choice": 2.5, "own_rolling": 2.5}
    assert found["configs"]["own_choice"]["doc_to_text"] == "{{q}}"
    assert (found["swamla_version"], found["torch_version"]) == (swamla.__version__, torch.__version__)
    assert found["config"]["checkpoint"] == 6
    assert (found["config"]["limit"], found["config"]["precision"]) == (2, "fp32")
    assert found["config"]["model"]["width"] == 16
    assert [path.name for path in tmp_path.iterdir() if "results" in path.name] == ["results.json"]
    assert run(home, "own_choice", "--out", str(out), "--samples", "--batch_size", "1") == 0
    assert len(json.loads(out.read_text())["samples"]["own_choice"]) == 5


def test_the_table_has_each_metric_with_its_standard_error_and_fits_60_columns(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    found = results(home, capsys, "own_group,own_rolling")
    assert run(home, "own_group,own_rolling") == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 60
    assert [line for line in shown.err.splitlines() if "starting" not in line] == []  # neither bars nor warnings
    words = shown.out.split()
    for task in ("own_choice", "own_rolling"):
        for name, value in found["results"][task].items():
            if isinstance(value, float):
                assert f"{value:.4f}" in words, name
    assert f"{found['groups']['own_group']['acc,none']:.4f}" in words
    assert "acc ↑" in shown.out
    assert "bits_per_byte ↓" in shown.out


def test_tasks_are_named_by_tags_patterns_and_files_and_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(home / "tasks")

    def found(*names: str) -> set[str]:
        return set(find_tasks(names, folder)["tasks"])

    assert found("own_words") == found("own_[cs]h*") == {"own_choice", "own_shots"}
    assert found("own_choice", "own_c*") == found(f"{folder}/own_choice.yaml") == {"own_choice"}
    capsys.readouterr()
    assert main(["evaluate", "no-run", "--tasks", "list", "--include_path", folder]) == 0
    listed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (listed["own_choice"], listed["own_group"], listed["own_words"]) == ("multiple_choice", "group", "tag")
    assert listed["hellaswag"] == "multiple_choice"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("own_choise", "no task 'own_choise'; did you mean own_choice"),
        ("qqqqqqqqqqq", "no task 'qqqqqqqqqqq'; swamla evaluate RUN --tasks list shows them"),
        ("hellaswag", r"the data of hellaswag cannot be read \(.*\); most tasks fetch it from the hub"),
        ("own_gone", r"the data of own_gone cannot be read \(.*no.jsonl"),
        ("own_wrong", r"own_wrong cannot be loaded \(UndefinedError: 'nothing' is undefined\)"),
        ("own_later", r"lm-eval cannot run the tasks \(UndefinedError: 'nothing' is undefined\)"),
        ("own_choice --num_fewshot -1", "--num_fewshot -1: must be >= 0"),
        ("own_choice --limit -1", "--limit -1: must be >= 0"),
        ("own_choice --batch_size 0", "--batch_size 0: must be >= 1"),
        ("own_choice --samples", "--samples needs --out FILE, or --json"),
        ("own_choice --out no/such/file.json", "--out no/such/file.json: its folder does not exist"),
        ("own_choice --block_size 8", "--block_size and --tasks exclude each other"),
        ("own_choice --data x", "--data and --tasks exclude each other"),
        (",", "--tasks ,: must name one task at least"),
    ],
)
def test_mistakes_are_one_line(home: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    tasks, *more = line.split()
    capsys.readouterr()
    assert run(home, tasks, *more) == 2
    (error,) = [each for each in capsys.readouterr().err.splitlines() if not each.endswith("…")]
    assert re.search(message, error), error


def test_flags_of_tasks_need_tasks(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(home / "run"), "--limit", "3"]) == 2
    assert "--limit needs --tasks" in capsys.readouterr().err
