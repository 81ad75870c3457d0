"""GPT-2 export and import: a folder with config.json and model.safetensors, in the format of transformers'
`GPT2LMHeadModel`.

Does not import transformers, and reads no pickle.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from swamla.config import from_plain, load_json, to_plain
from swamla.data.tokenizer import Tokenizer
from swamla.errors import CorruptError, SwamlaError, UsageError, require
from swamla.files import as_new_file, fsync
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.norm import LayerNormConfig
from swamla.tensor_file import misfits, read_tensors

_LAYER = {
    "mixer_norm": "ln_1",
    "mixer.qkv_proj": "attn.c_attn",
    "mixer.o_proj": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up_proj": "mlp.c_fc",
    "ffn.down_proj": "mlp.c_proj",
}
_CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # a buffer in older files, not a weight


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The fields of a GPT-2 config.json that determine its function, under its own names.

    n_inner: hidden width of the MLP; None for 4 · n_embd.
    """

    model_type: Literal["gpt2"]
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            size = self.__dict__[name]
            require(size is None or size > 0, name, size, "must be > 0")
        require(self.n_embd % self.n_head == 0, "n_head", self.n_head, f"must divide n_embd = {self.n_embd}")
        for name in ("tie_word_embeddings", "scale_attn_weights"):
            require(self.__dict__[name], name, False, "must be true: nothing else is supported")
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            require(not self.__dict__[name], name, True, "must be false: nothing else is supported")

    def language_model(self) -> LanguageModelConfig:
        """The equivalent config of ours, with dropout of the residual stream only: attention weights have none."""
        hidden = None if self.n_inner in (None, 4 * self.n_embd) else self.n_inner
        block = BlockConfig(
            mixer=MHAConfig(n_heads=self.n_head, rope=None, bias=True),
            ffn=DenseConfig(hidden=hidden, activation="gelu", bias=True),
        )
        return LanguageModelConfig(
            vocab_size=self.vocab_size,
            width=self.n_embd,
            blocks={"mha": block},
            pattern=("mha",) * self.n_layer,
            norm=LayerNormConfig(eps=self.layer_norm_epsilon),
            learned_positions=self.n_positions,
            dropout=self.resid_pdrop,
            init_std=self.initializer_range,
        )


def gpt2_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of the GPT-2 that equals `model`. Raises `UsageError` naming a setting that GPT-2 lacks."""
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    return {"architectures": ["GPT2LMHeadModel"], **to_plain(_as_gpt2(model.config)), "dtype": dtype}


def save_gpt2(model: LanguageModel, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
    """Write `model`, in its dtype, so that `transformers.GPT2LMHeadModel.from_pretrained(folder)` loads it.

    With a tokenizer, also writes tokenizer.json, and its end-of-text id becomes the model's. config.json is written
    last, so that an incomplete folder is not a model. Raises `UsageError` for a folder that is not empty and for a
    model that is not a GPT-2, which has mha with a bias and without rope, gelu with a bias, LayerNorm with a bias, a
    tied head and learned positions.
    """
    folder, plain = Path(folder), gpt2_config(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty: choose another folder")
    eos = None if tokenizer is None else tokenizer.eos_id
    ours, tensors = model.state_dict(), {}
    for name, (own, transposed) in _names(model.config.depth).items():
        tensor = ours[own].detach().cpu()
        tensors[f"transformer.{name}"] = (tensor.T if transposed else tensor).contiguous()
    with _staged(folder) as staging:
        with as_new_file(staging / "model.safetensors"):
            save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            _save_tokenizer(tokenizer, staging, model.config.learned_positions)
        text = json.dumps(plain | {"bos_token_id": eos, "eos_token_id": eos}, indent=2)
        (staging / "config.json").write_text(text + "\n", encoding="utf-8")


def load_gpt2(folder: str | Path) -> LanguageModel:
    """Load a GPT-2 saved by transformers, in evaluation mode and fp32.

    Accepts names with and without the prefix `transformer.`, and an lm_head.weight equal to the embedding. Dropout of
    attention weights, or a different one of embeddings, is not kept, with a warning, as it matters in training only.
    Raises `UsageError` or `ConfigError` for other models, and `CorruptError` listing the first five tensors that are
    missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config = _read_config(folder)
    model = config.language_model().build()
    file = folder / "model.safetensors"
    if not file.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = f"{pickles[0]} is a pickle, which is never loaded" if pickles else "weights in several files are not read"
        raise UsageError(f"{file}: no such file ({why}): save the model with transformers' save_pretrained")
    theirs = _weights(read_tensors(file), file)
    ours = model.state_dict()
    names = _names(config.n_layer)
    expected = {
        n: tuple(ours[own].T.shape if transposed else ours[own].shape) for n, (own, transposed) in names.items()
    }
    _require_shapes(expected, {name: tuple(tensor.shape) for name, tensor in theirs.items()}, file)
    loaded = {own: theirs[n].T if transposed else theirs[n] for n, (own, transposed) in names.items()}
    model.load_state_dict(loaded | {"head.weight": loaded["embedding.weight"]})
    return model.eval()


