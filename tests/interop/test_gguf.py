"""GGUF files: llama.cpp computes the same function, and gives a text the ids of training."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swamla.checkpoint import load
from swamla.cli import main
from swamla.data.chat import make_template, template_of
from swamla.data.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, IdTokenizer, Tokenizer, gpt2_bpe, train_bpe
from swamla.errors import MissingBackendError, UsageError
from swamla.interop import save_gguf
from swamla.interop.architectures.deepseek import DeepseekV2, DeepseekV3
from swamla.interop.architectures.kimi import KimiLinear
from swamla.interop.architectures.llama import Llama, Mistral, Qwen3
from swamla.interop.architectures.olmo import Olmo2
from swamla.interop.architectures.qwen import Qwen3_5
from swamla.interop.architectures.qwen_moe import Qwen3Next
from swamla.interop.gguf.saving import HOMES, home_of
from swamla.interop.gguf.vocabulary import vocabulary
from swamla.interop.rope import RopeParameters
from swamla.model.language_model import LanguageModel
from tests.interop.llama_cpp import IN_LLAMA_CPP, LENGTH, MISSING, SIGNS, LlamaCpp, agreement, ours_of

needs_llama_cpp = pytest.mark.skipif(bool(MISSING), reason=MISSING)
needs_gguf = pytest.mark.skipif("gguf is not" in MISSING, reason=MISSING)
# A BPE's own way to cut text is not in llama.cpp: see test_nearly_all_….
TEXT = "Hé wörld,  it's\n\t☃ 𝔘 a  b\r\n  don't 12345 é </s> x=[1, 22]; "
TOLERANCE = {"f32": 1e-4, "f16": 0.02, "bf16": 0.1, "q8_0": 0.3}  # of random models, which are more sensitive
GELU = 2e-3  # of which llama.cpp has a table in fp16


def llama(tokenizer: Tokenizer) -> LanguageModel:
    """A small one with the ids of a tokenizer, and more that only pad."""
    size = -(-tokenizer.vocab_size // 64) * 64
    model = replace(Llama.example(), vocab_size=size).language_model().build(seed=0).eval()
    model.known_ids = tokenizer.vocab_size
    return model


def test_every_architecture_of_llama_cpp_has_a_case() -> None:
    import transformers

    kinds = {getattr(transformers, case.config).model_type for case in IN_LLAMA_CPP.values()}
    assert kinds - {"qwen2"} == HOMES.keys()  # a Qwen2 is written as the Llama that it is here


@needs_llama_cpp
@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_llama_cpp_computes_the_same_probabilities_and_greedy_text(name: str) -> None:
    found = agreement(ours_of(IN_LLAMA_CPP[name]))
    assert found.log_probabilities <= (GELU if name == "gpt2" else TOLERANCE["f32"])
    assert found.argmax == LENGTH
    assert found.text


@needs_llama_cpp
@pytest.mark.parametrize("name", ["gpt2", "llama", "ministral", "qwen3", "deepseek_v3, all dense"])
@pytest.mark.parametrize("weights", ["f16", "bf16", "q8_0"])
def test_fewer_bits_change_probabilities_by_their_rounding(name: str, weights: str) -> None:
    """Not of experts, where a router that nearly ties chooses others."""
    found = agreement(ours_of(IN_LLAMA_CPP[name]), weights=weights, exact=False)
    assert found.log_probabilities <= TOLERANCE[weights]


@needs_gguf
@pytest.mark.parametrize(("weights", "bits"), [("f32", 32), ("f16", 16), ("bf16", 16), ("q8_0", 8.5)])
def test_matrices_have_the_dtype_asked_for_and_everything_else_is_fp32(weights, bits, tmp_path) -> None:
    import gguf

    file = tmp_path / "model.gguf"
    save_gguf(ours_of(IN_LLAMA_CPP["qwen3_next"]), file, tokenizer=SIGNS, weights=weights)
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) == 1 or "conv1d" in tensor.name or tensor.name.endswith("ffn_gate_inp.weight"):
            assert tensor.tensor_type.name == "F32", tensor.name
        elif tensor.shape[0] % 32 == 0:
            assert tensor.n_bytes * 8 == tensor.n_elements * bits, tensor.name
        else:  # rows that Q8_0's blocks do not fill
            assert tensor.tensor_type.name == ("F16" if weights == "q8_0" else weights.upper()), tensor.name


@needs_gguf
def test_rows_of_ids_that_only_pad_are_left_out(tmp_path) -> None:
    import gguf

    ours = llama(ByteTokenizer())
    save_gguf(ours, tmp_path / "model.gguf", tokenizer=ByteTokenizer(), weights="f32")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, weight in (("token_embd.weight", ours.embedding.weight), ("output.weight", ours.head.weight)):
        assert torch.equal(torch.tensor(stored[name]), weight[:257])


def gpt2_files(folder: Path) -> Path:
    """A BPE in GPT-2's files: two merges."""
    from swamla.data.tokenizer import byte_signs

    merges = [("Ġ", "a"), ("b", "c")]
    vocab = {token: i for i, token in enumerate([*byte_signs(), *("".join(pair) for pair in merges)])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return folder


def cut_by(pattern: str) -> HFTokenizer:
    """A BPE trained on TEXT that cuts it by another pattern."""
    from tokenizers import Tokenizer as Library
    from tokenizers import trainers

    plain = json.loads(train_bpe([TEXT], 280))
    plain["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    library = Library.from_str(json.dumps(plain))
    alphabet = [token for token in plain["model"]["vocab"] if len(token) == 1]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([TEXT * 9], trainer)
    return HFTokenizer(library.to_str())


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
EXACT = {
    "byte": lambda folder: ByteTokenizer(),
    "char": lambda folder: CharTokenizer(f"{TEXT}{''.join(map(chr, range(32, 127)))}"),
    "gpt2": lambda folder: HFTokenizer(gpt2_bpe(gpt2_files(folder))),
    "llama 3": lambda folder: cut_by(LLAMA_3),
    "qwen 2": lambda folder: cut_by(LLAMA_3.replace("{1,3}", "")),
}


@needs_llama_cpp
@pytest.mark.parametrize("kind", EXACT)
def test_text_has_the_ids_of_training_behind_the_documents_start_and_comes_back(kind, tmp_path) -> None:
    tokenizer = EXACT[kind](tmp_path)
    assert vocabulary(tokenizer).same
    save_gguf(llama(tokenizer), tmp_path / "model.gguf", tokenizer=tokenizer, weights="f32")
    with LlamaCpp(tmp_path / "model.gguf") as theirs:
        ids = theirs.ask("tokenize", content=TEXT, add_special=True)["tokens"]
        assert ids == [tokenizer.eos_id, *tokenizer.encode(TEXT)]
        assert theirs.ask("detokenize", tokens=ids[1:])["content"] == TEXT


CHAT = [
    {"role": "system", "content": "Be brief: 'é'.\n"},
    {"role": "user", "content": "  2 + 2?\n\nand 12345 \t☃"},
    {"role": "assistant", "content": "4\n  <b> "},
    {"role": "user", "content": "x=[1, 22];"},
]


@needs_gguf
@pytest.mark.parametrize("kind", EXACT)
def test_a_model_of_conversations_has_their_template_and_the_ids_that_end_answers(kind, tmp_path) -> None:
    import gguf
    import jinja2

    tokenizer = make_template("chatml", EXACT[kind](tmp_path)).tokenizer
    save_gguf(llama(tokenizer), tmp_path / "model.gguf", tokenizer=tokenizer)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    start, end = (found["tokenizer.ggml.tokens"][tokenizer.specials[each]] for each in ("<|im_start|>", "<|im_end|>"))
    assert (start, end) == ("<|im_start|>", "<|im_end|>")
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert found["tokenizer.ggml.eot_token_id"] == tokenizer.specials["<|im_end|>"]
    bos = found["tokenizer.ggml.tokens"][found["tokenizer.ggml.bos_token_id"]]
    template = jinja2.Environment().from_string(found["tokenizer.chat_template"])
    text = template.render(messages=CHAT, bos_token=bos, add_generation_prompt=True)
    assert text == tokenizer.decode(template_of(tokenizer).prompt(CHAT))
    save_gguf(llama(EXACT[kind](tmp_path)), tmp_path / "plain.gguf", tokenizer=EXACT[kind](tmp_path))
    fields = gguf.GGUFReader(tmp_path / "plain.gguf").fields
    assert not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & fields.keys()


@needs_llama_cpp
@pytest.mark.parametrize("kind", EXACT)
def test_llama_cpps_chat_asks_with_the_ids_of_training_and_its_answer_ends_with_the_message(kind, tmp_path) -> None:
    tokenizer = make_template("chatml", EXACT[kind](tmp_path)).tokenizer
    ours = llama(tokenizer)
    ids = template_of(tokenizer).prompt(CHAT)
    with torch.no_grad():  # a head that says one id, and after it the end of the message
        said = tokenizer.encode("x")[0]
        for before, after in ((ids[-1], said), (said, tokenizer.specials["<|im_end|>"])):
            ours.embedding.weight[before] *= 100
            ours.head.weight[after] = 0
        state = ours.hidden(torch.tensor([[*ids, said]]))[0][0]
        ours.head.weight[said], ours.head.weight[tokenizer.specials["<|im_end|>"]] = state[-2], state[-1]
    own = ours.generate(torch.tensor([ids]), max_new_tokens=2, temperature=0.0)[0].tolist()
    assert own == [said, tokenizer.specials["<|im_end|>"]]
    save_gguf(ours, tmp_path / "model.gguf", tokenizer=tokenizer, weights="f32")
    with LlamaCpp(tmp_path / "model.gguf") as theirs:
        text = theirs.ask("apply-template", messages=CHAT)["prompt"]
        assert theirs.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids
        answer = theirs.ask("v1/chat/completions", messages=CHAT, max_tokens=9, temperature=0)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["choices"][0]["message"]["content"] == "x"
        assert answer["choices"][0]["finish_reason"] == "stop"


@needs_llama_cpp
def test_nearly_all_ids_of_a_bpe_of_ours_are_those_of_training_and_text_comes_back_whole(tmp_path) -> None:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    tokenizer = HFTokenizer(train_bpe(texts[::2], 2048))
    with pytest.warns(UserWarning, match="some texts get other tokens"):
        save_gguf(llama(tokenizer), tmp_path / "model.gguf", tokenizer=tokenizer)
    same = total = 0
    with LlamaCpp(tmp_path / "model.gguf") as theirs:
        for text in texts[1:60:2]:
            own = tokenizer.encode(text)
            found = theirs.ask("tokenize", content=text, add_special=False, parse_special=False)["tokens"]
            assert theirs.ask("detokenize", tokens=found)["content"] == text
            same += len(places(tokenizer, own) & places(tokenizer, found))
            total += len(own)
    assert same / total > 0.97


def places(tokenizer: Tokenizer, ids: list[int]) -> set[tuple[int, int]]:
    """Where in the text each token begins, and which it is."""
    lengths = [len(token) for token in vocabulary(tokenizer).tokens]
    found, place = set(), 0
    for i in ids:
        found.add((place, i))
        place += lengths[i]
    return found


@needs_llama_cpp
def test_a_trained_run_is_exported_and_llama_cpp_continues_a_text_as_we_do(tmp_path, capsys) -> None:
    text, run, file = tmp_path / "text.txt", tmp_path / "run", tmp_path / "model.gguf"
    text.write_text("the cat sat on the mat.\nthe dog sat on the log.\n" * 400, encoding="utf-8")
    line = (
        f"train servable --data {text} --tokenizer bpe:300 --width 64 --pattern gdn,mha --steps 40 --batch_size 8"
        f" --block_size 64 --output_dir {run}"
    )
    assert main(line.split()) == 0
    assert main(["export", str(run), str(file), "--gguf_type", "f32"]) == 0
    assert "is qwen35 of llama.cpp" in capsys.readouterr().out
    ours, tokenizer = load(run)
    prompt = "the dog sat on"
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    with LlamaCpp(file) as theirs:
        assert theirs.ask("tokenize", content=prompt, add_special=True)["tokens"] == ids
        found, shown = theirs.generate(prompt, 20)
        probabilities = theirs.log_probabilities(ids, tokenizer.vocab_size)
    expected = ours.generate(torch.tensor([ids]), max_new_tokens=20, temperature=0.0)[0].tolist()
    assert found == expected
    assert shown == tokenizer.decode(expected)
    with torch.no_grad():
        own = ours(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].log_softmax(dim=-1)
    torch.testing.assert_close(probabilities, own, rtol=0, atol=1e-4)


def refused(architecture) -> str:
    """Why llama.cpp does not have the model of an architecture."""
    with pytest.raises(UsageError) as raised:
        home_of(architecture.language_model())
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_stack_without_a_home_is_refused_in_one_line_with_the_reason() -> None:
    assert "must be `head_k_dim`" in refused(Qwen3_5.example())
    assert "must be moe in every layer" in refused(replace(Qwen3Next.example(), linear_value_head_dim=8))
    assert "normalise = False" in refused(
        replace(Qwen3Next.example(), linear_value_head_dim=8, mlp_only_layers=(), norm_topk_prob=False)
    )
    assert "kda.n_heads = 3" in refused(KimiLinear.example())
    assert "mla.q_lora_rank = 8" in refused(replace(KimiLinear.example(), linear_num_heads=4, q_lora_rank=8))
    assert "must be > 0 in a model of 2 layers" in refused(replace(DeepseekV3.example(), q_lora_rank=None))
    assert "must be 0 in a model of 27 layers" in refused(replace(DeepseekV3.example(), num_hidden_layers=27))
    assert "group_score = 'max'" in refused(replace(DeepseekV2.example(), topk_method="group_limited_greedy"))
    assert "mha.head_dim = 16" in refused(replace(Olmo2.example(), head_dim=16))
    stretched = RopeParameters(
        rope_type="llama3",
        factor=8.0,
        original_max_position_embeddings=64,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert "scaling.kind = 'llama3'" in refused(replace(Qwen3.example(), rope_parameters=stretched))
    local, latent = (each.example().language_model() for each in (Mistral, DeepseekV3))
    both = replace(local, blocks={**local.blocks, "mla": latent.blocks["mla"]}, pattern=("swa", "mla"))
    with pytest.raises(UsageError, match="none has the layers swa mla"):
        home_of(both)
    sinks = replace(Mistral.example(), sliding_window=7).language_model()
    (block,) = sinks.blocks.values()
    kept = replace(sinks, blocks={"swa": replace(block, mixer=replace(block.mixer, sinks=4))})
    with pytest.raises(UsageError, match=r"the nearest is mistral: blocks.swa.mixer.sinks = 4"):
        home_of(kept)
    with pytest.raises(UsageError, match="must be one of auto, llama"):
        home_of(kept, "swamla")
    with pytest.raises(UsageError, match="llama has such a model"):
        home_of(Llama.example().language_model(), "mistral")


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (IdTokenizer(30), "WordLevel"),
        (HFTokenizer(train_bpe([TEXT * 9], 300, lines=True)), "span the words of a line"),
        (cut_by(r"\S+|\s+"), "does not cut text by"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused(tokenizer, why, tmp_path) -> None:
    with pytest.raises(UsageError, match=why):
        save_gguf(llama(tokenizer), tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_no_file_is_overwritten_or_half_written(tmp_path, monkeypatch) -> None:
    file = tmp_path / "model.gguf"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'swamla\[gguf\]'"):
        save_gguf(llama(ByteTokenizer()), file, tokenizer=ByteTokenizer())
    assert not list(tmp_path.iterdir())
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists"):
        save_gguf(llama(ByteTokenizer()), file, tokenizer=ByteTokenizer())
    with pytest.raises(UsageError, match="must be one of f32, f16"):
        save_gguf(llama(ByteTokenizer()), tmp_path / "other.gguf", tokenizer=ByteTokenizer(), weights="q4")  # type: ignore[arg-type]


@needs_gguf
def test_what_llama_cpp_computes_differently_is_told(tmp_path) -> None:
    ours = replace(KimiLinear.example(), linear_num_heads=4, rms_norm_eps=1e-5).language_model().build(seed=0)
    with pytest.warns(UserWarning, match=r"norm\.eps = 1e-05, where it is 1e-6 here"):
        save_gguf(ours, tmp_path / "model.gguf", tokenizer=SIGNS)
