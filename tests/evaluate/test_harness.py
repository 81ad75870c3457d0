"""lm-eval's three requests are answered as full forward passes say, however they are batched and shared."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'swamla[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tokenizers.processors import TemplateProcessing

from swamla.data.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer, train_bpe
from swamla.errors import ConfigError, UsageError
from swamla.evaluate.harness import Generation, HarnessModel
from swamla.interop import load_pretrained, save_pretrained
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from tests.interop.cases import CASES
from tests.model.helpers import MIXERS, build_model, hybrid_config

TEXT = "the cat sat on the mat, and the dog sat on the log; then both of them ran home to eat.\n"
TOKENIZERS: dict[str, Tokenizer] = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer(TEXT),
    "bpe": HFTokenizer(train_bpe([TEXT] * 3, 290)),
}
POSITIONS = 30
PAIRS = [
    ("the cat sat", " on the mat"),
    ("the cat sat", " on"),
    ("the cat sat", "."),
    ("the dog ", "sat on the log"),  # the space goes to the continuation
    ("the cat sat", " home to eat, and then"),
    ("", "the cat"),
    ("", "t"),
    ("  ", "then"),
    ("both of them ran home to eat the log; the dog sat on the mat", " and then both of them sat"),
    ("the", " h"),
]
ROLLING = ["the dog sat on the log; then both ran home", "t", "", "the cat sat on the mat, and the dog sat on the log"]
GREEDY = {"until": [" ", "zz"], "max_gen_toks": 9, "do_sample": False}
LONG = {"until": "no such text", "max_gen_toks": 7, "temperature": 0.0}
PROMPTS = [("the cat", GREEDY), ("", LONG), ("the dog sat on the log; then", GREEDY), ("both", LONG), (TEXT[:60], LONG)]


def config_for(tokenizer: Tokenizer, **changes: Any) -> LanguageModelConfig:
    return replace(hybrid_config(), vocab_size=tokenizer.vocab_size + 5, **changes)  # ids that only pad


def model_for(tokenizer: Tokenizer, **changes: Any) -> LanguageModel:
    model = build_model(config_for(tokenizer, **changes)).eval()
    model.known_ids = tokenizer.vocab_size
    return model


@pytest.fixture(scope="module", params=[*TOKENIZERS, "learned positions"])
def made(request: pytest.FixtureRequest) -> tuple[LanguageModel, Tokenizer]:
    """A hybrid with each tokenizer, and one with learned positions, which are too few for some of the texts."""
    tokenizer = TOKENIZERS.get(request.param, TOKENIZERS["char"])
    return model_for(tokenizer, learned_positions=0 if request.param in TOKENIZERS else POSITIONS), tokenizer


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]  # type: ignore[arg-type]


def scored(lm: LM, pairs: Sequence[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs))


def rolled(lm: LM, texts: Sequence[str] = ROLLING) -> list[float]:
    return lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))


def generated(lm: LM, prompts: Sequence[tuple[str, dict[str, Any]]] = PROMPTS) -> list[str]:
    return lm.generate_until(instances("generate_until", prompts))


@torch.no_grad()
def whole_pass(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By all logits of one forward pass over both, cut from the left to the learned positions."""
    limit = model.config.learned_positions or 10**9
    ids = torch.tensor((context + continuation)[-limit - 1 :])
    log_p = model(ids[None, :-1]).double().log_softmax(-1)[0, -len(continuation) :]
    labels = torch.tensor(continuation)
    return log_p.gather(1, labels[:, None]).sum().item(), bool((log_p.argmax(-1) == labels).all())


