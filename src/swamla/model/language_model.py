"""The language model: embedding, a stack of blocks, final norm, head."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.config import within
from swamla.errors import ConfigError, UsageError, require
from swamla.inference.decoding import Decodable, require_ids
from swamla.model.block import Block, BlockConfig, Checkpointing
from swamla.model.compiling import Compile, compile_blocks, refuse_whole, resolve_compile
from swamla.model.ffns.experts import check_recordable
from swamla.model.initial import Initializer, SkippedInit, constant, initial_tensor, initializers_of, normal
from swamla.model.mup import initial_scale
from swamla.model.ngrams import NgramEmbedding
from swamla.model.norm import NormConfig, RMSNormConfig
from swamla.model.state import ModelState
from swamla.ops import chunked_cross_entropy
from swamla.ops.autocast import product_dtype
from swamla.ops.cross_entropy import soft_cap
from swamla.ops.layout import Layout

NO_LABEL = -100  # what `F.cross_entropy` ignores


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A decoder-only language model.

    vocab_size: number of token ids; 0 for the tokenizer's, to be replaced before `build`.
    width: of the residual stream.
    blocks: the blocks that the pattern may use, by name.
    pattern: the name of every layer's block, bottom first; its length is the depth.
    norm: before every mixer and FFN, and before the head.
    tied_head: whether the head shares the embedding's weights.
    learned_positions: number of learned position vectors, which limits the length of a document; 0 for none.
    ngram_buckets: rows of hashed embeddings of the last 1, 2, 3, … tokens, which are added to the input of the layer
        ngram_layer, e.g. [4096, 16384] for tokens and pairs; 0 leaves one out.
    ngram_layer: counted from 0; -1 is the last layer, where they gained most (docs/log.md).
    dropout: on the embeddings and on the outputs of mixers and FFNs, in training.
    residual: dtype of the residual stream under autocast: weights (as the weights are, fp32) or autocast (its 16 bits,
        half the memory traffic of norms and sums; what every layer adds is rounded: docs/log.md).
    logit_cap: bounds the logits smoothly by ±logit_cap, e.g. 15 (Gemma 2, arXiv 2408.00118); 0 for no bound.
    init_std: standard deviation of the initial weights; output projections get it / √(2 · depth).
    mup_base_width: train by µP (arXiv 2203.03466, table 8; 2310.17813): init_std and the learning rate are those of a
        model of this width, and initial weights, learning rates, logits and attention's scale follow the width from
        there; none for the standard parametrization.
    """

    vocab_size: int = 0
    width: int
    blocks: dict[str, BlockConfig]
    pattern: tuple[str, ...]
    norm: NormConfig = field(default_factory=RMSNormConfig)
    tied_head: bool = True
    learned_positions: int = 0
    ngram_buckets: tuple[int, ...] = ()
    ngram_layer: int = -1
    dropout: float = 0.0
    residual: Literal["weights", "autocast"] = "weights"
    logit_cap: float = 0.0
    init_std: float = 0.02
    mup_base_width: int | None = None

    def __post_init__(self) -> None:
        require(self.vocab_size >= 0, "vocab_size", self.vocab_size, "must be > 0, or 0 for the tokenizer's")
        require(self.width > 0, "width", self.width, "must be > 0, e.g. 256")
        require(
            len(self.pattern) > 0, "pattern", self.pattern, 'must name a block for every layer, e.g. ["swa", "mla"]'
        )
        for name in self.pattern:
            require(name in self.blocks, "pattern", name, f"must be one of the blocks: {', '.join(self.blocks)}")
        for name in self.blocks:
            require(name in self.pattern, "blocks", name, f"is not used by the pattern: {' '.join(self.pattern)}")
        require(self.learned_positions >= 0, "learned_positions", self.learned_positions, "must be >= 0 (0: none)")
        sizes = self.ngram_buckets
        require(all(size >= 0 for size in sizes), "ngram_buckets", sizes, "must each be >= 0, e.g. [4096, 16384]")
        require(not sizes or sizes[-1] > 0, "ngram_buckets", sizes, "must not end in 0, e.g. [4096, 16384]")
        there = -self.depth <= self.ngram_layer < self.depth
        require(
            there, "ngram_layer", self.ngram_layer, f"must be a layer from 0 to {self.depth - 1}, or -1 for the last"
        )
        require(0 <= self.logit_cap < math.inf, "logit_cap", self.logit_cap, "must be > 0, e.g. 15, or 0 for none")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1), e.g. 0.1")
        require(self.init_std > 0, "init_std", self.init_std, "must be > 0, e.g. 0.02")
        for name, block in self.blocks.items():  # counting raises for settings that do not fit the width
            with within(f"blocks.{name}.mixer", kind=block.mixer.kind):
                block.mixer.n_parameters(self.width)
            with within(f"blocks.{name}.ffn", kind=block.ffn.kind):
                block.ffn.n_parameters(self.width)
        if self.mup_base_width is not None:
            require(self.mup_base_width > 0, "mup_base_width", self.mup_base_width, "must be > 0, e.g. 256")
            self._require_base(self.mup_base_width)

    def _require_base(self, width: int) -> None:
        """Raise `ConfigError` if the settings do not fit a model of the base width of µP."""
        try:
            replace(self, width=width, mup_base_width=None)
        except ConfigError as error:
            base = f"the base model of µP is this one at the width of mup_base_width = {width}"
            allowed = f"{error.allowed} ({base})"
            raise ConfigError(error.field, error.got, allowed, error.origin, error.kind) from error

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.pattern)

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The block of every layer, bottom first."""
        return tuple(self.blocks[name] for name in self.pattern)

    @property
    def vectors(self) -> frozenset[str]:
        """Names of the parameters that are sets of vectors (see `MixerConfig.vectors`)."""
        return frozenset(f"blocks.{n}.{name}" for n, block in enumerate(self.layers) for name in block.vectors)

    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters at the base width of µP, by name; none under the standard parametrization."""
        if self.mup_base_width is None:
            return {}
        base = replace(self, width=self.mup_base_width, mup_base_width=None, vocab_size=self.vocab_size or 1)
        return {name: tuple(p.shape) for name, p in base.skeleton().named_parameters()}

    def with_backends(self, paths: Mapping[str, str]) -> "LanguageModelConfig":
        """The same model where mixers with the backend "auto" get that of `paths` (block → backend)."""
        blocks = {
            name: replace(block, mixer=block.mixer.with_backend(paths[name])) if name in paths else block
            for name, block in self.blocks.items()
        }
        return replace(self, blocks=blocks)

    def build(self, seed: int | None = None) -> "LanguageModel":
        """The model with the initial weights of `seed`, by default drawn from torch's global generator.

        In fp32 and in training mode, on torch's default device; on the meta device it has shapes only. Raises
        `ConfigError` for a vocabulary of 0, which stands for the tokenizer's.
        """
        model, device = self.skeleton(), torch.get_default_device()
        if device.type == "meta":
            return model
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu").item())
        model.to_empty(device=device)
        model.tie()
        model.reset_parameters(seed)
        return model

    def skeleton(self) -> "LanguageModel":
        """The model on torch's meta device: names and shapes without storage."""
        require(self.vocab_size > 0, "vocab_size", self.vocab_size, "must be > 0 to build the model")
        with torch.device("meta"), SkippedInit():
            return LanguageModel(self)


