"""A graph of ONNX, run by onnxruntime, computes what the model computes: rows, prompts and steps, in every format."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import swamla
from swamla.checkpoint import dequantized, quantize
from swamla.cli import main
from swamla.data.tokenizer import ByteTokenizer
from swamla.errors import MissingBackendError, UsageError
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.interop import save_onnx
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.norm import LayerNormConfig
from swamla.ops.rounding import Rounded
from tests.model.helpers import FFNS, MIXERS, build_model, hybrid_config, random_tokens
from tests.test_readme import ROOT, TINY
from tests.toys import registered

onnx = pytest.importorskip("onnx", reason="onnx is not installed: `make interop` has it")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: `make interop` has it")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: `make interop` has it")

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with registered():
        yield


class Program:
    """A file of ONNX in onnxruntime."""

    def __init__(self, file: Path) -> None:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = runtime.InferenceSession(str(file), options)
        self.inputs = {given.name: given for given in self.session.get_inputs()}

    def empty(self, batch: int, capacity: int) -> dict[str, np.ndarray]:
        """The state of no tokens."""
        sizes = {"batch": batch, "capacity": capacity}
        return {
            name: np.zeros([sizes.get(size, size) for size in given.shape], TYPES[given.type])
            for name, given in self.inputs.items()
            if name.startswith("past.")
        }

    def __call__(
        self, tokens_BT: Tensor, length_B: Tensor, past: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        feed = {"tokens": tokens_BT.numpy(), "length": length_B.numpy(), **past}
        logits, *present = self.session.run(None, feed)
        names = [found.name.replace("present.", "past.") for found in self.session.get_outputs()[1:]]
        return torch.from_numpy(logits), dict(zip(names, present, strict=True))


def program_of(model: LanguageModel, tmp_path: Path, **options: Any) -> Program:
    file = tmp_path / "model.onnx"
    file.unlink(missing_ok=True)
    save_onnx(model, file, **options)
    onnx.checker.check_model(str(file), full_check=True)
    return Program(file)


def pieces(program: Program, tokens_BT: Tensor, cuts: list[int], capacity: int) -> Tensor:
    """Logits of all tokens, read in pieces."""
    past, length_B, found = program.empty(len(tokens_BT), capacity), torch.zeros(len(tokens_BT), dtype=torch.int64), []
    for piece in tokens_BT.tensor_split(cuts, dim=1):
        logits, past = program(piece, length_B, past)
        length_B = length_B + piece.shape[1]
        found.append(logits)
    return torch.cat(found, dim=1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 3e-5 * max(1.0, expected.abs().max().item())


CONFIGS: dict[str, LanguageModelConfig] = {name: hybrid_config(pattern=(name,)) for name in MIXERS} | {
    f"ffn {name}": hybrid_config(pattern=("mha",), ffn=name) for name in FFNS
}
gpt2 = hybrid_config(pattern=("mha",))
CONFIGS |= {
    "learned positions, a head of its own, layer norms": replace(
        gpt2, learned_positions=48, tied_head=False, norm=LayerNormConfig(), ngram_buckets=()
    ),
    "a filter before the mixer, norms after it": replace(
        gpt2, blocks={"mha": replace(gpt2.blocks["mha"], conv=4, norm_place="post")}
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_reads_whole_rows_prompts_and_single_tokens(name: str, tmp_path: Path) -> None:
    model = build_model(CONFIGS[name]).eval()
    program = program_of(model, tmp_path)
    for batch, time, capacity in ((3, 7, 9), (1, 1, 1), (2, 40, 48)):
        tokens = random_tokens(batch, time)
        expected = model(tokens)
        assert_near(pieces(program, tokens, [], capacity), expected)
        assert_near(pieces(program, tokens, list(range(max(1, time // 2), time)), capacity), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_of_one_token_at_a_time_needs_no_new_operators(name: str, tmp_path: Path) -> None:
    model = build_model(CONFIGS[name]).eval()
    program = program_of(model, tmp_path, one_token=True)
    graph = onnx.load(tmp_path / "model.onnx")
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 20)]
    tokens = random_tokens(2, 20)
    assert_near(pieces(program, tokens, list(range(1, 20)), 20), model(tokens))


@torch.no_grad()
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("name", ["gdn", "kda", "mla", "ffn moe", "ffn latent_moe"])
def test_rounded_weights_are_those_of_a_rounded_run_and_their_file_as_small(
    name: str, format: str, tmp_path: Path
) -> None:
    model = build_model(CONFIGS[name]).eval()
    rounded = quantize(dict(model.state_dict(keep_vars=True)), model.config, format)
    program = program_of(model, tmp_path, rounded=rounded)
    model.load_state_dict(dequantized(rounded))
    tokens = random_tokens(2, 20)
    assert_near(pieces(program, tokens, [], 20), model(tokens))
    stored = {each.name: each for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    matrices = {name: weight for name, weight in rounded.items() if isinstance(weight, Rounded)}
    found = [name for name in matrices if f"{name}_integers" in stored]
    assert len(matrices) - len(found) == 1  # the tied head
    assert not matrices.keys() & stored.keys()
    for name in found:
        numbers, half = matrices[name].plain_integers().numel(), matrices[name].format == "int4"
        assert len(stored[f"{name}_integers"].raw_data) == (numbers + 1) // 2 if half else numbers
        assert len(stored[f"{name}_scale"].raw_data) == 4 * matrices[name].scale.numel()


@torch.no_grad()
def test_every_weight_is_stored_once_under_its_name(tmp_path: Path) -> None:
    model = build_model(hybrid_config()).eval()
    save_onnx(model, tmp_path / "model.onnx")
    stored = {each.name: each for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    own = dict(model.named_parameters())
    tied = {"embedding.weight", "head.weight"}
    assert own.keys() - stored.keys() <= tied
    assert len(tied & stored.keys()) == 1
    for name in own.keys() & stored.keys():
        assert np.array_equal(onnx.numpy_helper.to_array(stored[name]), own[name].numpy()), name
    assert sum(len(each.raw_data) for name, each in stored.items() if "." not in name) < 8192


@torch.no_grad()
def test_rows_of_different_lengths_continue_each_from_its_own(tmp_path: Path) -> None:
    model = build_model(hybrid_config()).eval()
    program = program_of(model, tmp_path)
    tokens, capacity = random_tokens(2, 30), 30
    pasts = []
    for row, length in enumerate((11, 4)):
        begin = tokens[row : row + 1, :length]
        pasts.append(program(begin, torch.zeros(1, dtype=torch.int64), program.empty(1, capacity))[1])
    both = {name: np.concatenate([past[name] for past in pasts]) for name in pasts[0]}
    more = torch.stack([tokens[0, 11:17], tokens[1, 4:10]])
    found, _ = program(more, torch.tensor([11, 4]), both)
    assert_near(found[0], model(tokens[:1, :17])[0, 11:])
    assert_near(found[1], model(tokens[1:, :10])[0, 4:])


@torch.no_grad()
def test_weights_that_are_too_large_for_the_file_are_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swamla.interop.onnx.saving.MOST_BYTES", 1)
    model = build_model(hybrid_config(pattern=("swa",))).eval()
    program = program_of(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    tokens = random_tokens(1, 5)
    assert_near(pieces(program, tokens, [], 5), model(tokens))


def test_weights_beside_the_file_overwrite_nothing_and_are_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swamla.interop.onnx.saving.MOST_BYTES", 1)
    model, file = build_model(hybrid_config(pattern=("swa",))).eval(), tmp_path / "model.onnx"
    beside = tmp_path / "model.onnx.data"
    beside.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"model\.onnx\.data: exists"):
        save_onnx(model, file)
    assert [path.name for path in tmp_path.iterdir()] == [beside.name]
    assert beside.read_bytes() == b"mine"
    beside.unlink()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swamla.interop.onnx.saving.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_onnx(model, file)
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_stays_as_it_is(tmp_path: Path) -> None:
    model = build_model(hybrid_config(pattern=("swa",))).bfloat16().train()
    save_onnx(model, tmp_path / "model.onnx")
    assert model.training
    assert model.embedding.weight.dtype == torch.bfloat16


def test_ids_that_only_pad_the_vocabulary_have_no_logits_and_files_are_not_overwritten(tmp_path: Path) -> None:
    config = replace(hybrid_config(pattern=("swa",)), vocab_size=300)
    program = program_of(build_model(config), tmp_path, tokenizer=ByteTokenizer())
    logits, _ = program(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), program.empty(1, 2))
    assert logits.shape[-1] == ByteTokenizer().vocab_size < 300
    with pytest.raises(UsageError, match=r"model\.onnx: exists"):
        save_onnx(build_model(config), tmp_path / "model.onnx")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny trained run where the guide has its quickstart's."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))
    flags = TINY.replace("--steps 1", "--steps 40").split()
    flags[flags.index("--pattern") + 1] = "gdn swa mla"
    where = ["--data", f"{folder}/text.txt", "--cache_dir", f"{folder}/cache", "--precision", "fp32"]
    tokens = ["--tokenizer", "byte", "--lr", "0.01"]
    assert main(["train", "quickstart", *flags, *where, *tokens, "--output_dir", str(folder / "runs/quickstart")]) == 0
    return folder


@pytest.mark.parametrize("flags", [[], ["--quantize", "int8"], ["--one_token"]], ids=["fp32", "int8", "one token"])
def test_the_guides_program_generates_the_models_own_text(
    flags: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of docs/export.md, without torch and swamla, against `Decoder`, over 100 greedy tokens."""
    monkeypatch.chdir(tmp_path)
    run = home / "runs/quickstart"
    assert main(["export", str(run), "model.onnx", *flags]) == 0
    (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"\b(torch|swamla)\b", code)
    if flags and flags[0] == "--quantize":
        assert main(["export", str(run), "rounded", *flags]) == 0
        run = tmp_path / "rounded"
    names: dict[str, Any] = {}
    exec(compile(code, "export.md", "exec"), names)
    model, tokenizer = swamla.load(run)
    prompt = [tokenizer.eos_id, *tokenizer.encode("def ")]
    expected = Decoder(model).generate([prompt], 100, sampling=Sampling(temperature=0))[0]
    assert names["new"] == expected
    assert tokenizer.decode(expected) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out", "--one_token"], "--one_token is for ONNX: out must end in .onnx"),
        (["out.onnx", "--to", "llama"], "--to llama is for other outputs: out.onnx is ONNX"),
        (["out.onnx", "--gguf_type", "f32"], "--gguf_type f32 is for other outputs"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    words: list[str], said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(home / "runs/quickstart"), *words]) == 2
    assert said in capsys.readouterr().err


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx_ir", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'swamla\[onnx\]'"):
        save_onnx(build_model(hybrid_config(pattern=("swa",))), tmp_path / "model.onnx")
