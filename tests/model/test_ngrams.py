"""Hashed n-gram embeddings: the vectors of the right n-grams, restarted by documents, kept up by steps, counted."""

import random
from dataclasses import replace

import pytest
import torch

from swamla.model.accounting import count_parameters, state_bytes
from swamla.model.ngrams import NgramEmbedding, bucket_of
from swamla.ops.layout import PADDING, Layout
from swamla.train.optim import MuonConfig

from .helpers import WIDTH, assert_close, build_model, hybrid_config, random_tokens, scramble

DOCUMENTS = [[5, 0, 7, 7, 30], [12], [5, 0, 7], [1, 2]]


def bucket(gram: list[int], buckets: int) -> int:
    """The bucket of an n-gram of ids plus 1, with Python's integers."""
    key = 0
    for place, number in enumerate(reversed(gram)):
        key += number * 1_103_515_245**place
    return key % (2**31 - 1) % buckets


def by_hand(embedding: NgramEmbedding, document: list[int]) -> torch.Tensor:
    """The sum of the n-grams' vectors of every token of one document."""
    padded = [0] * 10 + [token + 1 for token in document]
    rows = []
    for place in range(10, len(padded)):
        grams = {n: padded[place - int(n) + 1 : place + 1] for n in embedding.tables}
        rows.append(sum(table.weight[bucket(grams[n], len(table.weight))] for n, table in embedding.tables.items()))
    return torch.stack(rows)


def embedding_of(*buckets: int) -> NgramEmbedding:
    embedding = NgramEmbedding(buckets, WIDTH)
    scramble(embedding)
    return embedding


def row(documents: list[list[int]], padding: int = 0) -> tuple[torch.Tensor, Layout]:
    ids = [index for index, document in enumerate(documents) for _ in document] + [PADDING] * padding
    tokens = [token for document in documents for token in document] + [3] * padding
    return torch.tensor([tokens]), Layout.from_documents(torch.tensor([ids]))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_buckets_are_those_of_integers_that_never_overflow(n: int) -> None:
    generator = random.Random(n)
    grams = [[generator.choice([0, 1, 2**31 - 2, generator.randrange(2**31 - 1)]) for _ in range(n)] for _ in range(99)]
    for buckets in (1, 7, 16384, 2**31 - 1):
        found = bucket_of([torch.tensor(column) for column in zip(*grams, strict=True)], buckets)
        assert found.tolist() == [bucket(gram, buckets) for gram in grams]


def test_buckets_are_filled_evenly_by_pairs_of_small_ids() -> None:
    first, second = torch.cartesian_prod(torch.arange(200), torch.arange(200)).T
    counts = torch.bincount(bucket_of([first, second], 1000), minlength=1000)
    assert counts.sum() == 40_000
    assert counts.min() > 0
    assert counts.max() < 100  # 40 each on average


@pytest.mark.parametrize("buckets", [(31,), (31, 40), (31, 40, 23), (0, 0, 23), (31, 0, 0, 11)], ids=str)
@pytest.mark.parametrize("padding", [0, 4])
def test_packed_documents_have_the_vectors_of_their_own_ngrams(buckets: tuple[int, ...], padding: int) -> None:
    embedding = embedding_of(*buckets)
    tokens, seq = row(DOCUMENTS, padding)
    found = embedding(tokens, seq)[0]
    expected = torch.cat([by_hand(embedding, document) for document in DOCUMENTS])
    assert_close(found[: len(expected)], expected, 1e-6)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("cuts", [[], [1], [2, 3], [1, 2, 3, 4, 5, 6, 7], [7]], ids=str)
@torch.no_grad()
def test_steps_of_any_split_are_the_whole(cuts: list[int]) -> None:
    embedding = embedding_of(31, 40, 23, 9)
    tokens = random_tokens(2, 8)
    state, found = embedding.init_state(2, "cpu"), []
    for begin, end in zip([0, *cuts], [*cuts, 8], strict=True):
        found.append(embedding.step(tokens[:, begin:end], state, Layout.continuing_uniform(begin, 2, end - begin)))
    expected = torch.stack([by_hand(embedding, document) for document in tokens.tolist()])
    assert_close(torch.cat(found, dim=1), expected, 1e-6)


