"""Held-out loss, perplexity and bits per byte are what their definitions say."""

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from swamla.data.packing import Batch
from swamla.data.shards import Split
from swamla.errors import ConfigError, DataError
from swamla.evaluate import Evaluation, bytes_apart, evaluate, evaluate_split, held_out, part_of
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.ops.layout import PADDING, Layout

VOCABULARY, EOS = 11, 10


TEXTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8], [2, 2]]


def split_of(texts: list[list[int]]) -> Split:
    """A split held in memory, of three bytes a token."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return Split(
        path=Path("memory"),
        tokens=np.array(list(chain(*texts)), dtype=np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        byte_counts=3 * lengths,
        vocab_size=VOCABULARY,
    )


SPLIT = split_of(TEXTS)


@pytest.fixture
def model():
    block = BlockConfig(mixer=MHAConfig(n_heads=2), ffn=DenseConfig(hidden=32))
    torch.manual_seed(0)
    return LanguageModelConfig(
        vocab_size=VOCABULARY, width=16, blocks={"mha": block}, pattern=("mha",), dropout=0.3, init_std=0.3
    ).build()


def by_hand(model, texts):
    """Total nats, document by document."""
    model.eval()
    nats = 0.0
    for text in texts:
        logits = model(torch.tensor([[EOS, *text]]))
        nats += torch.nn.functional.cross_entropy(logits[0], torch.tensor([*text, EOS]), reduction="sum").item()
    return nats


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_token_and_each_end_counts_once_as_if_documents_were_read_alone(model, batch_size):
    found = evaluate_split(model, SPLIT, eos_id=EOS, block_size=64, batch_size=batch_size)
    nats = by_hand(model, TEXTS)
    assert found.tokens == 19 + 4
    assert found.loss == pytest.approx(nats / 23, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / 23), rel=1e-5)
    assert found.bytes == 57
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 57, rel=1e-5)


def test_batches_do_not_change_the_result(model):
    a, b = (evaluate_split(model, SPLIT, eos_id=EOS, block_size=4, batch_size=n) for n in (1, 4))
    assert a.tokens == b.tokens == 23
    assert a.loss == pytest.approx(b.loss, rel=1e-6)


def test_a_limit_reads_less_and_counts_its_share_of_bytes(model):
    found = evaluate_split(model, SPLIT, eos_id=EOS, block_size=4, batch_size=1, max_tokens=8)
    assert found.tokens == 8
    assert found.bytes == pytest.approx(57 * 8 / 23)


def test_dropout_is_off_and_the_mode_is_put_back(model):
    for mode in (True, False):
        model.train(mode)
        first = evaluate_split(model, SPLIT, eos_id=EOS, block_size=8, batch_size=2)
        assert first == evaluate_split(model, SPLIT, eos_id=EOS, block_size=8, batch_size=2)
        assert model.training is mode


def test_padding_and_labels_without_loss_do_not_count(model):
    tokens = torch.tensor([[EOS, 1, 2, 0]])
    batch = Batch(
        tokens_BT=tokens, labels_BT=torch.tensor([[1, -100, EOS, -100]]), document_BT=torch.tensor([[0, 0, 0, -1]])
    )
    found = evaluate(model, [batch], bytes_per_label=1.0)
    logits = model.eval()(tokens[:, :3], Layout.one_document_per_row(1, 3))[0].log_softmax(-1)
    assert found.tokens == 2
    assert found.loss == pytest.approx(-(logits[0, 1] + logits[2, EOS]).item() / 2, rel=1e-5)


def test_bytes_counted_are_those_of_the_tokens_unless_some_are_lost_or_miscounted():
    def decode(ids):
        return "".join(chr(0x4E00 + i) for i in ids)  # of three bytes each

    assert bytes_apart(SPLIT, decode) == 0
    assert bytes_apart(SPLIT, lambda ids: decode(ids)[1:]) == 3 * len(TEXTS)
    assert bytes_apart(replace(SPLIT, byte_counts=SPLIT.byte_counts - 1), decode) == -len(TEXTS)


def test_a_rank_for_which_no_batch_is_left_reads_nothing_but_padding(monkeypatch):
    batch = Batch(*(torch.ones(2, 3, dtype=torch.int64) for _ in range(3)))
    monkeypatch.setattr(held_out.distributed, "rank", lambda: 1)
    monkeypatch.setattr(held_out.distributed, "world_size", lambda: 2)
    mine, spare = held_out._share([batch] * 3)
    assert mine is batch
    assert spare.n_labels == 0
    assert (spare.document_BT == PADDING).all()


def test_nothing_to_evaluate_is_an_error(model):
    with pytest.raises(DataError, match="held-out split has no documents"):
        evaluate_split(model, split_of([]), eos_id=EOS, block_size=4, batch_size=1)
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(model, [], bytes_per_label=1.0)


def test_the_figures_by_name_and_a_loss_beyond_exp():
    found = Evaluation(loss=800.0, tokens=2, bytes=4).as_dict()
    assert found["perplexity"] == math.inf
    assert found["bits_per_byte"] == pytest.approx(800 * 2 / 4 / math.log(2))
    assert set(found) == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}


def written(texts: list[str]) -> Split:
    """A split of bytes, held in memory."""
    raw = [text.encode() for text in texts]
    lengths = np.array([len(each) for each in raw], dtype=np.int64)
    return Split(
        path=Path("memory"),
        tokens=np.frombuffer(b"".join(raw), dtype=np.uint8).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        byte_counts=lengths,
        vocab_size=257,
    )


def read(split: Split) -> list[str]:
    return [decoded(split.document(i).tolist()) for i in range(split.n_documents)]


def decoded(ids) -> str:
    return bytes(ids).decode(errors="replace")


DOCUMENTS = [f"{number} " * (number % 7 + 1) for number in range(40)]


def test_every_held_out_document_is_in_the_validation_or_in_the_test_part_and_each_has_half_of_the_bytes():
    split = written(DOCUMENTS)
    parts = [part_of(split, part, decoded) for part in ("validation", "test")]
    assert sorted(text for part in parts for text in read(part)) == sorted(DOCUMENTS)
    assert sum(part.n_bytes for part in parts) == split.n_bytes
    for part in parts:
        assert part.n_bytes == pytest.approx(split.n_bytes / 2, rel=0.05)
        assert bytes_apart(part, decoded) == 0
    assert part_of(split, "all", decoded) is split


def test_the_parts_follow_from_the_texts_and_not_from_their_order():
    here, there = (part_of(written(texts), "test", decoded) for texts in (DOCUMENTS, DOCUMENTS[::-1]))
    assert set(read(here)) == set(read(there))


def test_an_only_held_out_document_is_cut_between_characters():
    text = "été" * 33 + "a"
    first, last = (part_of(written([text]), part, decoded) for part in ("validation", "test"))
    assert read(first)[0] + read(last)[0] == text
    assert first.n_bytes + last.n_bytes == len(text.encode())
    assert first.n_bytes == pytest.approx(last.n_bytes, abs=4)


def test_two_documents_are_one_in_each_part_whatever_their_sizes():
    split = written(["short", "long " * 1000])
    assert {tuple(read(part_of(split, part, decoded))) for part in ("validation", "test")} == {
        ("short",),
        ("long " * 1000,),
    }


def test_text_that_cannot_be_divided_and_parts_that_do_not_exist_are_refused():
    for nothing in (["a"], []):
        with pytest.raises(DataError, match="too little to divide into a validation and a test part"):
            part_of(written(nothing), "test", decoded)
    with pytest.raises(ConfigError, match="part = 'dev': must be one of all, validation, test"):
        part_of(written(DOCUMENTS), "dev", decoded)
