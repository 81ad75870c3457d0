"""What the command line guards, the library does: Python users meet the same errors, and nothing that is none."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch

import swamla
from swamla.errors import ConfigError, CorruptError, DataError, UsageError
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout
from tests.train.helpers import model_of, run, tiny_config, tiny_dataset


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A run whose model has 4096 ids, of which its tokenizer knows 257."""
    folder = tmp_path_factory.mktemp("padded")
    model = model_of("mha")
    model = type(model)(**model.__dict__ | {"vocab_size": 4096, "dropout": 0.0})
    run(tiny_config(model, steps=1), folder / "run", tiny_dataset(folder))
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(padded):
    return swamla.load(padded)


@pytest.mark.parametrize("decoding", ["eager", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_no_id_without_a_text_is_generated_from_a_padded_vocabulary(loaded, temperature, decoding):
    model, tokenizer = loaded
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] *= 100  # where ids are drawn freely it is one of these
    sampling = Sampling(temperature=temperature)
    for row in Decoder(model, decoding).generate([[tokenizer.eos_id], [65, 66]], 40, sampling=sampling):
        assert len(row) == 40
        assert max(row) < tokenizer.vocab_size
        tokenizer.decode(row)
    done = swamla.generate_text(model, tokenizer, ["a"], 10, sampling=sampling, decoding=decoding)
    assert tokenizer.decode(done.completions[0].tokens) == done.completions[0].text
    everything = Decoder(model).generate([[65]], 40, known_ids=4096, sampling=sampling)[0]
    assert max(everything) >= tokenizer.vocab_size, "or the test shows nothing"


def test_a_run_is_loaded_to_a_device_and_in_a_dtype(padded, loaded):
    model, _ = swamla.load(padded, device="cpu", dtype=torch.float64)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float64, "cpu")}
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(tokens).float(), loaded[0](tokens), atol=1e-4, rtol=1e-4)


def test_a_tokenizer_of_another_run_is_told(padded, tmp_path):
    small = run(tiny_config(steps=1), tmp_path / "small", tiny_dataset(tmp_path, "char"))
    assert small.model.config.vocab_size < 257
    shutil.copyfile(padded / "tokenizer.json", tmp_path / "small" / "tokenizer.json")
    with pytest.raises(CorruptError, match=r"tokenizer\.json: has 257 ids, the model \d+: it belongs to another run"):
        swamla.load(tmp_path / "small")


PROMPTS = [
    ([], "a prompt is empty"),
    ([[]], "a prompt is empty"),
    ([[65], []], "a prompt is empty"),
    ([[4096]], "token 4096 in prompt 0 is outside the vocabulary of 4096"),
    ([[65], [-1]], "token -1 in prompt 1 is outside the vocabulary"),
    (["text"], "prompt 0 is 'text': must be token ids; swamla.generate_text takes texts"),
    ([[1.5]], "prompt 0 is [1.5]: must be token ids"),
    ([[None]], "prompt 0 is [None]: must be token ids"),
]


@pytest.mark.parametrize(("prompts", "message"), PROMPTS, ids=[str(prompts) for prompts, _ in PROMPTS])
def test_prompts_that_cannot_be_are_refused(loaded, prompts, message):
    with pytest.raises(UsageError) as caught:
        Decoder(loaded[0]).generate(prompts, 3)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple, lambda ids: [tuple(row) for row in ids]])
def test_prompts_may_be_any_sequences_of_whole_numbers(loaded, kind):
    ids = [[65, 66, 67], [68, 69, 70]]
    expected = Decoder(loaded[0]).generate(ids, 4)
    assert Decoder(loaded[0]).generate(kind(ids), 4) == expected
    assert loaded[1].decode(kind(ids)[0]) == "ABC"


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_tokens_that_cannot_be_is_refused(loaded, count):
    with pytest.raises(UsageError, match=f"max_new_tokens = {count}: must be >= 1"):
        Decoder(loaded[0]).generate([[65]], count)
    with pytest.raises(UsageError, match=f"max_new_tokens = {count}: must be >= 1"):
        swamla.generate_text(*loaded, ["a"], count)


def test_a_text_alone_is_continued_as_the_only_one_of_a_list(loaded):
    alone, listed = (swamla.generate_text(*loaded, texts, 3).completions for texts in ("abc", ["abc"]))
    assert alone == listed


@pytest.mark.parametrize(
    ("text", "message"),
    [([], r"prompts = \[\]: must have one text"), (["a\0"], "NUL"), ("a\0", "NUL"), (["\ud800"], "lone surrogate")],
)
def test_texts_that_cannot_be_are_refused(loaded, text, message):
    with pytest.raises(UsageError, match=message):
        swamla.generate_text(*loaded, text, 3)


