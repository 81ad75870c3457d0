"""A language model with the interface of transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as hf_init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from swamla.errors import UsageError
from swamla.interop.architectures.swamla import CODE, SOURCE
from swamla.interop.transformers.backbone import SAID_TWICE, Backbone
from swamla.interop.transformers.cache import SwamlaCache
from swamla.interop.transformers.config import SwamlaConfig
from swamla.model.block import Block
from swamla.model.initial import Initializer, initial_tensor
from swamla.model.language_model import NO_LABEL

OF_GENERATE = {"tokenizer", "assistant_tokenizer"}  # `generate`'s own arguments, which it passes on


@dataclass(frozen=True)
class InitialWeights:
    """The initial weights of a seed. names: of the model's modules, by their `id`."""

    seed: int
    initializers: dict[str, Initializer]
    names: dict[int, str]

    def fill(self, module: nn.Module) -> None:
        """Set the module's own parameters, but for those that are loaded or have no storage."""
        prefix = self.names[id(module)]
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                full = f"{prefix}.{name}" if prefix else name
                parameter.copy_(initial_tensor(self.initializers[full], parameter.shape, self.seed, full))


class RecomputedBlock(GradientCheckpointingLayer, Block):
    """A block that `gradient_checkpointing_enable` recomputes in the backward pass."""


class SwamlaForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel`, the attribute `model`, with the interface of transformers.

    Padding, on either side or within, is left out: the tokens of a row are moved together, and results back to their
    places. At padding, results are those of the last token before it.
    """

    config_class = SwamlaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    _is_stateful = True
    _no_split_modules = ["RecomputedBlock"]  # noqa: RUF012 - transformers' own names and types, as are the others
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: SwamlaConfig) -> None:
        super().__init__(config)
        self._plan: InitialWeights | None = None
        self.model = Backbone(config.build_config())
        # Tied by transformers alone, after loading: it takes a weight for loaded if it is tied before.
        self.model.head = nn.Linear(self.model.config.width, self.model.config.vocab_size, bias=False)
        for block in self.model.blocks:
            block.__class__ = RecomputedBlock  # the same module; its `forward` alone is wrapped
        self.post_init()

    def initialize_weights(self) -> None:
        """swamla's initial weights for all that are not loaded, by one seed from torch's global generator."""
        seed = int(torch.randint(2**63 - 1, (), device="cpu").item())
        names = {id(module): name for name, module in self.model.named_modules()}
        self._plan = InitialWeights(seed, self.model.all_initializers(), names)
        try:
            super().initialize_weights()
        finally:
            self._plan = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Those of one module, without the modules in it; transformers calls it for each."""
        if self._plan is not None and id(module) in self._plan.names:
            self._plan.fill(module)
        elif isinstance(module, nn.Embedding | nn.Linear):  # which resizing makes, in place of another
            hf_init.normal_(module.weight, 0.0, self.model.config.init_std)
        for buffer in module.buffers(recurse=False):
            hf_init.zeros_(buffer)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *arguments: Any, **settings: Any) -> nn.Embedding:
        """As in transformers; the language model's own config follows."""
        embedding = super().resize_token_embeddings(*arguments, **settings)
        self.model.config = replace(self.model.config, vocab_size=embedding.num_embeddings)
        self.model.head.out_features = embedding.num_embeddings
        return embedding

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this module into every folder that it saves."""

    def save_pretrained(self, save_directory: Any, *arguments: Any, **settings: Any) -> None:
        """As in transformers, and the small file that `trust_remote_code=True` reads."""
        super().save_pretrained(save_directory, *arguments, **settings)
        (Path(save_directory) / f"{CODE}.py").write_text(SOURCE, encoding="utf-8")

    @property
    def init_continuous_batching(self) -> Any:
        """Absent: it is of keys and values in pages, and this model's state is others. `swamla serve` batches so.

        transformers asks by `hasattr`, and its server then answers one request after the other.
        """
        raise AttributeError("init_continuous_batching")

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_length: int
    ) -> None:
        """Give `generate` a cache with room for its longest text."""
        chosen = generation_config.cache_implementation
        if chosen not in (None, "dynamic"):
            raise UsageError(f"cache_implementation = {chosen!r}: must be left out: this model's state is its own")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = SwamlaCache(max_length)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SwamlaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocabulary), and the loss where labels are given.

        input_ids or inputs_embeds: (B, T) or (B, T, D).  attention_mask: (B, T), with a cache also of all columns so
        far; 0 for padding.  position_ids: (B, T) or (1, T); a document begins wherever they restart at 0, and nothing
        sees beyond its document. With a cache they follow from it.
        labels: (B, T), each position's own id, shifted here; -100 for none. What would be predicted at padding does not
        count. In training mode the losses of routers are added, as the model's settings ask for them.
        past_key_values, use_cache: a pass that reads or fills a cache records no gradients. By default a cache is
        returned where gradients are disabled and no labels are given.
        others: `shift_labels`, each position's next id in place of labels; `num_items_in_batch`, what the sum of losses
        is divided by, instead of the number of labels; `cu_seq_lens_q`, where the documents of a single row begin, as
        `DataCollatorWithFlattening` says it, and what says the same to other models (`SAID_TWICE`). Not in the
        signature: `Trainer` takes every name there with "label" in it for one that evaluation needs.
        Raises `UsageError` for inputs that contradict each other, and for what this model does not have.
        """
        labels_given, cu_seq_lens = _labels(labels, others), others.pop("cu_seq_lens_q", None)
        if unknown := others.keys() - SAID_TWICE - OF_GENERATE:
            raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise UsageError("output_attentions = True: must be left out: attention weights are never held")
        cache = self._cache(past_key_values, use_cache, has_labels=labels_given is not None)
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        rows, last_BTD, statistics, inputs = self.model.read(
            input_ids, attention_mask, position_ids, inputs_embeds, cu_seq_lens, cache, with_inputs=bool(asked)
        )
        hidden_states = None if inputs is None else tuple(rows.apart(x) for x in (*inputs, last_BTD))
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(rows.apart(last_BTD)[:, kept])
        loss = None
        if labels_given is not None:
            loss = self._loss(logits, statistics, **rows.predicted(**labels_given))
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=hidden_states)

    def _cache(self, given: Any, use_cache: bool | None, *, has_labels: bool) -> SwamlaCache | None:
        """The cache of a pass. Raises `UsageError` for one of another kind."""
        if given is not None and not isinstance(given, SwamlaCache):
            kind = type(given).__name__
            raise UsageError(f"past_key_values is a {kind}: must be a SwamlaCache, such as an earlier pass returned")
        if use_cache is None:
            use_cache = self.config.use_cache and not has_labels and not torch.is_grad_enabled()
        return SwamlaCache() if given is None and use_cache else given

    def _loss(self, logits: Tensor, statistics: dict[str, Tensor], **labels: Any) -> Tensor:
        """transformers' loss; in training plus Σ of the routers' losses, which have to have gradients."""
        loss: Tensor = self.loss_function(logits=logits, vocab_size=self.config.vocab_size, **labels)
        routers = [value for name, value in statistics.items() if name.startswith("loss/")]
        if not self.training or not routers:
            return loss
        if torch.is_grad_enabled() and not all(each.requires_grad for each in routers):
            raise UsageError("use_reentrant = True loses the gradients of the routers' losses: must be False")
        count = labels["num_items_in_batch"]
        if count is None:
            count = (labels["shift_labels"] != NO_LABEL).sum().clamp(min=1)
        return loss + torch.stack(routers).sum() / count


def _labels(labels: Tensor | None, others: dict[str, Any]) -> dict[str, Any] | None:
    """What the loss is of, taken out of `others`; None without labels."""
    shifted, count = others.pop("shift_labels", None), others.pop("num_items_in_batch", None)
    if labels is None and shifted is None:
        return None
    return {"labels": labels, "shift_labels": shifted, "num_items_in_batch": count}
