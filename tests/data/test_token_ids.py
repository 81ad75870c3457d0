"""Ids given from Python make the dataset that their texts make, and a run on them is a run like any other."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import swamla
from swamla.cli import main
from swamla.data.config import DataConfig, WeightedSource
from swamla.data.dataset import Dataset
from swamla.data.preparing import prepare
from swamla.data.shards import Split
from swamla.errors import ConfigError, DataError
from swamla.evaluate import bytes_apart, validation
from tests.train.helpers import losses, model_of, run, tiny_config

EOS = 50
PLAIN = DataConfig(source="token_ids", tokenizer="ids:50", held_out_fraction=0.2)
DOCUMENTS = [[(n * 7 + i) % 50 for i in range(5 + n % 4)] for n in range(30)]


def documents(*splits: Split) -> list[list[int]]:
    return [split.document(i).tolist() for split in splits for i in range(split.n_documents)]


def joined(rows: Iterable[list[int]]) -> list[int]:
    return [i for row in rows for i in (*row, EOS)]


FORMS: dict[str, Callable[[], Any]] = {
    "lists": lambda: DOCUMENTS,
    "a generator": lambda: (list(row) for row in DOCUMENTS),
    "arrays": lambda: [np.array(row, dtype=np.uint16) for row in DOCUMENTS],
    "tensors": lambda: [torch.tensor(row, dtype=torch.int32) for row in DOCUMENTS],
    "a stream": lambda: torch.tensor(joined(DOCUMENTS)),
    "a stream, and empty documents": lambda: np.array([EOS, EOS, *joined(DOCUMENTS), EOS]),
    "streams": lambda: [joined(DOCUMENTS[:9]), [], joined(DOCUMENTS[9:])],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_documents_are_the_same_dataset_in_whatever_form_they_come(form: str) -> None:
    expected, found = prepare(PLAIN, token_ids=DOCUMENTS), prepare(PLAIN, token_ids=FORMS[form]())
    assert (found.fingerprint, found.path) == (expected.fingerprint, expected.path)
    assert sorted(documents(found.train, found.held_out)) == sorted(DOCUMENTS)
    found.verify()
    assert bytes_apart(found.held_out, found.tokenizer.decode) == 0
    assert len(list(found.path.parent.iterdir())) == 1  # no staging is left


def test_ids_of_texts_make_the_shards_that_the_texts_make(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"text number {n}, " * (n % 5 + 1) for n in range(40)]
    for n, text in enumerate(texts):
        (folder / f"{n:02d}.txt").write_text(text)
    config = DataConfig(source=str(folder), tokenizer="byte", held_out_fraction=0.2)
    by_text = prepare(config)
    by_ids = prepare(replace(config, source="token_ids"), token_ids=(by_text.tokenizer.encode(t) for t in texts))
    names = [path.name for path in by_text.path.iterdir() if path.name != "meta.json"]
    assert sorted(path.name for path in by_ids.path.iterdir()) == sorted([*names, "meta.json"])
    for name in names:
        assert (by_ids.path / name).read_bytes() == (by_text.path / name).read_bytes(), name
    assert by_ids.fingerprint == by_text.fingerprint


def test_given_documents_are_held_out_and_no_others() -> None:
    found = prepare(PLAIN, token_ids=DOCUMENTS[:20], held_out=torch.tensor([DOCUMENTS[20]]))
    assert (documents(found.train), documents(found.held_out)) == (DOCUMENTS[:20], DOCUMENTS[20:21])
    assert dict(found.describe())["held out"].endswith("the ids given as held out)")


def test_an_only_document_is_cut() -> None:
    ids = torch.arange(1000) % 50
    found = prepare(PLAIN, token_ids=ids)
    assert (documents(found.train), documents(found.held_out)) == ([ids[:800].tolist()], [ids[800:].tolist()])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, r'data.source = "token_ids": its ids are given from Python'),
        (5, "token_ids = 5: must be a tensor of ids, or an iterable of sequences"),
        ([1, 2, 3], r"token_ids\[0\] is 1: must be one document's ids"),
        (["text"], r"token_ids\[0\] is 'text': must be one document's ids"),
        ([[1, 2], [0.5]], r"token_ids\[1\] is \[0.5\]: must be one document's ids"),
        ([[1, 2], [[1], [2, 3]]], r"token_ids\[1\] is \[\[1\], \[2, 3\]\]: must be"),
        (torch.zeros(3, 4), r"token_ids\[0\] is array.*: must be one document's ids"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"token_ids\[0\] is array"),
        ([[1], [51]], r"token_ids\[1\] has the id 51: must be one of the tokenizer, 0 to 50, of which 50 ends"),
        ([[-1]], r"token_ids\[0\] has the id -1"),
        ([], "token_ids: no text to learn from"),
        ([[], [50, 50]], "token_ids: no text to learn from"),
        ([[7]], "token_ids: its only document is too short to hold a part of it out"),
    ],
    ids=str,
)
def test_what_is_no_documents_of_ids_is_refused_in_a_line(ids: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepare(PLAIN, token_ids=ids)
    assert "\n" not in str(caught.value)
    folder = PLAIN.cache / "data"
    assert not folder.exists() or not list(folder.iterdir())


def test_settings_that_ids_contradict_are_refused() -> None:
    for tokenizer in ("bpe:300", "char"):
        with pytest.raises(ConfigError, match=r"tokenizer = .*: made the ids already"):
            replace(PLAIN, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer = 'ids:0': must be like ids:50"):
        replace(PLAIN, tokenizer="ids:0")
    with pytest.raises(ConfigError, match="stream = 2: must be 0"):
        replace(PLAIN, stream=2)
    with pytest.raises(ConfigError, match="a mixture cannot contain"):
        WeightedSource(source="token_ids", weight=1.0)
    with pytest.raises(ConfigError, match=r"data.source = 'stdlib': with ids: \"token_ids\""):
        prepare(DataConfig(), token_ids=DOCUMENTS)


def test_documents_are_packed_best_fit_where_the_config_says_so() -> None:
    fitted = prepare(replace(PLAIN, buffer_docs=10), token_ids=DOCUMENTS)
    assert fitted.fingerprint != prepare(PLAIN, token_ids=DOCUMENTS).fingerprint
    assert (fitted.rows(12, 0).batch(0, 4).document_BT == -1).any()


def trained(folder: Path, dataset: Dataset, **options: Any) -> None:
    config = replace(tiny_config(model_of("swa"), save_interval=2, keep_last=9), data=PLAIN)
    run(config, folder, dataset, evaluate=validation(dataset, 32), **options)


def test_a_run_on_ids_is_resumed_evaluated_and_continued_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token_ids").mkdir()  # which is not meant
    trained(Path("run"), prepare(PLAIN, token_ids=DOCUMENTS))
    for cut in ("cut", "again"):
        shutil.copytree("run", cut)
        for step in (4, 6):
            shutil.rmtree(f"{cut}/checkpoints/step-{step:08d}")
    trained(Path("cut"), prepare(PLAIN, token_ids=DOCUMENTS), resume=True)
    assert main(["train", "--resume", "again"]) == 0
    assert losses(Path("cut")) == losses(Path("again")) == losses(Path("run"))
    capsys.readouterr()
    assert main(["evaluate", "run"]) == 0
    shown = capsys.readouterr()
    assert "of token_ids" in shown.out
    assert "gone" not in shown.err
    assert main(["generate", "run", "--prompt", "3 5 7", "--max_new_tokens", "4"]) == 0
    assert all(0 <= int(word) < 50 for word in capsys.readouterr().out.split())
    model, tokenizer = swamla.load("run")
    assert model.generate(torch.tensor(tokenizer.encode("3 5 7")), 5).shape == (5,)
    assert json.loads(Path("run/config.json").read_text())["data"]["source"] == "token_ids"


def test_without_its_ids_and_its_cache_a_run_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "run", prepare(PLAIN, token_ids=DOCUMENTS))
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "none"))
    for command in (["evaluate", str(tmp_path / "run")], ["train", "--resume", str(tmp_path / "run")]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "its ids are given from Python: swamla.data.prepare(config, token_ids=…)" in told
    trained(tmp_path / "run", prepare(PLAIN, token_ids=DOCUMENTS), resume=True)  # the same ids are the same data
