"""Folders as transformers saves them: config.json, *.safetensors, tokenizer.json."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swamla.config import load_json
from swamla.data.chat import END
from swamla.data.tokenizer import Tokenizer
from swamla.errors import ConfigError, CorruptError, SwamlaError, UsageError
from swamla.files import as_new_file, fsync, regular_file
from swamla.interop.architecture import Architecture, architecture_of, require_plain_numbers
from swamla.interop.equality import Lacks
from swamla.interop.tokenizer import save_tokenizer
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.registry import members_of
from swamla.tensor_file import misfits, read_header

HEAD = "lm_head.weight"
DTYPES = ("F64", "F32", "F16", "BF16")


def read_architecture(folder: str | Path) -> Architecture:
    """What a folder's config.json describes. Raises `UsageError` or `ConfigError` for what is not mapped."""
    file = Path(folder) / "config.json"
    plain, _ = load_json(file)
    return architecture_of(plain, str(file))


def load_pretrained(folder: str | Path, *, dtype: torch.dtype | None = None) -> LanguageModel:
    """The model of a folder that transformers (or `save_pretrained`) wrote, in evaluation mode.

    dtype: of the weights, fp32 by default. Weights are read one at a time; no pickle is read. Raises as
    `read_architecture` does, and `CorruptError` listing the first five weights that are missing, unexpected or of
    another shape.
    """
    folder = Path(folder)
    architecture = read_architecture(folder)
    model = architecture.language_model().skeleton()
    model.to_empty(device="cpu")
    model.tie()
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for buffer in model.buffers():
        buffer.zero_()
    with torch.no_grad():
        for name, tensor in read_weights(folder, architecture):
            own[name].copy_(tensor)
    return model.eval().to(dtype=dtype or torch.float32)


