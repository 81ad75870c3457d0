"""The speedrun: what it prints is computed here another way; both learners see the same text; records are fair."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import quality, quality_page
from benchmarks.quality import Learner, NanoModel, Ours, nanogpt_parameters, nanogpt_shape, race, seconds_until
from swamla.bench.results import Results
from swamla.cli.run_config import resolve
from swamla.data.preparing import prepare
from swamla.errors import UsageError
from swamla.train import train
from swamla.train.run_folder import resolve_vocabulary
from swamla.train.tracking.metrics import read_metrics


class FakeGPT(nn.Module):
    """What nanoGPT's model is to us: logits and the mean loss of labels other than -1."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, tokens, targets):
        logits = self.table(tokens)
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Clock(Learner):
    """A learner whose steps take the seconds that they say."""

    def __init__(self, name, seconds, budget, monkeypatch):
        super().__init__(name, nn.Linear(1, 1), budget, "fp32")
        self.takes = seconds

    def step(self):
        quality.time.now += self.takes
        return 7

    def score(self, dataset, length, most=quality.EVALUATED):
        quality.time.now += 1000  # scoring takes long, and nobody's clock counts it
        return 5.0 - self.seconds if most else 1.0


@pytest.fixture
def clock(monkeypatch):
    time = SimpleNamespace(now=0.0)
    time.monotonic = lambda: time.now
    monkeypatch.setattr(quality, "time", time)
    return time


def test_learners_take_turns_on_clocks_of_their_own(clock, monkeypatch):
    fast, slow = Clock("fast", 1.5, 24.0, monkeypatch), Clock("slow", 5.0, 24.0, monkeypatch)
    order = []
    for learner in (fast, slow):
        step = learner.step
        learner.step = lambda learner=learner, step=step: (order.append(learner.name), step())[1]
    scores = [
        (learner.name, learner.seconds, bits) for learner, bits in race([fast, slow], {"fast": 8, "slow": 8}, None)
    ]
    assert (fast.seconds, fast.steps, fast.tokens) == (24.0, 16, 112)
    assert (slow.seconds, slow.steps, slow.tokens) == (25.0, 5, 35)  # the fifth step's middle is within the budget
    assert order[:9] == ["fast"] * 3 + ["slow"] + ["fast"] * 1 + ["slow"] + ["fast"] * 3
    assert [(n, s) for n, s, _ in scores if n == "slow"] == [
        ("slow", 5.0),
        ("slow", 10.0),
        ("slow", 15.0),
        ("slow", 20.0),
        ("slow", 25.0),
    ]
    assert [(n, s) for n, s, _ in scores if n == "fast"][-1] == ("fast", 24.0)
    assert scores[-1][2] == 1.0
    assert [bits for name, *_, bits in scores if name == "fast"].count(1.0) == 1


@pytest.mark.parametrize(
    ("target", "expected"), [(3.0, 10.0), (2.5, 15.0), (2.0, 20.0), (1.75, 30.0), (1.5, 40.0), (1.4, None), (9.0, 10.0)]
)
def test_the_time_until_a_score_is_read_off_the_straight_line_between_points(target, expected):
    assert seconds_until([(10, 3.0), (20, 2.0), (40, 1.5)], target) == expected


def test_a_curve_that_rises_counts_from_where_it_was_first_low_enough():
    assert seconds_until([(10, 3.0), (20, 2.0), (30, 2.6), (40, 1.0)], 2.5) == pytest.approx(15.0)
    assert seconds_until([], 2.5) is None


def test_nanogpts_size_is_counted_by_its_matrices():
    width, depth, vocabulary = 64, 3, 100
    block = nn.ModuleList(
        [
            *(nn.Linear(a * width, b * width, bias=False) for a, b in ((1, 3), (1, 1), (1, 4), (4, 1))),
            *(nn.LayerNorm(width, bias=False) for _ in range(2)),
        ]
    )
    rest = [
        nn.Embedding(vocabulary, width),
        nn.Embedding(quality.NANOGPT_LENGTH, width),
        nn.LayerNorm(width, bias=False),
    ]
    counted = depth * sum(p.numel() for p in block.parameters()) + sum(p.numel() for m in rest for p in m.parameters())
    assert nanogpt_parameters(width, depth, vocabulary) == counted


def test_nanogpt_gets_our_size_or_is_refused():
    config = resolve("quickstart", {}).config
    shape = nanogpt_shape(config, 4096, 4_400_000)
    assert nanogpt_parameters(shape.width, shape.depth, 4096) == pytest.approx(4_400_000, rel=0.05)
    assert shape.width % shape.heads == 0
    with pytest.raises(UsageError, match="no width of nanoGPT has 1,000 parameters"):
        nanogpt_shape(config, 4096, 1_000)


def test_nanogpts_loss_is_summed_over_the_labels_that_count():
    torch.manual_seed(0)
    model = NanoModel(FakeGPT(11))
    tokens, labels = torch.randint(11, (2, 9)), torch.randint(11, (2, 9))
    labels[0, 3:] = -100
    total, _ = model.loss(tokens, labels)
    by_hand = -sum(
        model.gpt.table.weight[token].log_softmax(0)[label]
        for token, label in zip(tokens.flatten(), labels.flatten(), strict=True)
        if label != -100
    )
    torch.testing.assert_close(total, by_hand)


