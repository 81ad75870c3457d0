"""The decoding state as transformers' cache."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from swamla.errors import UsageError
from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState


class SwamlaCache(Cache):
    """The decoding state of a batch, in place of keys and values: one `State` per layer, of whatever kind it is.

    max_len: room for so many tokens per row from the start; it grows by itself.
    state: None before the first pass.  columns: tokens per row so far, padding included: the attention mask's width.
    """

    def __init__(self, max_len: int = 0) -> None:
        super().__init__(layers=[])
        self.max_len, self.columns = max_len, 0
        self.state: ModelState | None = None

    def room_for(self, model: LanguageModel, x_BTD: Tensor) -> ModelState:
        """The state with room for the tokens x. Raises `UsageError` for another number of rows than it has."""
        batch, time, _ = x_BTD.shape
        if self.state is None:
            max_len = max(self.max_len, time)
            self.state = model.init_state(batch, max_len, dtype=x_BTD.dtype, device=x_BTD.device)
        if len(self.state.length_B) != batch:
            raise UsageError(f"past_key_values hold {len(self.state.length_B)} rows: must be as many as given, {batch}")
        needed = self.state.longest + time
        if needed > self.state.max_len:
            doubled = max(needed, 2 * self.state.max_len)
            limit = model.config.learned_positions
            model.grow(self.state, max(needed, min(doubled, limit)) if limit else doubled)
        return self.state

    def __len__(self) -> int:
        """Number of layers, 0 before the first pass."""
        return 0 if self.state is None else len(self.state.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def snapshot(self) -> "SwamlaCache":
        """A copy that later passes do not change, to continue one text in several ways."""
        copy = SwamlaCache(self.max_len)
        copy.columns, copy.state = self.columns, self.state and self.state.snapshot()
        return copy

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices, in their order."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.state is not None:
            rows = torch.arange(len(self.state.length_B), device=self.state.length_B.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens."""
        self.state, self.columns = None, 0

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first pass."""
        return -1 if self.state is None else len(self.state.length_B)

    @property
    def is_initialized(self) -> bool:
        """Whether a pass has filled it."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """False: a recurrent state cannot be led back."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise `UsageError`: a recurrent state cannot be led back; `snapshot` before, and continue that."""
        if tokens_to_remove:
            raise UsageError(
                "a cache with recurrent layers cannot be cropped: take a snapshot() before, and continue it"
            )
