"""Many streams at once get what each gets alone, with the cache of prefixes and without; lm-eval scores as we do."""

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from swamla.data.tokenizer import HFTokenizer
from swamla.interop.tokenizer import save_tokenizer
from swamla.model.language_model import LanguageModel
from swamla.text import encode_prompt

from .helpers import TOKENIZER, alone, model_of
from .servers import Running, running

STREAMS = 64


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return model_of("gdn", "swa", "mla")


@pytest.fixture(scope="module")
def expected(model: LanguageModel) -> dict[str, str]:
    """A prompt and its text alone, for every stream; most prompts begin alike."""
    shared = "".join(chr(33 + 7 * index % 90) for index in range(40))
    prompts = [f"{shared if index % 4 else ''}{index} " * (1 + index % 3) for index in range(STREAMS)]
    return {p: alone(model, encode_prompt(TOKENIZER, p), 10 + index % 7)[0] for index, p in enumerate(prompts)}


@pytest.mark.parametrize("cache", [0, 64 << 20], ids=["no cache", "cache"])
def test_sixty_four_streams_at_once_have_the_greedy_text_of_each_alone(
    model: LanguageModel, expected: dict[str, str], cache: int
) -> None:
    found: dict[str, str] = {}

    def stream(server: Running, index: int, prompt: str) -> None:
        body = {"prompt": prompt, "max_tokens": 10 + index % 7, "temperature": 0, "stream": True}
        _, raw = server.call("POST", "/v1/completions", body)
        lines = [line.removeprefix("data: ") for line in raw.decode().split("\n\n")[:-2]]
        found[prompt] = "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])

    with running([("model", model, TOKENIZER)], slots=16, cache_bytes=cache, limit=300, piece=32) as server:
        threads = [
            threading.Thread(target=stream, args=(server, index, prompt)) for index, prompt in enumerate(expected)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        counters = server.engine.counters
    assert found == expected
    assert counters.steps < counters.generated_tokens / 2
    assert (counters.cached_tokens > 0) == (cache > 0)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: make interop installs it")
def test_local_completions_of_lm_eval_gives_the_log_likelihoods_of_our_own_class(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from swamla.evaluate.harness import HarnessModel

    texts = [("The answer", " is 42"), ("a", "b"), ("x = [1, 2", ", 3]\n"), ("é", "𝄞 and more")]

    def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]  # type: ignore[arg-type]

    save_tokenizer(HFTokenizer(TOKENIZER.library_json()), tmp_path)
    ours = HarnessModel(model, TOKENIZER)
    with running([("model", model, TOKENIZER)]) as server:
        theirs = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="model",
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            add_bos_token=True,
            max_retries=1,
        )
        scores = theirs.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True)
        own = ours.loglikelihood(requests("loglikelihood", texts))
        torch.testing.assert_close([score for score, _ in scores], [score for score, _ in own], rtol=0, atol=1e-3)
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in own]
        asked = [("The answer", {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}), ("q", {"max_gen_toks": 5})]
        written = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
        assert written == ours.generate_until(requests("generate_until", asked))
