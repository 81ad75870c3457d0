"""The state: step after step, in any split and beside any neighbours, is forward on the whole."""

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.model.accounting import state_bytes
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mixer import Mixer
from swamla.model.mixers.swa import SWAConfig
from swamla.ops.layout import Layout

from .helpers import (
    FFNS,
    MIXERS,
    WIDTH,
    WINDOW,
    assert_close,
    build_mixer,
    build_model,
    hybrid_config,
    random_input,
    random_tokens,
    whole,
)

SHORT, LONG = 13, 150
every_mixer = pytest.mark.parametrize("kind", MIXERS)


def in_pieces(mixer: Mixer, x_BTD: Tensor, cuts: list[int]) -> Tensor:
    """The mixer's outputs when x arrives cut at `cuts`; NaN in outputs that a step leaves out."""
    batch, time, _ = x_BTD.shape
    state = mixer.init_state(batch, time, dtype=torch.float32, device="cpu")
    out = torch.full_like(x_BTD, float("nan"))
    for begin, end in pairwise([0, *cuts, time]):
        seq = Layout.continuing(torch.full((batch,), begin), torch.ones(batch, end - begin, dtype=torch.bool))
        out[:, begin:end] = mixer.step(x_BTD[:, begin:end], state, seq)
    return out


def random_cuts(time: int, seed: int) -> list[int]:
    """Some of 1 … time − 1, in order."""
    generator = random.Random(seed)
    return sorted(generator.sample(range(1, time), generator.randint(1, 12)))


@every_mixer
@torch.no_grad()
def test_a_mixer_stepped_through_every_two_way_split_is_forward(kind: str) -> None:
    mixer, x = build_mixer(MIXERS[kind]), random_input(2, SHORT)
    expected = mixer(x, whole(x))
    for cut in range(1, SHORT):
        assert_close(in_pieces(mixer, x, [cut]), expected, 1e-5, f"cut at {cut}")


@every_mixer
@torch.no_grad()
def test_a_mixer_stepped_token_by_token_through_many_windows_and_chunks_is_forward(kind: str) -> None:
    mixer, x = build_mixer(MIXERS[kind]), random_input(1, LONG)
    assert_close(in_pieces(mixer, x, list(range(1, LONG))), mixer(x, whole(x)), 1e-5)


@every_mixer
@torch.no_grad()
def test_a_mixer_stepped_through_random_splits_of_many_windows_and_chunks_is_forward(kind: str) -> None:
    mixer, x = build_mixer(MIXERS[kind]), random_input(2, LONG)
    expected = mixer(x, whole(x))
    for seed in range(6):
        cuts = random_cuts(LONG, seed)
        assert_close(in_pieces(mixer, x, cuts), expected, 1e-5, f"cut at {cuts}")


@pytest.mark.parametrize(
    "cuts",
    [
        [],
        [LONG - 1],
        [WINDOW],
        [WINDOW - 1, WINDOW],
        [WINDOW, 2 * WINDOW, 3 * WINDOW],
        [1, 64, 65],
        [63, 127, 128, 129],
    ],
    ids=str,
)
@every_mixer
@torch.no_grad()
def test_prefill_longer_than_the_window_and_cuts_at_its_edges_are_forward(kind: str, cuts: list[int]) -> None:
    mixer, x = build_mixer(MIXERS[kind]), random_input(1, LONG)
    assert_close(in_pieces(mixer, x, cuts), mixer(x, whole(x)), 1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 5), (3, 0), (3, 30), (7, 2), (12, 12), (40, 4)])
@torch.no_grad()
def test_every_shape_of_ring_gives_forward(window: int, sinks: int) -> None:
    """More sinks than prompt, no sinks, a window of one, a ring that goes round many times or not once."""
    mixer = build_mixer(SWAConfig(n_heads=4, window=window, sinks=sinks))
    x = random_input(1, 45)
    expected = mixer(x, whole(x))
    for cuts in ([], list(range(1, 45)), [20], [2, 44], random_cuts(45, 0), random_cuts(45, 1)):
        assert_close(in_pieces(mixer, x, cuts), expected, 1e-5, f"cut at {cuts}")


