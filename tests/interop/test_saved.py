"""A model in transformers' form is saved, loaded, resized, trained and adapted there without a difference."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import swamla
from swamla.cli import main
from swamla.data.tokenizer import ByteTokenizer, HFTokenizer
from swamla.errors import ConfigError, CorruptError, UsageError
from swamla.inference.sampling import Sampling
from swamla.interop import load_pretrained, save_pretrained
from swamla.interop.transformers import SwamlaConfig, SwamlaForCausalLM
from swamla.model.language_model import LanguageModel
from swamla.text import generate_text
from tests.model.helpers import FFNS, MIXERS, assert_close, build_model, hybrid_config

from .helpers import LONG, ids, of, pair, without_ngrams

CONFIGS = {
    "every mixer": hybrid_config(),
    "untied": replace(hybrid_config(), tied_head=False),
    "learned positions": replace(hybrid_config(), learned_positions=40),
    **{kind: hybrid_config(pattern=(kind, "gdn")) for kind in MIXERS},
    **{kind: hybrid_config(pattern=("swa",), ffn=kind) for kind in FFNS},
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def byte_model() -> LanguageModel:
    """Every mixer, with a vocabulary of bytes that is padded."""
    model = build_model(replace(hybrid_config(), vocab_size=264)).eval()
    model.known_ids = ByteTokenizer().vocab_size
    return model


def assert_same(found: SwamlaForCausalLM, expected: dict[str, Tensor]) -> None:
    tensors = found.model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@every_config
def test_saved_and_loaded_it_is_the_same_to_the_bit_by_either_writer(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(CONFIGS[name])
    save_pretrained(ours, tmp_path / "ours", to="swamla")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert type(loaded) is SwamlaForCausalLM
        assert not loaded.training
        assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_same(loaded, ours.state_dict())
        assert loaded.model.config == ours.config
        assert (loaded.model.head.weight is loaded.model.embedding.weight) == ours.config.tied_head
        again = load_pretrained(tmp_path / folder)
        assert again.config == ours.config
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True)
        )


def test_the_two_writers_write_the_same_weights_and_settings(tmp_path: Path) -> None:
    ours, theirs = pair()
    save_pretrained(ours, tmp_path / "ours", to="swamla")
    theirs.save_pretrained(tmp_path / "theirs")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert one.keys() == other.keys()
    plain, found = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs"))
    assert {name: found[name] for name in plain if not name.endswith("_token_id")} == {
        name: plain[name] for name in plain if not name.endswith("_token_id")
    }
    code = [(tmp_path / folder / "modeling_swamla.py").read_text() for folder in ("ours", "theirs")]
    assert code[0] == code[1]


def test_weights_in_several_files_load(tmp_path: Path) -> None:
    ours, theirs = pair()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), ours.state_dict())
    again = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(tmp_path: Path) -> None:
    ours = build_model(hybrid_config()).eval()
    expected = {name: tensor.bfloat16() for name, tensor in ours.state_dict().items()}
    save_pretrained(ours.bfloat16(), tmp_path / "half", to="swamla")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16
    assert_same(loaded, expected)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    loaded.generate(torch.stack(ids(LONG)), max_new_tokens=3)


def test_a_missing_weight_is_told_and_gets_its_initial_values(tmp_path: Path) -> None:
    _, theirs = pair(hybrid_config(pattern=("gdn", "gdn")))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = ["model.blocks.1.mixer.A_log", "model.embedding.weight", "model.norm.weight"]
    rest = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, told = SwamlaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(gone) <= set(told["missing_keys"])
    assert set(told["missing_keys"]) <= {*gone, "model.head.weight"}
    found = loaded.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in rest.items())
    assert torch.equal(found["model.norm.weight"], torch.ones(32))
    assert ((found[gone[0]] >= 0) & (found[gone[0]] <= torch.tensor(16.0).log())).all()
    assert 0.015 < found[gone[1]].std() < 0.025
    with pytest.raises(CorruptError, match=r"blocks\.1\.mixer\.A_log: got nothing"):
        load_pretrained(tmp_path)


def test_a_new_model_has_swamlas_initial_weights_by_torchs_seed() -> None:
    config = SwamlaConfig.of(replace(hybrid_config(pattern=("gdn", "mha", "swa"), ffn="moe"), init_std=0.05))

    def new(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).model.state_dict()

    first, again, other = new(0), new(0), new(1)
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert torch.equal(first["head.weight"], first["embedding.weight"])
    assert 0.045 < first["embedding.weight"].std() < 0.055
    scale = first["blocks.1.mixer.o_proj.weight"].std() / first["blocks.1.mixer.qkv_proj.weight"].std()
    assert 0.9 < scale * (2 * 3) ** 0.5 < 1.1
    assert first["ngrams.tables.1.weight"].abs().max() == 0
    assert first["blocks.0.ffn.router.bias"].abs().max() == 0
    assert (first["blocks.0.mixer.A_log"] <= torch.tensor(16.0).log()).all()
    assert first["blocks.0.mixer.norm_weight"].eq(1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_the_old_ids_and_know_the_new(tied: bool, tmp_path: Path) -> None:
    _, theirs = pair(without_ngrams(tied_head=tied))
    tokens = torch.stack(ids(LONG))
    with torch.no_grad():
        expected = theirs(tokens).logits
    theirs.resize_token_embeddings(40)
    assert_close(theirs(tokens).logits[..., :31], expected, 1e-6)
    assert theirs(torch.tensor([[39]])).logits.shape[-1] == theirs.model.head.out_features == 40
    assert theirs.config.vocab_size == theirs.model.config.vocab_size == 40
    assert (theirs.model.head.weight is theirs.model.embedding.weight) == tied
    theirs(tokens, labels=tokens + 8).loss.backward()
    theirs.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), theirs.model.state_dict())
    theirs.resize_token_embeddings(31)
    assert_close(theirs(tokens).logits, expected, 1e-6)
    with pytest.raises(UsageError, match="token 39 is outside the vocabulary of 31"):
        theirs(torch.tensor([[39]]))


PROGRAM = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, again = sys.argv[1:]
assert not any(name.startswith("swamla.interop") for name in sys.modules)
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("code was run without being trusted")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
print(model.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=9, do_sample=False)[0].tolist())
"""


