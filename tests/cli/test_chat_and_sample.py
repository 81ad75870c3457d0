"""`swamla chat` holds a conversation, `swamla sample` puts models side by side: both write what the library writes."""

import io
import signal

import pytest

from swamla.cli import chat, main, sample
from swamla.cli.console import harmless
from swamla.data.chat import template_of
from swamla.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, train_bpe, with_specials
from swamla.errors import UsageError
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.serve.chat import asked_ids
from swamla.serve.engine import Engine
from swamla.text import generate_text

PLAIN = ByteTokenizer()


def talking() -> Tokenizer:
    """Bytes, with the special ids of ChatML."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(PLAIN.library_json())
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return HFTokenizer(library.to_str())


def model_of(tokenizer: Tokenizer, seed: int = 0) -> LanguageModel:
    blocks = {"swa": BlockConfig(mixer=SWAConfig(n_heads=2, window=8))}
    config = LanguageModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, blocks=blocks, pattern=("swa",), init_std=0.3
    )
    return config.build(seed=seed).eval()


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *flags: str
) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert chat.main(["run", "--greedy", "--max_new_tokens", "9", *flags]) == 0
    found = capsys.readouterr()
    return found.out, found.err


def test_a_conversation_is_continued_and_begun_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = talking()
    model, template = model_of(tokenizer), template_of(tokenizer)
    monkeypatch.setattr(chat, "load", lambda *_: (model, tokenizer))
    messages = [{"role": "system", "content": "Be kind."}]
    expected = []
    for message in ("Hi", "And?"):
        messages.append({"role": "user", "content": message})
        ids = template.prompt(messages)
        new = Decoder(model).generate([ids], 9, sampling=Sampling(temperature=0), stop_id=tokenizer.eos_id)[0]
        text = tokenizer.decode(new[: new.index(template.stop_id)] if template.stop_id in new else new)
        messages.append({"role": "assistant", "content": text})
        expected.append(text)
    out, _ = said(monkeypatch, capsys, "Hi\n\nAnd?\n/new\nHi\n/quit\nnever read\n", "--system", "Be kind.")
    assert out == "".join(f"{text}\n" for text in (*expected, expected[0]))


def test_a_conversation_has_the_ids_that_fine_tuning_learns_also_where_an_answer_begins_with_a_space() -> None:
    text = "user\n  a\nassistant\n  b\nsystem\n  c\n" * 9
    tokenizer = with_specials(HFTokenizer(train_bpe([text], 300)), ("<|im_start|>", "<|im_end|>"))
    said = [("system", "  c"), ("user", "  a"), ("assistant", "  b"), ("user", "a")]
    messages = [{"role": role, "content": content} for role, content in said]
    template = template_of(tokenizer)
    ids, (system,) = asked_ids(template, messages)
    for said_before in (1, 3):
        learned = [tokenizer.eos_id, *template.conversation(messages[:said_before]).ids]
        assert ids[: len(learned)] == learned
        assert (len(learned) == system) == (said_before == 1)
    assert tokenizer.encode("assistant\n  b") != [*tokenizer.encode("assistant\n"), *tokenizer.encode("  b")]


def test_a_conversation_that_is_too_long_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = talking()
    model = model_of(tokenizer)
    monkeypatch.setattr(chat, "load", lambda *_: (model, tokenizer))
    out, err = said(monkeypatch, capsys, "x" * 100 + "\nHi\n", "--max_length", "60")
    assert err.count("/new begins another conversation") == 1
    alone, nothing = said(monkeypatch, capsys, "Hi\n", "--max_length", "60")
    assert (out, nothing) == (alone, "")  # what did not fit was not kept
    assert out.strip()


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was said until then is kept; nothing tells that the program stops."""
    tokenizer, rounds, step = talking(), list[int](), Engine.step
    model, template = model_of(tokenizer), template_of(tokenizer)
    monkeypatch.setattr(chat, "load", lambda *_: (model, tokenizer))
    monkeypatch.setattr("swamla.cli.outputs.PATIENCE", 0.0)  # so that a notice would be written at once
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAnd?\n"))

    def interrupted(engine: Engine) -> bool:
        rounds.append(0)
        if len(rounds) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    def answered(messages: list[dict[str, str]], count: int) -> str:
        ids = template.prompt(messages)
        ends = tokenizer.eos_id
        return tokenizer.decode(
            Decoder(model).generate([ids], count, sampling=Sampling(temperature=0), stop_id=ends)[0]
        )

    monkeypatch.setattr(Engine, "step", interrupted)
    assert main(["chat", "run", "--greedy", "--max_new_tokens", "20"]) == 0
    out, err = capfd.readouterr()
    asked = [{"role": "user", "content": "Hi"}]
    begun = answered(asked, 20)
    assert not {template.stop_id} & set(tokenizer.encode(begun))
    said = next(begun[:end] for end in range(1, 20) if out.startswith(begun[:end] + "\n"))
    messages = [*asked, {"role": "assistant", "content": said}, {"role": "user", "content": "And?"}]
    assert out == f"{said}\n{answered(messages, 20)}\n"
    assert "SIGINT" not in err


