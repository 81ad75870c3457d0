"""Adapters on every mixer and FFN: the same in training, decoding and merged; gradients in adapters alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from swamla.errors import CorruptError
from swamla.inference.decoding import Decoder, inference_copy
from swamla.inference.sampling import Sampling
from swamla.model import BlockConfig, LanguageModel, LanguageModelConfig
from swamla.model.adapters import attach, is_adapter, merged, places
from swamla.model.ffns.moe import MoEConfig
from swamla.ops.linear import matrix_of

from .helpers import FFNS, MIXERS, WIDTH, assert_close, scramble

RANK, SCALE, IDS = 3, 0.5, (29, 30)
CASES = {**{f"mixer-{kind}": (kind, "dense") for kind in MIXERS}, **{f"ffn-{kind}": ("mha", kind) for kind in FFNS}}
every_part = pytest.mark.parametrize("case", CASES)


def built(case: str, *, tied: bool = True) -> LanguageModel:
    mixer, ffn = CASES[case]
    block = BlockConfig(mixer=MIXERS[mixer], ffn=FFNS[ffn], conv=3)
    config = LanguageModelConfig(vocab_size=31, width=WIDTH, blocks={"a": block}, pattern=("a", "a"), tied_head=tied)
    model = config.build(seed=0).eval()
    scramble(model)
    return model


def with_adapters(model: LanguageModel, *, begun: bool = True, ids: tuple[int, ...] = ()) -> LanguageModel:
    """The model with adapters, begun: no longer at their initial values."""
    attach(model, rank=RANK, scale=SCALE, seed=1, ids=ids)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapters_of(model):
            if begun and name.endswith((".b", ".rows")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if is_adapter(name))


def parted(model: LanguageModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's own weights, and its adapters."""
    found = model.state_dict()
    return {n: t for n, t in found.items() if not is_adapter(n)}, {n: t for n, t in found.items() if is_adapter(n)}


def merged_model(model: LanguageModel) -> LanguageModel:
    plain = model.config.build(seed=5).eval()
    plain.load_state_dict(merged(*parted(model), model.config, origin="here"))
    return plain


def tokens(time: int = 21) -> Tensor:
    return torch.randint(31, (2, time), generator=torch.Generator().manual_seed(3))


@every_part
@torch.no_grad()
def test_new_adapters_change_nothing_and_trained_ones_change_the_output(case: str) -> None:
    model = built(case)
    before = model(tokens())
    names = list(model.state_dict())
    attach(model, rank=RANK, scale=SCALE, seed=1)
    assert [name for name in model.state_dict() if not is_adapter(name)] == names
    assert torch.equal(model(tokens()), before)
    assert (with_adapters(built(case))(tokens()) - before).abs().max() > 1e-2


@every_part
@torch.no_grad()
def test_decoding_with_adapters_is_forward_token_by_token_and_in_pieces(case: str) -> None:
    model = with_adapters(built(case), ids=IDS)
    expected = model(tokens())
    for copy in (model, inference_copy(model)):
        for sizes in ([1] * 21, [5, 1, 8, 7]):
            state, done = copy.init_state(2, 21), []
            for piece in tokens().split(sizes, dim=1):
                done.append(copy.step(piece, state))
            assert_close(torch.cat(done, dim=1), expected, 1e-5, f"pieces {sizes}")


@every_part
@torch.no_grad()
def test_merged_adapters_compute_the_same_whole_and_step_by_step(case: str) -> None:
    model = with_adapters(built(case), ids=IDS)
    plain = merged_model(model)
    assert_close(plain(tokens()), model(tokens()), 1e-5)
    state = plain.init_state(2, 21)
    stepped = torch.cat([plain.step(piece, state) for piece in tokens().split(1, dim=1)], dim=1)
    assert_close(stepped, model(tokens()), 1e-5)


@every_part
def test_gradients_are_in_adapters_alone_and_in_all_of_them_those_of_the_merged_weights(case: str) -> None:
    model = with_adapters(built(case), ids=IDS)
    plain = merged_model(model)
    labels = tokens().roll(-1, dims=1)
    for each in (model, plain):
        total, _ = each.loss(tokens(), labels)
        total.backward()  # type: ignore[no-untyped-call]
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in adapters_of(model)}
    whole = {name: p.grad for name, p in plain.named_parameters()}
    for place in places(model):
        gradient = whole[f"{place.module}.{place.parameter}"]
        assert gradient is not None
        parts = gradient.split(list(place.parts.values()), dim=0 if gradient.ndim == 2 else -1)
        for part, of_part in zip(place.parts, parts, strict=True):
            a, b = (model.get_parameter(f"{place.prefix}{part}.{name}") for name in "ab")
            # The chain rule for W + s · B A, and for experts W + s · A B.
            first, last = (b, a) if gradient.ndim == 2 else (a, b)
            assert first.grad is not None
            assert last.grad is not None
            assert_close(first.grad, SCALE * of_part @ last.mT, 1e-4)
            assert_close(last.grad, SCALE * first.mT @ of_part, 1e-4)
    rows = model.get_parameter("embedding.lora.weight.rows").grad
    table = whole["embedding.weight"]
    assert rows is not None
    assert table is not None
    assert_close(rows, table[list(IDS)], 1e-4)


@every_part
def test_every_matrix_of_a_block_is_adapted_and_nothing_else(case: str) -> None:
    model = built(case)
    found = {f"{place.module}.{place.parameter}" for place in places(model)}
    expected = {
        name
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.ndim > 1 and "conv" not in name and "router" not in name
    } - {name for name, _ in model.named_parameters() if name.endswith("shared_gate")}
    assert found == expected


