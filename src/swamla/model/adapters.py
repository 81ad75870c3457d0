"""Low-rank adapters (LoRA, arXiv 2106.09685) on the matrices of a model's blocks.

An adapted module's parameter is read as W + scale · B A, wherever and however it is read: by a linear layer, by MLA's
absorbed decoding, by grouped products of experts. So no mixer or FFN knows of adapters, and merging changes nothing.
The product B A is formed once in each use of a matrix; its cost, 2 · rank FLOPs for each weight, is that of `rank` more
tokens. Parameters that fuse several projections have an adapter for each (`MixerConfig.projections`), so that adapters
can be mapped to architectures that have them apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swamla.errors import CorruptError
from swamla.model.initial import initial_tensor, uniform
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.ops.autocast import without_autocast
from swamla.tensor_file import misfits

MARK = ".lora."  # in the names of adapters' parameters
TABLES = ("embedding", "head")  # what new ids have a row in


class Place(NamedTuple):
    """An adapted parameter. module: the name of the module that has it.  parts: outputs of each logical projection."""

    module: str
    parameter: str
    shape: tuple[int, ...]
    parts: Mapping[str, int]

    @property
    def prefix(self) -> str:
        """Of the names of the adapter's tensors."""
        return f"{self.module}{MARK}{self.parameter}."


class Factors(nn.Module):
    """The factors A and B of one logical projection, of a rank that is no larger than its inputs and outputs.

    For a linear layer (outputs, inputs): A (R, inputs) and B (outputs, R). For experts (E, inputs, outputs): A
    (E, inputs, R) and B (E, R, outputs). B begins at 0.
    """

    def __init__(self, shape: Sequence[int], outputs: int, rank: int) -> None:
        super().__init__()
        inputs = shape[-1] if len(shape) == 2 else shape[-2]
        rank = min(rank, inputs, outputs)
        self.bound = inputs**-0.5
        sizes: tuple[tuple[int, ...], ...] = ((rank, inputs), (outputs, rank))
        if len(shape) > 2:
            sizes = (*shape[:-2], inputs, rank), (*shape[:-2], rank, outputs)
        self.a, self.b = (nn.Parameter(torch.zeros(size)) for size in sizes)

    def product(self) -> Tensor:
        """B A, of the shape of the projection's part of the parameter."""
        return self.b @ self.a if self.a.ndim == 2 else self.a @ self.b


class LowRank(nn.ModuleDict):
    """The adapter of a parameter: the factors of its logical projections, which lie one after the other."""

    scale: Tensor

    def __init__(self, shape: Sequence[int], parts: Mapping[str, int], rank: int, scale: float = 1.0) -> None:
        super().__init__({name: Factors(shape, outputs, rank) for name, outputs in parts.items()})
        self.register_buffer("scale", torch.tensor(scale))
        self.dim = 0 if len(shape) == 2 else -1

    def adapted(self, weight: Tensor) -> Tensor:
        """W + scale · B A. Without autocast, so that it is what merging makes of them."""
        with without_autocast(weight.device.type):
            products = [factors.product() for factors in self.values()]  # type: ignore[operator]
            product = products[0] if len(products) == 1 else torch.cat(products, dim=self.dim)
            return weight + (self.scale * product).to(weight.dtype)


class Rows(nn.Module):
    """What is added to the rows of some ids in the embedding, and in the head; begins at 0."""

    ids: Tensor

    def __init__(self, ids: Sequence[int], width: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.int64))
        self.rows = nn.Parameter(torch.zeros(len(ids), width))

    def adapted(self, weight: Tensor) -> Tensor:
        """The table with the rows added."""
        return weight.index_add(0, self.ids, self.rows.to(weight.dtype))


def places(model: LanguageModel) -> list[Place]:
    """All matrices of the blocks but sets of vectors, such as a router's.

    Raises `ValueError` for `projections` that are not the matrix's.
    """
    fused: dict[str, Mapping[str, int]] = {}
    for index, block in enumerate(model.config.layers):
        for half, config in (("mixer", block.mixer), ("ffn", block.ffn)):
            for name, parts in config.projections(model.config.width).items():
                fused[f"blocks.{index}.{half}.{name}"] = parts
    found = []
    for name, parameter in model.named_parameters():
        if not name.startswith("blocks.") or parameter.ndim < 2 or name in model.config.vectors or MARK in name:
            continue
        module, _, own = name.rpartition(".")
        outputs = parameter.shape[0] if parameter.ndim == 2 else parameter.shape[-1]
        parts = {part: size for part, size in fused.get(name, {"all": outputs}).items() if size}
        if sum(parts.values()) != outputs:
            raise ValueError(f"{name} has {outputs} outputs, `projections` has {dict(parts)}")
        found.append(Place(module, own, tuple(parameter.shape), parts))
    return found


