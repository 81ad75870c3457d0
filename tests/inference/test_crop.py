"""Generation beyond learned positions: cropped to the last ones, it is the loop of nanoGPT, by every way in."""

import pytest
import torch
from torch import Tensor

from swamla.cli import generate as command
from swamla.data.tokenizer import ByteTokenizer
from swamla.errors import ConfigError, UsageError
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.text import encode_prompt, generate_text
from tests.model.helpers import MIXERS, WIDTH, build_model, random_tokens

POSITIONS = 12
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 12, 20)]
NEW = 15


def positioned(kind: str, vocab_size: int = 31) -> LanguageModel:
    """A model with learned positions, in fp64, so that no two tokens are equally likely but for rounding."""
    blocks = {"a": BlockConfig(mixer=MIXERS[kind])}
    settings = {"width": WIDTH, "blocks": blocks, "pattern": ("a", "a"), "learned_positions": POSITIONS}
    return build_model(LanguageModelConfig(vocab_size=vocab_size, **settings)).double().eval()


@torch.no_grad()
def nanogpt(model: LanguageModel, prompt: list[int], sampling: Sampling, row: int, count: int = NEW) -> list[int]:
    """The loop of nanoGPT's `generate`: every token by a forward pass over the cropped context."""
    context, generator = torch.tensor([prompt]), sampling.generators(row + 1)[row]
    for _ in range(count):
        cropped = context if context.shape[1] <= POSITIONS else context[:, -POSITIONS:]
        (chosen,) = sampling.choose(model(cropped)[:, -1], [generator])
        context = torch.cat((context, torch.tensor([[chosen]])), dim=1)
    return context[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["mha", "swa", "mla", "gdn", "latent"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=0.9, top_k=9, seed=3)])
def test_a_cropped_generation_is_the_loop_of_nanogpt(kind: str, sampling: Sampling) -> None:
    model = positioned(kind)
    expected = [nanogpt(model, prompt, sampling, row) for row, prompt in enumerate(PROMPTS)]
    together = Decoder(model).generate(PROMPTS, NEW, sampling=sampling, context=POSITIONS)
    assert together == expected
    alone = Decoder(model).generate(PROMPTS[:1], NEW, sampling=sampling, context=POSITIONS)
    assert alone == expected[:1]


def test_the_logits_beyond_the_last_position_are_those_of_the_cropped_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = positioned("mha"), list(PROMPTS[0])
    logits: list[Tensor] = []
    choose = Sampling.choose

    def noted(self: Sampling, logits_BV: Tensor, generators: list[torch.Generator]) -> list[int]:
        logits.append(logits_BV)
        return choose(self, logits_BV, generators)

    monkeypatch.setattr(Sampling, "choose", noted)
    new = Decoder(model).generate([seen], NEW, context=POSITIONS)[0]
    assert len(logits) == NEW
    for count, found in enumerate(logits):
        context = [*seen, *new[:count]][-POSITIONS:]
        with torch.no_grad():
            torch.testing.assert_close(found, model(torch.tensor([context]))[:, -1], rtol=0, atol=1e-10)


def test_up_to_the_last_position_nothing_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = positioned("mha"), []
    monkeypatch.setattr(Decoder, "_read_anew", lambda self, seen, size: calls.append(size) or torch.zeros(1, 31))
    fits = POSITIONS - len(PROMPTS[0]) + 1  # the last token is not read
    decoder = Decoder(model)
    assert decoder.generate(PROMPTS[:1], fits, context=POSITIONS) == decoder.generate(PROMPTS[:1], fits)
    assert calls == []
    decoder.generate(PROMPTS[:1], fits + 2, context=POSITIONS)
    assert calls == [POSITIONS, POSITIONS]


def test_a_context_shorter_than_the_positions_may_be_asked_for_of_any_model() -> None:
    model = positioned("mha")
    expected = PROMPTS[2][-5:]
    for _ in range(4):
        with torch.no_grad():
            expected = [*expected, int(model(torch.tensor([expected[-5:]]))[0, -1].argmax())]
    assert Decoder(model).generate(PROMPTS[2:], 4, sampling=Sampling(temperature=0.0), context=5) == [expected[5:]]
    with pytest.raises(ConfigError, match="context = 0: must be > 0"):
        Decoder(model).generate(PROMPTS, 4, context=0)
    with pytest.raises(UsageError, match="learned positions"):
        Decoder(model).generate(PROMPTS, 4)


def test_the_command_and_the_library_write_the_same_text(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    model = positioned("mha", tokenizer.vocab_size)
    monkeypatch.setattr(command, "load", lambda *_: (model, tokenizer))
    prompt, sampling = "a prompt longer than all positions", Sampling(seed=5)
    found = generate_text(model, tokenizer, prompt, NEW, sampling=sampling, crop=True)
    ids = nanogpt(model, encode_prompt(tokenizer, prompt), sampling, 0)
    ids = ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids
    assert found.completions[0].tokens == ids
    state = model.init_state(1, POSITIONS, dtype=torch.float64)
    assert found.state_bytes == state.nbytes
    line = ["run", "--prompt", prompt, "--max_new_tokens", str(NEW), "--seed", "5"]
    assert command.main([*line, "--crop"]) == 0
    assert capsys.readouterr().out == f"{prompt}{found.completions[0].text}\n"
    with pytest.raises(UsageError, match="shorten it by 23, or --crop, which reads its last 12"):
        command.main(line)
    with pytest.raises(UsageError, match="leave room for 11: --max_new_tokens 11, or a shorter prompt, or --crop"):
        command.main(["run", "--prompt", "a", "--max_new_tokens", "12"])


def test_cropping_a_model_without_learned_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    blocks = {"a": BlockConfig(mixer=MIXERS["mha"])}
    model = LanguageModelConfig(vocab_size=257, width=WIDTH, blocks=blocks, pattern=("a",)).build(0).eval()
    monkeypatch.setattr(command, "load", lambda *_: (model, tokenizer))
    with pytest.raises(UsageError, match="--crop is for learned positions"):
        command.main(["run", "--crop"])
    with pytest.raises(ConfigError, match="crop = True: is for learned positions"):
        generate_text(model, tokenizer, "a", 3, crop=True)