FUSED = {
    "mha_gated": {"qkv_proj.weight": {"q": 40, "k": 20, "v": 20, "gate": 40}},
    "swa": {"qkv_proj.weight": {"q": 32, "k": 16, "v": 16}},
    "gdn": {"qkvz_proj.weight": {"q": 16, "k": 16, "v": 24, "z": 24}, "ba_proj.weight": {"b": 4, "a": 4}},
    "gdn_latent": {"qkvz_proj.weight": {"q": 10, "v": 10, "z": 24}},
    "kda": {"qkvz_proj.weight": {"q": 32, "k": 32, "v": 24, "z": 6}, "ba_proj.weight": {"b": 4, "a": 6}},
    "latent": {"qc_proj.weight": {"q": 12, "c": 12}, "kv_proj.weight": {"k": 12, "v": 32}},
    "mla": {"kv_b_proj.weight": {"all": 28}, "kv_a_proj_with_mqa.weight": {"all": 16}},
}


@pytest.mark.parametrize("kind", FUSED)
@torch.no_grad()
def test_each_logical_projection_has_factors_of_its_own_for_its_own_rows(kind: str) -> None:
    model = with_adapters(built(f"mixer-{kind}"))
    layer = "blocks.1.mixer."
    found = {f"{place.module}.{place.parameter}": place for place in places(model)}
    for name, parts in FUSED[kind].items():
        place = found[layer + name]
        assert dict(place.parts) == parts
        module = model.get_submodule(place.module)
        change = matrix_of(module) - module._parameters["weight"]
        begin = 0
        for part, outputs in parts.items():
            a, b = (model.get_parameter(f"{place.prefix}{part}.{factor}") for factor in "ab")
            assert (a.shape[0], b.shape[0]) == (min(RANK, outputs), outputs)
            assert_close(change[begin : begin + outputs], SCALE * (b @ a), 1e-5)
            begin += outputs


def test_each_expert_has_factors_of_its_own_for_gate_and_up() -> None:
    model = with_adapters(built("ffn-moe"))
    experts = model.blocks[0].ffn.experts  # type: ignore[union-attr]
    a, b = (model.get_parameter(f"blocks.0.ffn.experts.lora.gate_up.up.{factor}") for factor in "ab")
    change = (experts.gate_up - experts._parameters["gate_up"])[..., 16:]
    for expert in range(8):
        assert_close(change[expert], SCALE * a[expert] @ b[expert], 1e-5)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_rows_of_new_ids_are_added_to_embedding_and_head_and_a_tied_head_stays_tied(tied: bool) -> None:
    model = with_adapters(built("mixer-mha", tied=tied), ids=IDS)
    weights = merged(*parted(model), model.config, origin="here")
    assert (weights["head.weight"] is weights["embedding.weight"]) == tied
    for table in ("embedding", "head"):
        change = weights[f"{table}.weight"] - model.state_dict()[f"{table}.weight"]
        assert change.abs().amax(dim=1).nonzero().flatten().tolist() == list(IDS)
    own = [name for name, _ in adapters_of(model) if name.endswith(".rows")]
    assert len(own) == (1 if tied else 2)


@torch.no_grad()
def test_the_factors_depend_on_the_seed_and_their_name_only() -> None:
    first, again, other = (built("mixer-gdn") for _ in range(3))
    attach(first, rank=2, scale=1.0, seed=7)
    torch.manual_seed(99)
    attach(again, rank=2, scale=1.0, seed=7)
    attach(other, rank=2, scale=1.0, seed=8)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, other.state_dict()[name]) != name.endswith(".a")


def test_adapters_of_another_model_are_refused_with_the_name() -> None:
    weights, adapters = parted(with_adapters(built("mixer-mha")))
    config = built("mixer-mha").config
    name = "blocks.0.mixer.qkv_proj.lora.weight.q.a"
    with pytest.raises(CorruptError, match=r"here: adapters do not fit the model: .*q\.a"):
        merged(weights, {n: t for n, t in adapters.items() if n != name}, config, origin="here")
    with pytest.raises(CorruptError, match="nobody is unexpected"):
        merged(weights, {**adapters, "nobody": adapters[name]}, config, origin="here")


def test_projections_that_are_not_the_matrix_are_refused() -> None:
    class Wrong(MoEConfig):
        def projections(self, width: int) -> dict[str, dict[str, int]]:
            return {"experts.gate_up": {"gate": 1}}

    block = BlockConfig(mixer=MIXERS["mha"], ffn=Wrong(n_experts=8, n_activated=3, expert_hidden=16))
    config = LanguageModelConfig(vocab_size=31, width=WIDTH, blocks={"a": block}, pattern=("a",))
    with pytest.raises(ValueError, match=r"gate_up has 32 outputs, `projections` has \{'gate': 1\}"):
        places(config.skeleton())


def test_greedy_text_with_adapters_is_that_of_the_merged_model() -> None:
    model = with_adapters(built("mixer-mla"))
    texts = [
        Decoder(each, "eager").generate([[1, 2, 3]], 12, sampling=Sampling(temperature=0.0))
        for each in (model, merged_model(model))
    ]
    assert texts[0] == texts[1]


def test_the_trained_numbers_are_those_counted_by_hand() -> None:
    model = with_adapters(built("mixer-gdn"), ids=IDS)
    mixer = 3 * (4 * 32 + 16 + 16 + 24 + 24) + 2 * 3 * (32 + 4) + 3 * (24 + 32)  # q k v z; b a; output
    ffn = 2 * 3 * (32 + 24) + 3 * (24 + 32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * (mixer + ffn) + 2 * 32
