"""The language model: embedding, a stack of blocks, final norm, head."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.config import within
from swamla.errors import UsageError, require
from swamla.model.block import Block, BlockConfig, Checkpointing
from swamla.model.initial import Draw, Unfilled, constant, drawn, normal, own_starts
from swamla.model.norm import NormConfig, RMSNormConfig
from swamla.model.state import ModelState
from swamla.ops import chunked_cross_entropy
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A decoder-only language model.

    vocab_size: ids the model knows; 0 stands for as many as the tokenizer has, and is settled before `build`.
    width: of the residual stream.
    blocks: what a layer may be, by name.
    pattern: the name of every layer's block, bottom first; its length is the depth.
    norm: before every mixer and FFN, and before the head.
    tied_head: whether the head shares the embedding's weights.
    learned_positions: how many learned position vectors to add, then the longest document it can read; 0 for none.
    dropout: of the embeddings and of what mixers and FFNs add, in training.
    init_std: standard deviation of the initial weights; output projections get it / √(2 · depth).
    """

    vocab_size: int = 0
    width: int
    blocks: dict[str, BlockConfig]
    pattern: tuple[str, ...]
    norm: NormConfig = field(default_factory=RMSNormConfig)
    tied_head: bool = True
    learned_positions: int = 0
    dropout: float = 0.0
    init_std: float = 0.02

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
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1), e.g. 0.1")
        require(self.init_std > 0, "init_std", self.init_std, "must be > 0, e.g. 0.02")
        for name, block in self.blocks.items():  # what does not fit the width is found now, not when it is built
            with within(f"blocks.{name}.mixer"):
                block.mixer.n_parameters(self.width)
            with within(f"blocks.{name}.ffn"):
                block.ffn.n_parameters(self.width)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.pattern)

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The block of every layer, bottom first."""
        return tuple(self.blocks[name] for name in self.pattern)

    def with_backends(self, paths: Mapping[str, str]) -> "LanguageModelConfig":
        """The same model, mixers of these blocks by the backends given, but for those that name one themselves."""
        blocks = {
            name: replace(block, mixer=block.mixer.with_backend(paths[name])) if name in paths else block
            for name, block in self.blocks.items()
        }
        return replace(self, blocks=blocks)

    def build(self, seed: int | None = None) -> "LanguageModel":
        """The model with the initial weights of `seed`, or of a seed drawn from torch's random generator."""
        model, device = self.skeleton(), torch.get_default_device()
        if device.type == "meta":
            return model
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu").item())
        model.to_empty(device=device)
        model.tie()
        model.reset_weights(seed)
        return model

    def skeleton(self) -> "LanguageModel":
        """The model without numbers, on torch's meta device: shapes and names alone."""
        require(self.vocab_size > 0, "vocab_size", self.vocab_size, "must be > 0 to build the model")
        with torch.device("meta"), Unfilled():
            return LanguageModel(self)


