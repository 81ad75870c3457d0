"""Byte-level BPE: trained on the spot, or GPT-2's from its two files. Both return the text of a tokenizer.json."""

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from swamla.data.config import BYTES
from swamla.data.foreign import foreign, without_stderr
from swamla.errors import DataError

EOS_TEXT = "<|endoftext|>"

# What merges may not cross. Letters with the sign before them, up to three digits, and punctuation together with the
# line's end and the next line's indentation, which saves 5 % of the tokens of Python source against GPT-2's pattern.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\s*[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
# Merges may span words of a line: a further 13 % fewer tokens, but "def f" is then often one of them.
LINES = r"[^\n]*\n[ \t]*|[^\n]+"
_RULES = "1"  # to be raised when `train` changes in what the patterns do not show
_TRAINING_PIECE = 1 << 16  # the library needs some 50 bytes a character while it splits


def training_version() -> list[str]:
    """What, besides the texts and the size, decides which BPE `train` makes: its rules, and whose code follows them."""
    return [version("tokenizers"), _RULES, WORDS, LINES]


def train(texts: Iterable[str], vocab_size: int, lines: bool = False) -> str:
    """A BPE of at most `vocab_size` ids: the end of a document, 256 bytes, and merges. The same texts, the same BPE."""
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
    """The texts, long ones cut after line ends where there are any."""
    for text in texts:
        start = 0
        while len(text) - start > _TRAINING_PIECE:
            stop = text.rfind("\n", start, start + _TRAINING_PIECE) + 1 or start + _TRAINING_PIECE
            yield text[start:stop]
            start = stop
        yield text[start:]


def gpt2(folder: Path) -> str:
    """GPT-2's BPE from encoder.json and vocab.bpe, or their newer names vocab.json and merges.txt."""
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