def read_weights(folder: Path, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Our weights by name, one at a time, in the dtype of the file. Raises as `load_pretrained` does."""
    file = folder / "config.json"
    require_plain_numbers(load_json(file)[0], str(file))
    config, rules = architecture.language_model(), list(architecture.rules())
    own = config.skeleton().state_dict()
    # What `split` makes of weights without storage are the shapes that theirs must have.
    expected = {
        name: tuple(their.shape)
        for rule in rules
        for name, their in zip(rule.theirs, rule.split(own[rule.ours]), strict=True)
    }
    theirs = Weights(folder, architecture)
    for rule in rules:
        if rule.cut_anywhere:
            expected |= theirs.cut_elsewhere({name: expected[name] for name in rule.theirs})
    theirs.require(expected, tied=config.tied_head)
    for rule in rules:
        yield rule.ours, rule.join([theirs[name] for name in rule.theirs])


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name, each read from its memory-mapped file when asked for.

    Where a file lacks the architecture's prefix, it is added.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder, prefix = folder, architecture.prefix
        # Other names are other programs' copies, e.g. Mistral's consolidated.safetensors.
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            why = f" ({pickles[0]} is a pickle, which is never loaded)" if pickles else ""
            raise UsageError(f"{folder}: has no *.safetensors{why}: save the model with transformers' save_pretrained")
        # A snapshot of the hub's cache is links to the blobs beside it.
        inside = folder.resolve().parents[1] if folder.resolve().parent.name == "snapshots" else folder
        self._at: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        self._opened: dict[Path, Any] = {}
        for file in files:
            for name, entry in read_header(regular_file(file, inside=inside)).items():
                if name != "__metadata__" and not architecture.leaves_out(name):
                    if entry["dtype"] not in DTYPES:
                        allowed = f"must be one of {', '.join(DTYPES)}: quantized weights are not read"
                        raise UsageError(f"{file}: {name} is stored as {entry['dtype']}, {allowed}")
                    self._at[architecture.newer(name)] = file, name, tuple(entry["shape"])
        if not any(name.startswith(prefix) for name in self._at):
            self._at = {name if name == HEAD else prefix + name: place for name, place in self._at.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, stored, _ = self._at[name]
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(file, framework="pt")
            return self._opened[file].get_tensor(stored)
        except SafetensorError as error:
            raise CorruptError(f"{file}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def cut_elsewhere(self, expected: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        """The shapes of these tensors, if they have as many rows together as expected."""
        got = {name: self._at[name][2] for name in expected if name in self._at}
        rows = [sum(shape[0] for shape in shapes.values()) for shapes in (got, expected)]
        return got if rows[0] == rows[1] and len(got) == len(expected) else expected

    def require(self, expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
        """Raise `CorruptError` unless these names and shapes are there. A tied head may be stored, if it is tied."""
        got = {name: shape for name, (_, _, shape) in self._at.items()}
        if tied and HEAD in got:
            del got[HEAD]
            embedding = next(iter(expected))
            if embedding in got and not torch.equal(self[HEAD], self[embedding]):
                raise UsageError(f"{self.folder}: {HEAD} is not {embedding}: the config says that they are tied")
        if wrong := misfits(got, expected):
            raise CorruptError(f"{self.folder}: not the weights that config.json describes: {wrong}")


def equal_architecture(
    config: LanguageModelConfig, to: str = "auto", weights: Mapping[str, Tensor] | None = None
) -> Architecture:
    """The architecture that equals a model of ours: of that name, or the first of transformers, or else our own.

    weights: the model's, which may be others than an architecture has for all models, such as a router's bias. Raises
    `UsageError` that says why the one of that name does not.
    """
    known = members_of(Architecture)
    if to != "auto":
        if to not in known:
            raise UsageError(f"--to {to}: must be one of auto, {', '.join(sorted(known))}")
        return _equal(known[to], config, weights)
    for architecture in sorted(known.values(), key=lambda each: (each.has_every_model, each.tried_late)):  # type: ignore[attr-defined]
        try:
            return _equal(architecture, config, weights)
        except (ConfigError, UsageError):  # `Lacks`, or a check of what would be equal there
            continue
    raise AssertionError("the last has every model")


def _equal(kind: Any, config: LanguageModelConfig, weights: Mapping[str, Tensor] | None) -> Architecture:
    found: Architecture = kind.equal(config)
    constants = [] if weights is None else [rule for rule in found.rules() if not rule.theirs]
    for rule in constants:
        assert weights is not None
        if largest := (weights[rule.ours].cpu() - rule.join([])).abs().max().item():
            raise Lacks(kind.kind, rule.ours, f"up to {largest:.3g}", "0 everywhere")
    return found


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    *,
    to: str = "auto",
    tokenizer: Tokenizer | None = None,
    trained_length: int | None = None,
) -> Architecture:
    """Write a model, in its dtype, as transformers' `from_pretrained` loads it; returns the architecture.

    to: as for `equal_architecture`.  trained_length: tokens of a text in training, for programs that ask.
    With a tokenizer, also writes it (see `save_tokenizer`); the id that ends its texts becomes the model's, and ids
    that only pad the model's vocabulary are never generated. config.json is written last, so that an incomplete folder
    is not a model. Raises `UsageError` for a folder that is not empty, and for a model that `to` does not equal.
    """
    folder, own = Path(folder), model.state_dict()
    architecture = equal_architecture(model.config, to, own)
    if trained_length is not None:
        architecture = architecture.trained_on(trained_length)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty: choose another folder")
    tensors = tensors_of(model, architecture)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    eos = None if tokenizer is None else tokenizer.eos_id
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos)
    # Embeddings of transformers never learn what config.json calls padding, and this id begins every text.
    plain = architecture.plain() | {"dtype": dtype} | ids | {"pad_token_id": None}
    padding = [] if tokenizer is None else list(range(tokenizer.vocab_size, model.config.vocab_size))
    generation: dict[str, Any] = ids | ({"suppress_tokens": padding} if padding else {})
    if tokenizer is not None and END in tokenizer.specials:  # an answer ends before its conversation does
        generation |= {"eos_token_id": [tokenizer.specials[END], eos]}
    with staged(folder) as staging:
        with as_new_file(staging / "model.safetensors"):
            save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            save_tokenizer(tokenizer, staging, max_length=model.config.learned_positions or None)
        for name, text in architecture.files().items():
            (staging / name).write_text(text, encoding="utf-8")
        for name, settings in (("generation_config.json", generation), ("config.json", plain)):
            (staging / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return architecture


def tensors_of(model: LanguageModel, architecture: Architecture) -> dict[str, Tensor]:
    """The weights of a model under the names and in the shapes of the architecture that equals it."""
    own = model.state_dict()
    return {
        name: tensor.detach().cpu().contiguous()
        for rule in architecture.rules()
        for name, tensor in zip(rule.theirs, rule.split(own[rule.ours]), strict=True)
    }


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
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
