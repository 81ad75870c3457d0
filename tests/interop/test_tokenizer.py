"""Exported tokenizers: transformers and the tokenizers library give the ids of training, after the document's start."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swamla.data.tokenizer import (
    BYTES,
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    IdTokenizer,
    Tokenizer,
    byte_signs,
    load_tokenizer,
    train_bpe,
)
from swamla.interop import save_tokenizer

TEXT = "Hé <|endoftext|> wörld\n\t☃ 𝔘 a  b\r\n  don't 12345 é </s>"
NUMBERS = " 3 29 0 17"
TOKENIZERS: dict[str, Tokenizer] = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer(TEXT),
    "bpe": HFTokenizer(train_bpe([TEXT * 9], 300)),
    "bpe-lines": HFTokenizer(train_bpe([TEXT * 9], 300, lines=True)),
    "ids": IdTokenizer(30),
}
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def exported(kind: str, folder: Path, max_length: int | None = None) -> PreTrainedTokenizerFast:
    save_tokenizer(TOKENIZERS[kind], folder, max_length=max_length)
    return AutoTokenizer.from_pretrained(folder)


def text_of(kind: str) -> str:
    return NUMBERS if kind == "ids" else TEXT


@every_tokenizer
def test_the_ids_are_those_of_training_after_the_documents_start(kind: str, tmp_path: Path) -> None:
    ours, theirs, text = TOKENIZERS[kind], exported(kind, tmp_path), text_of(kind)
    expected = [ours.eos_id, *ours.encode(text)]
    assert theirs(text)["input_ids"] == expected
    assert theirs(text, add_special_tokens=False)["input_ids"] == expected[1:]
    assert theirs("")["input_ids"] == [ours.eos_id]
    assert theirs.decode(expected, skip_special_tokens=True) == text == ours.decode(expected[1:])
    assert {theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id} == {ours.eos_id}
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "ids"])
def test_text_that_looks_like_the_documents_start_stays_text(kind: str, tmp_path: Path) -> None:
    theirs = exported(kind, tmp_path)
    ids = theirs("<|endoftext|>")["input_ids"]
    assert ids.count(theirs.eos_token_id) == 1
    assert len(ids) > 2


@every_tokenizer
def test_it_is_the_same_when_saved_again_and_for_the_library_alone(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library

    (tmp_path / "out").mkdir()
    theirs, text = exported(kind, tmp_path / "out"), text_of(kind)
    expected = theirs(text)["input_ids"]
    theirs.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(text)["input_ids"] == expected
    library = Library.from_file(str(tmp_path / "out/tokenizer.json"))
    library.encode_special_tokens = True  # not stored in the file
    assert library.encode(text).ids == expected


@every_tokenizer
def test_the_folder_has_the_tokenizer_of_training_too_and_either_encodes_alike(kind: str, tmp_path: Path) -> None:
    ours, text = TOKENIZERS[kind], text_of(kind)
    exported(kind, tmp_path)
    assert load_tokenizer(tmp_path / "swamla_tokenizer.json").fingerprint == ours.fingerprint
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text) == ours.encode(text)


@every_tokenizer
def test_rows_of_a_batch_are_padded_on_the_left(kind: str, tmp_path: Path) -> None:
    theirs = exported(kind, tmp_path)
    long, short = text_of(kind), text_of(kind)[:2]
    batch, alone = theirs([long, short], padding=True), theirs(short)["input_ids"]
    padding = len(batch["input_ids"][0]) - len(alone)
    assert batch["attention_mask"][1] == [0] * padding + [1] * len(alone)
    assert batch["input_ids"][1] == [theirs.pad_token_id] * padding + alone


@pytest.mark.parametrize("kind", ["char", "ids"])
def test_what_has_no_id_is_an_error_and_not_left_out(kind: str, tmp_path: Path) -> None:
    theirs = exported(kind, tmp_path)
    with pytest.raises(Exception, match=r"Missing .* token"):
        theirs("Ω")


def test_bytes_that_are_no_text_decode_alike(tmp_path: Path) -> None:
    ours, theirs = TOKENIZERS["byte"], exported("byte", tmp_path)
    for ids in (list(range(BYTES)), [0xE2, 0x98, 65, 0xF0, 0x9F, 0xFF, 0x80]):
        assert theirs.decode(ids) == ours.decode(ids)


def test_byte_signs_are_the_librarys_alphabet() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    signs = byte_signs()
    assert sorted(signs) == sorted(ByteLevel.alphabet())
    assert len(set(signs)) == BYTES
    for text in ("é☃𝔘 \n", "aZ~¡"):
        shown = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
        assert shown == "".join(signs[byte] for byte in text.encode())


def test_a_limit_of_length_is_told_and_none_is_made_up(tmp_path: Path) -> None:
    exported("byte", tmp_path, max_length=77)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 77
    exported("byte", tmp_path)
    assert "model_max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_tokenizer_that_puts_a_start_of_its_own_has_it_once(tmp_path: Path) -> None:
    """As many on the hub do: training encodes without it, and puts the document's start itself."""
    from tokenizers import processors

    first = json.loads(TOKENIZERS["bpe"].library_json())
    template = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    ours = HFTokenizer(json.dumps(first | {"post_processor": json.loads(template.__getstate__())}))
    save_tokenizer(ours, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == [ours.eos_id, *ours.encode("a b")]
