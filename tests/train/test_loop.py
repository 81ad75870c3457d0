"""The training loop: what a step is, what ends a run, what it leaves behind."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swamla import load
from swamla.data.packing import PackedRows
from swamla.errors import ConfigError, DataError
from swamla.ops.layout import Layout
from swamla.train import Diverged, training_step
from swamla.train import loop as loop_module
from swamla.train import run as run_module
from swamla.train.parallel.strategy import Strategy
from swamla.train.run_folder import fresh_state, resolve_vocabulary
from swamla.train.tracking.metrics import read_metrics

from .helpers import held_out, losses, run, tiny_config, weights


def start(config, dataset):
    """A fresh state without dropout, and the first batch."""
    config = resolve_vocabulary(config, dataset)
    state = fresh_state(config, dataset)
    rows = PackedRows(dataset.train, config.train.block_size, config.train.seed, dataset.tokenizer.eos_id)
    for module in state.model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    object.__setattr__(state.model.config, "dropout", 0.0)
    return state, rows.batch(0, config.train.batch_size)


def poison(monkeypatch, steps):
    """Make the gradient of the steps in `steps` infinite."""
    real = Strategy.gradient_norm
    calls = iter(range(10_000))
    monkeypatch.setattr(
        Strategy, "gradient_norm", lambda strategy: real(strategy) * (math.inf if next(calls) + 1 in steps else 1)
    )


def test_accumulation_changes_nothing_even_when_labels_fall_unequally(dataset):
    found = {}
    for accumulation in (1, 4):
        config = tiny_config(accumulation=accumulation, grad_clip=None)
        state, batch = start(config, dataset)
        batch.labels_BT[0, 3:] = -100  # the first micro-batch counts for less
        result = training_step(state, batch, config.train, lr=0.0)
        found[accumulation] = result, [p.grad.clone() for p in state.model.parameters()]
    (one, gradients), (four, accumulated) = found.values()
    assert one.tokens == four.tokens == int((batch.labels_BT != -100).sum())
    assert one.loss == pytest.approx(four.loss, rel=1e-6)
    for a, b in zip(gradients, accumulated, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_labels(dataset):
    config = tiny_config()
    state, batch = start(config, dataset)
    logits = state.model(batch.tokens_BT, Layout.from_documents(batch.document_BT))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten())
    assert training_step(state, batch, config.train, lr=1e-3).loss == pytest.approx(expected.item(), rel=1e-6)


def test_gradients_are_clipped_to_the_limit_and_the_norm_before_is_told(dataset):
    config = tiny_config(grad_clip=1e-3)
    state, batch = start(config, dataset)
    result = training_step(state, batch, config.train, lr=0.0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()])
    assert result.grad_norm > 0.1
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_step_without_labels_is_an_error(dataset):
    state, batch = start(tiny_config(), dataset)
    batch.labels_BT.fill_(-100)
    with pytest.raises(DataError, match="rows 0 to 3: no label carries loss"):
        training_step(state, batch, tiny_config().train, lr=1e-3)


def test_the_model_learns(tmp_path, dataset):
    state = run(tiny_config(steps=40), tmp_path / "run", dataset, evaluate=held_out(dataset))
    history = losses(tmp_path / "run")
    assert history[0][1] == pytest.approx(math.log(257), abs=0.3)
    assert history[-1][1] < history[0][1] - 1
    assert state.best_loss is not None
    assert state.best_loss < history[0][1] - 1


def test_every_setting_that_shapes_the_steps_changes_them(tmp_path, dataset):
    changes = [
        {},
        {"lr": 5e-3},
        {"min_lr_ratio": 0.5},
        {"warmup": 3},
        {"schedule": "linear"},
        {"schedule": "wsd"},
        {"schedule": "wsd", "decay": 0.9},
        {"weight_decay": 0.5},
        {"weight_decay_embedding": 0.5},
        {"lr_embedding": 2.0},
        {"lr_scalars": 2.0},
        {"grad_clip": 0.05},
        {"seed": 1},
        {"batch_size": 2},
        {"block_size": 16},
        {"precision": "bf16"},
        {"steps": 5},
    ]
    ends = [weights(run(tiny_config(**c), tmp_path / str(i), dataset)) for i, c in enumerate(changes)]
    flat = [torch.cat([p.flatten() for p in end.values()]) for end in ends]
    for i in range(len(flat)):
        for j in range(i):
            assert not torch.equal(flat[i], flat[j]), (changes[i], changes[j])


def test_a_step_whose_gradient_is_not_finite_changes_no_weight_and_is_counted(tmp_path, monkeypatch, dataset):
    seen = []
    real = loop_module.training_step

    def watched(state, *args):
        before = weights(state)
        result = real(state, *args)
        seen.append(all(torch.equal(p, before[n]) for n, p in weights(state).items()))
        return result

    monkeypatch.setattr(loop_module, "training_step", watched)
    poison(monkeypatch, {2, 5})
    state = run(tiny_config(), tmp_path / "run", dataset)
    assert seen == [False, True, False, False, True, False]
    assert (state.step, state.skipped, state.skipped_in_a_row, state.sample) == (6, 2, 0, 24)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if "skipped" in r] == [2, 5]
    assert records[1]["grad_norm"] is None  # JSON has no infinity


def test_every_step_is_recorded_however_rarely_the_console_hears_of_it(tmp_path, dataset):
    run(tiny_config(steps=5, log_interval=4), tmp_path / "run", dataset, evaluate=None)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5]
    assert all(r["tokens_per_second"] > 0 for r in records if "loss" in r)


def test_twenty_skipped_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path, monkeypatch, dataset):
    poison(monkeypatch, set(range(4, 100)))
    with pytest.raises(Diverged, match=r"20 steps in a row, up to step 23.*step-00000002") as caught:
        run(tiny_config(steps=50, save_interval=2, keep_last=1), tmp_path / "run", dataset, evaluate=None)
    assert caught.value.exit_status == 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, dataset):
    real = loop_module.training_step

    def ruin(state, *args):
        result = real(state, *args)
        if state.step == 3:
            next(state.model.parameters()).data[0] = math.nan
        return result

    monkeypatch.setattr(loop_module, "training_step", ruin)
    with pytest.raises(Diverged, match=r"after step 4 are not finite.*step-00000002"):
        run(tiny_config(save_interval=2), tmp_path / "run", dataset)
    names = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-00000002"]


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __init__(self, monkeypatch):
        for module in (loop_module, run_module):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now


def test_a_run_bounded_by_time_ends_within_it_annealed(tmp_path, monkeypatch, dataset):
    clock = Clock(monkeypatch)
    real = loop_module.training_step
    rates = []

    def timed(state, batch, config, lr, *rest):
        clock.now += 2.0
        rates.append(lr / config.lr)
        return real(state, batch, config, lr, *rest)

    monkeypatch.setattr(loop_module, "training_step", timed)
    state = run(tiny_config(max_minutes=1.0, warmup=0.0), tmp_path / "run", dataset)
    assert state.step == 30
    assert state.seconds == 60
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=5e-3)


def test_whichever_of_steps_and_time_comes_first_ends_the_run(tmp_path, monkeypatch, dataset):
    clock = Clock(monkeypatch)
    real = loop_module.training_step

    def timed(*args):
        clock.now += 10.0
        return real(*args)

    monkeypatch.setattr(loop_module, "training_step", timed)
    assert run(tiny_config(steps=4, max_minutes=1.0), tmp_path / "a", dataset).step == 4
    assert run(tiny_config(steps=400, max_minutes=1.0), tmp_path / "b", dataset).step == 6


def test_time_spent_before_an_interruption_counts(tmp_path, monkeypatch, dataset):
    clock = Clock(monkeypatch)
    constant = {"schedule": "constant", "eval_interval": 2}  # more steps of a constant rate change no rate
    run(tiny_config(steps=3, **constant), tmp_path / "run", dataset, evaluate=lambda m: tick(clock, 7.0))
    clock.now += 1e6  # a long night
    longer = tiny_config(steps=5, **constant)
    state = run(longer, tmp_path / "run", dataset, resume=True, evaluate=lambda m: tick(clock, 7.0))
    assert state.seconds == 28  # after steps 2, 3, 4 and 5


def tick(clock, seconds):
    clock.now += seconds
    return {"loss": 1.0}


def test_evaluations_come_by_steps_or_by_time_and_always_at_the_end(tmp_path, monkeypatch, dataset):
    def evaluated(folder, **settings):
        run(tiny_config(**settings), tmp_path / folder, dataset, evaluate=lambda m: {"loss": 1.0})
        records = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [r["step"] for r in records if "held_out_loss" in r]

    assert evaluated("steps", eval_interval=2, steps=5) == [2, 4, 5]
    assert evaluated("end", eval_interval=None) == [6]
    assert evaluated("exact", eval_interval=3) == [3, 6]
    clock = Clock(monkeypatch)
    real = loop_module.training_step

    def timed(*args):
        clock.now += 10.0
        return real(*args)

    monkeypatch.setattr(loop_module, "training_step", timed)
    assert evaluated("time", eval_seconds=25.0) == [3, 6]


def test_the_best_checkpoint_is_pinned_and_the_last_ones_kept(tmp_path, dataset):
    scores = iter([3.0, 1.0, 2.0, 2.5, 2.5, 2.5])
    config = tiny_config(eval_interval=1, save_interval=1, keep_last=2)
    state = run(config, tmp_path / "run", dataset, evaluate=lambda m: {"loss": next(scores)})
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-00000002", "step-00000005", "step-00000006"]
    assert (state.best_step, state.best_loss) == (2, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_is_told_and_never_the_best(tmp_path, dataset, bad):
    found = iter([bad, 2.0, bad, 3.0])
    state = run(
        tiny_config(steps=4, eval_interval=1), tmp_path / "a", dataset, evaluate=lambda m: {"loss": next(found)}
    )
    assert (state.best_step, state.best_loss) == (2, 2.0)
    always = run(tiny_config(eval_interval=2), tmp_path / "b", dataset, evaluate=lambda m: {"loss": bad})
    assert always.best_step is None
    assert sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir()) == ["step-00000006"]
    records = read_metrics(tmp_path / "b" / "metrics.jsonl")
    assert [r["held_out_loss"] for r in records if "held_out_loss" in r] == [None] * 3


def test_a_learning_rate_beyond_all_measure_ends_without_a_bug(tmp_path, dataset):
    state = run(tiny_config(lr=1e15, eval_interval=2), tmp_path / "run", dataset, evaluate=held_out(dataset))
    assert state.step == 6
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_evaluation_and_the_start_hook_disturb_nothing(tmp_path, dataset):
    def noisy(state):
        torch.rand(7)

    alone = weights(run(tiny_config(), tmp_path / "a", dataset))
    watched = run(tiny_config(eval_interval=1), tmp_path / "b", dataset, evaluate=held_out(dataset), on_start=noisy)
    assert all(torch.equal(p, alone[name]) for name, p in weights(watched).items())


def test_the_run_folder_alone_rebuilds_the_model_and_its_tokenizer(tmp_path, dataset):
    state = run(tiny_config(), tmp_path / "run", dataset, evaluate=held_out(dataset))
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "data.json", "tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints"}
    model, tokenizer = load(tmp_path / "run")
    tokens = torch.tensor([tokenizer.encode("the cat")])
    assert tokenizer.fingerprint == dataset.tokenizer.fingerprint
    assert torch.equal(model(tokens), state.model.eval()(tokens))
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path, dataset):
    from dataclasses import replace

    config = tiny_config()
    small = replace(config, model=replace(config.model, vocab_size=100))
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 100: must be >= the tokenizer's 257"):
        run(small, tmp_path / "run", dataset)
    assert not (tmp_path / "run").exists()


class WeightCasts(TorchDispatchMode):
    """Counts casts by the shape and the dtype of what is cast."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._to_copy.default:
            self.found[tuple(args[0].shape), kwargs["dtype"]] += 1
        return op(*args, **(kwargs or {}))


def test_a_weight_is_cast_once_a_step_however_many_micro_batches_it_has(dataset):
    found, gradients = {}, {}
    for accumulation in (1, 4):
        config = tiny_config(accumulation=accumulation, precision="bf16", grad_clip=None)
        state, batch = start(config, dataset)
        with WeightCasts() as casts:
            training_step(state, batch, config.train, lr=0.0)
        weights_down = [p for n, p in state.model.named_parameters() if n.endswith("down_proj.weight")]
        weight = weights_down[0]
        found[accumulation] = casts.found[tuple(weight.shape), torch.bfloat16] / len(weights_down)
        gradients[accumulation] = weight.grad.clone()
    assert found == {1: 1, 4: 1}
    torch.testing.assert_close(gradients[4], gradients[1], atol=1e-5, rtol=2e-2)