def attach(model: LanguageModel, *, rank: int, scale: float, seed: int, ids: Sequence[int] = ()) -> None:
    """Give every place an adapter, and the ids trainable rows; nothing else has a gradient any more.

    Factors depend on the seed, their name and their shape only. The model computes the same as before.
    """
    for place in places(model):
        adapter = LowRank(place.shape, place.parts, rank, scale)
        for part, factors in adapter.items():
            assert isinstance(factors, Factors)
            name = f"{place.prefix}{part}.a"
            factors.a.data.copy_(initial_tensor(uniform(factors.bound), factors.a.shape, seed, name))
        _adapt(model.get_submodule(place.module), place.parameter, adapter)
    if ids:
        rows = Rows(ids, model.config.width)
        _adapt(model.embedding, "weight", rows)
        _adapt(model.head, "weight", rows if model.config.tied_head else Rows(ids, model.config.width))
    model.to(model.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)


def _adapt(module: nn.Module, parameter: str, adapter: "LowRank | Rows") -> None:
    """Make `module.parameter` be what the adapter makes of it; names in `state_dict` stay as they are."""
    if "lora" not in module._modules:
        module.add_module("lora", nn.ModuleDict())
        module.__class__ = type(f"Adapted{type(module).__name__}", (type(module),), {})
    adapters: Any = module._modules["lora"]
    adapters[parameter] = adapter

    def adapted(self: nn.Module) -> Tensor:
        own = self._parameters[parameter]
        assert own is not None
        return self._modules["lora"][parameter].adapted(own)  # type: ignore[index]

    setattr(type(module), parameter, property(adapted))


def is_adapter(name: str) -> bool:
    """Whether a name of a model's `state_dict` is that of an adapter's tensor."""
    return MARK in name


@torch.no_grad()
def merged(
    weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], config: LanguageModelConfig, *, origin: str
) -> dict[str, Tensor]:
    """The weights of a model with its adapters merged; a tied head stays tied.

    adapters: their tensors by name, as in the `state_dict` of the model. Raises `CorruptError` naming `origin` unless
    they are adapters of this model.
    """
    done = dict(weights)
    known: set[str] = set()
    for place in places(config.skeleton()):
        own = {name.removeprefix(place.prefix): t for name, t in adapters.items() if name.startswith(place.prefix)}
        ranks = [t.shape[0] if t.ndim == 2 else t.shape[-1] for name, t in own.items() if name.endswith(".a")]
        adapter = LowRank(place.shape, place.parts, max(ranks, default=1))
        known |= _load(adapter, own, place.prefix, origin)
        name = f"{place.module}.{place.parameter}"
        done[name] = adapter.adapted(weights[name])
    for table in TABLES:
        prefix = f"{table}{MARK}weight."
        own = {name.removeprefix(prefix): t for name, t in adapters.items() if name.startswith(prefix)}
        if own:
            rows = Rows([0] * len(own.get("ids", ())), config.width)
            known |= _load(rows, own, prefix, origin)
            tied = table == "head" and config.tied_head
            done[f"{table}.weight"] = done["embedding.weight"] if tied else rows.adapted(weights[f"{table}.weight"])
    if unknown := sorted(adapters.keys() - known):
        raise CorruptError(f"{origin}: adapters do not fit the model: {unknown[0]} is unexpected")
    if config.tied_head:
        done["head.weight"] = done["embedding.weight"]
    return done


def _load(adapter: nn.Module, tensors: Mapping[str, Tensor], prefix: str, origin: str) -> set[str]:
    """Load an adapter's tensors; returns their full names."""
    expected = {name: tuple(t.shape) for name, t in adapter.state_dict().items()}
    if wrong := misfits({name: tuple(t.shape) for name, t in tensors.items()}, expected):
        raise CorruptError(f"{origin}: adapters do not fit the model: {prefix}{wrong}")
    adapter.load_state_dict(dict(tensors))
    return {f"{prefix}{name}" for name in tensors}
