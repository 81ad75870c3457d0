"""Text generation: streamed pieces are the text, rows do not depend on each other, bad prompts are one-line errors."""

import copy
from dataclasses import replace

import pytest
import torch

from swamla.data.chat import END, START, template_of
from swamla.data.tokenizer import ByteTokenizer, with_specials
from swamla.errors import UsageError
from swamla.inference.sampling import Sampling
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.text import Generation, answer, encode_prompt, generate_text

TOKENIZER = ByteTokenizer()
PROMPTS = ["def f(x):", "", "é€𝄞 and more", "a"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Untrained, so that it emits bytes that are no whole characters: the hard case for streaming."""
    torch.manual_seed(0)
    blocks = {
        "gdn": BlockConfig(mixer=GDNConfig(n_heads=2)),
        "swa": BlockConfig(mixer=SWAConfig(n_heads=2, window=8, sinks=2)),
    }
    config = LanguageModelConfig(
        vocab_size=TOKENIZER.vocab_size, width=16, blocks=blocks, pattern=("gdn", "swa"), init_std=0.5
    )
    return config.build().eval()


def generate(model: LanguageModel, prompts: list[str], **settings) -> tuple[Generation, list[str]]:
    """The generation, and what was streamed for each row."""
    streamed = [""] * len(prompts)

    def hear(row: int, piece: str) -> None:
        assert piece, "an empty piece was streamed"
        streamed[row] += piece

    return generate_text(model, TOKENIZER, prompts, on_text=hear, **settings), streamed


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_streamed_pieces_are_the_text(model: LanguageModel, temperature: float) -> None:
    found, streamed = generate(model, PROMPTS, max_new_tokens=60, sampling=Sampling(temperature=temperature))
    assert [completion.text for completion in found.completions] == streamed
    assert [completion.prompt for completion in found.completions] == PROMPTS
    for completion in found.completions:
        assert completion.text == TOKENIZER.decode(completion.tokens)
        assert TOKENIZER.eos_id not in completion.tokens
        assert completion.ended == (len(completion.tokens) < 60)


def test_prompts_of_unequal_lengths_are_continued_as_each_alone(model: LanguageModel) -> None:
    together = generate_text(model, TOKENIZER, PROMPTS, 30, sampling=Sampling(temperature=1.0, seed=4))
    for row, prompt in enumerate(PROMPTS):
        alone = generate_text(model, TOKENIZER, [prompt], 30, sampling=Sampling(temperature=1.0, seed=4 + row))
        assert together.completions[row] == alone.completions[0]


def test_greedy_text_is_the_models_likeliest_continuation(model: LanguageModel) -> None:
    tokens = encode_prompt(TOKENIZER, "ab")
    start = len(tokens)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    produced = tokens[start:]
    if TOKENIZER.eos_id in produced:
        produced = produced[: produced.index(TOKENIZER.eos_id)]
    found = generate_text(model, TOKENIZER, ["ab"], 12, sampling=Sampling(temperature=0))
    assert found.completions[0].tokens == produced


def test_the_same_seed_gives_the_same_text_and_streaming_changes_nothing(model: LanguageModel) -> None:
    settings = {"max_new_tokens": 20, "sampling": Sampling(temperature=1.0, seed=9)}
    first, _ = generate(model, PROMPTS, **settings)
    silent = generate_text(model, TOKENIZER, PROMPTS, **settings)
    assert first.completions == silent.completions
    other = generate_text(model, TOKENIZER, PROMPTS, 20, sampling=Sampling(temperature=1.0, seed=90))
    assert first.completions != other.completions


def test_a_document_that_ends_says_so(model: LanguageModel) -> None:
    end = torch.tensor([TOKENIZER.eos_id])
    certain = model.head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, end, 1e9))
    try:
        found = generate_text(model, TOKENIZER, ["x"], 5, sampling=Sampling(temperature=0))
    finally:
        certain.remove()
    assert found.completions[0].ended
    assert found.completions[0].text == ""
    assert found.tokens_per_second == 0


def test_a_prompt_begins_with_the_document_start_and_the_special_tokens_name_is_plain_text() -> None:
    assert encode_prompt(TOKENIZER, "") == [TOKENIZER.eos_id]
    ids = encode_prompt(TOKENIZER, "<|endoftext|>")
    assert ids[0] == TOKENIZER.eos_id
    assert TOKENIZER.eos_id not in ids[1:]
    assert TOKENIZER.decode(ids[1:]) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("ab\0c", "the prompt has a NUL character at position 2"),
        ("abc\ud800", "the prompt has a lone surrogate at position 3"),
        ("\udfff", "the prompt has a lone surrogate at position 0"),
    ],
)
def test_text_that_is_no_text_is_refused_before_anything_is_generated(
    model: LanguageModel, prompt: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        generate(model, ["fine", prompt], max_new_tokens=3)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_no_prompt_at_all_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"prompts = \[\]: must have one text at least"):
        generate_text(model, TOKENIZER, [], 3)


def test_the_costs_are_those_of_this_generation(model: LanguageModel) -> None:
    found, _ = generate(model, ["abc", "a longer prompt"], max_new_tokens=10)
    state = model.init_state(2, len("a longer prompt") + 1 + 10)
    assert found.state_bytes == state.nbytes
    assert found.seconds_to_first > 0
    assert found.tokens_per_second > 0
    in_half = generate_text(copy.deepcopy(model).bfloat16(), TOKENIZER, ["abc", "a longer prompt"], 10)
    assert in_half.state_bytes == copy.deepcopy(model).bfloat16().init_state(2, 26).nbytes < state.nbytes
    much_longer, _ = generate(model, ["abc" * 50, "a"], max_new_tokens=10)
    assert much_longer.state_bytes == found.state_bytes, "windows and memories do not grow"


def test_a_model_with_more_ids_than_its_tokenizer_never_draws_one_that_no_text_has(model: LanguageModel) -> None:
    torch.manual_seed(0)
    wide = LanguageModelConfig(
        vocab_size=4 * TOKENIZER.vocab_size, width=16, blocks=model.config.blocks, pattern=("gdn", "swa")
    ).build()
    found = generate_text(wide, TOKENIZER, ["a"], 60, sampling=Sampling(temperature=3.0))
    assert max(found.completions[0].tokens) < TOKENIZER.vocab_size


def test_an_answer_ends_where_its_message_or_its_document_ends(model: LanguageModel) -> None:
    talks = with_specials(TOKENIZER, (START, END))
    talking = replace(model.config, vocab_size=talks.vocab_size, tied_head=False).build(seed=1).eval()
    messages = [{"role": "user", "content": "a"}]
    for end in (talks.eos_id, talks.specials[END]):
        with torch.no_grad():
            prompt = torch.tensor([template_of(talks).prompt(messages)])
            talking.head.weight.zero_()
            talking.head.weight[end] = talking.hidden(prompt)[0][0, -1]
        assert talking.generate(prompt, 3, temperature=0.0, stop_id=None)[0, 0] == end
        assert answer(talking, talks, messages, 3) == ""


def test_an_answer_ends_with_the_last_learned_position(model: LanguageModel) -> None:
    talks, messages = with_specials(TOKENIZER, (START, END)), [{"role": "user", "content": "a"}]
    room = 40 - len(template_of(talks).prompt(messages)) + 1  # the last token is not fed back
    limited = replace(model.config, vocab_size=talks.vocab_size, tied_head=False, learned_positions=40).build().eval()
    with torch.no_grad():
        limited.head.weight.zero_()  # so that id 0 is chosen every time
    assert answer(limited, talks, messages, 120) == room * "\0"
    assert answer(limited, talks, messages, 3) == 3 * "\0"
    with pytest.raises(UsageError, match="more than the model's 40 learned positions"):
        answer(limited, talks, [{"role": "user", "content": "a" * 40}])