@pytest.mark.parametrize("tokens", [torch.tensor([[4096]]), torch.tensor([[-1]]), torch.tensor([[0.5]])], ids=str)
def test_what_is_no_token_id_is_refused_by_every_way_into_the_model(loaded, tokens):
    model: LanguageModel = loaded[0]
    message = r"token \S+ is outside the vocabulary of 4096|tokens are of torch.float32: must be of torch.int64"
    for enter in (model, model.hidden, lambda tokens: model.step(tokens, model.init_state(1, 4))):
        with pytest.raises(UsageError, match=message):
            enter(tokens)
    with pytest.raises(UsageError, match=message):
        model.loss(tokens, torch.tensor([[0]]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], r"tokens are a list: must be a tensor of ids, \(batch, time\): torch.tensor"),
        (None, "tokens are a NoneType: must be a tensor"),
        (torch.tensor([1, 2]), r"tokens have the shape \(2,\): must be \(batch, time\), one token at least"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"tokens have the shape \(1, 2, 3\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"tokens have the shape \(2, 0\)"),
        (torch.zeros(1, 2, dtype=torch.uint8), "tokens are of torch.uint8: must be of torch.int64"),
        (torch.tensor([[4096]]), r"token 4096 is outside the vocabulary of 4096: must be in \[0, 4096\)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_tokens_of_another_kind_or_shape_are_refused_in_a_line(loaded, tokens, message):
    model: LanguageModel = loaded[0]
    for enter in (model, model.hidden, lambda tokens: model.step(tokens, model.init_state(1, 4))):
        with pytest.raises(UsageError, match=message) as caught:
            enter(tokens)
        assert "\n" not in str(caught.value)


def test_labels_and_layouts_of_another_kind_are_refused_in_a_line(loaded):
    model, tokens = loaded[0], torch.tensor([[1, 2]])
    for labels, message in (
        (tokens.tolist(), "labels are a list: must be a tensor of torch.int64"),
        (tokens.float(), "labels are torch.float32: must be a tensor of torch.int64"),
        (tokens[:, 1:], r"labels.shape = \(1, 1\): must be that of the tokens, \(1, 2\)"),
        (tokens + 4096, r"label 4097 at row 0: must be in \[0, 4096\), or -100"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, labels=labels)
    with pytest.raises(UsageError, match=r"seq is a Tensor: must be a swamla.ops.Layout .*labels go by name"):
        model(tokens, tokens)
    with pytest.raises(UsageError, match=r"seq is of \(1, 3\): must be a swamla.ops.Layout of \(1, 2\)"):
        model(tokens, Layout.one_document_per_row(1, 3))


def test_under_anomaly_detection_ids_are_checked_before_any_kernel_sees_them(loaded, monkeypatch):
    """On a GPU the kernel's own assertion would end the process."""
    monkeypatch.setattr(LanguageModel, "embed", lambda *_: pytest.fail("reached the embedding"))
    checked = torch.autograd.set_detect_anomaly(True, check_nan=False)
    with checked, pytest.raises(UsageError, match="token 4096 is outside"):
        loaded[0](torch.tensor([[4096]]))


@pytest.mark.parametrize("what", ["some", True, ""])
def test_activation_checkpointing_of_an_unknown_name_is_refused(loaded, what):
    with pytest.raises(ConfigError, match=r"checkpointing = .*: must be one of none, attention, ffn, all"):
        loaded[0].checkpoint_activations(what)


@pytest.mark.parametrize("ids", [[257], [-1], ["a"], "text", [0.5], 3], ids=str)
def test_what_no_text_has_is_not_decoded(loaded, ids):
    with pytest.raises(DataError):
        loaded[1].decode(ids)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -1.0])
def test_a_temperature_that_cannot_be_is_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature = .*: must be >= 0"):
        Sampling(temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-50, 5e-324])
def test_however_small_a_temperature_the_likeliest_token_is_drawn(temperature):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=temperature)
    assert sampling.choose(logits, sampling.generators(3)) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_model_that_diverged_says_so_instead_of_drawing_anything(loaded, wrong, temperature):
    model = copy.deepcopy(loaded[0])
    with torch.no_grad():
        model.norm.weight.fill_(wrong)
    with pytest.raises(UsageError, match="the model's logits are not finite"):
        Decoder(model).generate([[65]], 3, sampling=Sampling(temperature=temperature))
