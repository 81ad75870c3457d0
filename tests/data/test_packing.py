"""Packing: every position carries loss, and rows put back together are the documents."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from swamla.data.packing import NO_LABEL, Batch, HeldOutRows, PackedRows, permutation
from swamla.data.shards import Split
from swamla.errors import ConfigError
from swamla.ops.layout import PADDING

EOS = 1000
LENGTHS = (1, 7, 3, 30, 2, 1, 12, 64, 5)


def make_split(lengths: tuple[int, ...] = LENGTHS) -> Split:
    """Documents whose ids are 0, 1, 2, … over the whole split, so that an id tells where it comes from."""
    offsets = np.cumsum([0, *lengths])
    return Split(
        path=Path("train.tokens.npy"),
        tokens=np.arange(offsets[-1], dtype=np.uint16),
        offsets=offsets,
        byte_counts=np.array(lengths),
        vocab_size=EOS + 1,
    )


def document_of(split: Split, token: int) -> int:
    return int(np.searchsorted(split.offsets, token, side="right")) - 1


def one_epoch(rows: PackedRows) -> Batch:
    """The rows of enough whole epochs that the last ends at a row's end."""
    return rows.batch(0, rows.epoch_length)  # epoch_length rows are block_size epochs


@pytest.mark.parametrize("block_size", [1, 2, 5, 16, 33, 200])
def test_each_epoch_covers_each_token_once_and_learns_each_end_once(block_size: int) -> None:
    split = make_split()
    batch = one_epoch(PackedRows(split, block_size, seed=3, eos_id=EOS))
    inputs, labels = Counter(batch.tokens_BT.flatten().tolist()), Counter(batch.labels_BT.flatten().tolist())
    assert labels == inputs == {**dict.fromkeys(range(split.n_tokens), block_size), EOS: len(LENGTHS) * block_size}


def test_epochs_hold_each_token_once_as_far_as_rows_can() -> None:
    split = make_split()
    rows = PackedRows(split, 5, seed=0, eos_id=EOS)  # 134 positions: epochs begin in rows 0, 27, 54
    labels = rows.batch(0, 27).labels_BT.flatten().tolist()
    assert set(range(split.n_tokens)) < set(labels)
    assert len(labels) - rows.epoch_length == 1


@pytest.mark.parametrize("block_size", [1, 7, 50])
def test_labels_follow_their_inputs_inside_one_document(block_size: int) -> None:
    split = make_split()
    batch = one_epoch(PackedRows(split, block_size, seed=1, eos_id=EOS))
    for token, label in zip(batch.tokens_BT.flatten().tolist(), batch.labels_BT.flatten().tolist(), strict=True):
        if token == EOS:
            assert label in split.offsets[:-1]
        elif label == EOS:
            assert token + 1 in split.offsets
        else:
            assert label == token + 1
            assert document_of(split, token) == document_of(split, label)


def test_every_position_carries_loss() -> None:
    rows = PackedRows(make_split(), 16, seed=0, eos_id=EOS)
    assert rows.batch(0, 1000).n_labels == 1000 * 16
    assert rows.batch(5, 8).n_labels == 8 * 16


@pytest.mark.parametrize("block_size", [3, 20, 500])
def test_document_ids_change_exactly_where_a_document_starts(block_size: int) -> None:
    batch = one_epoch(PackedRows(make_split(), block_size, seed=2, eos_id=EOS))
    changes_BT = batch.document_BT.diff(dim=1)
    assert torch.equal(changes_BT == 1, batch.tokens_BT[:, 1:] == EOS)
    assert set(changes_BT.flatten().tolist()) <= {0, 1}
    assert not batch.document_BT[:, 0].any()


def test_rows_in_stream_order_reconstruct_the_documents_exactly() -> None:
    split = make_split()
    stream = torch.cat([batch.labels_BT for batch in HeldOutRows(split, 7, EOS).batches(3)]).flatten()
    text = stream[stream != NO_LABEL].tolist()
    for i in range(split.n_documents):
        end = text.index(EOS)
        assert text[:end] == split.document(i).tolist()
        text = text[end + 1 :]
    assert text == []


def test_a_single_document_follows_itself_as_another() -> None:
    batch = PackedRows(make_split((3,)), 10, seed=0, eos_id=EOS).batch(0, 1)
    assert batch.tokens_BT.tolist() == [[EOS, 0, 1, 2, EOS, 0, 1, 2, EOS, 0]]
    assert batch.labels_BT.tolist() == [[0, 1, 2, EOS, 0, 1, 2, EOS, 0, 1]]
    assert batch.document_BT.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2]]


@pytest.mark.parametrize("block_size", [4, 150])
def test_a_sample_is_the_same_however_it_is_asked_for(block_size: int) -> None:
    split = make_split()
    whole = PackedRows(split, block_size, seed=5, eos_id=EOS).batch(0, 200)
    asked_backwards = PackedRows(split, block_size, seed=5, eos_id=EOS)
    for first, count in ((199, 1), (60, 13), (0, 60), (73, 126)):
        part = asked_backwards.batch(first, count)
        for name in ("tokens_BT", "labels_BT", "document_BT"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[first : first + count])


def test_seeds_and_epochs_have_their_own_order() -> None:
    rows = PackedRows(make_split(), 2, seed=0, eos_id=EOS)
    per_epoch = rows.epoch_length // 2
    orders = [rows.batch(e * per_epoch, per_epoch).labels_BT.flatten().tolist() for e in range(3)]
    orders.append(PackedRows(make_split(), 2, seed=1, eos_id=EOS).batch(0, per_epoch).labels_BT.flatten().tolist())
    assert len(set(map(tuple, orders))) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_permutations_never_change() -> None:
    assert permutation(10, 0, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(8, 7, 1, 1).tolist() == [7, 1, 5, 3, 4, 0, 6, 2]
    assert sorted(permutation(1000, 1, 2, 3).tolist()) == list(range(1000))


def test_held_out_rows_pad_only_the_end() -> None:
    split = make_split()
    held_out = HeldOutRows(split, 33, EOS)
    batches = list(held_out.batches(2))
    tokens, labels, documents = (
        torch.cat([getattr(batch, name) for batch in batches]).flatten()
        for name in ("tokens_BT", "labels_BT", "document_BT")
    )
    n = split.n_tokens + split.n_documents
    assert held_out.n_labels == n == sum(batch.n_labels for batch in batches)
    assert len(tokens) == held_out.n_rows * 33 > n
    assert (labels[n:] == NO_LABEL).all()
    assert (documents[n:] == PADDING).all()
    assert not (documents[:n] == PADDING).any()
    assert tokens.min() >= 0


def test_held_out_rows_are_the_same_in_any_batch_size() -> None:
    held_out = HeldOutRows(make_split(), 8, EOS)
    one, many = (torch.cat([batch.labels_BT for batch in held_out.batches(size)]) for size in (1, 100))
    assert torch.equal(one, many)


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_few_held_out_rows_are_spread_evenly_over_all(most: int) -> None:
    held_out = HeldOutRows(make_split(), 8, EOS)
    every = torch.cat([batch.labels_BT for batch in held_out.batches(4)])
    some = torch.cat([batch.labels_BT for batch in held_out.batches(2, most)])
    assert torch.equal(some, every[[i * held_out.n_rows // most for i in range(most)]])


def test_a_block_of_no_tokens_is_refused() -> None:
    for rows in (lambda: PackedRows(make_split(), 0, 0, EOS), lambda: HeldOutRows(make_split(), -1, EOS)):
        with pytest.raises(ConfigError, match="block_size"):
            rows()
