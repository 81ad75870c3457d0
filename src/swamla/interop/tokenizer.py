"""Tokenizers as transformers' `AutoTokenizer` and the `tokenizers` library load them: the same ids as in training."""

import json
from pathlib import Path
from typing import Any

from swamla.data.chat import END, JINJA, START
from swamla.data.tokenizer import Tokenizer

OWN_FILE = "swamla_tokenizer.json"


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(folder)` loads.

    As in training a text begins with the document's start, which is also the id that ends it, and text that looks like
    it stays text. Rows are padded with it on the left, where `generate` wants it. max_length: of a text in tokens, if
    the model limits it. swamla_tokenizer.json has the tokenizer as it was in training, with its fingerprint.
    A tokenizer with the special ids of conversations gets their template, chat_template.jinja. Templates write text, so
    there special tokens in text are special: `apply_chat_template(…, sanitize_control_tokens=True)` keeps those of
    messages text, as in training.
    """
    tokenizer.save(folder / OWN_FILE)
    library = json.loads(with_document_start(tokenizer))
    start = next(token["content"] for token in library["added_tokens"] if token["id"] == tokenizer.eos_id)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), start),
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    chats = {START, END} <= tokenizer.specials.keys()
    if chats:
        config |= {"split_special_tokens": False, "additional_special_tokens": [START, END]}
        (folder / "chat_template.jinja").write_text(JINJA, encoding="utf-8")
    if max_length is not None:
        config["model_max_length"] = max_length
    for name, plain in (("tokenizer.json", library), ("tokenizer_config.json", config)):
        text = json.dumps(plain, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def with_document_start(tokenizer: Tokenizer) -> str:
    """The tokenizer.json that encodes as `tokenizer` does, after the document's start."""
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library = Library.from_str(tokenizer.library_json())
    start = library.id_to_token(tokenizer.eos_id)
    one, two = f"{start}:0 $A:0", f"{start}:0 $A:0 {start}:1 $B:1"
    library.post_processor = processors.TemplateProcessing(one, two, special_tokens=[(start, tokenizer.eos_id)])
    library.no_truncation()
    library.no_padding()
    return str(library.to_str())