def split(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, split where the context's ids without its trailing spaces end; the document's start before them."""
    bare = len(tokenizer.encode(context.rstrip()))
    ids = tokenizer.encode(context + continuation)
    return [tokenizer.eos_id, *ids[:bare]], ids[bare:]


def assert_same(found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5, abs=1e-4)
    assert [same for _, same in found] == [same for _, same in expected]


@pytest.mark.filterwarnings("ignore:.* requests are cut to the last")
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_likelihoods_are_those_of_full_passes_at_any_batch_size(
    made: tuple[LanguageModel, Tokenizer], batch_size: int
) -> None:
    model, tokenizer = made
    expected = [whole_pass(model, *split(tokenizer, *pair)) for pair in PAIRS]
    assert_same(scored(HarnessModel(model, tokenizer, batch_size=batch_size)), expected)


@pytest.mark.parametrize("name", MIXERS)
def test_each_mixer_goes_on_from_a_shared_context_as_it_does_alone(name: str) -> None:
    tokenizer = TOKENIZERS["byte"]
    model = build_model(replace(hybrid_config(pattern=(name, name)), vocab_size=tokenizer.vocab_size)).eval()
    lm = HarnessModel(model, tokenizer, batch_size=4)
    assert_same(scored(lm), [scored(lm, [pair])[0] for pair in PAIRS])


def test_the_likeliest_continuation_is_greedy_and_another_is_not() -> None:
    tokenizer = TOKENIZERS["char"]
    model = model_for(tokenizer)
    lm = HarnessModel(model, tokenizer)
    (text,) = generated(lm, [("the cat", LONG)])
    other = text[:-1] + ("a" if text[-1] != "a" else "e")
    assert [same for _, same in scored(lm, [("the cat", text), ("the cat", other), ("the cat", text[:1])])] == [
        *(True, False, True)
    ]


class Counted(HarnessModel):
    """Counts the real tokens that the model reads."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.rows: list[list[int]] = []
        step = self.model.step_hidden

        def counted(tokens_BT: torch.Tensor, state: Any, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
            real = torch.ones_like(tokens_BT, dtype=torch.bool) if valid_BT is None else valid_BT
            self.rows += [tokens[kept].tolist() for tokens, kept in zip(tokens_BT, real, strict=True)]
            return step(tokens_BT, state, valid_BT)

        self.model.__dict__["step_hidden"] = counted


def test_a_shared_context_is_read_once() -> None:
    tokenizer = TOKENIZERS["byte"]
    lm = Counted(model_for(tokenizer), tokenizer, batch_size=3)
    choices = [" on the mat", " on", ".", " off it", " and ran"]
    scored(lm, [(TEXT, choice) for choice in choices])
    read = 1 + len(TEXT.rstrip()) + sum(map(len, choices))
    assert sum(map(len, lm.rows)) == read  # "\n" goes to each continuation, whose last token is not read


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_document_starts_exactly_once_and_text_that_looks_like_it_is_text(tokenizer: Tokenizer) -> None:
    lm = Counted(model_for(tokenizer), tokenizer, batch_size=1)
    if not isinstance(tokenizer, CharTokenizer):
        ids = lm.tok_encode("<|endoftext|>a")
        assert ids.count(tokenizer.eos_id) == 1
        assert tokenizer.decode(ids[1:]) == "<|endoftext|>a"
    scored(lm), rolled(lm), generated(lm, [(prompt, LONG) for prompt in ("", "the cat")])
    starts = [row.count(tokenizer.eos_id) for row in lm.rows if len(row) > 0]
    distinct = len({tuple(split(tokenizer, *pair)[0]) for pair in PAIRS})
    assert set(starts) <= {0, 1}
    assert [row[0] for row in lm.rows if tokenizer.eos_id in row] == [tokenizer.eos_id] * sum(starts)
    assert sum(starts) == distinct + 1 + 2  # contexts, that of all whole documents, and prompts


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_rolling_log_likelihood_is_that_of_the_whole_document(batch_size: int) -> None:
    tokenizer = TOKENIZERS["bpe"]
    model = model_for(tokenizer)
    expected = [whole_pass(model, [tokenizer.eos_id], tokenizer.encode(text))[0] if text else 0.0 for text in ROLLING]
    found = rolled(HarnessModel(model, tokenizer, batch_size=batch_size))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_progress_is_told_up_to_the_whole() -> None:
    told: list[tuple[str, float]] = []
    tokenizer = TOKENIZERS["byte"]
    lm = HarnessModel(model_for(tokenizer), tokenizer, batch_size=2, progress=lambda *each: told.append(each))
    scored(lm), rolled(lm), generated(lm)
    for stage in ("scoring 10 texts", "scoring 3 texts", "generating 5 texts"):
        shares = [share for name, share in told if name == stage]
        assert shares == sorted(shares)
        assert shares[-1] == 1
    assert len({share for _, share in told}) > 5


def test_long_documents_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["char"]
    model = model_for(tokenizer)
    lm = HarnessModel(model, tokenizer)
    expected = rolled(lm)
    monkeypatch.setattr("swamla.evaluate.harness.PREFILL_CHUNK", 12)
    monkeypatch.setattr("swamla.evaluate.harness.LOGITS", 5 * model.config.vocab_size)
    assert rolled(lm) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_with_learned_positions_each_token_of_a_document_is_predicted_once_in_windows_that_are_full() -> None:
    tokenizer = TOKENIZERS["char"]
    model = model_for(tokenizer, learned_positions=POSITIONS)
    expected = []
    for text in ROLLING:
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        nats = 0.0
        for begin in range(0, len(ids) - 1, POSITIONS):
            end = min(begin + POSITIONS, len(ids) - 1)
            nats += whole_pass(model, ids[: begin + 1], ids[begin + 1 : end + 1])[0] if end > begin else 0.0
        expected.append(nats)
    assert rolled(HarnessModel(model, tokenizer)) == pytest.approx(expected, rel=1e-5, abs=1e-4)


@torch.no_grad()
def continued(model: LanguageModel, tokenizer: Tokenizer, prompt: str, settings: dict[str, Any]) -> str:
    """Greedily, by a forward pass for every token."""
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    if model.config.learned_positions:
        ids = ids[-(model.config.learned_positions - settings["max_gen_toks"]) :]
    stops = [settings["until"]] if isinstance(settings["until"], str) else settings["until"]
    new: list[int] = []
    for _ in range(settings["max_gen_toks"]):
        token = int(model(torch.tensor([ids + new]))[0, -1, : tokenizer.vocab_size].argmax())
        if token == tokenizer.eos_id:
            break
        new.append(token)
        if any(stop in tokenizer.decode(new) for stop in stops):
            break
    text = tokenizer.decode(new)
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


@pytest.mark.filterwarnings("ignore:.* prompts are cut to their last")
@pytest.mark.parametrize("batch_size", [1, 64])
def test_generated_texts_are_greedy_ones_up_to_a_stop(made: tuple[LanguageModel, Tokenizer], batch_size: int) -> None:
    model, tokenizer = made
    expected = [continued(model, tokenizer, *prompt) for prompt in PROMPTS]
    assert generated(HarnessModel(model, tokenizer, batch_size=batch_size)) == expected


def test_a_stop_may_span_tokens_and_is_cut_off() -> None:
    tokenizer = TOKENIZERS["char"]
    lm = HarnessModel(model_for(tokenizer), tokenizer)
    (whole,) = generated(lm, [("the", {"until": [], "max_gen_toks": 12})])
    stop = whole[5:8]
    assert generated(lm, [("the", {"until": ["", stop], "max_gen_toks": 12})]) == [whole[: whole.index(stop)]]


def test_sampled_texts_depend_on_the_seed_but_not_on_the_batch() -> None:
    tokenizer = TOKENIZERS["byte"]
    model = model_for(tokenizer)
    prompts = [
        (text, {"until": [], "max_gen_toks": 5, "do_sample": True, "temperature": 2.0}) for text in ("a", "a", "b")
    ]
    once, alone, other = (
        generated(HarnessModel(model, tokenizer, batch_size=size, seed=seed), prompts)
        for size, seed in ((8, 0), (1, 0), (8, 77))
    )
    assert once == alone
    assert once != other
    assert once[0] != once[1]  # repeats of a request differ


def test_generation_settings_mean_what_they_mean_in_lm_eval() -> None:
    def of(**kwargs: Any) -> Generation:
        return Generation.of(kwargs, 256)

    plain = Generation(until=(), max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0)
    assert of() == of(do_sample=False, temperature=0.7) == of(num_beams=1) == plain
    assert of(until="\n") == replace(plain, until=("\n",))
    assert of(temperature=0.5, top_p=0.9, top_k=4, max_new_tokens=3) == replace(
        plain, temperature=0.5, top_p=0.9, top_k=4, max_new_tokens=3
    )
    assert of(do_sample=True) == replace(plain, temperature=1.0)
    with pytest.raises(UsageError, match="num_beams = 4: known are until"):
        of(num_beams=4)


def hf(model: Any, tokenizer: Tokenizer, *, starts: bool) -> LM:
    """lm-eval's class for transformers. starts: whether encoding a text puts the document's start first."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval's hf needs accelerate")
    transformers = pytest.importorskip("transformers")
    first = tokenizer.decode([tokenizer.eos_id])
    library = tokenizers.Tokenizer.from_str(tokenizer._serialized)  # type: ignore[attr-defined]
    library.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, tokenizer.eos_id)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token=first, eos_token=first)
    return huggingface.HFLM(pretrained=model, tokenizer=fast, add_bos_token=starts, batch_size=1, device="cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "changes"), [("gpt2", {"n_positions": POSITIONS}), ("llama", {}), ("qwen3_5", {})])
def test_it_answers_as_lm_evals_own_class_does_on_the_same_model(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    """Long texts, too: both cut them from the left."""
    tokenizer, case = TOKENIZERS["bpe"], CASES[name]
    changes |= {"vocab_size": tokenizer.vocab_size} | dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_id)
    theirs = replace(case, settings=case.settings | changes).model()
    theirs.save_pretrained(tmp_path / name)
    ours = HarnessModel(load_pretrained(tmp_path / name), tokenizer, batch_size=3)
    assert_same(scored(ours), scored(hf(theirs, tokenizer, starts=True)))
    alone = hf(theirs, tokenizer, starts=False)  # it puts the start before whole documents itself
    assert rolled(ours) == pytest.approx(rolled(alone), rel=1e-5, abs=1e-4)
    prompts = [(text, LONG) for text, _ in PROMPTS if text]
    assert generated(ours, prompts) == generated(hf(theirs, tokenizer, starts=True), prompts)


@pytest.mark.filterwarnings("ignore")
def test_it_answers_as_lm_evals_own_class_does_on_an_exported_hybrid_with_its_exported_tokenizer(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    import_module("swamla.interop.transformers")  # registers our class
    tokenizer = TOKENIZERS["bpe"]
    model = model_for(tokenizer)
    save_pretrained(model, tmp_path / "out", to="swamla", tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval's hf needs accelerate")
    other = huggingface.HFLM(pretrained=theirs, tokenizer=fast, add_bos_token=True, batch_size=1, device="cpu")
    ours = HarnessModel(model, tokenizer, batch_size=3)
    assert_same(scored(ours), scored(other))
    prompts = [(text, LONG) for text, _ in PROMPTS if text]
    assert generated(ours, prompts) == generated(other, prompts)


def test_what_does_not_fit_is_refused_in_a_line_and_what_is_cut_is_told() -> None:
    tokenizer = TOKENIZERS["char"]
    lm = HarnessModel(model_for(tokenizer, learned_positions=POSITIONS), tokenizer)
    with pytest.raises(UsageError, match="a continuation has 31 tokens, and the model 30 learned positions"):
        scored(lm, [("t", "a" * 31)])
    with pytest.warns(UserWarning, match="1 of 1 requests are cut"):
        assert scored(lm, [("t", "a" * 30)])[0][0] < 0
    with pytest.raises(UsageError, match="'h' after 'the t' has no token of its own"):
        scored(HarnessModel(model_for(TOKENIZERS["bpe"]), TOKENIZERS["bpe"]), [("the t", "h")])
    with pytest.raises(UsageError, match="generates 30 tokens, and the model has 30 learned positions"):
        generated(lm, [("t", LONG | {"max_gen_toks": 30})])
    with pytest.warns(UserWarning, match="1 of 2 requests are cut to the last 30 tokens"):
        scored(lm, [("the cat", "s"), (TEXT, "t")])
    with pytest.warns(UserWarning, match="1 prompts are cut to their last 23 tokens"):
        generated(lm, [(TEXT, LONG)])
    with pytest.raises(ConfigError, match="batch_size = 0: must be > 0"):
        HarnessModel(model_for(tokenizer), tokenizer, batch_size=0)
