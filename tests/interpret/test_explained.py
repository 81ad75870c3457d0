"""explain.json holds what the measures find on the rows that it names, and the weights of every head."""

import copy
import json
import math
from dataclasses import replace

import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from swamla.data.tokenizer import ByteTokenizer, HFTokenizer, IdTokenizer, NameTokenizer, make_tokenizer
from swamla.errors import UsageError
from swamla.interpret import (
    ablated,
    behavioural_context,
    copying,
    head_patterns,
    in_context,
    induction,
    load_by_class,
    logit_lens,
    loss_by_position,
    trace,
)
from swamla.interpret.drawn import CLASSES, draw, guesses, token_classes, token_texts
from swamla.interpret.explaining import Subject, explained, other_length, repeat_size
from swamla.interpret.repeats import at_another_length, repeated_rows
from swamla.model.accounting import count_parameters
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.explanation import Explanation
from tests.interpret.models import VOCABULARY, hybrid, induction_model
from tests.model.helpers import MIXERS, random_tokens

TOKENIZER = IdTokenizer(VOCABULARY - 1)
ROWS = random_tokens(4, 40, seed=5)
TEXTS = [0, 0, 1, 1]
SUBJECT = Subject(
    name="a model",
    ids=range(VOCABULARY - 1),
    rows_BT=ROWS,
    texts=TEXTS,
    text=ROWS[0].tolist(),
    source="a text",
)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request):
    return hybrid(ffn=request.param)


@pytest.fixture(scope="module")
def found(model):
    """What explain.json holds, as a reader gets it."""
    return json.loads(json.dumps(explained(model, TOKENIZER, SUBJECT).plain(), allow_nan=False))


def close(value, expected) -> None:
    """Equal to six digits, of which the last is rounded."""
    if isinstance(expected, dict):
        assert value.keys() == {str(key) for key in expected}
        for key, each in expected.items():
            close(value[str(key)], each)
    elif isinstance(expected, list | tuple):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            close(one, other)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-12)
    else:
        assert value == expected


def fields_close(value, expected) -> None:
    close(value, vars(expected))


def test_random_repeats_are_those_of_induction(model, found) -> None:
    length, rows = repeat_size(model, VOCABULARY - 1)
    assert (found["about"]["repeat_length"], found["about"]["repeat_rows"]) == (length, rows) == (30, 64)
    expected = induction(model, repeated_rows(SUBJECT.ids, TOKENIZER.eos_id, length=length, rows=rows))
    for name in ("accuracy", "first_loss", "second_loss"):
        close(found["repeats"][name], getattr(expected, name))
    for layer, other in zip(found["repeats"]["layers"], expected.layers, strict=True):
        fields_close(layer, other)
    assert other_length(length) == 20
    shorter = repeated_rows(SUBJECT.ids, TOKENIZER.eos_id, length=20, rows=rows)
    fields_close(found["repeats"]["other"], at_another_length(model, shorter))
    assert [other_length(length) for length in (4, 9, 50)] == [3, 6, 34]


def test_the_report_says_how_exact_the_explanation_is_which_is_as_exact_as_the_weights_dtype(model, found) -> None:
    assert found["about"]["exact_to"] == 1e-12
    in_fp32 = copy.deepcopy(model).float()
    assert explained(in_fp32, TOKENIZER, SUBJECT).about.exact_to == 1e-6


def test_a_mixer_whose_explanation_is_wrong_is_told_in_the_report(model, monkeypatch) -> None:
    right = Explanation.output
    monkeypatch.setattr(Explanation, "output", lambda self: 1.003 * right(self))
    monkeypatch.setattr("swamla.interpret.explaining.REPEAT_ROWS", 2)
    found = explained(model, TOKENIZER, replace(SUBJECT, rows_BT=None, text=()))
    assert found.about.exact_to == 1e-2


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_explanation_that_is_no_number_is_exact_to_no_digit(model, monkeypatch, wrong) -> None:
    right = Explanation.output
    monkeypatch.setattr(Explanation, "output", lambda self: wrong * right(self))
    monkeypatch.setattr("swamla.interpret.explaining.REPEAT_ROWS", 2)
    assert explained(model, TOKENIZER, replace(SUBJECT, rows_BT=None, text=())).about.exact_to == math.inf