def test_a_program_that_does_not_import_swamla_loads_it_by_the_folders_code(tmp_path: Path) -> None:
    ours, tokenizer = byte_model(), ByteTokenizer()
    save_pretrained(ours, tmp_path / "out", to="swamla", tokenizer=tokenizer)
    prompt = torch.tensor([tokenizer.eos_id, *tokenizer.encode("import os")])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out"), str(tmp_path / "again")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    new = ours.generate(prompt, 9, temperature=0.0, stop_id=tokenizer.eos_id)
    assert done.stdout.splitlines()[-1].rpartition("] ")[2] == str([*prompt.tolist(), *new.tolist()])
    names = {file.name for file in (tmp_path / "again").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "modeling_swamla.py"}


WITHOUT = """
import sys
sys.modules["transformers"] = None
from swamla.data.tokenizer import IdTokenizer
from swamla.errors import MissingBackendError
from swamla.interop import load_pretrained, save_pretrained
from swamla.interop.architectures.swamla import Swamla
model = Swamla.example().language_model().build(0)
save_pretrained(model, sys.argv[1], to="swamla", tokenizer=IdTokenizer(95))
load_pretrained(sys.argv[1])
try:
    import swamla.interop.transformers
except MissingBackendError as error:
    print(error)
"""


def test_writing_and_reading_need_no_transformers_and_the_class_says_how_to_get_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "transformers is not installed: pip install 'swamla[transformers]'\n"


def test_the_pipeline_writes_batched_what_it_writes_alone_and_what_swamla_writes(tmp_path: Path) -> None:
    ours, texts = byte_model(), ["import os", "def f(x):\n    return", "a", ""]
    save_pretrained(ours, tmp_path / "out", to="swamla", tokenizer=ByteTokenizer(), trained_length=128)
    model, tokenizer = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForCausalLM, AutoTokenizer))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 12, "do_sample": False}
    batched = [found[0]["generated_text"] for found in write(texts, batch_size=4, **settings)]
    assert batched == [write(text, **settings)[0]["generated_text"] for text in texts]
    completions = generate_text(ours, ByteTokenizer(), texts, 12, sampling=Sampling(temperature=0)).completions
    assert batched == [each.prompt + each.text for each in completions]


def test_the_exported_folder_knows_its_ids_and_its_length(tmp_path: Path) -> None:
    save_pretrained(byte_model(), tmp_path / "out", to="swamla", tokenizer=ByteTokenizer(), trained_length=128)
    config, model = (auto.from_pretrained(tmp_path / "out") for auto in (AutoConfig, AutoModelForCausalLM))
    assert (config.eos_token_id, config.bos_token_id, config.max_position_embeddings) == (256, 256, 128)
    assert config.pad_token_id is None
    assert model.generation_config.pad_token_id == 256
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 4, 264)
    assert model.generation_config.eos_token_id == 256
    assert model.generation_config.suppress_tokens == [257, 258, 259, 260, 261, 262, 263]  # only pad the vocabulary
    with torch.no_grad():
        model.model.head.weight[257:] += 100.0 * model.model.head.weight[:7].sign()
        drawn = model.generate(torch.tensor([[256, 97]]), max_new_tokens=40, do_sample=True)
    assert drawn.max() <= 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swamla_format": 2}, r"swamla_format = 2 .*: must be 1"),
        ({"settings": None}, "settings = None"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"settings": {"width": 32, "wdith": 3}}, "did you mean"),
    ],
)
def test_another_config_is_refused_in_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_pretrained(byte_model(), tmp_path / "out", to="swamla")
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for load in (AutoModelForCausalLM.from_pretrained, load_pretrained):
        with pytest.raises(ConfigError, match=message) as caught:
            load(tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        save_pretrained(byte_model(), tmp_path, to="swamla")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_what_transformers_saved_becomes_a_run_again(tmp_path: Path) -> None:
    ours = byte_model()
    save_pretrained(ours, tmp_path / "out", to="swamla", tokenizer=ByteTokenizer())
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    for folder, kind in (("out", ByteTokenizer), ("again", HFTokenizer)):
        assert main(["import", str(tmp_path / folder), str(tmp_path / f"run-{folder}")]) == 0
        model, tokenizer = swamla.load(tmp_path / f"run-{folder}")
        assert model.config == ours.config
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
        assert type(tokenizer) is kind
        assert tokenizer.encode("é <|endoftext|>") == ByteTokenizer().encode("é <|endoftext|>")


def test_trainer_trains_evaluates_and_saves_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    save_pretrained(byte_model(), tmp_path / "out", to="swamla", tokenizer=ByteTokenizer())
    model, tokenizer = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForCausalLM, AutoTokenizer))
    rows = [tokenizer("def f(x): return x * 2\n" * (1 + n % 3)) for n in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trained"),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=3e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=6,
        save_steps=6,
        report_to=[],
        use_cpu=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "trained/checkpoint-6"), model.model.state_dict())


def test_of_is_the_model_that_the_helpers_promise() -> None:
    model = build_model(hybrid_config()).train()
    assert of(model).training
    assert_same(of(model), model.state_dict())