@pytest.mark.parametrize("conv", [1, 2, 4, 7])
@torch.no_grad()
def test_every_width_of_convolution_gives_forward(conv: int) -> None:
    mixer = build_mixer(GDNConfig(n_heads=2, conv=conv))
    x = random_input(1, 20)
    expected = mixer(x, whole(x))
    for cuts in ([], list(range(1, 20)), [1], [2, 4, 5, 11], [19]):
        assert_close(in_pieces(mixer, x, cuts), expected, 1e-5, f"cut at {cuts}")


def step_ragged(mixer: Mixer, x_BTD: Tensor, lengths: list[int], pieces: list[list[int]]) -> list[Tensor]:
    """Outputs of each row when piece i brings `pieces[i][row]` tokens of it, padded at the right with NaN-free junk."""
    state = mixer.init_state(len(lengths), max(lengths) + max(map(max, pieces)), dtype=torch.float32, device="cpu")
    taken, out = [0] * len(lengths), [[] for _ in lengths]
    for counts in pieces:
        longest = max(counts)
        valid = torch.arange(longest) < torch.tensor(counts)[:, None]
        fed = random_input(len(lengths), longest, seed=99) * 5
        for row, count in enumerate(counts):
            fed[row, :count] = x_BTD[row, taken[row] : taken[row] + count]
        y = mixer.step(fed, state, Layout.continuing(torch.tensor(taken), valid))
        assert torch.isfinite(y).all()
        for row, count in enumerate(counts):
            out[row].append(y[row, :count])
            taken[row] += count
    assert taken == lengths
    return [torch.cat(parts) for parts in out]


@pytest.mark.parametrize(
    "pieces",
    [
        [[3, 17, 9, 1]],
        [[3, 17, 9, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[2, 0, 8, 1], [5, 20, 0, 1], [1, 1, 30, 1], [4, 2, 1, 9]],
        [[40, 10, 0, 64], [0, 10, 1, 65], [1, 0, 9, 1]],
    ],
    ids=str,
)
@every_mixer
@torch.no_grad()
def test_rows_of_unequal_lengths_are_each_row_alone(kind: str, pieces: list[list[int]]) -> None:
    mixer = build_mixer(MIXERS[kind])
    lengths = [sum(counts) for counts in zip(*pieces, strict=True)]
    x = random_input(4, max(lengths))
    for row, found in enumerate(step_ragged(mixer, x, lengths, pieces)):
        alone = x[row : row + 1, : lengths[row]]
        assert_close(found, mixer(alone, whole(alone))[0], 1e-5, f"row {row}")


@every_mixer
@torch.no_grad()
def test_the_state_is_mutated_in_place_and_weighs_what_accounting_says(kind: str) -> None:
    config = MIXERS[kind]
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)):
        mixer = build_mixer(config)
        state = mixer.init_state(3, 29, dtype=dtype, device="cpu")
        assert state.nbytes == 3 * config.state_bytes(WIDTH, 29, size)
        addresses = [tensor.data_ptr() for tensor in state.tensors()]
        before = [tensor.clone() for tensor in state.tensors()]
        seq = Layout.continuing(torch.zeros(3, dtype=torch.int64), torch.ones(3, 11, dtype=torch.bool))
        assert mixer.step(random_input(3, 11), state, seq).dtype == torch.float32
        assert [tensor.data_ptr() for tensor in state.tensors()] == addresses
        assert not any(torch.equal(old, new) for old, new in zip(before, state.tensors(), strict=True))
        assert state.nbytes == 3 * config.state_bytes(WIDTH, 29, size)