def test_a_bug_in_the_engine_is_told_as_one_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, decode = talking(), Engine._decode
    model, rounds = model_of(tokenizer), list[int]()
    monkeypatch.setattr(chat, "load", lambda *_: (model, tokenizer))

    def broken(engine: Engine) -> None:
        rounds.append(0)
        if len(rounds) == 3:
            raise ZeroDivisionError("no more")
        decode(engine)

    whole, _ = said(monkeypatch, capsys, "Hi\n")
    monkeypatch.setattr(Engine, "_decode", broken)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nHi\n"))
    assert chat.main(["run", "--greedy", "--max_new_tokens", "9"]) == 1
    out, err = capsys.readouterr()
    assert "swamla: error: a bug in swamla: ZeroDivisionError: no more; the message is not kept\n" in err
    assert out.endswith(f"\n{whole}")  # as if the first had not been said
    assert out != f"{whole}{whole}"


def test_a_model_without_a_template_does_not_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "load", lambda *_: (model_of(PLAIN), PLAIN))
    with pytest.raises(UsageError, match="run has no chat template, as its tokenizer has no special ids"):
        chat.main(["run"])


def test_models_are_sampled_side_by_side_with_the_same_prompts_and_seeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"a": model_of(PLAIN), "b": model_of(PLAIN, seed=1)}
    monkeypatch.setattr(sample, "load", lambda folder, _: (models[folder.name], PLAIN))
    monkeypatch.setenv("COLUMNS", "200")
    flags = ["--prompt", "def", "--prompt", "x", "--samples", "2", "--max_new_tokens", "6", "--seed", "4"]
    assert main(["sample", "a", "b", *flags]) == 0
    expected = [
        [f"{prompt}{4 + sample}" for prompt in ("def", "x") for sample in range(2)],
        *(
            [
                "".join(harmless(completion.text).split())
                for prompt in ("def", "x")
                for completion in generate_text(model, PLAIN, [prompt] * 2, 6, sampling=Sampling(seed=4)).completions
            ]
            for model in models.values()
        ),
    ]
    assert cells(capsys.readouterr().out) == [list(row) for row in zip(*expected, strict=True)]
    assert expected[1] != expected[2]


@pytest.mark.parametrize(("rounded", "decoding"), [("int8", "int8"), ("", "eager")])
def test_a_rounded_model_is_decoded_as_generate_and_serve_decode_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rounded: str, decoding: str
) -> None:
    tokenizer, used = talking(), list[str]()
    model = model_of(tokenizer)
    model.quantized = rounded
    decoder = Decoder.__init__

    def noted(self: Decoder, model: LanguageModel, decoding: str = "eager") -> None:
        used.append(decoding)
        decoder(self, model, decoding)

    monkeypatch.setattr(Decoder, "__init__", noted)
    monkeypatch.setattr(chat, "load", lambda *_: (model, tokenizer))
    monkeypatch.setattr(sample, "load", lambda *_: (model, tokenizer))
    out, _ = said(monkeypatch, capsys, "Hi\n")
    assert out.strip()
    assert main(["sample", "a", "--prompt", "x", "--max_new_tokens", "3"]) == 0
    assert used == [decoding] * 2


def cells(shown: str) -> list[list[str]]:
    """What stands in a table's rows below its head, without white space."""
    rows: list[list[str]] = []
    for line in shown.splitlines():
        if line[0] in "├┡":
            rows.append([])
        elif line[0] == "│":
            parts = ["".join(part.split()) for part in line.strip("│").split("│")]
            rows[-1] = [before + part for before, part in zip(rows[-1] or [""] * len(parts), parts, strict=True)]
    return rows


@pytest.mark.parametrize(
    "flags", [["--samples", "0"], ["--greedy", "--temperature", "1"], ["--max_new_tokens", "0"], ["--max_length", "1"]]
)
def test_settings_that_make_no_sense_are_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError):
        sample.main(["a", *flags])
    if flags[0] != "--samples":
        with pytest.raises(UsageError):
            chat.main(["a", *flags])
