"""Models as GGUF files in llama.cpp, through xllamacpp's server, beside the same models here."""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from swamla.data.tokenizer import CharTokenizer, Tokenizer
from swamla.interop import load_pretrained, save_gguf
from swamla.model.language_model import LanguageModel
from tests.interop.cases import CASES, VOCABULARY, Case, tokens
from tests.waiting import PATIENCE

MISSING = next(
    (f"{name} is not installed: pip install gguf xllamacpp" for name in ("gguf", "xllamacpp") if not find_spec(name)),
    "",
)
SIGNS = CharTokenizer("".join(chr(33 + i) for i in range(VOCABULARY - 1)))  # a sign for each id, and the end
LENGTH = 24


def changed(name: str, **settings: Any) -> Case:
    """A case of transformers with other settings."""
    return replace(CASES[name], settings={**CASES[name].settings, **settings})


SQUARE = {"linear_value_head_dim": 8}  # states as wide as high, which llama.cpp wants
YARN = "deepseek_v3, full-rank queries, halves, YaRN"
IN_LLAMA_CPP = {
    **{
        name: CASES[name]
        for name in CASES
        if name.startswith(("gpt2", "llama", "mistral", "ministral", "qwen2", "olmo2"))
    },
    "qwen3": CASES["qwen3"],
    "qwen3_5": changed("qwen3_5", **SQUARE),
    "qwen3_5, all of a head rotated, tied": changed("qwen3_5, all of a head rotated, tied", **SQUARE),
    "qwen3_next": changed("qwen3_next", **SQUARE, mlp_only_layers=[]),
    "deepseek_v3": CASES["deepseek_v3"],
    "deepseek_v3, tied, other epsilon": changed("deepseek_v3", tie_word_embeddings=True, rms_norm_eps=1e-3),
    "deepseek_v3, halves, YaRN": changed(YARN, q_lora_rank=24),
    "deepseek_v3, YaRN without mscale": changed(
        "deepseek_v3", rope_parameters=CASES["llama, YaRN"].settings["rope_parameters"]
    ),
    "deepseek_v3, all dense": changed("deepseek_v3", first_k_dense_replace=3),
    "deepseek_v3, full-rank queries, 26 layers": changed("deepseek_v3", num_hidden_layers=26, q_lora_rank=None),
    "deepseek_v2, greedy": CASES["deepseek_v2, greedy"],
    "kimi_linear": changed("kimi_linear", linear_num_heads=4, rms_norm_eps=1e-6),
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """log_probabilities: the largest difference, over positions and ids.  argmax: positions where it is equal.

    text: whether greedy text is equal, up to the end of the document.
    """

    log_probabilities: float
    argmax: int
    text: bool


SERVER = """
import sys, xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx, settings.n_parallel, settings.verbosity = 512, 1, -1
settings.warmup = settings.fit_params = False
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
if sys.argv[2] == "exact":
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """llama.cpp with one model, on one thread, until the context ends. exact: the state in fp32, by default in fp16.

    In a process of its own, which is killed: its server sometimes waits for itself when it is closed, and it aborts
    where it finds a file wrong.
    """

    def __init__(self, file: Path, *, exact: bool = True) -> None:
        words = [sys.executable, "-c", SERVER, str(file), "exact" if exact else "default"]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        found = next((line for line in self._process.stdout if line.startswith("at ")), None)
        assert found is not None, "llama.cpp did not load the file"
        self._address = found.split()[1]
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, what: str, **question: Any) -> Any:
        """The answer of the server."""
        body = json.dumps(question).encode()
        request = urllib.request.Request(f"{self._address}/{what}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read())

    def generate(self, prompt: str | Sequence[int], n_text: int) -> tuple[list[int], str]:
        """Greedy ids and their text, without the end of the document."""
        found = self.ask(
            "completion", prompt=prompt, n_predict=n_text, temperature=0, cache_prompt=False, return_tokens=True
        )
        return found["tokens"], found["content"]

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> Tensor:
        """Of every id after each of `ids`: (time, vocabulary)."""
        found = torch.full((len(ids), vocabulary), torch.nan)
        for time in range(len(ids)):
            answer = self.ask(
                "completion",
                prompt=ids[: time + 1],
                n_predict=1,
                n_probs=vocabulary,
                temperature=0,
                cache_prompt=False,
            )
            for each in answer["completion_probabilities"][0]["top_logprobs"]:
                found[time, each["id"]] = each["logprob"]
        return found


def ours_of(case: Case) -> LanguageModel:
    """The model of a case here."""
    with tempfile.TemporaryDirectory() as folder:
        case.model().save_pretrained(folder)
        return load_pretrained(folder)


def agreement(
    ours: LanguageModel, tokenizer: Tokenizer = SIGNS, weights: Any = "f32", *, exact: bool = True
) -> Agreement:
    """Of a model here and what llama.cpp makes of its file."""
    ids = [i % tokenizer.vocab_size for i in tokens(1, LENGTH)[0].tolist()]
    with tempfile.TemporaryDirectory() as folder:
        save_gguf(ours, Path(folder) / "model.gguf", tokenizer=tokenizer, weights=weights)
        with LlamaCpp(Path(folder) / "model.gguf", exact=exact) as theirs:
            found = theirs.log_probabilities(ids, tokenizer.vocab_size)
            text, _ = theirs.generate(ids[:5], LENGTH)
    with torch.no_grad():
        expected = ours(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].float().log_softmax(dim=-1)
    own = ours.generate(torch.tensor([ids[:5]]), max_new_tokens=LENGTH, temperature=0.0)[0].tolist()
    until = own.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in own else LENGTH
    return Agreement(
        log_probabilities=(found - expected).abs().max().item(),
        argmax=int((found.argmax(dim=-1) == expected.argmax(dim=-1)).sum()),
        text=text == own[:until],
    )
