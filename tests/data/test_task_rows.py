"""Rows of tasks as the data of a run: one document a row, any grouping of samples, held-out rows apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from swamla.data import DataConfig, TaskDataset, load_tokenizer, prepare
from swamla.data.sources import is_path, located
from swamla.data.tokenizer import NameTokenizer, StreamDecoder
from swamla.errors import ConfigError, CorruptError, DataError, UsageError
from swamla.registry import members_of
from swamla.tasks import IGNORED, Task, parse

MQAR = parse("mqar?pairs=2&length=12&vocabulary=16")


@pytest.mark.parametrize("kind", sorted(members_of(Task)))
def test_sample_i_is_row_i_of_the_seed_however_samples_are_grouped(kind: str) -> None:
    task = parse(kind)
    rows = TaskDataset(task).rows(task.length, seed=3)
    whole = rows.batch(5, 6)
    parts = [rows.batch(first, count) for first, count in ((5, 1), (6, 3), (9, 2))]
    assert torch.equal(whole.tokens_BT, torch.cat([part.tokens_BT for part in parts]))
    assert torch.equal(whole.labels_BT, torch.cat([part.labels_BT for part in parts]))
    for place in range(6):
        row = task.row(3, 5 + place)
        assert torch.equal(whole.tokens_BT[place], torch.from_numpy(row.tokens_T))
        assert torch.equal(whole.labels_BT[place], torch.from_numpy(row.labels_T))
    assert whole.document_BT.eq(0).all()
    assert whole.n_labels == int((whole.labels_BT != IGNORED).sum())


def test_held_out_rows_are_the_same_for_all_runs_and_none_is_trained_on() -> None:
    data = TaskDataset(MQAR)
    scored = torch.cat([batch.tokens_BT for batch in data.held_out_rows(batch_size=10, max_tokens=25 * 12 + 11)])
    assert scored.shape == (25, 12)
    assert torch.equal(scored, next(data.held_out_rows(25)).tokens_BT)
    trained = data.rows(12, seed=0).batch(0, 500).tokens_BT
    assert not {tuple(row) for row in scored.tolist()} & {tuple(row) for row in trained.tolist()}
    assert sum(len(batch.tokens_BT) for batch in data.held_out_rows(100)) == 1024
    assert sum(len(batch.tokens_BT) for batch in data.held_out_rows(100, max_tokens=1)) == 1
    test = next(data.held_out_rows(25, test=True)).tokens_BT
    assert not {tuple(row) for row in test.tolist()} & {tuple(row) for row in [*scored.tolist(), *trained.tolist()]}


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.block_size = 16: must be 12, the length of the task's rows"):
        TaskDataset(MQAR).rows(16, seed=0)


def test_data_of_other_sizes_or_names_has_another_fingerprint() -> None:
    specs = ["mqar", "mqar?pairs=7", "mqar?length=128", "induction", "copy", "palindrome"]
    assert len({TaskDataset(parse(spec)).fingerprint for spec in specs}) == len(specs)
    assert TaskDataset(parse("mqar?pairs=8")).fingerprint == TaskDataset(parse("task:mqar")).fingerprint


def test_a_config_names_a_task_and_no_setting_of_texts() -> None:
    config = DataConfig(source="task:mqar?pairs=4", tokenizer="names")
    assert config.task == parse("mqar?pairs=4")
    assert DataConfig().task is None
    assert located(config) == config
    assert not is_path("task:mqar")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": "byte"}, "tokenizer = 'byte': must be \"names\" for a task"),
        ({"stream": 4}, "stream = 4: must be 0 for a task"),
        ({"buffer_docs": 10}, "buffer_docs = 10: must be 0 for a task"),
        ({"held_out_fraction": 0.1}, "held_out_fraction = 0.1: must be 0.05 for a task"),
        ({"source": "task:mqar?pairs=0"}, "pairs = 0 .*must be > 0"),
        ({"source": "stdlib"}, "tokenizer = 'names': is for a task"),
    ],
)
def test_a_setting_that_a_task_cannot_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**({"source": "task:mqar", "tokenizer": "names"} | settings))


def test_a_task_has_nothing_to_prepare() -> None:
    with pytest.raises(UsageError, match=r"has no text to prepare: .*TaskDataset\(config\.task\)"):
        prepare(DataConfig(source="task:mqar", tokenizer="names"))


def test_names_are_the_text_of_ids() -> None:
    named = NameTokenizer(["k0", "k1", "|"])
    assert (named.vocab_size, named.eos_id, named.start) == (4, 3, [])
    assert named.encode(" k1 |\nk0") == [1, 2, 0]
    assert named.decode([1, 2, 0, 3]) == " k1 | k0<|endoftext|>"
    assert named.encode_batch(["k0", ""]) == [[0], []]
    stream = StreamDecoder(named)
    assert "".join(stream.push(i) for i in (2, 0)) + stream.flush() == " | k0"
    with pytest.raises(DataError, match=r"'k2' is no name of an id: must be words of k0, k1 … \|"):
        named.encode("k0 k2")


def test_names_are_saved_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    named, file = NameTokenizer(MQAR.names()), tmp_path / "tokenizer.json"
    named.save(file)
    loaded = load_tokenizer(file)
    assert (loaded.fingerprint, loaded.vocab_size, loaded.start) == (named.fingerprint, 17, [])
    assert loaded.decode([0, 15]) == " k0 v7"
    for names in (None, "k0 k1", ["k0"], ["k0", "k0"], ["k0", "k 1"], ["k0", 1], ["k0", ""]):
        file.write_text(json.dumps({"swamla_tokenizer": "names", "names": names}))
        with pytest.raises(CorruptError, match="names"):
            load_tokenizer(file)


@pytest.mark.parametrize("kind", sorted(members_of(Task)))
def test_the_tokenizers_library_reads_the_same_names(kind: str) -> None:
    task = parse(kind)
    named = NameTokenizer(task.names())
    library = tokenizers.Tokenizer.from_str(named.library_json())
    ids = task.row(0, 0).tokens_T.tolist()
    assert named.encode(named.decode(ids)) == ids == library.encode(named.decode(ids)).ids
    assert library.decode(ids) == named.decode(ids)
