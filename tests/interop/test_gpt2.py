"""GPT-2 out to transformers and in from it: the same function, the same gradients, the same text."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swamla.cli import main
from swamla.data.tokenizer import ByteTokenizer, load_tokenizer
from swamla.errors import CorruptError, SwamlaError, UsageError
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.interop import equal_architecture, load_pretrained, save_pretrained
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import LayerNormConfig, RMSNormConfig
from swamla.model.rope import RopeConfig

DEPTH, WIDTH, POSITIONS = 3, 32, 40
MIXER = MHAConfig(n_heads=4, rope=None, bias=True)
FFN = DenseConfig(activation="gelu", bias=True)
# Nothing at its default, so that whatever is forgotten on the way shows.
CONFIG = LanguageModelConfig(
    vocab_size=50,
    width=WIDTH,
    blocks={"gpt2": BlockConfig(mixer=MIXER, ffn=FFN)},
    pattern=("gpt2",) * DEPTH,
    norm=LayerNormConfig(eps=1e-3),
    learned_positions=POSITIONS,
    dropout=0.2,
    init_std=0.3,
)


def scrambled(module: nn.Module) -> Any:
    """In evaluation mode, every bias and gain off 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def model_of(config: LanguageModelConfig = CONFIG) -> LanguageModel:
    torch.manual_seed(0)
    return scrambled(config.build())


