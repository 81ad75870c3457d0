"""ChatML: a conversation as the ids that a model was tuned on.

`<|im_start|>` and `<|im_end|>` are ids that stand between texts. Texts are encoded plainly, so that a message that
contains these words contains only text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swamla.data.tokenizer import Tokenizer
from swamla.errors import UsageError
from swamla.text import encode_prompt

START, END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class ChatML:
    """The two special ids of a tokenizer."""

    start: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatML | None":
        """The template, None where the tokenizer does not have both ids as special ones."""
        added = json.loads(tokenizer.library_json()).get("added_tokens") or []
        special = {token["content"]: token["id"] for token in added if token.get("special")}
        return cls(special[START], special[END]) if START in special and END in special else None

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], tuple[int, ...]]:
        """The ids of a conversation up to where the assistant answers, and the length of its system prompt.

        messages: each a role and its content. The second result is empty where no message of the role "system" begins
        the conversation. Raises `UsageError` for text that is no Unicode.
        """
        newline = tokenizer.encode("\n")
        ids = [tokenizer.eos_id]
        marks: tuple[int, ...] = ()
        for index, message in enumerate(messages):
            header, content = f"{message['role']}\n", message["content"]
            # An answer follows its header as it was generated, and learned: no token joins the two.
            texts = (header, content) if message["role"] == "assistant" else (header + content,)
            text = [i for part in texts for i in _plain(tokenizer, part)]
            ids += [self.start, *text, self.end, *newline]
            if index == 0 and message["role"] == "system":
                marks = (len(ids),)
        return [*ids, self.start, *_plain(tokenizer, "assistant\n")], marks


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return encode_prompt(tokenizer, text)[1:]


def require_template(template: ChatML | None, name: str) -> ChatML:
    """The template. Raises `UsageError` where a model has none."""
    if template is None:
        raise UsageError(
            f"{name} has no chat template, as its tokenizer has no special ids {START} and {END}: it continues texts"
        )
    return template
