"""Tokenizers as llama.cpp has them: byte-level BPE, whose way to cut text into words is one of a list in its code."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swamla.data.chat import END, PLAIN_JINJA, START
from swamla.data.tokenizer import LINES, WORDS, CharTokenizer, Tokenizer, WithSpecials, byte_signs
from swamla.errors import UsageError

_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = "GPT-2's pattern"
# llama.cpp's name (src/llama-vocab.cpp) of each way to cut text, by the patterns of a tokenizer.json.
PRE: Mapping[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (rf"{_SHORTENED}|\p{{N}}{{1,3}}|{_SIGNS}",): "smaug-bpe",  # Llama 3's
    (rf"{_SHORTENED}|\p{{N}}|{_SIGNS}",): "qwen2",
}
NEAREST = "smaug-bpe"  # to WORDS, which is not in the list
ANY = "gpt-2"  # for a tokenizer whose ids do not depend on how text is cut
NEVER = "ÿ ÿ"  # a merge of two bytes 255, which no text has: llama.cpp wants a list that is not empty
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A byte-level BPE.

    tokens: by id, in the signs of `byte_signs`.  merges: "left right", the first first.  special: ids of no text.
    whole: ids whose tokens, as they stand, are taken out of a text before it is cut.
    pre: how llama.cpp cuts text.  same: whether all texts have the ids of training.
    chat_end: the id that ends a message, if the model was tuned on conversations.
    """

    tokens: Sequence[str]
    merges: Sequence[str]
    special: frozenset[int]
    whole: frozenset[int] = frozenset()
    eos_id: int
    pre: str
    same: bool = True
    chat_end: int | None = None

    def metadata(self) -> dict[str, Any]:
        """The keys of a GGUF file. A text begins with the document's start, which also ends it, as in training.

        With `chat_end`, the template of conversations, and this id as the end of turns.
        """
        ids = range(len(self.tokens))
        chat = {"tokenizer.chat_template": PLAIN_JINJA, "tokenizer.ggml.eot_token_id": self.chat_end}
        return ({} if self.chat_end is None else chat) | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": [
                CONTROL if i in self.special else USER_DEFINED if i in self.whole else NORMAL for i in ids
            ],
            "tokenizer.ggml.merges": list(self.merges) or [NEVER],
            "tokenizer.ggml.bos_token_id": self.eos_id,
            "tokenizer.ggml.eos_token_id": self.eos_id,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_space_prefix": False,
        }


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """A tokenizer of ours for llama.cpp. Raises `UsageError` for one that it cannot have."""
    chats = {START, END} <= tokenizer.specials.keys()
    return replace(_words(tokenizer), chat_end=tokenizer.specials[END] if chats else None)


def _words(tokenizer: Tokenizer) -> Vocabulary:
    plain = json.loads(tokenizer.library_json())
    model, normalizer = plain["model"], plain.get("normalizer")
    added = {token["id"]: token["content"] for token in plain["added_tokens"]}
    names = {i: token for token, i in model["vocab"].items()} | added
    tokens = [names.get(i, f"[unused {i}]") for i in range(tokenizer.vocab_size)]
    special = frozenset(added) | {i for i in range(len(tokens)) if i not in names}
    if isinstance(tokenizer.base if isinstance(tokenizer, WithSpecials) else tokenizer, CharTokenizer):
        return _characters(tokens, special, tokenizer.eos_id)
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}, and llama.cpp's is a BPE of bytes")
    if normalizer is not None:
        raise _refused(f"it changes text before it encodes it ({normalizer['type']}), and llama.cpp does not")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(option):
            raise _refused(f"its {option} is {model[option]!r}, which llama.cpp's BPE does not have")
    cut = _patterns(plain.get("pre_tokenizer"))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    whole: dict[int, str] = {}
    if not merges:
        pre = ANY
    elif cut in PRE:
        pre = PRE[cut]
    elif cut == (WORDS,):
        pre, whole = NEAREST, _indented(tokens, special)
    elif cut == (LINES,):
        raise _refused("its merges span the words of a line, as of a bpe-lines; a bpe goes")
    else:
        raise _refused(f"llama.cpp does not cut text by {' then '.join(cut) or 'nothing'}")
    return Vocabulary(
        tokens=[whole.get(i, token) for i, token in enumerate(tokens)],
        merges=merges,
        special=special,
        whole=frozenset(whole),
        eos_id=tokenizer.eos_id,
        pre=pre,
        same=not merges or cut in PRE,
    )


def _characters(tokens: Sequence[str], special: frozenset[int], eos_id: int) -> Vocabulary:
    """Characters as merges of their bytes: a byte that continues a character begins none, so no other bytes merge."""
    signs = byte_signs()
    spelled = {i: "".join(signs[b] for b in tokens[i].encode()) for i in range(len(tokens)) if i not in special}
    merges = dict.fromkeys(f"{one[:end]} {one[end]}" for one in spelled.values() for end in range(1, len(one)))
    named = [spelled.get(i, token) for i, token in enumerate(tokens)]
    return Vocabulary(tokens=named, merges=list(merges), special=special, eos_id=eos_id, pre=ANY)


def _indented(tokens: Sequence[str], special: frozenset[int]) -> dict[int, str]:
    """Id → text of tokens that end in the indentation of a next line, which WORDS keeps together and NEAREST cuts off.

    Taken out of a text first, the longest first, they are nearly always those that the BPE would make.
    """
    byte_of = {sign: byte for byte, sign in enumerate(byte_signs())}
    found = {}
    for i, token in enumerate(tokens):
        if i not in special:
            text = bytes(byte_of[sign] for sign in token).decode("utf-8", errors="replace")
            if "\n" in text and not text.endswith("\n") and "\ufffd" not in text:
                found[i] = text
    return found


def _patterns(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The patterns by which a tokenizer.json cuts text, before it takes its bytes."""
    stages = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not stages or stages[-1]["type"] != "ByteLevel" or stages[-1]["add_prefix_space"]:
        raise _refused("it is not a BPE of bytes")
    for stage in stages[:-1]:
        if stage["type"] != "Split" or "Regex" not in stage["pattern"] or stage["behavior"] != "Isolated":
            raise _refused(f"llama.cpp does not cut text by {stage['type']} of its own")
    found = [stage["pattern"]["Regex"] for stage in stages[:-1]]
    return (*found, GPT2) if stages[-1]["use_regex"] else tuple(found)


def _refused(why: str) -> UsageError:
    return UsageError(f"the tokenizer has no equal in llama.cpp: {why}")