def test_what_is_measured_on_text_is_what_the_measures_find(model, found) -> None:
    for layer, other in zip(found["worth"]["layers"], ablated(model, ROWS).layers, strict=True):
        fields_close(layer, other)
    for layer, other in zip(found["patterns"]["layers"], head_patterns(model, ROWS), strict=True):
        fields_close(layer, other)
    close(found["lens"]["loss"], logit_lens(model, ROWS).loss)
    fields_close(found["learned"], in_context(model, ROWS, early=3, span=2, texts=TEXTS))
    needed = behavioural_context(model, ROWS, queries=8, start=TOKENIZER.eos_id, texts=TEXTS)
    fields_close(found["needed"]["found"], needed)
    assert found["needed"]["predictions"] == 32
    close([layer["copying"] for layer in found["layers"]], copying(model, ids=torch.arange(VOCABULARY - 1)))


def test_losses_by_position_are_means_over_doubling_spans(model, found) -> None:
    loss = loss_by_position(model, ROWS).loss
    positions = found["positions"]
    assert positions["first"] == [1, 2, 3, 5, 9, 17, 33]
    assert positions["last"] == [1, 2, 4, 8, 16, 32, 39]
    assert positions["tokens"] == [4, 4, 8, 16, 32, 64, 28]
    close(positions["loss"][3], sum(loss[4:8]) / 4)
    close(positions["loss"][-1], sum(loss[32:]) / 7)


def test_only_models_with_routers_have_their_loads(model, found) -> None:
    classes = token_classes(TOKENIZER, VOCABULARY)
    expected = load_by_class(model, ROWS, classes)
    if not expected:
        assert found["routing"] is None
        return
    assert found["routing"]["classes"] == list(CLASSES)
    for layer, other in zip(found["routing"]["layers"], expected, strict=True):
        fields_close(layer, other)


def test_weights_are_whole_numbers_of_three_digits_within_half_a_unit(model, found) -> None:
    text = found["texts"][0]
    assert text["tokens"] == [f" {each}" if each < VOCABULARY - 1 else "⟨start⟩" for each in ROWS[0].tolist()]
    layers = trace(model, ROWS[:1]).layers
    for about, drawn, layer in zip(found["layers"], text["layers"], layers, strict=True):
        weight_HTS = layer.mixer.weight_BHTS[0]
        assert about["heads"] == len(drawn["heads"]) == len(weight_HTS)
        assert about["signed"] == (about["mixer"] == "gdn")
        close(drawn["largest"], weight_HTS.abs().max().item())
        for head, weight_TS in zip(drawn["heads"], weight_HTS, strict=True):
            assert [len(row) for row in head["weights"]] == list(range(1, 41))
            assert max(abs(number) for row in head["weights"] for number in row) in range(100, 1001)
            for query, row in enumerate(head["weights"]):
                expected = weight_TS[query, : query + 1]
                assert (torch.tensor(row) * head["unit"] - expected).abs().max() <= 0.5001 * head["unit"]


def test_losses_of_a_drawn_text_are_those_of_each_token(model, found) -> None:
    with torch.no_grad():
        expected = model.token_losses(ROWS[:1, :-1], ROWS[:1, 1:])[0].tolist()
    assert found["texts"][0]["losses"][0] is None
    close(found["texts"][0]["losses"][1:], expected)