def _as_gpt2(config: LanguageModelConfig) -> GPT2Config:
    """The GPT-2 config of a model of ours. Raises `UsageError` naming the first setting that GPT-2 lacks."""
    shapes = {name: _heads_and_hidden(block, f"blocks.{name}", config.width) for name, block in config.blocks.items()}
    n_heads, hidden = shapes[config.pattern[0]]
    for name, (its_heads, its_hidden) in shapes.items():
        _require_equal(f"blocks.{name}.mixer.n_heads", its_heads, n_heads, f"{n_heads} in every layer")
        _require_equal(f"blocks.{name}.ffn.hidden", its_hidden, hidden, f"{hidden} in every layer")
    if not isinstance(config.norm, LayerNormConfig):
        raise _not_gpt2("norm.kind", config.norm.kind, "layernorm")
    _require_equal("norm.bias", config.norm.bias, True)
    _require_equal("tied_head", config.tied_head, True)
    _require_equal("ngram_buckets", config.ngram_buckets, ())
    _require_equal("logit_cap", config.logit_cap, 0.0)
    if config.mup_base_width not in (None, config.width):
        raise _not_gpt2("mup_base_width", config.mup_base_width, f"none, or the width {config.width}")
    if not config.learned_positions:
        raise _not_gpt2("learned_positions", 0, "a number of them")
    return GPT2Config(
        model_type="gpt2",
        vocab_size=config.vocab_size,
        n_positions=config.learned_positions,
        n_embd=config.width,
        n_layer=config.depth,
        n_head=n_heads,
        n_inner=None if hidden == 4 * config.width else hidden,
        layer_norm_epsilon=config.norm.eps,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=0.0,
        initializer_range=config.init_std,
    )


def _heads_and_hidden(block: BlockConfig, where: str, width: int) -> tuple[int, int]:
    """The two free settings of a GPT-2 block. Raises `UsageError` naming a setting that GPT-2 lacks."""
    mixer, ffn = block.mixer, block.ffn
    _require_equal(f"{where}.conv", block.conv, 0)
    _require_equal(f"{where}.norm_place", block.norm_place, "pre")
    if type(mixer) is not MHAConfig:  # not its subclass SWAConfig either
        raise _not_gpt2(f"{where}.mixer.kind", mixer.kind, MHAConfig.kind)
    if not isinstance(ffn, DenseConfig):
        raise _not_gpt2(f"{where}.ffn.kind", ffn.kind, DenseConfig.kind)
    if mixer.rope is not None:
        raise _not_gpt2(f"{where}.mixer.rope", "a table", "none")
    _require_equal(f"{where}.mixer.bias", mixer.bias, True)
    _require_equal(f"{where}.mixer.qk_norm", mixer.qk_norm, "none")
    _require_equal(f"{where}.mixer.n_kv_heads", mixer.kv_heads, mixer.n_heads)
    if mixer.n_heads * mixer.key_dim(width) != width:
        raise _not_gpt2(f"{where}.mixer.head_dim", mixer.head_dim, f"the width {width} / n_heads")
    _require_equal(f"{where}.ffn.activation", ffn.activation, "gelu")
    _require_equal(f"{where}.ffn.bias", ffn.bias, True)
    return mixer.n_heads, ffn.hidden_dim(width)


def _require_equal(field: str, got: Any, wanted: Any, shown: str = "") -> None:
    if got != wanted:
        raise _not_gpt2(field, got, shown or repr(wanted))


def _not_gpt2(field: str, got: Any, wanted: str) -> UsageError:
    return UsageError(f"{field} = {got!r}: GPT-2 does not have it, it must be {wanted}")


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A staging folder whose files are moved to `folder` at the end, config.json last.

    A failed write leaves nothing behind. Raises `SwamlaError` if safetensors cannot write.
    """
    made = not folder.exists()
    staging = folder / ".saving"
    staging.mkdir(parents=True)
    try:
        yield staging
        for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
            fsync(file)
            file.rename(folder / file.name)
        fsync(folder)
    except SafetensorError as error:
        raise SwamlaError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _read_config(folder: Path) -> GPT2Config:
    plain, _ = load_json(folder / "config.json")
    known = {field.name for field in fields(GPT2Config)}
    config = from_plain(
        GPT2Config, {key: plain[key] for key in plain if key in known}, origin=str(folder / "config.json")
    )
    for name, ours in (("attn_pdrop", 0.0), ("embd_pdrop", config.resid_pdrop)):
        found = config.__dict__[name]
        if found != ours:
            warnings.warn(f"{folder}: {name} = {found} becomes {ours}, which matters in training only", stacklevel=3)
    return config


def _names(depth: int) -> dict[str, tuple[str, bool]]:
    """GPT-2's name of every weight → our name, and whether GPT-2 stores it transposed, as in its `Conv1D`."""
    names = {"wte.weight": ("embedding.weight", False), "wpe.weight": ("positions.weight", False)}
    for layer in range(depth):
        for ours, theirs in _LAYER.items():
            for parameter in ("weight", "bias"):
                transposed = parameter == "weight" and "." in theirs
                names[f"h.{layer}.{theirs}.{parameter}"] = (f"blocks.{layer}.{ours}.{parameter}", transposed)
    return names | {f"ln_f.{parameter}": (f"norm.{parameter}", False) for parameter in ("weight", "bias")}


def _weights(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The weights by name without prefix; without masks, and without a head that equals the embedding."""
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    named = {name: tensor for name, tensor in named.items() if not _CAUSAL_MASK.fullmatch(name)}
    head, embedding = named.pop("lm_head.weight", None), named.get("wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UsageError(f"{file}: lm_head.weight is not wte.weight: only a tied head is supported")
    return named


def _require_shapes(expected: dict[str, tuple[int, ...]], got: dict[str, tuple[int, ...]], file: Path) -> None:
    if wrong := misfits(got, expected):
        raise CorruptError(f"{file}: not the weights that config.json describes: {wrong}")


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write tokenizer.json and, for tokenizers that transformers can read, its config."""
    file = folder / "tokenizer.json"
    tokenizer.save(file)
    if "model" not in json.loads(file.read_text(encoding="utf-8")):
        return  # transformers cannot read our byte and character tokenizers
    eos = tokenizer.decode([tokenizer.eos_id])
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain | {"model_max_length": longest}, indent=2) + "\n")
