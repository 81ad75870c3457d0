"""A language model that transformers can call without its head, as trl's losses do."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from swamla.errors import UsageError
from swamla.interop.transformers.cache import SwamlaCache
from swamla.interop.transformers.rows import Rows
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout

UNSET = ("use_cache", "output_attentions", "output_hidden_states", "past_key_values")  # what peft and trl pass unset
SAID_TWICE = {"cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # what `cu_seq_lens_q` says, for other models


class Read(NamedTuple):
    """Rows that were read, where their tokens stand together.

    last_BTD: the head's input.  statistics: of the FFNs.  inputs: of the layers, if they were asked for.
    """

    rows: Rows
    last_BTD: Tensor
    statistics: dict[str, Tensor]
    inputs: list[Tensor] | None


class Backbone(LanguageModel):
    """The language model, which called by transformers' names gives the head's input in place of logits.

    trl multiplies it with the head in pieces, so that it never holds all logits.
    """

    def forward(
        self, tokens_BT: Tensor | None = None, seq: Layout | None = None, *, labels: Tensor | None = None, **theirs: Any
    ) -> Any:
        """As in `LanguageModel`; with `input_ids` or `inputs_embeds` in place of tokens, what `_last_hidden` gives."""
        if tokens_BT is None:
            return self._last_hidden(**theirs)
        return super().forward(tokens_BT, seq, labels=labels)

    def _last_hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutput:
        """The head's input, `last_hidden_state` (B, T, D); arguments as for `SwamlaForCausalLM`, without a cache.

        Raises `UsageError` in training if routers have losses: who calls this computes the loss without them.
        """
        for name in UNSET:
            if others.pop(name, None):
                raise UsageError(f"{name} is given: must be left out where the model is called without its head")
        if unknown := others.keys() - SAID_TWICE - {"return_dict"}:
            raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
        read = self.read(input_ids, attention_mask, position_ids, inputs_embeds, cu_seq_lens_q)
        if self.training and any(name.startswith("loss/") for name in read.statistics):
            raise UsageError(
                "the loss is computed outside of the model, which loses the routers' `aux_loss` and `z_loss`: "
                "they must be 0 in the model's settings, or use transformers' own Trainer"
            )
        return BaseModelOutput(last_hidden_state=read.rows.apart(read.last_BTD))

    def read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cu_seq_lens: Tensor | None,
        cache: SwamlaCache | None = None,
        *,
        with_inputs: bool = False,
    ) -> Read:
        """The body's results for rows with padding and documents. cache: what the rows continue; it is updated."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give either input_ids or inputs_embeds")
        x_BTD = inputs_embeds if input_ids is None else self.embed(input_ids)
        assert x_BTD is not None
        rows = Rows.of(x_BTD, attention_mask, position_ids, cu_seq_lens, past=None if cache is None else cache.columns)
        inputs: list[Tensor] | None = [] if with_inputs else None
        tokens_BT = None if input_ids is None else rows.together(input_ids)
        if cache is None:
            return Read(rows, *self.body(rows.together(x_BTD), rows.layout(), tokens_BT, inputs=inputs), inputs)
        with torch.no_grad():
            state = cache.room_for(self, x_BTD)
            last_BTD = self.step_body(rows.together(x_BTD), state, rows.valid_BT, tokens_BT, inputs=inputs)
        cache.columns += x_BTD.shape[1]
        return Read(rows, last_BTD, {}, inputs)
