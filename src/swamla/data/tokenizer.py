"""Tokenizers. Text that looks like a special token is encoded as plain text."""

import hashlib
import itertools
import json
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from swamla.config import load_json
from swamla.data.config import BYTES, parse_bpe, parse_ids
from swamla.data.hub import reason
from swamla.errors import CorruptError, DataError, HubDataError, MissingBackendError, foreign, without_stderr

EOS_TEXT = "<|endoftext|>"
_OTHER_EOS = ("<|end_of_text|>", "</s>", "<eos>")
_OWN_KEY = "swamla_tokenizer"
_SPECIALS_KEY = "specials"  # in a file of ours: special tokens after the last id
_EOS_KEY = "swamla_eos"  # in a saved tokenizer.json: the token that ends documents, where the library's does not tell
# Files of transformers beside a tokenizer.json, in the order in which they are asked for that token.
_EOS_FILES = {
    "tokenizer_config.json": "eos_token",
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
}
_NO_ENCODING = "the tokenizer cannot encode a text: it needs an unknown token, or all 256 bytes, in its vocabulary"
_GPT2_HUB_NAME = "openai-community/gpt2"

# Pretokenization: merges stay within one match. A match is letters with one sign before them, up to three digits, or
# punctuation with the line end and the next line's indentation. That gives 5 % fewer tokens on Python source than
# GPT-2's pattern.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\s*[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
# Merges may span the words of a line: another 13 % fewer tokens, but then "def f" is often a single token.
LINES = r"[^\n]*\n[ \t]*|[^\n]+"
_RULES = "1"  # raise this when `train_bpe` changes in other ways than its patterns
_TRAINING_PIECE = 1 << 16  # characters; the library needs some 50 bytes for each while it splits


class Tokenizer(Protocol):
    """The interface of all tokenizers.

    `eos_id` is the first input and the last label of every document; no text encodes to it. `start` is what a prompt
    begins with: `eos_id`, or nothing for the rows of a task. `specials` are the tokens that no text encodes to, and
    their ids. `fingerprint` is a SHA-256 of everything that affects the ids.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def start(self) -> list[int]: ...
    @property
    def specials(self) -> Mapping[str, int]: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens. DataError for a lone surrogate or an unknown character."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, encoded in parallel if the tokenizer can."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; incomplete UTF-8 becomes U+FFFD. DataError for an id outside of the vocabulary."""

    def save(self, path: str | Path) -> None:
        """Write the file that `load_tokenizer` reads."""

    def library_json(self) -> str:
        """The tokenizer.json with which the `tokenizers` library encodes and decodes the same ids."""


class _Serialized:
    """The common part of all tokenizers: fingerprint, saving and checks. A tokenizer is stored as JSON text."""

    def __init__(self, serialized: str, vocab_size: int, eos_id: int) -> None:
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        canonical = json.dumps(json.loads(serialized), sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self._serialized = serialized

    @property
    def start(self) -> list[int]:
        return [self.eos_id]

    @property
    def specials(self) -> Mapping[str, int]:
        return {EOS_TEXT: self.eos_id}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._serialized, encoding="utf-8")

    def _known(self, ids: Sequence[int]) -> list[int]:
        """The ids as Python integers, also of a tensor's row. DataError for one outside of the vocabulary."""
        try:
            numbers = [operator.index(i) for i in ids]
        except TypeError:
            raise DataError(f"{ids!r:.60}: must be a sequence of token ids") from None
        for extreme in (min(numbers, default=0), max(numbers, default=0)):
            if not 0 <= extreme < self.vocab_size:
                raise DataError(f"token id {extreme} is outside of the vocabulary (0 to {self.vocab_size - 1})")
        return numbers


