"""What is timed is the training step itself, on rows as the loader makes them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swamla.bench.synthetic import DOCUMENT, synthetic_dataset, whole_rows
from swamla.bench.training import Shape, TimedSteps, batch_of, expected_bytes, held_bytes, measure_step, with_timers
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.packing import NO_LABEL, Batch
from swamla.model import BlockConfig, DenseConfig, LanguageModelConfig, MHAConfig
from swamla.model.accounting import count_parameters, training_flops_per_token
from swamla.ops.layout import PADDING
from swamla.train import RunConfig, TrainConfig
from swamla.train.memory_advice import Place
from swamla.train.run_folder import fresh_state
from swamla.train.state import TrainState
from swamla.train.step import training_step

VOCABULARY = 100
BLOCK = BlockConfig(mixer=MHAConfig(n_heads=2), ffn=DenseConfig())
MODEL = LanguageModelConfig(vocab_size=VOCABULARY, width=32, blocks={"mha": BLOCK}, pattern=("mha",) * 2)
CONFIG = RunConfig(
    model=MODEL,
    data=DataConfig(source="none", tokenizer="byte"),
    train=TrainConfig(steps=1, batch_size=4, accumulation=2, block_size=64, precision="fp32", device="cpu"),
)
OWN = Shape(rows=4, length=64, accumulation=2, packed=True)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return synthetic_dataset(tmp_path, VOCABULARY, tokens=200_000)


def weights_after(state: TrainState, timed_state: TrainState, dataset: Dataset) -> torch.Tensor:
    training_step(timed_state, batch_of(OWN, dataset), OWN.settings(CONFIG.train), 1e-2)
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_the_timed_step_is_the_training_step(dataset: Dataset) -> None:
    plain, timed = fresh_state(CONFIG, dataset), fresh_state(CONFIG, dataset)
    before = weights_after(plain, plain, dataset)
    assert torch.equal(before, weights_after(timed, with_timers(timed), dataset))
    assert not torch.equal(before, weights_after(timed, with_timers(timed), dataset))


def test_both_passes_of_every_micro_batch_are_timed(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 1 whenever it is read."""
    now = iter(range(10**6))
    monkeypatch.setattr("swamla.bench.training.time.perf_counter", lambda: float(next(now)))
    steps = TimedSteps(with_timers(fresh_state(CONFIG, dataset)), OWN.settings(CONFIG.train), batch_of(OWN, dataset))
    steps.step()
    steps.step()
    # of each micro-batch: 1 within the forward pass, 3 within both; of a step 9 in all
    assert (steps.forward, steps.backward, steps.optimizer) == ([2.0, 2.0], [4.0, 4.0], [3.0, 3.0])


def test_what_training_holds_is_the_weights_and_the_moments(dataset: Dataset) -> None:
    state = fresh_state(CONFIG, dataset)
    n = count_parameters(MODEL).total
    training_step(state, batch_of(OWN, dataset), OWN.settings(CONFIG.train), 1e-3)
    assert held_bytes(state) == pytest.approx(3 * 4 * n, rel=0.01)  # and a count of steps for each parameter
    averaged = fresh_state(replace(CONFIG, train=replace(CONFIG.train, ema=0.9)), dataset)
    assert held_bytes(averaged) >= 2 * 4 * n


def test_a_row_has_what_its_shape_computes(dataset: Dataset) -> None:
    row = measure_step(CONFIG, fresh_state(CONFIG, dataset), batch_of(OWN, dataset), OWN, peak=1e10, limit=0.0)
    assert (row["name"], row["rows"], row["length"], row["rounds"]) == ("4 × 64 in 2 packed", 4, 64, 1)
    assert float(row["tokens_per_s"] or 0) == pytest.approx(OWN.tokens / float(row["median_s"] or 1))


def test_documents_cost_what_they_cost_alone_and_padding_nothing(dataset: Dataset) -> None:
    tokens_BT, labels_BT, document_BT = whole_rows(4, 64, VOCABULARY)
    document_BT[:, 40:] = 1
    document_BT[0, 10:] = document_BT[1] = PADDING
    batch = Batch(tokens_BT, labels_BT.masked_fill(document_BT == PADDING, NO_LABEL), document_BT)
    row = measure_step(CONFIG, fresh_state(CONFIG, dataset), batch, replace(OWN, packed=False), peak=1e10, limit=0.0)
    lengths = [10, 40, 24, 40, 24]
    assert float(row["tokens_per_s"] or 0) * float(row["median_s"] or 0) == pytest.approx(sum(lengths))
    assert row["flops"] == pytest.approx(sum(n * training_flops_per_token(MODEL, n) for n in lengths))
    assert float(row["matmul_share"] or 0) * float(row["median_s"] or 0) * 1e10 == pytest.approx(row["flops"])


def test_shapes_shrink_to_one_row_and_their_micro_batches_never_grow() -> None:
    shapes = [Shape(rows=48, length=8, accumulation=3)]
    while smaller := shapes[-1].smaller():
        shapes.append(smaller)
    assert [(shape.rows, shape.accumulation) for shape in shapes] == [(48, 3), (16, 1), (8, 1), (4, 1), (2, 1), (1, 1)]


def test_the_memory_expected_grows_with_the_micro_batch_not_with_the_batch() -> None:
    place, longer = Place(precision="fp32"), replace(OWN, length=128)
    needs = [expected_bytes(CONFIG, shape, place) for shape in (OWN, replace(OWN, rows=8, accumulation=4), longer)]
    assert needs[0] == needs[1] < needs[2]


def test_synthetic_documents_are_of_the_whole_vocabulary_and_several_to_a_row(dataset: Dataset) -> None:
    assert (dataset.tokenizer.vocab_size, dataset.tokenizer.eos_id) == (VOCABULARY, VOCABULARY - 1)
    assert set(dataset.train.tokens.tolist()) == set(range(VOCABULARY - 1))
    assert dataset.train.lengths.mean() == pytest.approx(DOCUMENT, rel=0.2)
    batch = dataset.rows(8 * DOCUMENT, 0).batch(0, 2)
    assert int(batch.document_BT.max()) >= 3
    assert batch.n_labels == batch.tokens_BT.numel()


def test_whole_rows_are_one_document_each_whose_labels_are_the_next_tokens() -> None:
    tokens_BT, labels_BT, document_BT = whole_rows(2, 16, VOCABULARY)
    assert torch.equal(tokens_BT[:, 1:], labels_BT[:, :-1])
    assert not document_BT.any()
    assert int(tokens_BT.max()) < VOCABULARY
