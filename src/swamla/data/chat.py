"""Conversations: a file's rows to messages, messages to ids and to which of them are learned.

A row is {"messages": [{"role": "user", "content": "…"}, …]}, or {"prompt": "…", "completion": "…"}. A template says
which special ids stand between the texts. Texts are encoded by themselves, so that no text becomes a special id.
"""

import json
import re
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swamla.data.reading import Notes, naming_damage, open_bytes
from swamla.data.tokenizer import Tokenizer, utf8, with_specials
from swamla.errors import DataError, UsageError

ROLES = ("system", "user", "assistant", "tool")
START, END = "<|im_start|>", "<|im_end|>"

Message = Mapping[str, str]

# For transformers' `apply_chat_template`; the same ids as `Chatml`. `generation` marks what is learned.
JINJA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '" + START + "' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '" + END + "' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '" + END + "' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + START + "assistant\\n' }}{% endif %}"
)
# The same for programs that only answer: `generation` is a tag of transformers' own.
PLAIN_JINJA = re.sub(r"{% (end)?generation %}", "", JINJA)


@dataclass(frozen=True)
class Conversation:
    """The ids of a conversation after the document's start, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Template(ABC):
    """Messages to ids. tokenizer: with the special ids that the template needs."""

    tokenizer: Tokenizer

    @abstractmethod
    def conversation(self, messages: Sequence[Message]) -> Conversation:
        """The ids of a whole conversation. Raises `DataError` for what the tokenizer cannot encode."""

    @abstractmethod
    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that an answer follows, the document's start included."""

    @property
    @abstractmethod
    def stop_id(self) -> int:
        """The id that ends an answer."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The special ids that the template adds to texts; that of the document's start is none of them."""
        return ()

    def _joined(self, parts: Sequence[tuple[str | int, bool]]) -> Conversation:
        """The ids of texts and special ids in order, each with whether it is learned."""
        encoded = iter(self.tokenizer.encode_batch([part for part, _ in parts if isinstance(part, str)]))
        ids: list[int] = []
        learned: list[bool] = []
        for part, is_learned in parts:
            new = next(encoded) if isinstance(part, str) else [part]
            ids += new
            learned += [is_learned] * len(new)
        return Conversation(ids, learned)


class Chatml(Template):
    """<|im_start|>ROLE, a line end, the text, <|im_end|>, a line end, for each message.

    Of an assistant's messages text and <|im_end|> are learned. The header of these is encoded apart from the text,
    because an answer is generated after it.
    """

    def conversation(self, messages: Sequence[Message]) -> Conversation:
        start, end = self.tokenizer.specials[START], self.stop_id
        parts: list[tuple[str | int, bool]] = []
        for message in messages:
            answer = message["role"] == "assistant"
            header = f"{message['role']}\n"
            texts = [(header, False), (message["content"], True)] if answer else [(header + message["content"], False)]
            parts += [(start, False), *texts, (end, answer), ("\n", False)]
        return self._joined(parts)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        header = self._joined([(self.tokenizer.specials[START], False), ("assistant\n", False)])
        return [self.tokenizer.eos_id, *self.conversation(messages).ids, *header.ids]

    @property
    def stop_id(self) -> int:
        return self.tokenizer.specials[END]

    @property
    def special_ids(self) -> tuple[int, ...]:
        return self.tokenizer.specials[START], self.stop_id


class Plain(Template):
    """A prompt and its completion, nothing between them; the completion and the document's end are learned."""

    def conversation(self, messages: Sequence[Message]) -> Conversation:
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise DataError('template = "plain" is for one prompt and one completion: chatml has roles and turns')
        prompt, completion = (message["content"] for message in messages)
        return self._joined([(prompt, False), (completion, True), (self.stop_id, True)])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        if len(messages) != 1:
            raise DataError('template = "plain" has one prompt: chatml has roles and turns')
        return [self.tokenizer.eos_id, *self.tokenizer.encode(messages[0]["content"])]

    @property
    def stop_id(self) -> int:
        return self.tokenizer.eos_id


def make_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template of that name; its tokenizer has new ids after its last one for special tokens that it lacks.

    Raises `DataError` for a tokenizer that has no text.
    """
    return Plain(tokenizer) if name == "plain" else Chatml(with_specials(tokenizer, (START, END)))


def template_of(tokenizer: Tokenizer, name: str = "chatml") -> Template:
    """The template of that name for a tokenizer that has its special ids. Raises `UsageError` for one without them."""
    if name != "plain" and not {START, END} <= tokenizer.specials.keys():
        raise UsageError(f"the tokenizer has no {START} and {END}: the model knows no conversations yet: swamla sft")
    return make_template(name, tokenizer)


def read_conversations(path: Path, on_bad_row: str, notes: Notes) -> Iterator[tuple[int, list[Message]]]:
    """The number, from 1, and the messages of each row of a .jsonl file, or of a .json file with a list of rows.

    Raises `DataError` naming file and row for a bad row, or counts it in `notes` if `on_bad_row` is "skip".
    """
    for number, row in _rows(path):
        try:
            yield number, messages_of(row() if callable(row) else row)
        except DataError as error:
            if on_bad_row != "skip":
                raise DataError(f'{path}: row {number}: {error} (or leave it out: on_bad_row = "skip")') from error
            notes.add("bad rows skipped", f"{path}: row {number}: {error}")


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each row: of a .jsonl file a function that parses the line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a .jsonl file of conversations")
    with naming_damage(path), open_bytes(path) as lines:
        if ".json" in path.suffixes:
            found = _parsed(lines.read(), f"{path}: ")
            if not isinstance(found, list):
                raise DataError(f"{path}: must be a list of rows, or a .jsonl file with a row on each line")
            yield from enumerate(found, 1)
            return
        for number, line in enumerate(iter(lines.readline, b""), 1):
            if line.removeprefix(BOM_UTF8).strip():
                yield number, partial(_parsed, line)


def _parsed(raw: bytes, where: str = "") -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{where}not JSON in UTF-8 ({error})") from error


def messages_of(row: Any) -> list[Message]:
    """The messages of a row, checked. Raises `DataError` that says what is wrong with it."""
    if not isinstance(row, dict) or not ("messages" in row or {"prompt", "completion"} <= row.keys()):
        has = ", ".join(map(repr, list(row)[:8])) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f'needs "messages", or "prompt" and "completion"; it has {has or "nothing"}')
    if "messages" in row:
        found = row["messages"]
    else:
        found = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    if not isinstance(found, list) or not found:
        raise DataError('"messages" must be a list of at least one message')
    messages = [_message(each, number) for number, each in enumerate(found, 1)]
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("no assistant message: there is nothing to learn")
    return messages


def _message(found: Any, number: int) -> Message:
    if not isinstance(found, dict) or not {"role", "content"} <= found.keys():
        raise DataError(f'message {number} must have "role" and "content"')
    role, content = found["role"], found["content"]
    if role not in ROLES:
        raise DataError(f"message {number} has the role {role!r:.40}: must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"message {number}: content must be text, got {type(content).__name__}")
    utf8(content)
    return {"role": role, "content": content}
