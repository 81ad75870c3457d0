"""Conversations of requests, as the ids that a model was tuned on (`swamla.data.chat`)."""

from collections.abc import Sequence

from swamla.data.chat import END, START, Chatml, Message
from swamla.data.tokenizer import Tokenizer
from swamla.errors import UsageError
from swamla.text import require_text


def chat_template(tokenizer: Tokenizer) -> Chatml | None:
    """ChatML; None where the tokenizer does not have both of its special ids."""
    return Chatml(tokenizer) if {START, END} <= tokenizer.specials.keys() else None


def require_template(template: Chatml | None, name: str) -> Chatml:
    """The template. Raises `UsageError` where a model has none."""
    if template is None:
        raise UsageError(
            f"{name} has no chat template, as its tokenizer has no special ids {START} and {END}: it continues texts"
        )
    return template


def asked_ids(template: Chatml, messages: Sequence[Message]) -> tuple[list[int], tuple[int, ...]]:
    """The ids of a conversation up to where the assistant answers, and the length of its system prompt.

    The second result is empty where no system prompt begins the conversation. Raises `UsageError` for NUL and for text
    that is no Unicode, `DataError` for text that the tokenizer cannot encode.
    """
    for message in messages:
        require_text(message["content"])
    ids = template.prompt(messages)
    if messages[0]["role"] != "system":
        return ids, ()
    return ids, (1 + len(template.conversation(messages[:1]).ids),)  # 1: the document's start