@torch.no_grad()
def test_padding_at_row_ends_leaves_no_trace_in_the_state() -> None:
    embedding = embedding_of(31, 40, 23)
    documents = random_tokens(3, 12).tolist()
    given = [0, 0, 0]
    state, found = embedding.init_state(3, "cpu"), [[], [], []]
    for pieces in ([4, 0, 1], [0, 3, 1], [2, 2, 2], [1, 0, 5]):
        tokens, valid = torch.full((3, max(pieces)), 30), torch.zeros(3, max(pieces), dtype=torch.bool)
        for index, count in enumerate(pieces):
            tokens[index, :count] = torch.tensor(documents[index][given[index] : given[index] + count])
            valid[index, :count] = True
        out = embedding.step(tokens, state, Layout.continuing(torch.tensor(given), valid))
        for index, count in enumerate(pieces):
            found[index].append(out[index, :count])
            given[index] += count
    for index, pieces_of_row in enumerate(found):
        assert_close(torch.cat(pieces_of_row), by_hand(embedding, documents[index][: given[index]]), 1e-6)


@torch.no_grad()
def test_steps_with_tokens_alone_keep_no_state() -> None:
    embedding = embedding_of(31)
    state = embedding.init_state(2, "cpu")
    tokens = random_tokens(2, 1)
    found = embedding.step(tokens, state, Layout.continuing_uniform(5, 2, 1))
    assert state.nbytes == 0
    assert_close(found, embedding.tables["1"](tokens + 1), 1e-6)


def test_every_id_has_a_row_of_its_own_in_a_table_of_the_vocabularys_size() -> None:
    assert len(set(bucket_of([torch.arange(1, 4097)], 4096).tolist())) == 4096


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_a_new_model_is_the_one_without_and_vectors_enter_before_the_named_layer(layer: int) -> None:
    config = replace(hybrid_config(), ngram_buckets=(31, 50), ngram_layer=layer)
    model, without = config.build(seed=3), replace(config, ngram_buckets=()).build(seed=3)
    tokens = torch.tensor([[1, 2, 3, 2]])
    assert torch.equal(model(tokens), without(tokens))
    with torch.no_grad():
        model.ngrams.tables["2"].weight.normal_()
    inputs: list[list[torch.Tensor]] = [[], []]
    for found, each in zip(inputs, (model, without), strict=True):
        for block in each.blocks:
            block.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0]))
        each(tokens)
    first = layer % config.depth
    assert [torch.equal(a, b) for a, b in zip(*inputs, strict=True)] == [index < first for index in range(config.depth)]
    assert_close(inputs[0][first] - inputs[1][first], model.ngrams(tokens, Layout.one_document_per_row(1, 4)), 1e-5)


@pytest.mark.parametrize("buckets", [(), (31,), (31, 40), (0, 0, 23)], ids=str)
def test_parameters_and_state_are_counted_exactly(buckets: tuple[int, ...]) -> None:
    config = replace(hybrid_config(), ngram_buckets=buckets)
    model, counted = config.build(), count_parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.by_component.get("ngrams", 0) == sum(buckets) * WIDTH
    assert counted.non_embedding == count_parameters(replace(config, ngram_buckets=())).non_embedding
    for batch, dtype in ((1, torch.float32), (3, torch.bfloat16)):
        state = model.init_state(batch, 50, dtype=dtype)
        assert state.nbytes == state_bytes(config, 50, batch=batch, element_bytes=dtype.itemsize)
        assert state.nbytes == sum(t.nbytes for t in state.tensors())


def test_tables_learn_by_adamw_at_their_rows_only_and_without_decay() -> None:
    model = build_model(replace(hybrid_config(), ngram_buckets=(0, 50)))
    table = model.ngrams.tables["2"].weight
    before = table.detach().clone()
    optimizer = MuonConfig().build(model, lr=0.01, weight_decay=0.5)
    tokens = torch.tensor([[1, 2, 3, 4]])
    model.loss(tokens, torch.roll(tokens, -1, 1))[0].backward()
    optimizer.step()
    used = {bucket(gram, 50) for gram in ([0, 2], [2, 3], [3, 4], [4, 5])}
    changed = (table.detach() != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == used
    assert {"exp_avg", "exp_avg_sq"} <= {
        name.rsplit("/", 1)[1] for name in optimizer.state_tensors() if name.startswith("ngrams.tables.2.weight/")
    }