def test_guesses_are_the_likeliest_tokens_of_the_lens(model, found) -> None:
    lens = logit_lens(model, ROWS[:1])
    assert found["guesses"]["tokens"][-1] == token_texts(TOKENIZER, lens.top_LBTK[-1, 0, -12:, 0].tolist())
    close(found["guesses"]["probability"], lens.probability_LBTK[:, 0, -12:, 0].tolist())
    assert found["guesses"]["read"] == found["texts"][0]["tokens"][-12:]
    assert found["guesses"]["follows"] == [*found["texts"][0]["tokens"][-11:], ""]


def test_taps_are_shares_of_mean_sizes_by_how_far_back_they_read(model, found) -> None:
    taps = model.blocks[0].taps()["values"].abs().mean(dim=0)
    close(found["layers"][0]["taps"]["values"], (taps / taps.sum()).tolist())


def test_without_a_text_there_are_random_repeats_only(monkeypatch) -> None:
    monkeypatch.setattr("swamla.interpret.explaining.REPEAT_ROWS", 2)
    plain = explained(hybrid(), TOKENIZER, replace(SUBJECT, rows_BT=None, text=())).plain()
    sections = ("worth", "patterns", "lens", "positions", "learned", "needed", "routing")
    assert [name for name in sections if plain[name] is not None] == []
    assert len(plain["texts"]) == 1
    assert len(plain["verdicts"]) == 1


def test_a_layer_built_to_be_an_induction_head_is_found() -> None:
    ids = list(range(1, VOCABULARY))
    found = explained(induction_model(), IdTokenizer(VOCABULARY - 1), Subject(name="built", ids=ids))
    assert found.verdicts[0].answer == "yes"
    assert "layer 0, head 0" in found.verdicts[0].text


def test_short_texts_have_what_they_suffice_for(monkeypatch) -> None:
    monkeypatch.setattr("swamla.interpret.explaining.REPEAT_ROWS", 2)
    for length in (3, 7, 12):
        rows = random_tokens(1, length)
        plain = explained(hybrid(), TOKENIZER, replace(SUBJECT, rows_BT=rows, text=rows[0].tolist())).plain()
        json.dumps(plain, allow_nan=False)
        assert (plain["needed"] is None) == (length < 8)
        assert plain["learned"] is None


@pytest.mark.parametrize(("pattern", "width"), [(("gdn", "swa", "gdn", "mla"), 288), (("mha",) * 8, 256)])
def test_a_model_of_ten_million_parameters_has_all_64_rows_of_repeats_and_a_larger_one_fewer(pattern, width) -> None:
    def sized(pattern, width) -> LanguageModelConfig:
        blocks = {kind: BlockConfig(mixer=MIXERS[kind]) for kind in dict.fromkeys(pattern)}
        return LanguageModelConfig(vocab_size=8192, width=width, blocks=blocks, pattern=pattern)

    class Model:
        """Sizes follow from the config alone."""

        config = sized(pattern, width)

    assert 5e6 < count_parameters(Model.config).total < 1.1e7
    assert repeat_size(Model, 4096) == (50, 64)
    Model.config = sized(4 * pattern, 2 * width)
    assert 8 <= repeat_size(Model, 4096)[1] < 16
    Model.config = sized(8 * pattern, 6 * width)
    assert count_parameters(Model.config).total > 5e8
    assert repeat_size(Model, 4096)[1] == 8  # fewer would settle nothing


def test_few_ids_and_few_positions_shorten_the_repeats_and_too_few_are_an_error() -> None:
    model = hybrid()
    assert repeat_size(model, 9)[0] == 9
    assert repeat_size(hybrid(learned_positions=21), 30)[0] == 10
    assert repeat_size(model, 30, 21)[0] == 10  # rows of training
    assert repeat_size(model, 30, 3)[0] == 4
    with pytest.raises(UsageError, match="3 ids: random repeats need four different ids twice"):
        repeat_size(model, 3)