@pytest.mark.parametrize("values", [[1.5], [1.40, 1.44], [1.40, 1.44, 1.39]])
def test_intervals_are_students(values):
    quantile = {2: 12.7062, 3: 4.30265}  # from a printed table of the t distribution, 97.5 %
    n = len(values)
    middle = sum(values) / n
    if n == 1:
        assert quality_page.interval(values, 3) == "1.500"
        return
    deviation = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
    assert quality_page.interval(values, 3) == f"{middle:.3f} ± {quantile[n] * deviation / math.sqrt(n):.3f}"


def tiny(tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    for index in range(40):
        (text / f"{index}.txt").write_text(f"document {index} says {index * 'so ' + 'much'}. " * 20, encoding="utf-8")
    given = {"source": str(text), "tokenizer": "byte", "width": 32, "n_heads": 2, "batch_size": 2, "block_size": 64}
    config = resolve(
        "quickstart", {**given, "device": "cpu", "precision": "fp32", "n_layers": 1, "pattern": "swa"}
    ).config
    return replace(config, data=replace(config.data, cache_dir=str(tmp_path / "cache"), held_out_fraction=0.2))


def test_our_learner_takes_the_steps_of_a_training_run(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    muon = replace(config.train.optimizer, momentum_warmup=4.0)
    config = replace(config, train=replace(config.train, steps=5, max_minutes=None, eval_seconds=None, optimizer=muon))
    dataset = prepare(config.data)
    train(config, tmp_path / "run", dataset=dataset)
    told = [
        record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record.get("loss") is not None
    ]
    losses = []
    step = quality.training_step

    def kept(*given, **named):
        result = step(*given, **named)
        losses.append(result.loss)
        return result

    monkeypatch.setattr(quality, "training_step", kept)
    ours = Ours(resolve_vocabulary(config, dataset), dataset, config.train.seed, math.inf)
    for _ in range(5):
        ours.tokens += ours.step()
    assert losses == pytest.approx(told, rel=1e-6)


@pytest.mark.parametrize("ramp", [{"batch_ramp": "1:0.5,2:inf"}, {"curriculum": "32:0.5,64:inf"}], ids=str)
def test_recipes_whose_steps_change_shape_are_refused(ramp, tmp_path):
    config = tiny(tmp_path)
    config = replace(config, train=replace(config.train, **ramp))
    with pytest.raises(UsageError, match=f"{next(iter(ramp))}: the speedrun trains steps of one shape"):
        Ours(config, None, 0, 1.0)


def test_a_whole_race_writes_results_page_and_picture(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    monkeypatch.setattr(
        quality,
        "resolve",
        lambda *_: SimpleNamespace(config=replace(config, train=replace(config.train, max_minutes=0.02))),
    )
    monkeypatch.setattr(quality, "ceilings", lambda: {"fp32_flops": 1e9, "bf16_flops": 2e9, "copy_bytes": 3e9})
    monkeypatch.setattr(quality, "MARKS", (0.2, 0.5))
    monkeypatch.setattr(quality, "nanogpt_shape", lambda *_: None)
    monkeypatch.setattr(quality_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(quality_page, "PICTURE", tmp_path / "page.png")
    (tmp_path / "page.md").write_text(
        "before\n<!-- outcome -->\nold\n<!-- end of outcome -->\nafter\n", encoding="utf-8"
    )

    class WithOptimizer(FakeGPT):
        def configure_optimizers(self, decay, lr, betas, device):
            return torch.optim.AdamW(self.parameters(), lr=lr, betas=betas, weight_decay=decay)

    monkeypatch.setattr(quality, "nanogpt", lambda *_: WithOptimizer(257))
    file = tmp_path / "q.json"
    assert quality.main(["--recipe", "tiny", "--minutes", "0.02", "--seeds", "2", "--output", str(file)]) == 0
    results = Results.load(file)
    best = min(results.rows["outcome"][1:4], key=lambda row: row["bits_per_byte"])
    assert [row["name"] for row in results.rows["outcome"]] == [
        "swamla, seed 0",
        "nanoGPT, lr 0.0003, seed 0",
        "nanoGPT, lr 0.001, seed 0",
        "nanoGPT, lr 0.003, seed 0",
        "swamla, seed 1",
        best["name"].replace("seed 0", "seed 1"),
    ]
    assert {row["target"] for row in results.rows["outcome"][:4]} == {best["bits_per_byte"]}
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("before\n<!-- outcome -->")
    assert page.endswith("<!-- end of outcome -->\nafter\n")
    assert f"{best['bits_per_byte']:.4f}" in page
    assert "old" not in page
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_checkout_is_told_in_one_line(tmp_path):
    assert "benchmarks.quality" in sys.modules
    with pytest.raises(UsageError, match="give a checkout of"):
        quality.nanogpt(SimpleNamespace(vocabulary=9, depth=1, heads=1, width=8), 8, tmp_path)