@every_mixer
@torch.no_grad()
def test_a_bfloat16_state_stays_close_to_forward(kind: str) -> None:
    mixer, x = build_mixer(MIXERS[kind]), random_input(1, 40)
    state = mixer.init_state(1, 40, dtype=torch.bfloat16, device="cpu")
    out = [
        mixer.step(x[:, t : t + 1], state, Layout.continuing(torch.tensor([t]), torch.ones(1, 1, dtype=torch.bool)))
        for t in range(40)
    ]
    expected = mixer(x, whole(x))
    assert (torch.cat(out, dim=1) - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@torch.no_grad()
def test_the_whole_model_stepped_in_any_split_is_forward(backend: str) -> None:
    model, tokens = build_model(hybrid_config(backend)).eval(), random_tokens(2, LONG)
    expected = model(tokens)
    splits = [[], list(range(1, LONG)), [WINDOW], [64, 65], random_cuts(LONG, 3), random_cuts(LONG, 4)]
    for cuts in splits if backend == "auto" else [[64, 65], random_cuts(LONG, 3)]:
        state = model.init_state(2, LONG)
        pieces = [model.step(tokens[:, begin:end], state) for begin, end in pairwise([0, *cuts, LONG])]
        assert_close(torch.cat(pieces, dim=1), expected, 1e-4, f"cut at {cuts}")
        assert state.length_B.tolist() == [LONG, LONG]


@pytest.mark.parametrize("ffn", FFNS)
@torch.no_grad()
def test_every_two_way_split_of_a_short_prompt_gives_the_models_logits(ffn: str) -> None:
    model, tokens = build_model(hybrid_config(ffn=ffn)).eval(), random_tokens(1, SHORT)
    expected = model(tokens)
    for cut in range(1, SHORT):
        state = model.init_state(1, SHORT)
        found = torch.cat((model.step(tokens[:, :cut], state), model.step(tokens[:, cut:], state)), dim=1)
        assert_close(found, expected, 1e-4, f"cut at {cut}")


@pytest.mark.parametrize("ffn", FFNS)
@torch.no_grad()
def test_the_model_steps_rows_of_unequal_lengths_as_each_alone(ffn: str) -> None:
    model, tokens = build_model(hybrid_config(ffn=ffn)).eval(), random_tokens(3, 40)
    lengths = torch.tensor([5, 40, 17])
    valid = torch.arange(40) < lengths[:, None]
    state = model.init_state(3, 42)
    first = model.step(tokens, state, valid)
    assert state.length_B.tolist() == lengths.tolist()
    more = random_tokens(3, 2, seed=5)
    then = torch.cat([model.step(more[:, :1], state), model.step(more[:, 1:], state)], dim=1)
    for row, length in enumerate(lengths.tolist()):
        whole_row = torch.cat((tokens[row, :length], more[row]))[None]
        expected = model(whole_row)[0]
        assert_close(first[row, :length], expected[:length], 1e-4, f"prompt of row {row}")
        assert_close(then[row], expected[length:], 1e-4, f"after the prompt of row {row}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 50), (3, 1000)])
def test_the_models_state_weighs_what_accounting_says(batch: int, length: int, dtype: torch.dtype) -> None:
    config = hybrid_config()
    state = config.build().init_state(batch, length, dtype=dtype)
    assert state.nbytes == state_bytes(config, length, batch=batch, element_bytes=dtype.itemsize)


def test_only_full_attention_has_a_state_that_grows() -> None:
    def at(kind: str, length: int) -> int:
        return MIXERS[kind].state_bytes(WIDTH, length, 2)

    assert at("swa", 10) == at("swa", 10_000)
    assert at("gdn", 10) == at("gdn", 10_000)
    assert at("mha", 20) == 2 * at("mha", 10)
    assert at("mla", 20) == 2 * at("mla", 10)
    assert at("latent", 20) == 2 * at("latent", 10)


def test_more_tokens_than_the_state_holds_are_refused_and_leave_it_as_it_was() -> None:
    model = build_model(hybrid_config()).eval()
    state = model.init_state(1, 10)
    with torch.no_grad():
        model.step(random_tokens(1, 8), state)
    before = [tensor.clone() for tensor in state.tensors()]
    with pytest.raises(UsageError, match="11 tokens do not fit a state made for 10"):
        model.step(random_tokens(1, 3), state)
    after = state.tensors()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert state.length_B.tolist() == [8]