class ByteTokenizer(_Serialized):
    """Every UTF-8 byte is a token."""

    def __init__(self) -> None:
        super().__init__(json.dumps({_OWN_KEY: "byte"}), vocab_size=BYTES + 1, eos_id=BYTES)

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        eos = EOS_TEXT.encode()
        return b"".join(eos if i == self.eos_id else bytes((i,)) for i in self._known(ids)).decode(
            "utf-8", errors="replace"
        )

    def library_json(self) -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        library = Tokenizer(models.BPE(vocab={sign: byte for byte, sign in enumerate(byte_signs())}, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        return _with_eos(library)


class CharTokenizer(_Serialized):
    """Every character of a given text is a token; ids are in the order of code points."""

    def __init__(self, characters: str) -> None:
        self._characters = "".join(sorted(set(characters)))
        self._codes = _code_points(self._characters)
        serialized = json.dumps({_OWN_KEY: "char", "characters": self._characters})
        super().__init__(serialized, vocab_size=len(self._codes) + 1, eos_id=len(self._codes))

    def encode(self, text: str) -> list[int]:
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes) if len(self._codes) else np.arange(len(codes))
        if len(unknown):
            at = int(unknown[0])
            raise DataError(
                f"character {text[at]!r} at offset {at} is not among the {len(self._codes)} characters known"
            )
        return ids.tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(EOS_TEXT if i == self.eos_id else self._characters[i] for i in self._known(ids))

    def library_json(self) -> str:
        from tokenizers import Regex, pre_tokenizers

        each = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        return _words({character: i for i, character in enumerate(self._characters)}, each)


class HFTokenizer(_Serialized):
    """A tokenizer of the `tokenizers` library, given as the text of its tokenizer.json.

    ends: tokens, or their ids, that end texts. Where no special token has a usual name, the first that the vocabulary
    has ends documents, and a saved tokenizer remembers it; without one, `EOS_TEXT` is added as a new id.
    """

    def __init__(self, serialized: str, ends: Sequence[str | int] = ()) -> None:
        import tokenizers

        plain = json.loads(serialized)
        eos = plain.pop(_EOS_KEY, None)
        self._library = tokenizers.Tokenizer.from_str(serialized if eos is None else json.dumps(plain))
        eos = eos or self._usual_eos()
        if eos is None:
            named = next(self._known_tokens(ends), None)
            eos = named or EOS_TEXT
            self._library.add_special_tokens([eos])
            serialized = self._library.to_str()
            if named is not None:
                serialized = json.dumps({**json.loads(serialized), _EOS_KEY: named}, ensure_ascii=False)
        eos_id = self._library.token_to_id(eos)
        if eos_id is None:
            raise CorruptError(f"{_EOS_KEY} = {eos!r}: not in its vocabulary")
        self._library.encode_special_tokens = True  # "<|endoftext|>" in a text is thirteen characters
        self._library.no_truncation()
        self._library.no_padding()
        highest = max(self._library.get_vocab(with_added_tokens=True).values())
        super().__init__(serialized, vocab_size=highest + 1, eos_id=eos_id)

    def _known_tokens(self, tokens: Sequence[str | int]) -> Iterator[str]:
        """Those of the tokens, or ids, that are in the vocabulary, as text."""
        for token in tokens:
            text = self._library.id_to_token(token) if isinstance(token, int) else token
            if text is not None and self._library.token_to_id(text) is not None:
                yield text

    def _usual_eos(self) -> str | None:
        special = {token.content for token in self._library.get_added_tokens_decoder().values() if token.special}
        return next((text for text in (EOS_TEXT, *_OTHER_EOS) if text in special), None)

    @property
    def specials(self) -> Mapping[str, int]:
        added = self._library.get_added_tokens_decoder().items()
        return {token.content: i for i, token in added if token.special}

    def with_specials(self, texts: Sequence[str]) -> "HFTokenizer":
        """The same with special tokens after its last id. DataError where the library gives them other ids."""
        from tokenizers import Tokenizer

        plain = json.loads(self._serialized)
        eos = plain.pop(_EOS_KEY, None)
        library = Tokenizer.from_str(json.dumps(plain))
        library.add_special_tokens(list(texts))
        ids = [library.token_to_id(text) for text in texts]
        expected = list(range(self.vocab_size, self.vocab_size + len(ids)))
        if ids != expected:
            raise DataError(
                f"the tokenizer has no room for special tokens: {', '.join(texts)} would be {ids}, "
                f"not {expected}, after its last id"
            )
        serialized = library.to_str()
        if eos is not None:
            serialized = json.dumps({**json.loads(serialized), _EOS_KEY: eos}, ensure_ascii=False)
        return HFTokenizer(serialized)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        with foreign(DataError, _NO_ENCODING):
            return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            utf8(text)
        with foreign(DataError, _NO_ENCODING):
            return [each.ids for each in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        numbers = self._known(ids)
        with foreign(DataError, "the tokenizer cannot decode its own ids"):
            return self._library.decode(numbers, skip_special_tokens=False)

    def library_json(self) -> str:
        plain = json.loads(self._serialized)
        return self._serialized if plain.pop(_EOS_KEY, None) is None else json.dumps(plain, ensure_ascii=False)


class IdTokenizer(_Serialized):
    """Ids without a tokenizer: their text is the numbers, a space before each. The id after the last ends documents."""

    def __init__(self, count: int) -> None:
        super().__init__(json.dumps({_OWN_KEY: "ids", "count": count}), vocab_size=count + 1, eos_id=count)

    def encode(self, text: str) -> list[int]:
        words = text.split()
        wrong = next((word for word in words if not (word.isascii() and word.isdecimal())), None)
        if wrong is not None or any(int(word) >= self.eos_id for word in words):
            first = wrong or next(word for word in words if int(word) >= self.eos_id)
            raise DataError(
                f"{first!r:.40} is no id: must be numbers from 0 to {self.eos_id - 1}, spaces between them: "
                "this model came without a tokenizer"
            )
        return [int(word) for word in words]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(EOS_TEXT if i == self.eos_id else f" {i}" for i in self._known(ids))

    def library_json(self) -> str:
        return _spaced({f" {i}": i for i in range(self.eos_id)})


class NameTokenizer(_Serialized):
    """Ids that have names, as those of a task: their text is the names, a space before each.

    The id after the last ends documents, which no row of a task does.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self._ids = list(names), {name: i for i, name in enumerate(names)}
        serialized = json.dumps({_OWN_KEY: "names", "names": self.names}, ensure_ascii=False)
        super().__init__(serialized, vocab_size=len(self.names) + 1, eos_id=len(self.names))

    @property
    def start(self) -> list[int]:
        return []

    def encode(self, text: str) -> list[int]:
        words = text.split()
        wrong = next((word for word in words if word not in self._ids), None)
        if wrong is not None:
            known = f"{self.names[0]}, {self.names[1]} … {self.names[-1]}"
            raise DataError(f"{wrong!r:.40} is no name of an id: must be words of {known}, spaces between them")
        return [self._ids[word] for word in words]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(EOS_TEXT if i == self.eos_id else f" {self.names[i]}" for i in self._known(ids))

    def library_json(self) -> str:
        return _spaced({f" {name}": i for i, name in enumerate(self.names)})


class WithSpecials(_Serialized):
    """A byte or character tokenizer with special tokens after its last id."""

    def __init__(self, base: Tokenizer, texts: Sequence[str], plain: Mapping[str, Any]) -> None:
        self._base, self._texts = base, list(texts)
        serialized = json.dumps({**plain, _SPECIALS_KEY: self._texts}, ensure_ascii=False)
        super().__init__(serialized, vocab_size=base.vocab_size + len(self._texts), eos_id=base.eos_id)

    @property
    def base(self) -> Tokenizer:
        """The tokenizer without them."""
        return self._base

    @property
    def specials(self) -> Mapping[str, int]:
        return {**self._base.specials, **{text: i for i, text in enumerate(self._texts, self._base.vocab_size)}}

    def encode(self, text: str) -> list[int]:
        return self._base.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._base.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        first = self._base.vocab_size
        runs = itertools.groupby(self._known(ids), key=lambda i: i >= first)
        return "".join(
            "".join(self._texts[i - first] for i in run) if special else self._base.decode(list(run))
            for special, run in runs
        )

    def library_json(self) -> str:
        from tokenizers import Tokenizer

        library = Tokenizer.from_str(self._base.library_json())
        library.add_special_tokens(self._texts)
        return str(library.to_str())


def with_specials(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """A tokenizer that has these special tokens: those that it lacks get the ids after its last one.

    Text still encodes to none of them. Raises DataError for a tokenizer of ids or of names, which has no text.
    """
    missing = [text for text in texts if text not in tokenizer.specials]
    if not missing:
        return tokenizer
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.with_specials(missing)
    if isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        return WithSpecials(tokenizer, missing, json.loads(tokenizer._serialized))
    raise DataError(
        f"its tokenizer, {type(tokenizer).__name__}, has no special tokens: must be of bytes, characters "
        "or a tokenizer.json"
    )


def byte_signs() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it can be seen, or one from U+0100.

    As in GPT-2 (encoder.py), which every byte-level tokenizer follows.
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}  # printable in Latin-1
    others = itertools.count(BYTES)
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(BYTES)]


def _spaced(vocabulary: dict[str, int]) -> str:
    """tokenizer.json of words with a space before each."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    spaces = [normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Prepend(" ")]
    return _words(vocabulary, pre_tokenizers.Split(" ", "merged_with_next"), normalizers.Sequence(spaces))


def _words(vocabulary: dict[str, int], split: Any, normalizer: Any = None) -> str:
    """The tokenizer.json of a vocabulary without subwords; a word outside it is an error."""
    from tokenizers import Tokenizer, decoders, models

    library = Tokenizer(models.WordLevel(vocabulary))
    library.pre_tokenizer, library.decoder = split, decoders.Fuse()
    if normalizer is not None:
        library.normalizer = normalizer
    return _with_eos(library)


def _with_eos(library: Any) -> str:
    """The tokenizer.json with `EOS_TEXT` as the id after the last."""
    library.add_special_tokens([EOS_TEXT])
    return str(library.to_str())


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of `text`. DataError for a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"lone surrogate U+{code:04X} at offset {error.start}: the text is not Unicode") from error


def _code_points(text: str) -> np.ndarray:
    utf8(text)
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file written by `save`, or in any tokenizer.json. DataError if the file is missing.

    Files of transformers beside it tell the token that ends texts where that has no usual name.
    """
    path = Path(path)
    try:
        serialized = path.read_text(encoding="utf-8")
        data = json.loads(serialized)
    except OSError as error:
        raise DataError(f"{path}: no tokenizer there ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not a tokenizer: {error}") from error
    if not isinstance(data, dict):
        raise CorruptError(f"{path}: not a tokenizer: needs a JSON object")
    if _OWN_KEY in data:
        return _own_tokenizer(data, path)
    ends = [token for tokens in _ends_beside(path).values() for token in tokens]
    with foreign(CorruptError, f"{path}: not a tokenizer.json that `tokenizers` can read"), without_stderr():
        return HFTokenizer(serialized, ends)


def _ends_beside(path: Path) -> dict[Path, list[str | int]]:
    """The tokens that end texts, or their ids, by the file of transformers beside a tokenizer.json that names them."""
    found = {}
    for name, key in _EOS_FILES.items():
        file = path.with_name(name)
        if path.name == "tokenizer.json" and file.is_file():
            plain, _ = load_json(file)
            value = plain.get(key, (plain.get("text_config") or {}).get(key))
            values = [each.get("content") if isinstance(each, dict) else each for each in _as_list(value)]
            if tokens := [each for each in values if isinstance(each, str | int)]:
                found[file] = tokens
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _own_tokenizer(data: dict[str, Any], path: Path) -> Tokenizer:
    makers: dict[str, Callable[[], Tokenizer]] = {
        "byte": ByteTokenizer,
        "char": lambda: CharTokenizer(data["characters"]),
        "ids": lambda: IdTokenizer(data["count"]),
        "names": lambda: NameTokenizer(data["names"]),
    }
    kind, count = data[_OWN_KEY], data.get("count")
    incomplete = kind == "char" and not isinstance(data.get("characters"), str)
    incomplete = incomplete or (kind == "ids" and (type(count) is not int or count < 1))
    incomplete = incomplete or (kind == "names" and not _are_names(data.get("names")))
    specials = data.get(_SPECIALS_KEY, [])
    incomplete = incomplete or (_SPECIALS_KEY in data and not _are_names(specials))
    if kind not in makers or incomplete:
        raise CorruptError(f"{path}: not a tokenizer: kind {kind!r} needs to be one of {', '.join(makers)}, complete")
    return with_specials(makers[kind](), specials)


def _are_names(names: Any) -> bool:
    """Whether these are names of ids: words, all different."""
    words = isinstance(names, list) and all(isinstance(name, str) and name.split() == [name] for name in names)
    return words and len(names) > 1 and len(set(names)) == len(names)


def make_tokenizer(spec: str, train_texts: Iterable[str] = (), all_texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` asks for.

    A BPE is trained on `train_texts`. A character vocabulary is taken from `all_texts`, so that held-out text has no
    unknown character. Other kinds read neither. Raises DataError, or MissingBackendError without the hub's library.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        characters: set[str] = set()
        for text in all_texts:
            characters.update(text)
        return CharTokenizer("".join(characters))
    if count := parse_ids(spec):
        return IdTokenizer(count)
    if bpe := parse_bpe(spec):
        vocab_size, lines = bpe
        return HFTokenizer(train_bpe(train_texts, vocab_size, lines))
    if spec == "gpt2" or spec.startswith("hub:"):
        return _from_hub(_GPT2_HUB_NAME if spec == "gpt2" else spec.removeprefix("hub:"))
    if spec.startswith("gpt2:"):
        return HFTokenizer(gpt2_bpe(Path(spec.removeprefix("gpt2:")).expanduser()))
    path = Path(spec).expanduser()
    if not path.exists():
        kinds = "byte, char, bpe:4096, bpe-lines:4096, ids:50, gpt2, gpt2:FOLDER, hub:NAME"
        raise DataError(f"data.tokenizer = {spec!r}: no such file; give the path of a tokenizer.json, or {kinds}")
    return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def tokenizer_files(spec: str) -> list[Path]:
    """The local files of the tokenizer `spec`, if any: when they change, so does the tokenizer."""
    path = Path(spec.removeprefix("gpt2:")).expanduser()
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in (".json", ".bpe", ".txt"))
    return [path, *_ends_beside(path)] if path.is_file() else []


def bpe_version() -> list[str]:
    """What the result of `train_bpe` depends on besides its arguments: the library's version, and our rules."""
    return [version("tokenizers"), _RULES, WORDS, LINES]


def train_bpe(texts: Iterable[str], vocab_size: int, lines: bool = False) -> str:
    """Train a BPE of at most `vocab_size` ids: end of document, 256 bytes, merges. Deterministic for equal texts.

    lines: merges may span the words of a line.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LINES if lines else WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_line_pieces(texts), trainer)
    assert tokenizer.get_vocab_size() > BYTES
    return tokenizer.to_str()


def _line_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts, long ones cut into pieces, after a line end if possible."""
    for text in texts:
        start = 0
        while len(text) - start > _TRAINING_PIECE:
            stop = text.rfind("\n", start, start + _TRAINING_PIECE) + 1 or start + _TRAINING_PIECE
            yield text[start:stop]
            start = stop
        yield text[start:]


def gpt2_bpe(folder: Path) -> str:
    """GPT-2's BPE, read from encoder.json and vocab.bpe, or under their newer names vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    encoder, merges = _gpt2_files(folder)
    what = f"{folder}: {encoder.name} and {merges.name} are not a BPE's"
    with foreign(DataError, what), without_stderr():
        vocab: dict[str, int] = json.loads(encoder.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs: list[Any] = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TEXT])
    return tokenizer.to_str()


def _gpt2_files(folder: Path) -> tuple[Path, Path]:
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        encoder, merges = (folder / name for name in names)
        if encoder.is_file() and merges.is_file():
            return encoder, merges
    raise DataError(f"{folder}: needs encoder.json and vocab.bpe, or vocab.json and merges.txt")


def _from_hub(name: str) -> Tokenizer:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingBackendError(f"tokenizer {name!r} is on the hub: pip install 'swamla[hub]'") from error
    chatter = logging.getLogger("huggingface_hub")  # it logs two lines per attempt; our error is one line
    before = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        file = hf_hub_download(name, "tokenizer.json")
    except Exception as error:  # the classes depend on the library's version
        raise HubDataError(
            f"cannot fetch tokenizer {name!r} from the hub ({reason(error)}); offline, pass the path of its "
            "tokenizer.json"
        ) from error
    finally:
        chatter.setLevel(before)
    return load_tokenizer(file)


class StreamDecoder:
    """Decodes ids one at a time; a character is returned once all of its bytes are complete.

    The concatenated results of `push` and `flush` equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids already returned as text; some decoders depend on the token before
        self._pending: list[int] = []
        self._sent = 0  # characters of the pending ids' text already returned

    def push(self, token: int) -> str:
        """Add `token`, and return the new text that no later token can change; may be empty."""
        self._pending.append(token)
        text = self._pending_text()
        if text.endswith("\ufffd"):  # only the last character can still change
            new, self._sent = text[self._sent : -1], len(text) - 1
            return new
        new = text[self._sent :]
        self._context, self._pending, self._sent = self._pending, [], 0
        return new

    def flush(self) -> str:
        """Return the rest; an incomplete character becomes U+FFFD."""
        new = self._pending_text()[self._sent :]
        self._context, self._pending, self._sent = [], [], 0
        return new

    def _pending_text(self) -> str:
        before = len(self._tokenizer.decode(self._context))
        return self._tokenizer.decode(self._context + self._pending)[before:]
