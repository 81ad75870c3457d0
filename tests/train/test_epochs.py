"""How often text is seen: counted by the labels that rows have, told when a pass is complete."""

import io

import pytest
from rich.console import Console

from swamla.data.config import DataConfig, WeightedSource
from swamla.data.preparing import prepare
from swamla.train import train
from swamla.train.tracking.metrics import read_metrics
from swamla.train.tracking.step_log import Epochs

from .helpers import tiny_config


def documents(dataset):
    """Labels of one pass, counted in the documents themselves: each has its tokens and an end."""
    text = dataset.train
    return sum(len(text.tokens[begin:end]) + 1 for begin, end in zip(text.offsets[:-1], text.offsets[1:], strict=True))


def test_a_run_tells_each_pass_when_it_is_complete_and_how_many_there_were(tmp_path, dataset):
    once, rows = documents(dataset), 4 * 32
    steps = -(-2 * once // rows) + 1  # a little more than two passes
    out = io.StringIO()
    config = tiny_config(steps=steps)
    train(config, tmp_path / "run", dataset=dataset, console=Console(file=out, width=400))
    said = out.getvalue()
    source = dataset.meta["source"]
    assert f"{steps} steps are {steps * rows:,} tokens, {steps * rows / once:.2f} epochs of {source}\n" in said
    for passes in (1, 2):
        step = -(-passes * once // rows)  # the first by whose end as many labels were read
        times = "1 time" if passes == 1 else "2 times"
        assert f"all of {source} ({once:,} tokens) was seen {times}, after step {step}\n" in said
    assert said.count("was seen") == 2
    assert f"after step {steps}: {steps * rows:,} tokens, {steps * rows / once:.2f} epochs of {source}\n" in said
    assert f"Epoch: {rows / once:.2f} | " in said
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["epoch"] for r in records] == pytest.approx([step * rows / once for step in range(1, steps + 1)])


def test_of_many_passes_ever_fewer_are_told():
    epochs = Epochs({"text": 10})
    told = [now // 10 for now in range(1, 25_000) for _ in epochs.completed(now - 1, now)]
    assert told[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30]
    assert told[-3:] == [900, 1000, 2000]
    assert list(epochs.completed(5, 35)) == ["all of text (10 tokens) was seen 3 times"]


def test_of_a_mixture_each_source_has_passes_of_its_own(tmp_path):
    for name, count in (("a", 40), ("b", 160)):
        (tmp_path / f"{name}.txt").write_text("to be or not to be\n" * count)
    parts = tuple(WeightedSource(source=str(tmp_path / f"{n}.txt"), weight=w) for n, w in (("a", 3), ("b", 1)))
    config = DataConfig(source="mixture", tokenizer="byte", mixture=parts, cache_dir=str(tmp_path / "cache"))
    dataset = prepare(config)
    alone = {part.meta["source"]: documents(part) for part in dataset.parts}
    shares = dict(zip(alone, (0.75, 0.25), strict=True))
    assert dataset.epochs() == {name: round(count / shares[name]) for name, count in alone.items()}
    assert Epochs(dataset.epochs()).seen(10**6) == pytest.approx(0.75e6 / min(alone.values()), rel=1e-3)


def test_where_nobody_knows_how_long_the_text_is_nothing_is_told():
    assert (Epochs({}).seen(5), Epochs({}).describe(5), list(Epochs({}).completed(0, 5))) == (None, "", [])
