"""The example of fine-tuning: conversations that are what they say, and exact answers counted one by one."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import finetuning
from benchmarks.finetuning import AT_ONCE, ROWS, conversations, exact_after, exact_before
from swamla.data.chat import END, START, template_of
from swamla.data.tokenizer import ByteTokenizer, with_specials

TOKENIZER = with_specials(ByteTokenizer(), (START, END))
ASKED = [(f"question {i}", f'{{"age": {i}}}') for i in range(2 * AT_ONCE + 3)]
SAID = [answer if i % 3 == 0 else answer + " " if i % 3 == 1 else answer.upper() for i, (_, answer) in enumerate(ASKED)]
RIGHT = sum(i % 3 == 0 for i in range(len(ASKED))) / len(ASKED)


def test_conversations_are_different_always_the_same_and_answered_by_what_they_say() -> None:
    rows = conversations()
    assert rows == conversations()
    assert len({row["prompt"] for row in rows}) == len(rows) == ROWS
    for row in rows:
        answer = json.loads(row["completion"])
        assert answer.keys() == {"name", "city", "age"}
        assert all(str(value) in row["prompt"] for value in answer.values())


def test_before_the_first_line_alone_is_compared_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {question + "\n": text for (question, _), text in zip(ASKED, SAID, strict=True)}

    def generate_text(model, tokenizer, prompts, longest, *, sampling):
        assert len(prompts) <= AT_ONCE
        assert sampling.temperature == 0
        return SimpleNamespace(completions=[SimpleNamespace(text=said[prompt] + "\nmore") for prompt in prompts])

    monkeypatch.setattr(finetuning, "generate_text", generate_text)
    assert exact_before(None, TOKENIZER, ASKED) == RIGHT


def test_after_it_the_whole_answer_to_the_templates_prompt_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_of(TOKENIZER)
    said = {
        tuple(template.prompt([{"role": "user", "content": question}])): TOKENIZER.encode(text)
        for (question, _), text in zip(ASKED, SAID, strict=True)
    }

    def generate(prompts, longest, *, sampling, stop_id):
        assert len(prompts) <= AT_ONCE
        assert (sampling.temperature, stop_id) == (0, template.stop_id)
        return [said[tuple(prompt)] for prompt in prompts]

    monkeypatch.setattr(finetuning, "Decoder", lambda model: SimpleNamespace(generate=generate))
    assert exact_after(None, TOKENIZER, ASKED) == RIGHT