class LanguageModel(nn.Module):
    """Next-token logits from tokens. `step` after `step` gives what `forward` gives on the whole.

    Its weights mean nothing before `reset_weights`, which `LanguageModelConfig.build` calls. known_ids: how many of the
    vocabulary's ids, the first ones, stand for text; the others, of a vocabulary rounded up, are never generated. None
    where nobody said, and all may be.
    """

    known_ids: int | None = None

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.learned_positions, config.width) if config.learned_positions else None
        layers = [block.build(config.width, config.norm, config.dropout) for block in config.layers]
        self.blocks: Sequence[Block] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = config.norm.build(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let the head be the embedding where the config says so."""
        if self.config.tied_head:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def reset_weights(self, seed: int, within: str = "") -> None:
        """The initial weights that `seed` stands for, those alone whose names begin with `within`; buffers get 0.

        Normal weights, output projections scaled by depth (GPT-2), zero biases, gains of 1, and what modules draw by
        rules of their own. A parameter's numbers depend on the seed, its name and its shape alone.
        """
        own, outputs = own_starts(self), self._outputs()
        for name, parameter in self.named_parameters():
            if name.startswith(within):
                draw = own[name] if name in own else self._start(name, parameter.ndim, name in outputs)
                parameter.copy_(drawn(draw, parameter.shape, seed, name))
        for name, buffer in self.named_buffers():
            if name.startswith(within):
                buffer.zero_()

    def _outputs(self) -> set[str]:
        """Names of the parameters that write to the residual stream."""
        parts = (
            (f"blocks.{index}.{part}", outputs)
            for index, block in enumerate(self.config.layers)
            for part, outputs in (("mixer", block.mixer.outputs), ("ffn", block.ffn.outputs))
        )
        return {f"{prefix}.{name}" for prefix, outputs in parts for name in outputs}

    def _start(self, name: str, ndim: int, is_output: bool) -> Draw:
        if ndim < 2:
            return constant(0.0 if name.endswith("bias") else 1.0)
        depth_scale = (2 * self.config.depth) ** -0.5 if is_output else 1.0
        return normal(self.config.init_std * depth_scale)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """From now on compute this part of every block again in the backward pass instead of keeping it."""
        for block in self.blocks:
            block.checkpointing = what

    def forward(self, tokens_BT: Tensor, seq: Layout | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of the token after each of tokens (B, T); `seq` says where documents lie."""
        return self.head(self.hidden(tokens_BT, seq)[0])

    def hidden(self, tokens_BT: Tensor, seq: Layout | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the head sees, (B, T, D), and the FFNs' statistics by layer."""
        if tokens_BT.ndim != 2 or not tokens_BT.numel():
            raise UsageError(
                f"tokens have the shape {tuple(tokens_BT.shape)}: must be (batch, time), one token at least"
            )
        if seq is None:
            batch, time = tokens_BT.shape
            seq = Layout.one_document_per_row(batch, time, device=tokens_BT.device)
        x_BTD = self._embed(tokens_BT, seq)
        if self.config.dropout:
            x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        statistics = {}
        for index, block in enumerate(self.blocks):
            x_BTD, found = block(x_BTD, seq)
            statistics.update({f"{name}/{index}": value for name, value in found.items()})
        return self.norm(x_BTD), statistics

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of −log p(label) in nats over labels that are not -100, and the FFNs' statistics as `name/layer`.

        Statistics called "loss/…" belong to what training minimises; they are not part of the sum. The logits are
        never held all at once.
        """
        x_BTD, statistics = self.hidden(tokens_BT, seq)
        return chunked_cross_entropy(x_BTD.flatten(0, 1), self.head.weight, labels_BT.flatten()), statistics

    def rebalance(self, statistics: Mapping[str, Tensor]) -> None:
        """After an optimizer step: let every FFN balance its experts, given the whole batch's statistics."""
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
        """An empty state for `batch` sequences of at most `max_len` tokens; UsageError beyond learned positions."""
        if self.positions is not None and max_len > self.config.learned_positions:
            raise UsageError(
                f"{max_len} tokens are more than the model's {self.config.learned_positions} learned positions"
            )
        dtype, device = dtype or self.embedding.weight.dtype, device or self.device
        layers = [block.mixer.init_state(batch, max_len, dtype=dtype, device=device) for block in self.blocks]
        return ModelState(layers, torch.zeros(batch, dtype=torch.int64, device=device), max_len)

    def step(self, tokens_BT: Tensor, state: ModelState, valid_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of T >= 1 new tokens after those in `state`, which is updated.

        valid_BT marks tokens that count (default all); padding may stand only at the end of a row, and its logits
        mean nothing, but it needs room as tokens do. UsageError when the state is full.
        """
        return self.head(self.read(tokens_BT, state, valid_BT))

    def read(self, tokens_BT: Tensor, state: ModelState, valid_BT: Tensor | None = None) -> Tensor:
        """`step` as far as the head, of what it sees (B, T, D): of a long prompt only the last logits are wanted."""
        if valid_BT is not None and bool(valid_BT.all()):
            valid_BT = None
        seq = state.following(tokens_BT, valid_BT)
        if seq.end > state.max_len:
            raise UsageError(f"{seq.end} tokens do not fit a state made for {state.max_len}")
        x_BTD = self.read_at(tokens_BT, state, seq)
        state.advance(tokens_BT.shape[1], valid_BT)
        return x_BTD

    def read_at(self, tokens_BT: Tensor, state: ModelState, seq: Layout) -> Tensor:
        """`read` where it is known where the tokens lie; the layers' states are updated, what rows hold is not."""
        x_BTD = self._embed(tokens_BT, seq)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x_BTD = block.step(x_BTD, layer, seq)
        return self.norm(x_BTD)

    def _embed(self, tokens_BT: Tensor, seq: Layout) -> Tensor:
        try:
            x_BTD = self.embedding(tokens_BT)
        except (IndexError, RuntimeError) as error:  # on a CPU alone: CUDA tells later, and by ending the process
            raise self._explain(tokens_BT) or error from None
        if self.positions is None:
            return x_BTD
        if seq.longest > self.config.learned_positions:
            raise UsageError(
                f"a document of {seq.longest} tokens is longer than the model's "
                f"{self.config.learned_positions} learned positions"
            )
        return x_BTD + self.positions(seq.position_BT)

    def _explain(self, tokens_BT: Tensor) -> UsageError | None:
        """What is wrong with tokens that the embedding refused."""
        if tokens_BT.dtype not in (torch.int32, torch.int64):
            return UsageError(f"tokens are of {tokens_BT.dtype}: must be of torch.int64")
        outside = tokens_BT[(tokens_BT < 0) | (tokens_BT >= self.config.vocab_size)]
        if not len(outside):
            return None
        return UsageError(f"token {outside[0]} is outside the vocabulary of {self.config.vocab_size}")