def test_a_text_longer_than_can_be_drawn_is_cut_and_said_so(monkeypatch) -> None:
    monkeypatch.setattr("swamla.interpret.drawn.MOST_TOKENS", 17)
    text = draw(hybrid(), TOKENIZER, ROWS[0].tolist(), name="a text", note="")
    assert len(text.tokens) == 17
    assert text.note == "Only the first 17 tokens are drawn."
    assert guesses(hybrid(), TOKENIZER, ROWS[0].tolist()).read[-1] == text.tokens[-1]


def test_more_heads_leave_room_for_fewer_tokens(monkeypatch) -> None:
    monkeypatch.setattr("swamla.interpret.drawn.MOST_WEIGHTS", 16 * 500)
    text = draw(hybrid(), TOKENIZER, ROWS[0].tolist(), name="a text", note="")
    heads = sum(len(layer.heads) for layer in text.layers)
    assert sum(len(row) for layer in text.layers for head in layer.heads for row in head.weights) <= 8000 + 16 * heads
    assert len(text.tokens) < 40


def test_tokens_that_cannot_be_read_are_their_ids() -> None:
    assert token_texts(ByteTokenizer(), [256, 97, 10, 0, 0xC3]) == ["⟨start⟩", "a", "\n", "⟨0⟩", "⟨195⟩"]
    assert token_texts(ByteTokenizer(), [300]) == ["⟨300⟩"]  # beyond the tokenizer, in a padded vocabulary


def test_classes_of_tokens_follow_from_their_text() -> None:
    tokenizer = make_tokenizer("bpe:300", ["a word and 12 words, more words and 3 lines\n" * 20] * 2)
    found = token_classes(tokenizer, tokenizer.vocab_size + 2)
    named = {
        text: CLASSES[found[index]] for index, text in enumerate(token_texts(tokenizer, range(tokenizer.vocab_size)))
    }
    assert named["a"] == "word goes on"
    assert named["1"] == "number"
    assert named[","] == "punctuation"
    assert named["\n"] == named[" "] == "white space"
    assert {CLASSES[each] for each in found[-2:].tolist()} == {"other"}
    assert any(name == "word begins" and text.startswith(" ") for text, name in named.items())


@pytest.mark.parametrize("decoder", ["sequence", "metaspace"])
def test_words_of_sentencepiece_keep_their_space(decoder: str) -> None:
    """Its decoders drop the space of a text's first word, and so of a token by itself."""
    names = ["</s>", "▁the", "the", "▁", "<0xC3>"]
    library = tokenizers.Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(plain) if decoder == "sequence" else decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    tokenizer = HFTokenizer(library.to_str())
    assert token_texts(tokenizer, range(4)) == ["⟨start⟩", " the", "the", " "]
    classes = [CLASSES[each] for each in token_classes(tokenizer, 4)]
    assert classes == ["other", "word begins", "word goes on", "white space"]


def test_a_model_whose_losses_are_nan_is_refused() -> None:
    model = hybrid()
    with torch.no_grad():
        model.blocks[1].mixer.o_proj.weight.fill_(math.nan)
    with pytest.raises(UsageError, match="a model: its losses are no finite numbers"):
        explained(model, TOKENIZER, SUBJECT)


def test_a_model_of_a_task_reads_no_start_because_it_never_saw_one(monkeypatch) -> None:
    monkeypatch.setattr("swamla.interpret.explaining.REPEAT_ROWS", 2)
    seen = []
    measured = "swamla.interpret.explaining.induction"
    monkeypatch.setattr(measured, lambda model, tokens: seen.append(tokens) or induction(model, tokens))
    tokenizer = NameTokenizer([f"t{number}" for number in range(VOCABULARY - 1)])
    found = explained(hybrid(), tokenizer, Subject(name="a task", ids=range(VOCABULARY - 1)))
    assert tokenizer.eos_id not in seen[0]
    assert "⟨start⟩" not in found.texts[0].tokens
    assert found.texts[0].note.startswith("An id, 12 random ids, the same again")
