"""`save_gguf`: a model and its tokenizer as one GGUF file, written by the `gguf` library."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from swamla.data.tokenizer import Tokenizer
from swamla.errors import ConfigError, MissingBackendError, UsageError
from swamla.files import fsync
from swamla.interop.equality import Lacks
from swamla.interop.folder import equal_architecture, tensors_of
from swamla.interop.gguf.deepseek import DeepseekHome
from swamla.interop.gguf.gpt2 import GPT2Home
from swamla.interop.gguf.home import Home
from swamla.interop.gguf.kimi import KimiHome
from swamla.interop.gguf.llama import LlamaHome, Olmo2Home, Qwen3Home, WindowHome
from swamla.interop.gguf.qwen import Qwen3_5Home, Qwen3NextHome
from swamla.interop.gguf.vocabulary import vocabulary
from swamla.model.language_model import LanguageModel, LanguageModelConfig

Type = Literal["f32", "f16", "bf16", "q8_0"]
TYPES = get_args(Type)
KINDS = ("kind", "mixer", "ffn", "norm", "learned_positions")  # fields that say what a model is made of
BY_ID = ("token_embd.weight", "output.weight")  # tensors with a row for each id
BLOCK = 32  # numbers that share a scale in Q8_0
# Each architecture of transformers that llama.cpp has under its own name or another's.
HOMES: Mapping[str, type[Home]] = {
    "llama": LlamaHome,
    "qwen3": Qwen3Home,
    "olmo2": Olmo2Home,
    "gpt2": GPT2Home,
    "mistral": WindowHome,
    "ministral": WindowHome,
    "qwen3_5_text": Qwen3_5Home,
    "qwen3_next": Qwen3NextHome,
    "deepseek_v3": DeepseekHome,
    "deepseek_v2": DeepseekHome,
    "kimi_linear": KimiHome,
}


def home_of(config: LanguageModelConfig, to: str = "auto", weights: Mapping[str, Tensor] | None = None) -> Home:
    """The architecture of llama.cpp that equals a model. to: an architecture of transformers, or the first that does.

    weights: the model's, as for `equal_architecture`. Raises `UsageError` with the reason if there is none.
    """
    if to not in ("auto", *HOMES):
        raise UsageError(f"--to {to}: must be one of auto, {', '.join(HOMES)} for a GGUF file")
    reasons: dict[str, Lacks] = {}
    for kind in HOMES if to == "auto" else [to]:
        try:
            home = HOMES[kind](theirs=equal_architecture(config, kind, weights))
        except Lacks as reason:
            reasons[kind] = reason
            continue
        except (ConfigError, UsageError):  # a check of what would be equal there
            if to != "auto":
                raise
            continue
        home.check()
        return home
    if to != "auto":
        raise reasons[to]
    # The nearest has the same kinds of layers.
    kind = next((kind for kind, reason in reasons.items() if reason.field.rpartition(".")[2] not in KINDS), "")
    why = f"the nearest is {kind}: {reasons[kind]}" if kind else f"none has the layers {' '.join(config.pattern)}"
    raise UsageError(f"no architecture of llama.cpp equals the model; {why}")


def save_gguf(
    model: LanguageModel,
    file: str | Path,
    *,
    tokenizer: Tokenizer,
    to: str = "auto",
    weights: Type = "f16",
    trained_length: int = 2048,
) -> Home:
    """Write a model and its tokenizer as a GGUF file; returns what it is in llama.cpp.

    to: an architecture of transformers that equals the model and that llama.cpp has; auto for the first.
    weights: dtype of the matrices; vectors, filters and routers stay in fp32, and in q8_0 matrices whose rows are not a
    multiple of 32 numbers in f16. Ids that only pad the vocabulary are left out.
    trained_length: tokens of a text in training, which llama.cpp takes for its context.
    Warns if the tokenizer cuts some texts differently in llama.cpp. Raises `UsageError` for a model or a tokenizer that
    has no equal there and for a file that exists, `MissingBackendError` without the `gguf` library.
    """
    file = Path(file)
    if weights not in TYPES:
        raise UsageError(f"--gguf_type {weights}: must be one of {', '.join(TYPES)}")
    if file.exists():
        raise UsageError(f"{file}: exists: choose another name")
    home, words = home_of(model.config, to, model.state_dict()), vocabulary(tokenizer)
    other = (
        [] if words.same else [f"llama.cpp cuts text by {words.pre!r}: some texts get other tokens than in training"]
    )
    for each in (*home.differences(), *other):
        warnings.warn(f"{file}: {each} (docs/interop.md)", stacklevel=2)
    size = {"context_length": trained_length, "vocab_size": tokenizer.vocab_size}
    metadata = {f"{home.name}.{key}": value for key, value in {**size, **home.settings()}.items()} | words.metadata()
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.new")
    try:
        write(staging, home, metadata, home.tensors(tensors_of(model, home.theirs)), weights)
        fsync(staging)
        staging.rename(file)
    finally:
        staging.unlink(missing_ok=True)
    return home


def write(
    file: Path, home: Home, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]], weights: Type
) -> None:
    """Write a GGUF file. tensors: under names that llama.cpp or the library's table has, with rows for padding ids."""
    try:
        import gguf
    except ImportError as error:
        raise MissingBackendError(f"a GGUF file needs gguf: pip install 'swamla[gguf]' ({error})") from error
    writer = gguf.GGUFWriter(file, home.name)
    try:
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if weights == "f32" else f"MOSTLY_{weights.upper()}"])
        for key, value in metadata.items():
            add(writer, key, value)
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[home.names], metadata[f"{home.name}.block_count"])
        for name, tensor in tensors:
            found = (
                name
                if name.startswith(("blk.", "rope_freqs."))
                else known.get_name(name, try_suffixes=(".weight", ".bias"))
            )
            assert found is not None, f"{home.name} of llama.cpp has no place for {name}"
            if found in BY_ID:
                tensor = tensor[: metadata[f"{home.name}.vocab_size"]]
            dtype = gguf.GGMLQuantizationType[stored_as(found, tensor, weights).upper()]
            data = gguf.quants.quantize(np.ascontiguousarray(tensor.float().numpy()), dtype)
            writer.add_tensor(found, data, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def stored_as(name: str, tensor: Tensor, weights: Type) -> str:
    """The dtype of one tensor. What llama.cpp computes element by element, and the router, is in fp32 there."""
    exact = not name.endswith(".weight") or any(
        part in name for part in ("_norm.", "conv1d", "gate_inp", "position_embd")
    )
    if exact or tensor.squeeze().ndim < 2:
        return "f32"
    return "f16" if weights == "q8_0" and tensor.shape[-1] % BLOCK else weights


def add(writer: Any, key: str, value: Any) -> None:
    """One entry of the metadata, of the type that llama.cpp reads there."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
