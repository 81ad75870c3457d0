"""States that are copied, cut, reordered and grown go on as those of the same texts do."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState
from swamla.ops.layout import Layout
from swamla.ops.linear import matrix_of

from .helpers import MIXERS, assert_close, build_model, hybrid_config, random_tokens

TIME, MORE = 21, 9  # the ring of swa, 11 slots, has turned
every_mixer = pytest.mark.parametrize("kind", MIXERS)


def model_of(kind: str) -> LanguageModel:
    """Two layers of a mixer, the second with a convolution before it."""
    config = hybrid_config(pattern=(kind,))
    block = config.blocks[kind]
    blocks = {kind: block, "conv": replace(block, conv=3)}
    return build_model(replace(config, blocks=blocks, pattern=(kind, "conv"))).eval()


def after(
    model: LanguageModel, tokens_BT: Tensor, max_len: int = TIME + MORE, lengths: list[int] | None = None
) -> ModelState:
    """The state after these tokens, of each row only the first of `lengths`."""
    state = model.init_state(len(tokens_BT), max_len)
    length_B1 = torch.tensor(lengths or [tokens_BT.shape[1]] * len(tokens_BT))[:, None]
    model.step(tokens_BT, state, torch.arange(tokens_BT.shape[1]) < length_B1)
    return state


def tensors(state: ModelState) -> list[Tensor]:
    return [tensor.clone() for tensor in (*state.tensors(), state.length_B)]


@every_mixer
@torch.no_grad()
def test_a_snapshot_is_left_alone_by_later_steps_and_continues_as_the_state_did(kind: str) -> None:
    model, tokens = model_of(kind), random_tokens(3, TIME + MORE)
    state = after(model, tokens[:, :TIME], lengths=[TIME, 4, 17])
    snapshot = state.snapshot()
    before = tensors(snapshot)
    expected = model.step(tokens[:, TIME:], state)
    assert all(torch.equal(a, b) for a, b in zip(tensors(snapshot), before, strict=True))
    assert (snapshot.longest, snapshot.uniform_length) == (TIME, None)
    assert torch.equal(model.step(tokens[:, TIME:], snapshot), expected)


@every_mixer
@pytest.mark.parametrize("lengths", [[TIME] * 3, [TIME, 4, 17]], ids=["uniform", "mixed"])
@torch.no_grad()
def test_selected_rows_continue_as_the_rows_that_they_are(kind: str, lengths: list[int]) -> None:
    model, tokens = model_of(kind), random_tokens(3, TIME)
    rows, more = torch.tensor([2, 1, 1, 2]), random_tokens(4, MORE, seed=2)
    selected = after(model, tokens, lengths=lengths).select(rows)
    alone = after(model, tokens[rows], lengths=[lengths[row] for row in rows])
    assert (selected.longest, selected.uniform_length) == (alone.longest, alone.uniform_length)
    for time in range(MORE):
        one = more[:, time : time + 1]
        assert_close(model.step(one, selected), model.step(one, alone), 1e-5, f"token {time}")


@every_mixer
@pytest.mark.parametrize("lengths", [[TIME] * 2, [TIME, 4]], ids=["uniform", "mixed"])
@torch.no_grad()
def test_a_state_that_grew_is_one_that_was_made_so(kind: str, lengths: list[int]) -> None:
    model, tokens, more = model_of(kind), random_tokens(2, TIME), random_tokens(2, MORE, seed=2)
    state, roomy = after(model, tokens, TIME, lengths), after(model, tokens, TIME + MORE, lengths)
    model.grow(state, TIME + MORE)
    assert (state.max_len, state.nbytes) == (roomy.max_len, roomy.nbytes)
    assert torch.equal(model.step(more, state), model.step(more, roomy))


@every_mixer
@torch.no_grad()
def test_a_copied_row_and_a_view_of_the_first_rows_continue_as_the_sequence_does(kind: str) -> None:
    model, tokens, more = model_of(kind), random_tokens(2, TIME), random_tokens(2, MORE, seed=2)
    state, pool = after(model, tokens, TIME), model.init_state(3, TIME + MORE)
    for tensor in pool.tensors():
        tensor.fill_(-1 if tensor.dtype == torch.int64 else torch.nan)  # of a sequence that was there before
    pool.copy_row(1, state, 0)
    pool.copy_row(0, state, 1)
    view = pool.first(2)
    assert (view.longest, view.uniform_length) == (TIME, TIME)
    alone = after(model, tokens[[1, 0]])
    assert_close(model.step(more, view), model.step(more, alone), 1e-5)
    assert pool.length_B.tolist() == [TIME + MORE, TIME + MORE, 0]
    assert_close(pool.tensors()[0][:2], alone.tensors()[0], 1e-5)


def test_growing_keeps_what_has_room_and_knows_learned_positions() -> None:
    model = build_model(replace(hybrid_config(), learned_positions=30)).eval()
    state = after(model, random_tokens(1, TIME), 25)
    before = state.tensors()
    model.grow(state, 24)
    assert state.max_len == 25
    assert all(a is b for a, b in zip(state.tensors(), before, strict=True))
    with pytest.raises(UsageError, match="31 tokens are more than the model's 30 learned positions"):
        model.grow(state, 31)


@torch.no_grad()
def test_body_and_step_body_take_embeddings_and_give_every_layers_input() -> None:
    model, tokens = build_model(replace(hybrid_config(), ngram_buckets=())).eval(), random_tokens(2, TIME)
    x_BTD, state = model.embed(tokens), model.init_state(2, TIME)
    inputs: list[Tensor] = []
    stepped: list[Tensor] = []
    found, _ = model.body(x_BTD, Layout.one_document_per_row(2, TIME), inputs=inputs)
    assert_close(model.logits(found), model(tokens), 1e-6)
    assert_close(model.step_body(x_BTD, state, inputs=stepped), found, 1e-5)
    assert len(inputs) == len(stepped) == model.config.depth
    for index, (one, other) in enumerate(zip(inputs, stepped, strict=True)):
        assert_close(other, one, 1e-5, f"input of layer {index}")
    assert torch.equal(inputs[0], x_BTD)


def test_embeddings_without_ids_are_refused_where_ngrams_need_the_ids() -> None:
    model = build_model(hybrid_config()).eval()
    with pytest.raises(UsageError, match="embeddings are given without ids"):
        model.step_body(model.embed(random_tokens(1, 2)), model.init_state(1, 2))


class Adapted(torch.nn.Module):
    """A linear layer and a low-rank adapter, as LoRA puts it in the layer's place."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.a = torch.nn.Linear(base.in_features, 2, bias=False)
        self.b = torch.nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


@every_mixer
@torch.no_grad()
def test_adapters_in_place_of_linear_layers_decode_as_they_train(kind: str) -> None:
    torch.manual_seed(0)
    model, tokens = model_of(kind), random_tokens(2, TIME)
    plain = model(tokens)
    for block in model.blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear:
                    setattr(parent, name, Adapted(layer))
    expected = model(tokens)
    assert (expected - plain).abs().max() > 0.1
    state = after(model, tokens[:, :-1])
    assert_close(model.step(tokens[:, -1:], state)[:, 0], expected[:, -1], 1e-5)


def test_the_matrix_of_a_layer_with_a_bias_and_an_adapter_is_its_linear_part() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    assert matrix_of(layer) is layer.weight
    adapted = Adapted(layer)
    assert_close(matrix_of(adapted), layer.weight + adapted.b.weight @ adapted.a.weight, 1e-6)


def test_rows_of_a_state_on_an_accelerator_may_be_named_by_indices_on_the_host() -> None:
    """With tensors that have a device and a shape alone, and refuse another's as a GPU does."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state = ModelState(layers=[], length_B=torch.zeros(3, dtype=torch.int64, device="cuda"), max_len=4)
        assert state.select(torch.tensor([2, 0])).length_B.device.type == "cuda"
