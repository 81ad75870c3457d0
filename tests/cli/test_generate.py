"""`swamla generate`: how tokens are computed is chosen by a flag, and told."""

import pytest

from swamla.cli import generate as command
from swamla.data.tokenizer import ByteTokenizer, with_specials
from swamla.errors import MissingBackendError
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.swa import SWAConfig


@pytest.fixture(autouse=True)
def _untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    blocks = {"swa": BlockConfig(mixer=SWAConfig(n_heads=2, window=8))}
    config = LanguageModelConfig(vocab_size=tokenizer.vocab_size, width=32, blocks=blocks, pattern=("swa",))
    model = config.build(seed=0).eval()
    monkeypatch.setattr(command, "load", lambda *_: (model, tokenizer))


@pytest.mark.parametrize("decoding", ["eager", "int8"])
def test_the_statistics_tell_how_tokens_were_computed(capsys: pytest.CaptureFixture[str], decoding: str) -> None:
    assert command.main(["run", "--prompt", "ab", "--max_new_tokens", "4", "--stats", "--decoding", decoding]) == 0
    assert f"fp32, {decoding}, state" in capsys.readouterr().err


def test_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(MissingBackendError, match='decoding = "graph" is for CUDA, the model is on cpu'):
        command.main(["run", "--decoding", "graph"])


def test_a_model_of_conversations_says_where_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["my run", "--prompt", "ab", "--max_new_tokens", "2"]) == 0
    plain = capsys.readouterr()
    assert plain.err == ""
    model, tokenizer = command.load("my run")
    tuned = with_specials(tokenizer, ("<|im_start|>", "<|im_end|>"))
    monkeypatch.setattr(command, "load", lambda *_: (model, tuned))
    assert command.main(["my run", "--prompt", "ab", "--max_new_tokens", "2"]) == 0
    found = capsys.readouterr()
    assert found.err.count("\n") == 1
    assert "chat 'my run' asks it; generate continues plain text" in found.err
    assert found.out == plain.out