def theirs_of(**settings: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    shape = {"vocab_size": 50, "n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4}
    plain = {"attn_pdrop": 0.0, "layer_norm_epsilon": 1e-3, "initializer_range": 0.3}
    return scrambled(GPT2LMHeadModel(GPT2Config(**shape, **(plain | settings))))


def reload(folder: Path) -> Any:
    from transformers import GPT2LMHeadModel

    model, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or misshaped
    return model


def tokens(batch: int = 2, time: int = POSITIONS) -> Tensor:
    return torch.randint(50, (batch, time), generator=torch.Generator().manual_seed(3))


def assert_same_function(ours: LanguageModel, theirs: Any) -> None:
    """Logits to 1e-5; gradients of what is one tensor in both, to 1e-4 of the largest."""
    found, expected = ours(tokens()), theirs(tokens()).logits
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    found.backward(upstream)
    expected.backward(upstream)
    inner, last = theirs.transformer, ours.blocks[-1]
    pairs = {
        "embedding": (ours.embedding.weight, inner.wte.weight),
        "positions": (ours.positions.weight, inner.wpe.weight),
        "final gain": (ours.norm.weight, inner.ln_f.weight),
        "queries, keys, values": (last.mixer.qkv_proj.bias, inner.h[-1].attn.c_attn.bias),
        "output": (last.mixer.o_proj.bias, inner.h[-1].attn.c_proj.bias),
        "hidden": (last.ffn.up_proj.bias, inner.h[-1].mlp.c_fc.bias),
        "first norm": (ours.blocks[0].mixer_norm.bias, inner.h[0].ln_1.bias),
    }
    for name, (mine, yours) in pairs.items():
        assert (mine.grad - yours.grad).abs().max() <= 1e-4 * max(1.0, yours.grad.abs().max().item()), name
    matrix, transposed = last.mixer.qkv_proj.weight.grad, inner.h[-1].attn.c_attn.weight.grad
    assert (matrix - transposed.T).abs().max() <= 1e-4 * max(1.0, transposed.abs().max().item())


@pytest.mark.parametrize("hidden", [None, 24])
def test_what_is_saved_is_the_same_function_in_transformers(hidden: int | None, tmp_path: Path) -> None:
    block = BlockConfig(mixer=MIXER, ffn=replace(FFN, hidden=hidden))
    ours = model_of(replace(CONFIG, blocks={"gpt2": block}))
    save_pretrained(ours, tmp_path / "out", to="gpt2")
    theirs = reload(tmp_path / "out")
    assert_same_function(ours, theirs.eval())
    assert (theirs.config.resid_pdrop, theirs.config.embd_pdrop, theirs.config.attn_pdrop) == (0.2, 0.2, 0.0)
    assert theirs.config.initializer_range == 0.3


@pytest.mark.parametrize("settings", [{}, {"n_inner": 24}, {"activation_function": "gelu_pytorch_tanh"}], ids=str)
def test_what_transformers_saved_is_the_same_function_here(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = theirs_of(**settings)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert_same_function(ours, theirs)
    assert not ours.training
    assert (ours.config.dropout, ours.config.init_std) == (0.1, 0.3)


def test_out_and_in_again_is_the_same_model_to_the_bit(tmp_path: Path) -> None:
    ours = model_of()
    save_pretrained(ours, tmp_path / "out", to="gpt2")
    again = load_pretrained(tmp_path / "out")
    assert again.config == replace(CONFIG, blocks={"mha": CONFIG.blocks["gpt2"]}, pattern=("mha",) * DEPTH)
    assert again.head.weight is again.embedding.weight
    assert again.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    save_pretrained(again, tmp_path / "again", to="gpt2")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_transformers_own_weights_come_back_to_it_to_the_bit(tmp_path: Path) -> None:
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path / "in")
    save_pretrained(load_gpt2_quietly(tmp_path / "in"), tmp_path / "out", to="gpt2")
    back = reload(tmp_path / "out").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def load_gpt2_quietly(folder: Path) -> LanguageModel:
    """Our loader, in a test in which a warning is an error."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_pretrained(folder)


def test_greedy_text_is_the_same_in_both(tmp_path: Path) -> None:
    ours = model_of()
    save_pretrained(ours, tmp_path / "out", to="gpt2")
    theirs = reload(tmp_path / "out").eval()
    for prompt in tokens(3, 7).tolist():
        found = Decoder(ours).generate([prompt], 30, sampling=Sampling(temperature=0.0))[0]
        text = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 7), max_new_tokens=30, do_sample=False, pad_token_id=0
        )
        assert text[0, 7:].tolist() == found
        assert len(set(found)) > 3


def test_a_model_is_saved_in_its_own_dtype_and_loaded_in_fp32(tmp_path: Path) -> None:
    ours = model_of().to(torch.bfloat16)
    save_pretrained(ours, tmp_path / "out", to="gpt2")
    assert reload(tmp_path / "out").dtype == torch.bfloat16
    again = load_pretrained(tmp_path / "out")
    assert again.embedding.weight.dtype == torch.float32
    assert torch.equal(again.embedding.weight, ours.embedding.weight.float())


def test_a_folder_of_the_published_form_without_prefix_with_masks_and_a_head_is_read(tmp_path: Path) -> None:
    """As openai-community/gpt2 has them: bare names, causal masks among the weights; some files hold the head too."""
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    bare = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, POSITIONS, POSITIONS) for layer in range(DEPTH)}
    save_file(bare | {"lm_head.weight": bare["wte.weight"].clone()}, tmp_path / "model.safetensors")
    plain = json.loads((tmp_path / "config.json").read_text())
    dropped = ("tie_word_embeddings", "scale_attn_weights", "add_cross_attention", "n_inner")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in plain.items() if k not in dropped}))
    assert_same_function(load_pretrained(tmp_path), theirs)


@pytest.mark.parametrize(("name", "rate", "becomes"), [("attn_pdrop", 0.1, "0.0"), ("embd_pdrop", 0.3, "0.1")])
def test_dropout_that_we_have_not_is_left_out_with_a_warning(
    name: str, rate: float, becomes: str, tmp_path: Path
) -> None:
    theirs_of(**{name: rate}).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"{name} = {rate} becomes {becomes}, which matters in training only"):
        load_pretrained(tmp_path)


IN_THE_WAY: list[tuple[dict[str, Any], str]] = [
    ({"norm": RMSNormConfig()}, "norm.kind = 'rmsnorm': gpt2 does not have it, it must be layernorm"),
    ({"norm": LayerNormConfig(bias=False)}, "norm.bias = False: gpt2 does not have it, it must be True"),
    ({"tied_head": False}, "tied_head = False"),
    ({"learned_positions": 0}, "learned_positions = 0: gpt2 does not have it, it must be a number of them"),
    ({"ngram_buckets": (9,)}, "ngram_buckets = (9,)"),
    ({"logit_cap": 15.0}, "logit_cap = 15.0"),
    ({"mixer": replace(MIXER, sink_logit=True)}, "blocks.a.mixer.sink_logit = True"),
    ({"mixer": replace(MIXER, gate="sigmoid")}, "blocks.a.mixer.gate = 'sigmoid'"),
    ({"mixer": replace(MIXER, sink_logit=True)}, "blocks.a.mixer.sink_logit = True"),
    ({"mixer": replace(MIXER, qk_norm="head")}, "blocks.a.mixer.qk_norm = 'head'"),
    ({"mixer": SWAConfig(n_heads=4, rope=None, bias=True)}, "blocks.a.mixer.kind = 'swa'"),
    ({"mixer": LatentConfig(n_heads=4, bias=True)}, "blocks.a.mixer.kind = 'latent'"),
    ({"mixer": replace(MIXER, rope=RopeConfig())}, "blocks.a.mixer.rope = 'a table'"),
    (
        {"mixer": replace(MIXER, softmax_scale=0.5)},
        "blocks.a.mixer.softmax_scale = 0.5: gpt2 does not have it, it must be 0.3535",
    ),
    ({"mixer": replace(MIXER, bias=False)}, "blocks.a.mixer.bias = False"),
    ({"mixer": replace(MIXER, n_kv_heads=2)}, "blocks.a.mixer.n_kv_heads = 2: gpt2 does not have it, it must be 4"),
    ({"mixer": replace(MIXER, head_dim=16)}, "blocks.a.mixer.head_dim = 16"),
    ({"ffn": MoEConfig(n_experts=4, n_activated=2)}, "blocks.a.ffn.kind = 'moe'"),
    ({"ffn": replace(FFN, activation="swiglu")}, "blocks.a.ffn.activation = 'swiglu'"),
    ({"ffn": replace(FFN, bias=False)}, "blocks.a.ffn.bias = False"),
    ({"second": BlockConfig(mixer=replace(MIXER, n_heads=2), ffn=FFN)}, "blocks.b.mixer.n_heads = 2"),
    ({"second": BlockConfig(mixer=MIXER, ffn=FFN, conv=4)}, "blocks.b.conv = 4"),
    ({"second": BlockConfig(mixer=MIXER, ffn=FFN, norm_place="post")}, "blocks.b.norm_place = 'post'"),
    ({"second": BlockConfig(mixer=MIXER, ffn=replace(FFN, hidden=5))}, "blocks.b.ffn.hidden = 5"),
]


@pytest.mark.parametrize(("change", "message"), IN_THE_WAY, ids=[message.split(":")[0] for _, message in IN_THE_WAY])
def test_what_gpt2_has_no_place_for_is_named_and_nothing_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    first = BlockConfig(mixer=change.pop("mixer", MIXER), ffn=change.pop("ffn", FFN))
    blocks = {"a": first, "b": change.pop("second", first)}
    model = replace(CONFIG, blocks=blocks, pattern=("a", "b", "a"), **change).build()
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        equal_architecture(model.config, "gpt2")
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        save_pretrained(model, tmp_path / "out", to="gpt2")
    assert not list(tmp_path.iterdir())


def test_blocks_of_two_names_that_are_alike_are_a_gpt2(tmp_path: Path) -> None:
    blocks = {"a": CONFIG.blocks["gpt2"], "b": BlockConfig(mixer=replace(MIXER, backend="reference"), ffn=FFN)}
    ours = model_of(replace(CONFIG, blocks=blocks, pattern=("a", "b", "b")))
    save_pretrained(ours, tmp_path / "out", to="gpt2")
    assert_same_function(ours, reload(tmp_path / "out").eval())


def test_a_folder_with_something_in_it_is_left_alone_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for taken in ("mine", "file"):
        with pytest.raises(UsageError, match=f"{taken}: exists and is not empty: choose another folder"):
            save_pretrained(model_of(), tmp_path / taken, to="gpt2")
    save_pretrained(model_of(), tmp_path / "empty", to="gpt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "x"), SafetensorError("No space left")])
@pytest.mark.parametrize("there", [False, True])
def test_a_save_that_fails_leaves_nothing_behind(
    error: Exception, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any, file: Path, **__: Any) -> None:
        file.write_text("half")
        raise error

    monkeypatch.setattr("swamla.interop.folder.save_file", full)
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises((OSError, SwamlaError), match="No space left"):
        save_pretrained(model_of(), tmp_path / "out", to="gpt2")
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if there else [])


def test_the_folder_may_be_the_one_we_are_in_or_below_ones_not_yet_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_pretrained(model_of(), ".", to="gpt2")
    save_pretrained(model_of(), "../a/b/c", to="gpt2")
    for folder in (tmp_path / "here", tmp_path / "a/b/c"):
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
        load_pretrained(folder)


def rewritten(**settings: Any) -> Callable[[Path], None]:
    """A folder in which config.json says something else; None removes the key."""

    def change(folder: Path) -> None:
        plain = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps({k: v for k, v in plain.items() if v is not None}))

    return change


def retensored(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """A folder whose tensors are changed in place."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


REFUSED: list[tuple[str, Callable[[Path], Any], str, int]] = [
    ("another family", rewritten(model_type="bert"), "config.json: model_type = 'bert': must be one of .*gpt2", 2),
    ("no family", rewritten(model_type=None), r"config.json: model_type = 'None': must be one of", 2),
    ("relu", rewritten(activation_function="relu"), "activation_function = 'relu' .*: must be one of gelu_new", 2),
    ("exact gelu", rewritten(activation_function="gelu"), "activation_function = 'gelu' .*: must be one of", 2),
    ("untied", rewritten(tie_word_embeddings=False), "tie_word_embeddings = False .*: must be true", 2),
    ("unscaled", rewritten(scale_attn_weights=False), "scale_attn_weights = False .*: must be true", 2),
    ("scaled by layer", rewritten(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True", 2),
    ("cross-attention", rewritten(add_cross_attention=True), "add_cross_attention = True .*: must be false", 2),
    ("no width", rewritten(n_embd=None), r"n_embd = None .*: must be given", 2),
    ("heads", rewritten(n_head=5), r"n_head = 5 \(.*config.json\): must divide n_embd = 32", 2),
    ("no layers", rewritten(n_layer=0), "n_layer = 0 .*: must be > 0", 2),
    ("text for a number", rewritten(n_layer="3"), "n_layer = '3' .*: must be a whole number", 2),
    (
        "another n_inner",
        rewritten(n_inner=64),
        r"transformer.h.0.mlp.c_fc.weight: got \(32, 128\), expected \(32, 64\);",
        3,
    ),
    (
        "more layers",
        rewritten(n_layer=4),
        r"h\.3\.ln_1\.weight: got nothing, expected \(32,\).* and 7 more$",
        3,
    ),
    ("fewer layers", rewritten(n_layer=2), r"h\.2\..*: got .*, expected nothing; .* and 7 more$", 3),
    (
        "missing",
        retensored(lambda t: t.pop("transformer.wpe.weight")),
        r": transformer.wpe.weight: got nothing, expected \(40, 32\)$",
        3,
    ),
    (
        "extra",
        retensored(lambda t: t.update({"transformer.h.0.crossattention.bias": torch.zeros(2)})),
        r"h.0.crossattention.bias: got \(2,\), expected nothing$",
        3,
    ),
    (
        "a head of its own",
        retensored(lambda t: t.update({"lm_head.weight": torch.zeros(50, 32)})),
        "lm_head.weight is not transformer.wte.weight: the config says that they are tied",
        2,
    ),
    ("pickle", as_pickle, "has no .*safetensors .pytorch_model.bin is a pickle, which is never loaded", 2),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "has no .*safetensors: save the model", 2),
    (
        "pickle under another name",
        lambda f: (as_pickle(f), (f / "pytorch_model.bin").rename(f / "model.safetensors")),
        "model.safetensors: is a pickle: refused",
        3,
    ),
    ("truncated", lambda f: (f / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"), "model.safetensors: ", 3),
    ("no config", lambda f: (f / "config.json").unlink(), "config.json: No such file", 2),
    ("no JSON", lambda f: (f / "config.json").write_text("{"), "config.json: not JSON", 2),
]


@pytest.mark.parametrize(("spoil", "message", "status"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_is_no_such_model_is_refused_in_one_line(
    spoil: Callable[[Path], Any], message: str, status: int, tmp_path: Path
) -> None:
    save_pretrained(model_of(), tmp_path / "out", to="gpt2")
    spoil(tmp_path / "out")
    with pytest.raises(SwamlaError, match=message) as caught:
        load_pretrained(tmp_path / "out")
    assert caught.value.exit_status == status
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone/config\.json: No such file"):
        load_pretrained(tmp_path / "gone")


def test_of_many_tensors_that_do_not_fit_five_are_listed(tmp_path: Path) -> None:
    save_pretrained(model_of(), tmp_path / "out", to="gpt2")
    rewritten(n_embd=16)(tmp_path / "out")
    with pytest.raises(CorruptError) as caught:
        load_pretrained(tmp_path / "out")
    assert str(caught.value).count("expected") == 5


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of two steps: a GPT-2 with a tokenizer of its own, and a model that is no GPT-2."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text("".join(f"the square of {i} is {i * i}\n" for i in range(600)))
    shared = f"--data {folder}/text.txt --cache_dir {folder}/cache --steps 2 --batch_size 2 --block_size 32 --threads 1"
    small = "--width 32 --n_layers 2 --n_heads 2 --eval_interval 1 --save_interval 1 --log_interval 1"
    gpt2 = "--tokenizer bpe:300 --learned_positions 64 --mha_bias --dense_bias --layernorm_bias"
    assert main(shlex.split(f"train shakespeare-char {shared} {small} {gpt2} --output_dir {folder}/gpt2")) == 0
    assert main(shlex.split(f"train shakespeare-char {shared} {small} --output_dir {folder}/plain")) == 0
    return folder


def test_an_exported_run_writes_the_same_text_in_transformers(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    import swamla

    assert main(["export", str(home / "gpt2"), str(tmp_path / "out"), "--checkpoint", "latest"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("config.json", "model.safetensors", "tokenizer.json"))
    ours, tokenizer = swamla.load(home / "gpt2", "latest")
    theirs, their_tokenizer = reload(tmp_path / "out").eval(), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out/swamla_tokenizer.json").fingerprint == tokenizer.fingerprint
    ids = their_tokenizer("the square of")["input_ids"]
    assert ids == [tokenizer.eos_id, *tokenizer.encode("the square of")]
    assert their_tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.eos_id
    found = Decoder(ours).generate([ids], 20, sampling=Sampling(temperature=0.0))[0]
    text = theirs.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert text[0, len(ids) :].tolist() == found


def test_which_checkpoint_is_exported_can_be_chosen(home: Path, tmp_path: Path) -> None:
    import swamla

    for which in ("1", "latest"):
        assert main(["export", str(home / "gpt2"), str(tmp_path / which), "--checkpoint", which, "--to", "gpt2"]) == 0
        expected = swamla.load(home / "gpt2", which)[0].state_dict()
        found = load_pretrained(tmp_path / which).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    first, latest = (load_pretrained(tmp_path / which).state_dict()["embedding.weight"] for which in ("1", "latest"))
    assert not torch.equal(first, latest)


def test_a_tokenizer_of_our_own_is_loaded_there_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_pretrained(model_of(replace(CONFIG, vocab_size=257)), tmp_path / "out", tokenizer=ByteTokenizer(), to="gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("é")["input_ids"] == [256, *"é".encode()]
    assert tokenizer.model_max_length == POSITIONS
    assert reload(tmp_path / "out").config.eos_token_id == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{home}/gpt2 {home}/plain", "plain: exists and is not empty: choose another folder"),
        ("{home}/plain {out} --to gpt2", "norm.bias = False: gpt2 does not have it"),
        ("{home}/cache {out}", "cache: not a run folder"),
        ("{home}/gone {out}", "gone: not a run folder"),
        ("{home}/gpt2 {out} --checkpoint 77", "no checkpoint of step 77; there are: 1, 2"),
        ("{home}/gpt2 {out} --checkpoint worst", "checkpoint 'worst': must be"),
        ("{home}/gpt2 {out} --to onnx", "--to onnx: must be one of auto, bailing_hybrid"),
        ("{home}/gpt2", "OUT"),
        ("{home}/gpt2 {out} --chekpoint best", "unknown flag --chekpoint; did you mean --checkpoint?"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    arguments: str, message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(home.rglob("*"))
    status = main(["export", *shlex.split(arguments.format(home=home, out=tmp_path / "out"))])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("swamla: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(home.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_no_gpt2_is_exported_in_our_own_form(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    import swamla
    from swamla.interop.transformers import SwamlaForCausalLM

    for name, chosen in (("plain", "auto"), ("gpt2", "swamla")):
        out = tmp_path / name
        assert main(["export", str(home / name), str(out), "--to", chosen]) == 0
        assert "trust_remote_code=True" in " ".join(capsys.readouterr().out.split())
        ours, tokenizer = swamla.load(home / name)
        theirs, their_tokenizer = SwamlaForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        ids = their_tokenizer("the square of", return_tensors="pt")["input_ids"]
        assert ids.tolist() == [[tokenizer.eos_id, *tokenizer.encode("the square of")]]
        expected = ours.generate(ids, 20, temperature=0.0, stop_id=tokenizer.eos_id)
        assert theirs.generate(ids, max_new_tokens=20, do_sample=False)[:, ids.shape[1] :].tolist() == expected.tolist()
        assert theirs.config.max_position_embeddings == 64
