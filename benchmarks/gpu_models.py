"""The models of the GPU benchmark, with random weights that are drawn on the device."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle

import torch

from benchmarks.contenders import GPT2, QUICK, Shape, contender, gpt2_twin
from benchmarks.gpu_running import Place
from swamla.config import from_plain, load_file
from swamla.data.packing import Batch
from swamla.model import (
    BlockConfig,
    DenseConfig,
    GDNConfig,
    LanguageModelConfig,
    LatentMoEConfig,
    MLAConfig,
    SWAConfig,
    count_parameters,
)
from swamla.model.accounting import TrainingFlops
from swamla.model.compiling import Compile, compile_blocks
from swamla.model.initial import initializers_of
from swamla.model.language_model import LanguageModel
from swamla.recipes import recipe_path
from swamla.train.backends import resolve_backends
from swamla.train.config import TrainConfig
from swamla.train.feed import pinned
from swamla.train.fp8 import convert_to_fp8
from swamla.train.optim import AdamWConfig
from swamla.train.parallel.strategy import Strategy
from swamla.train.precision import Chosen, autocast
from swamla.train.state import TrainState
from swamla.train.step import training_step

_EXPERTS = LatentMoEConfig(n_experts=8, n_activated=2, ratio=2, expert_hidden=16, shared_hidden=16)


def preset(name: str, local: str, place: Place) -> LanguageModelConfig:
    """A shipped recipe's model with this local mixer; if quick, three small layers with the same mixers and FFNs."""
    plain, _ = load_file(recipe_path(name))
    model, spare = plain["model"], plain["spare"]
    if local != "swa":
        model["blocks"] = {local: spare[local], "mla": model["blocks"]["mla"]}
        model["pattern"] = [local if block == "swa" else block for block in model["pattern"]]
    config = from_plain(LanguageModelConfig, model)
    return _shrunk(config) if place.quick else config


def every_mixer(head: int, window: int) -> dict[str, GDNConfig | SWAConfig | MLAConfig]:
    """A small config of every mixer in the presets, with heads of width `head`."""
    return {
        "gdn": GDNConfig(n_heads=2, head_k_dim=head, head_v_dim=head),
        "swa": SWAConfig(n_heads=2, head_dim=head, window=window),
        "mla": MLAConfig(
            n_heads=2, kv_lora_rank=head, qk_nope_head_dim=head, qk_rope_head_dim=head // 2, v_head_dim=head
        ),
    }


def _shrunk(config: LanguageModelConfig) -> LanguageModelConfig:
    mixers = every_mixer(16, window=16)
    blocks = {
        name: BlockConfig(
            mixer=mixers[name], ffn=_EXPERTS if block.ffn.kind == "latent_moe" else DenseConfig(hidden=64)
        )
        for name, block in config.blocks.items()
    }
    return replace(config, vocab_size=512, width=32, blocks=blocks, pattern=config.pattern[:3])


def shape_of(name: str, place: Place) -> Shape:
    """The shape of other libraries' models: a preset's width, depth and vocabulary, with heads of 64."""
    if place.quick:
        return QUICK
    config = preset(name, "swa", place)
    return Shape(width=config.width, heads=config.width // 64, depth=config.depth, vocabulary=config.vocab_size)


@torch.no_grad()
def filled(config: LanguageModelConfig, device: torch.device | str) -> LanguageModel:
    """The model with initial weights drawn on the device, which is fast; same distributions, not reproducible."""
    model = config.skeleton()
    model.to_empty(device=torch.device(device))
    model.tie()
    own = initializers_of(model)
    for name, parameter in model.named_parameters():
        if name in own:
            own[name](parameter, None)
        elif parameter.ndim > 1:
            parameter.normal_(0.0, config.init_std)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def batch_of(rows: int, length: int, vocabulary: int, documents: float = 1.0, seed: int = 0) -> Batch:
    """Random tokens; each row has `documents` documents on average, of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    document_BT = (torch.rand(rows, length, generator=generator) < (documents - 1) / length).cumsum(dim=1)
    return Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous(), document_BT)


class OurStep:
    """An optimizer step of a preset, as `swamla train` takes it: transfer, gradient norm and clipping included.

    batches: used in rotation.
    n_tokens: tokens of a step.
    flops_per_token, parameters, active: of the model, by the accounting.
    backends: op → backend.
    notes: other choices, as text.
    """

    def __init__(
        self, config: LanguageModelConfig, batches: Sequence[Batch], place: Place, *, precision: Chosen, compiled: bool
    ) -> None:
        device, (rows, length) = torch.device(place.device), batches[0].tokens_BT.shape
        mode: Compile = "default" if compiled else "none"
        model, count = filled(config, device), count_parameters(config)
        flops = TrainingFlops(config)
        self.flops_per_token = sum(flops.of(batch.document_BT) for batch in batches) / (len(batches) * rows * length)
        self.parameters, self.active = count.total, count.active
        self.backends = resolve_backends(config, device, precision)
        self.notes = [convert_to_fp8(model, device)] if precision == "fp8" else []
        if compiled:
            compile_blocks(model, mode, device)
        self.n_tokens = rows * length
        self._settings = TrainConfig(steps=1, batch_size=rows, block_size=length, compile=mode)
        self._batches = cycle([pinned(batch) for batch in batches] if device.type == "cuda" else batches)
        self._state = TrainState(
            strategy=Strategy(model),
            optimizer=AdamWConfig().build(model, lr=1e-4, weight_decay=0.1),
            precision=precision,
            backends=self.backends,
            data_fingerprint="",
            device=device,
        )

    def __call__(self) -> None:
        found = training_step(self._state, next(self._batches), self._settings, lr=1e-4)
        if not found.finite:
            raise FloatingPointError(f"loss {found.loss}, norm of the gradient {found.grad_norm}: not finite")


class TheirStep:
    """An optimizer step of another library's model, with the same autocast, clipping and fused AdamW.

    Fields as in `OurStep`. Raises `ModuleNotFoundError` without the library.
    """

    def __init__(self, library: str, shape: Shape, batch: Batch, place: Place, *, compiled: bool) -> None:
        self._device, self._batch = torch.device(place.device), batch
        length = batch.tokens_BT.shape[1]
        with self._device:
            self._contender = contender(library, shape, length)
        self.n_tokens = batch.tokens_BT.numel()
        self.flops_per_token = self._contender.flops_per_token(length)
        self.parameters = self.active = self._contender.n_parameters
        self.backends: dict[str, str] = {}
        self.notes: list[str] = []
        self._model = self._contender.model.to(self._device).train()
        if compiled:
            self._contender.model = torch.compile(self._model)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def __call__(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        tokens_BT, labels_BT = self._batch.tokens_BT.to(self._device), self._batch.labels_BT.to(self._device)
        with autocast("bf16", self._device):
            loss = self._contender.loss(tokens_BT, labels_BT)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        if not norm.isfinite():  # waits for the device, like our step
            raise FloatingPointError(f"loss {loss.item()}, norm of the gradient {norm.item()}: not finite")


def gpt2_step(shape: Shape, batch: Batch, place: Place, *, compiled: bool) -> OurStep | TheirStep:
    """A step of transformers' GPT-2; without transformers, of our own model of that shape."""
    if find_spec("transformers"):
        return TheirStep(GPT2, shape, batch, place, compiled=compiled)
    step = OurStep(gpt2_twin(shape), [batch], place, precision="bf16", compiled=compiled)
    step.notes.append("transformers is not installed: our own model of GPT-2's shape")
    return step
