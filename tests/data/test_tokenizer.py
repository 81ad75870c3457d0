"""Tokenizers: ids turn back into exactly the text, and agree with other implementations."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from swamla.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenizer_files,
)
from swamla.errors import CorruptError, DataError, foreign

GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2"
CODE = "def f(x):\n    if x:\n        return self.value_1[2024]\n\n\n" * 20
THIS_FILE = Path(__file__).read_text(encoding="utf-8")
STRANGE = ["", " ", "\x00\r\n\t", "été 漢字 🙂👩‍👩‍👧", "<|endoftext|>", "a<|endoftext|>b", "\ufeff\ufffd", CODE]


def make(spec: str) -> Tokenizer:
    return make_tokenizer(spec, [CODE] * 3, STRANGE)


@pytest.fixture(params=["byte", "char", "bpe:300", "bpe-lines:300"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make(request.param)


def test_plain_ids_are_the_text_of_their_numbers() -> None:
    plain = make("ids:50")
    assert (plain.vocab_size, plain.eos_id) == (51, 50)
    assert plain.encode(" 3 49\n0") == [3, 49, 0]
    assert plain.decode([3, 49, 0]) == " 3 49 0"
    assert plain.encode(plain.decode(range(50))) == list(range(50))
    assert plain.decode([1, 50, 2]) == " 1<|endoftext|> 2"


@pytest.mark.parametrize(("text", "first"), [("3 50", "50"), ("3 x 4", "x"), ("-1", "-1"), ("1.5", "1.5"), ("²", "²")])
def test_what_is_no_plain_id_is_refused(text: str, first: str) -> None:
    with pytest.raises(DataError, match=f"'{first}' is no id: must be numbers from 0 to 49, .*without a tokenizer"):
        make("ids:50").encode(text)


def test_plain_ids_are_saved_and_streamed(tmp_path: Path) -> None:
    plain = make("ids:50")
    plain.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.fingerprint, loaded.vocab_size) == (plain.fingerprint, 51)
    assert make("ids:51").fingerprint != plain.fingerprint
    stream = StreamDecoder(plain)
    assert "".join(stream.push(i) for i in (3, 4, 49)) + stream.flush() == " 3 4 49"
    for count in ("0", "true", '"5"', "null"):
        (tmp_path / "damaged.json").write_text(f'{{"swamla_tokenizer": "ids", "count": {count}}}')
        with pytest.raises(CorruptError, match="complete"):
            load_tokenizer(tmp_path / "damaged.json")


@pytest.mark.parametrize("text", STRANGE)
def test_ids_turn_back_into_exactly_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_special_tokens_name_in_a_text_is_plain_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


def test_a_batch_encodes_as_its_texts_do_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(STRANGE) == [tokenizer.encode(text) for text in STRANGE]


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for name in ("fingerprint", "vocab_size", "eos_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode_batch(STRANGE) == tokenizer.encode_batch(STRANGE)


def test_a_lone_surrogate_is_an_error_with_its_offset(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(DataError, match=r"U\+DC00 at offset 2"):
            encode("ab\udc00")


def test_an_id_outside_of_the_vocabulary_is_an_error(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=f"token id {token} is outside"):
            tokenizer.decode([0, token])


def test_streamed_text_is_the_decoded_text_for_any_ids(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("é🙂 漢 x"), 255, 240, 159, 97, 226, 130, 172, 255, *tokenizer.encode("end 🙂")[:-1]]
    ids = [i % tokenizer.vocab_size for i in ids]
    decoder = StreamDecoder(tokenizer)
    streamed = [decoder.push(i) for i in ids]
    assert "".join(streamed) + decoder.flush() == tokenizer.decode(ids)


def test_a_character_is_streamed_once_and_only_when_whole() -> None:
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(byte) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]


def test_an_unknown_character_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match="character 'z' at offset 2"):
        CharTokenizer("abc").encode("abz")


def test_characters_are_numbered_by_code_point() -> None:
    tokenizer = CharTokenizer("banana\n")
    assert tokenizer.encode("\nabn") == [0, 1, 2, 3]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (5, 4)


def test_a_bpe_is_the_same_when_trained_again() -> None:
    first, again, larger = (make_tokenizer(spec, [THIS_FILE]).fingerprint for spec in ("bpe:400", "bpe:400", "bpe:401"))
    assert first == again != larger


def test_a_bpe_has_the_vocabulary_that_was_asked_for_and_shortens_what_it_learned() -> None:
    tokenizer = make_tokenizer("bpe:600", [THIS_FILE])
    assert tokenizer.vocab_size == 600
    assert len(tokenizer.encode(THIS_FILE)) < len(THIS_FILE) / 2


def test_line_merges_cross_words_and_word_merges_do_not() -> None:
    assert len(make("bpe-lines:400").encode(CODE)) < len(make("bpe:400").encode(CODE))


def test_a_foreign_tokenizer_without_an_end_of_text_is_given_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.enable_truncation(3)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode(tokenizer.encode(CODE)) == CODE
    tokenizer.save(tmp_path / "saved.json")
    assert load_tokenizer(tmp_path / "saved.json").fingerprint == tokenizer.fingerprint


def test_a_vocabulary_with_gaps_counts_to_its_highest_id(tmp_path: Path) -> None:
    make("bpe:300").save(tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"]["vocab"][last] = 70_000
    (tmp_path / "t.json").write_text(json.dumps(data))
    assert load_tokenizer(tmp_path / "t.json").vocab_size == 70_001


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"swamla_tokenizer": "word"}', '{"swamla_tokenizer": "char"}'])
def test_a_file_that_is_no_tokenizer_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(CorruptError, match=r"t\.json: not a tokenizer") as caught:
        load_tokenizer(tmp_path / "t.json")
    assert caught.value.exit_status == 3


def test_a_tokenizer_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; give the path of a tokenizer\.json, or byte, char"):
        make_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(DataError, match=r"needs encoder\.json and vocab\.bpe"):
        make_tokenizer(f"gpt2:{tmp_path}")


def test_the_hub_offline_is_one_line_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: object) -> str:
        assert not logging.getLogger("huggingface_hub.utils").isEnabledFor(logging.WARNING)  # each attempt warns
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(DataError, match=r"cannot fetch tokenizer 'openai-community/gpt2'.*no route to host") as caught:
        make_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not GPT2.exists(), reason="GPT-2's encoder.json and vocab.bpe are not on this machine")
def test_gpt2_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_bytes((GPT2 / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((GPT2 / "vocab.bpe").read_bytes())
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path))
    texts = [*STRANGE, THIS_FILE]
    for folder in (GPT2, tmp_path):
        ours = make_tokenizer(f"gpt2:{folder}")
        assert (ours.vocab_size, ours.eos_id) == (50257, 50256)
        for text in texts:
            assert ours.decode(ours.encode(text)) == text
            if "<|endoftext|>" not in text:  # theirs takes the name for the token
                assert ours.encode(text) == theirs.encode(text)


# tokenizers of others that are not as they should be


def described(model: dict[str, object]) -> str:
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return json.dumps({"version": "1.0", "added_tokens": [], **dict.fromkeys(parts), "model": model})


DAMAGED = {
    "a merge whose result is not in the vocabulary": described(
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    ),
    "a merge of unknown tokens": described({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]}),
    "a merge of three": described({"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}),
    "an id below 0": described({"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "an unknown id that is not there": described({"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 7}),
    "an unknown kind": described({"type": "Markov", "vocab": {}}),
    "JSON that is too deep": "[" * 100_000,
    "JSON that is cut": described({"type": "BPE", "vocab": {"a": 0}, "merges": []})[:-9],
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_tokenizer_is_one_line_that_names_it_and_no_panic(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    (tmp_path / "t.json").write_text(DAMAGED[what])
    with pytest.raises(CorruptError, match=r"t\.json: not a tokenizer") as caught:
        make_tokenizer(str(tmp_path / "t.json"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("encoder", "merges"),
    [('{"a":0,"b":1}', "a b"), ('{"a":0}', "a b"), ('{"a":0}', "a b c"), ("[]", "a b"), ('{"a":"x"}', ""), ("{", "")],
)
def test_merges_that_do_not_fit_gpt2s_vocabulary_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], encoder: str, merges: str
) -> None:
    (tmp_path / "encoder.json").write_text(encoder)
    (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n")
    with pytest.raises(DataError, match=r"encoder\.json and vocab\.bpe are not a BPE's \(") as caught:
        make_tokenizer(f"gpt2:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None},
    ],
)
def test_a_text_that_a_tokenizer_without_an_unknown_token_cannot_encode_is_one_line(
    tmp_path: Path, model: dict[str, object]
) -> None:
    (tmp_path / "t.json").write_text(described(model))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(DataError, match="the tokenizer cannot encode a text: it needs an unknown token"):
            encode("zz\0 é")


def test_a_foreign_error_is_ours_with_its_first_line_but_an_interrupt_stays_one() -> None:
    class Panic(BaseException):
        pass

    with pytest.raises(DataError, match=r"^what \(first\)$"), foreign(DataError, "what"):
        raise Panic("first\nsecond")
    for own in (KeyboardInterrupt, SystemExit, MemoryError):
        with pytest.raises(own), foreign(DataError, "what"):
            raise own


END = "<｜end▁of▁sentence｜>"  # DeepSeek's


def foreign_folder(folder: Path, **files: Any) -> Path:
    """A byte-level tokenizer.json whose last two ids are a user's turn and DeepSeek's end, with files beside it."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={sign: i for i, sign in enumerate([*signs, "<user>", END])}, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([END])
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    for name, plain in files.items():
        (folder / f"{name}.json").write_text(json.dumps(plain), encoding="utf-8")
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("files", "eos_id"),
    [
        ({"tokenizer_config": {"eos_token": END}}, 257),
        ({"tokenizer_config": {"eos_token": {"content": END, "special": True}}}, 257),
        ({"config": {"eos_token_id": 257}}, 257),
        ({"config": {"text_config": {"eos_token_id": 257}}}, 257),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [256, 257]}}, 256),
        ({"config": {"eos_token_id": [9000, 257]}}, 257),
        ({"tokenizer_config": {"eos_token": END}, "config": {"eos_token_id": 256}}, 257),
        ({"tokenizer_config": {"eos_token": "<no such token>"}}, 258),
    ],
)
def test_the_token_that_ends_texts_is_told_by_the_files_beside_and_remembered(
    files: dict[str, Any], eos_id: int, tmp_path: Path
) -> None:
    path = foreign_folder(tmp_path / "theirs", **files)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (max(258, eos_id + 1), eos_id)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.eos_id, again.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint)
    for text in (END, "<user>", "é x"):
        assert again.eos_id not in again.encode(text)
        assert again.decode(again.encode(text)) == text
    assert json.loads(again.library_json()).keys() == json.loads(path.read_text(encoding="utf-8")).keys()
    assert make_tokenizer(str(path.parent)).fingerprint == tokenizer.fingerprint
    named = {file.name for file in tokenizer_files(str(path))} - {"tokenizer.json"}
    assert named == {f"{name}.json" for name, plain in files.items() if plain != {"eos_token_id": None}}


def test_a_usual_name_goes_before_what_the_files_beside_say(tmp_path: Path) -> None:
    make("bpe:300").save(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == make("bpe:300").eos_id


def test_a_remembered_end_that_the_vocabulary_lacks_is_damage(tmp_path: Path) -> None:
    plain = json.loads(foreign_folder(tmp_path / "theirs").read_text(encoding="utf-8"))
    (tmp_path / "t.json").write_text(json.dumps(plain | {"swamla_eos": "<gone>"}), encoding="utf-8")
    with pytest.raises(CorruptError, match="<gone>"):
        load_tokenizer(tmp_path / "t.json")