def vectors_of(module: nn.Module) -> frozenset[str]:
    """`LanguageModelConfig.vectors` of a language model; empty for another module."""
    return module.config.vectors if isinstance(module, LanguageModel) else frozenset()


class LanguageModel(Decodable[ModelState]):
    """Next-token logits from tokens. `step` over any split of a sequence equals `forward` on the whole sequence.
    `generate`, inherited, continues tokens.

    Weights are uninitialised before `reset_parameters`, which `LanguageModelConfig.build` calls. known_ids: the
    tokenizer's number of ids; larger ids only pad the vocabulary and are never generated. None allows all ids.
    quantized: the format in which a run of rounded weights stores them, "int8" or "int4", and "" elsewhere.
    """

    quantized: str = ""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.learned_positions, config.width) if config.learned_positions else None
        self.ngrams = NgramEmbedding(config.ngram_buckets, config.width) if config.ngram_buckets else None
        self.ngram_layer = config.ngram_layer % config.depth
        layers = [block.build(config.width, config.norm, config.dropout) for block in config.layers]
        self.blocks: Sequence[Block] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = config.norm.build(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()
        self.output_multiplier = 1.0 if config.mup_base_width is None else config.mup_base_width / config.width
        if config.mup_base_width is not None:
            for block in self.blocks:
                block.mixer.scale_from(config.mup_base_width)

    def tie(self) -> None:
        """Share the embedding's weights with the head if the config says so."""
        if self.config.tied_head:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def reset_parameters(self, seed: int, within: str = "") -> None:
        """Set the initial weights of `seed` and zero the buffers, for names that begin with `within`.

        Weights are normal, output projections are scaled by depth (GPT-2), biases are 0, gains 1; modules'
        `initializers` take precedence. A parameter's values depend on the seed, its name and its shape only.
        """
        for name, initializer in self.all_initializers().items():
            if name.startswith(within):
                parameter = self.get_parameter(name)
                parameter.copy_(initial_tensor(initializer, parameter.shape, seed, name))
        for name, buffer in self.named_buffers():
            if name.startswith(within):
                buffer.zero_()

    def all_initializers(self) -> dict[str, Initializer]:
        """The initializer of every parameter; buffers begin at 0."""
        own, outputs, base = initializers_of(self), self._outputs(), self.config.base_shapes()
        found = {}
        for name, parameter in self.named_parameters():
            scale = (2 * self.config.depth) ** -0.5 if name in outputs else 1.0
            if name in base and name.startswith("blocks."):
                scale *= initial_scale(parameter.shape, base[name])
            found[name] = own.get(name) or self._default_initializer(name, parameter.ndim, scale)
        return found

    def _outputs(self) -> set[str]:
        """Names of the parameters that write to the residual stream."""
        return {
            f"blocks.{index}.{module}.{name}"
            for index, block in enumerate(self.config.layers)
            for module, outputs in (("mixer", block.mixer.outputs), ("ffn", block.ffn.outputs))
            for name in outputs
        }

    def _default_initializer(self, name: str, ndim: int, scale: float) -> Initializer:
        if ndim < 2:
            return constant(0.0 if name.endswith("bias") else 1.0)
        return normal(self.config.init_std * scale)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.weight.device

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """Set what every block recomputes in the backward pass, see `Block`. Raises `ConfigError` for another name."""
        allowed = get_args(Checkpointing)
        require(what in allowed, "checkpointing", what, f"must be one of {', '.join(allowed)}")
        for block in self.blocks:
            block.checkpointing = what

    def compile(self, mode: Compile = "default") -> None:
        """Compile block by block what training calls, and on a GPU evaluations, at their first use; once only.

        Instead of `torch.compile(model)`, which is refused. mode: as for `swamla train --compile`, which calls this
        too; "auto" and "none" may compile nothing. On a CPU the first steps wait a minute or more for what they save
        later. Raises `MissingBackendError` if the machine cannot compile.
        """
        allowed = get_args(Compile)
        require(mode in allowed, "mode", mode, f"must be one of {', '.join(allowed)}")
        if (resolved := resolve_compile(mode, self.device)) != "none":
            compile_blocks(self, resolved, self.device)

    def forward(self, tokens_BT: Tensor, seq: Layout | None = None, *, labels: Tensor | None = None) -> Tensor:
        """Next-token logits (B, T, vocabulary) of tokens (B, T), in the weights' dtype or autocast's.

        seq: the documents, by default one a row.  labels: (B, T), each position's next token, -100 for none; with them
        the result is their mean loss in nats, a scalar, computed without holding all logits.
        Raises `UsageError` for tokens that are no tensor of ids (B, T) or lie outside the vocabulary, and `DataError`
        for such labels. On a GPU ids are not read, because that would wait for the device: there an id outside the
        vocabulary ends the process, except under `torch.autograd.detect_anomaly()`, which checks them.
        """
        if labels is None:
            return self.logits(self.hidden(tokens_BT, seq)[0])
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
            given = labels.dtype if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise UsageError(f"labels are {given}: must be a tensor of torch.int64, shaped as the tokens")
        require_ids(tokens_BT, dims=(2,))
        fits = labels.shape == tokens_BT.shape
        require(fits, "labels.shape", tuple(labels.shape), f"must be that of the tokens, {tuple(tokens_BT.shape)}")
        return self.loss(tokens_BT, labels, seq)[0] / (labels != NO_LABEL).sum().clamp(min=1)

    def hidden(self, tokens_BT: Tensor, seq: Layout | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's input (B, T, D), and the FFNs' statistics as `name/layer`. Raises `UsageError` for bad tokens."""
        if torch.compiler.is_dynamo_compiling():
            refuse_whole()
        require_ids(tokens_BT, dims=(2,))
        batch, time = tokens_BT.shape
        if seq is None:
            seq = Layout.one_document_per_row(batch, time, device=tokens_BT.device)
        elif not isinstance(seq, Layout) or seq.shape != (batch, time):
            given = f"of {seq.shape}" if isinstance(seq, Layout) else f"a {type(seq).__name__}"
            raise UsageError(
                f"seq is {given}: must be a swamla.ops.Layout of {(batch, time)}; labels go by name, "
                "model(tokens, labels=labels)"
            )
        if torch.is_anomaly_enabled() and (error := self._token_error(tokens_BT)):
            raise error
        return self.body(self.embed(tokens_BT), seq, tokens_BT)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The tokens' embeddings (B, T, D), which `body` takes. Raises `UsageError` for ids outside the vocabulary."""
        try:
            return self.embedding(tokens_BT)
        except (IndexError, RuntimeError) as error:  # on a CPU only; CUDA fails later and ends the process
            raise self._token_error(tokens_BT) or error from None

    def body(
        self, x_BTD: Tensor, seq: Layout, tokens_BT: Tensor | None = None, *, inputs: list[Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's input (B, T, D) of embeddings (B, T, D), and the FFNs' statistics as `name/layer`.

        tokens_BT: the ids, which embeddings of n-grams need, as nothing else does.  inputs: every layer's input is
        appended to it. Raises `UsageError` for a document longer than the learned positions, and for missing ids.
        """
        x_BTD = self.at_positions(x_BTD, seq)
        if self.config.dropout:
            x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        statistics = {}
        for index, block in enumerate(self.blocks):
            x_BTD = self.layer_input(index, x_BTD, seq, tokens_BT)
            if inputs is not None:
                inputs.append(x_BTD)
            x_BTD, found = block(x_BTD, seq)
            statistics.update({f"{name}/{index}": value for name, value in found.items()})
        return self.head_input(x_BTD), statistics

    def layer_input(self, index: int, x_BTD: Tensor, seq: Layout, tokens_BT: Tensor | None) -> Tensor:
        """The residual stream with what is added to it before a layer: embeddings of n-grams, in the layer for them."""
        if self.ngrams is None or index != self.ngram_layer:
            return x_BTD
        return x_BTD + self.ngrams(_needed(tokens_BT), seq).to(x_BTD.dtype)

    def token_losses(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout | None = None) -> Tensor:
        """−log p(label) of each token, (B, T) in nats, 0 for labels -100. Holds all logits, unlike `loss`."""
        logits_BTV = self(tokens_BT, seq).to(torch.promote_types(self.embedding.weight.dtype, torch.float32))
        return F.cross_entropy(logits_BTV.mT, labels_BT, reduction="none", ignore_index=NO_LABEL)

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ −log p(label), in nats, over labels other than -100, and the FFNs' statistics as `name/layer`.

        Training minimises the sum plus the statistics "loss/…". Logits are computed in chunks, never all at once.
        """
        x_BTD, statistics = self.hidden(tokens_BT, seq)
        x_ND, labels_N = x_BTD.flatten(0, 1), labels_BT.flatten()
        return chunked_cross_entropy(x_ND, self.head.weight, labels_N, cap=self.config.logit_cap), statistics

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Next-token logits (…, vocabulary) of the head's input (…, D)."""
        return soft_cap(self.head(x_BTD), self.config.logit_cap)

    def rebalance(self, statistics: Mapping[str, Tensor]) -> None:
        """After an optimizer step: every FFN updates its router bias by the statistics of the whole batch."""
        by_layer: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for full_name, value in statistics.items():
            name, layer = full_name.rsplit("/", 1)
            by_layer[int(layer)][name] = value
        for index, found in by_layer.items():
            self.blocks[index].ffn.rebalance(found)

    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelState:
        """An empty state for `batch` sequences of at most `max_len` tokens.

        Raises `UsageError` if `max_len` exceeds the learned positions.
        """
        if self.positions is not None and max_len > self.config.learned_positions:
            raise UsageError(
                f"{max_len} tokens are more than the model's {self.config.learned_positions} learned positions"
            )
        dtype, device = dtype or self.embedding.weight.dtype, device or self.device
        layers = [block.init_state(batch, max_len, dtype=dtype, device=device) for block in self.blocks]
        ngrams = self.ngrams.init_state(batch, device) if self.ngrams else None
        return ModelState(layers, torch.zeros(batch, dtype=torch.int64, device=device), max_len, ngrams=ngrams)

    def grow(self, state: ModelState, max_len: int) -> None:
        """Give `state` room for sequences of `max_len` tokens, unless it has it; what it holds stays.

        Raises `UsageError` if `max_len` exceeds the learned positions.
        """
        if max_len > state.max_len:
            state.grow(self.init_state(len(state.length_B), max_len, device="meta"))

    def step(self, tokens_BT: Tensor, state: ModelState, valid_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of T >= 1 new tokens after those in `state`, which is updated.

        valid_BT: False for padding (default: no padding), which is allowed only at the end of a row. Padding has
        undefined logits and needs room in the state like tokens. Raises `UsageError` when the state is full.
        """
        return self.logits(self.step_hidden(tokens_BT, state, valid_BT))

    def step_hidden(self, tokens_BT: Tensor, state: ModelState, valid_BT: Tensor | None = None) -> Tensor:
        """`step` up to the head's input (B, T, D): prefill needs the logits of the last token only."""
        require_ids(tokens_BT, dims=(2,))
        return self.step_body(self.embed(tokens_BT), state, valid_BT, tokens_BT)

    def step_body(
        self,
        x_BTD: Tensor,
        state: ModelState,
        valid_BT: Tensor | None = None,
        tokens_BT: Tensor | None = None,
        *,
        inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """`body` of new tokens after those in `state`, which is updated; valid_BT as for `step`."""
        if valid_BT is not None and bool(valid_BT.all()):
            valid_BT = None
        seq = state.next_layout(x_BTD[..., 0], valid_BT)
        if seq.end > state.max_len:
            raise UsageError(f"{seq.end} tokens do not fit a state made for {state.max_len}")
        x_BTD = self._step_body_at(x_BTD, state, seq, tokens_BT, inputs)
        state.advance(x_BTD.shape[1], valid_BT)
        return x_BTD

    def step_hidden_at(self, tokens_BT: Tensor, state: ModelState, seq: Layout) -> Tensor:
        """`step_hidden` for a given layout: updates the layers' states but not the rows' lengths."""
        return self._step_body_at(self.embed(tokens_BT), state, seq, tokens_BT, None)

    def _step_body_at(
        self, x_BTD: Tensor, state: ModelState, seq: Layout, tokens_BT: Tensor | None, inputs: list[Tensor] | None
    ) -> Tensor:
        x_BTD = self.at_positions(x_BTD, seq)
        for index, (block, layer) in enumerate(zip(self.blocks, state.layers, strict=True)):
            if self.ngrams is not None and state.ngrams is not None and index == self.ngram_layer:
                x_BTD = x_BTD + self.ngrams.step(_needed(tokens_BT), state.ngrams, seq).to(x_BTD.dtype)
            if inputs is not None:
                inputs.append(x_BTD)
            x_BTD = block.step(x_BTD, layer, seq)
        return self.head_input(x_BTD)

    def head_input(self, x_BTD: Tensor) -> Tensor:
        """What the head gets of the last layer's output: the final norm, and µP's factor."""
        x_BTD = self.norm(x_BTD)
        return x_BTD if self.output_multiplier == 1 else x_BTD * self.output_multiplier

    def check_recordable(self) -> None:
        """Raise `UsageError` for experts of a dtype that CUDA multiplies without a graph only."""
        check_recordable(self)

    def at_positions(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        """The first layer's input: embeddings in the residual stream's dtype, with those of positions added."""
        if self.config.residual == "autocast":
            x_BTD = x_BTD.to(product_dtype(x_BTD))
        if self.positions is None:
            return x_BTD
        if seq.longest > self.config.learned_positions:
            raise UsageError(
                f"a document of {seq.longest} tokens is longer than the model's "
                f"{self.config.learned_positions} learned positions"
            )
        return x_BTD + self.positions(seq.position_BT).to(x_BTD.dtype)

    def _token_error(self, tokens_BT: Tensor) -> UsageError | None:
        """Why the embedding refuses the tokens; None if the tokens are not the reason."""
        outside = tokens_BT[(tokens_BT < 0) | (tokens_BT >= self.config.vocab_size)]
        if not len(outside):
            return None
        return UsageError(
            f"token {outside[0]} is outside the vocabulary of {self.config.vocab_size}: must be in "
            f"[0, {self.config.vocab_size})"
        )


def _needed(tokens_BT: Tensor | None) -> Tensor:
    if tokens_BT is None:
        raise UsageError("embeddings are given without ids, which this model needs for its embeddings of n-grams")
    return tokens_BT
