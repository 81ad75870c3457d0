"""Explanations are equations: weights times values, gained and projected, are the mixer's output; cuts are exact."""

import inspect
from dataclasses import replace

import pytest
import torch

from swamla.errors import UsageError
from swamla.model.block import BlockConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.rope import RopeConfig, YarnScaling
from swamla.ops.gated_delta import gated_delta_rule
from swamla.ops.implied import implied_attention
from swamla.ops.kda import kimi_delta_attention
from swamla.ops.layout import Layout
from swamla.ops.short_conv import short_conv
from tests.model.helpers import MIXERS, NORMS, WIDTH, build_mixer, packed, random_input, scramble, whole

EXPLAINED = [name for name in MIXERS if name != "toy" and not name.startswith("plug")]
ROWS = {"whole": whole(random_input(2, 40)), "packed": packed(17, 1, 9, 8, padding=5)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def real(x: torch.Tensor, seq: Layout) -> torch.Tensor:
    return x[seq.document_BT >= 0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 4 * 2**-8), (torch.float32, 1e-6), (torch.float64, 1e-12)],  # bf16 rounds q, k, v, o: 2⁻⁸ each
    ids=["bf16", "fp32", "fp64"],
)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", EXPLAINED)
@torch.no_grad()
def test_the_sum_of_all_contributions_is_the_output(name: str, rows: str, dtype: torch.dtype, tolerance: float) -> None:
    """In fp32 to 1e-6, or what the mixer's own rounding is, in the order in which this machine adds, where it is more:
    both round, so together they are apart by up to twice that.
    """
    mixer, seq = build_mixer(MIXERS[name]).to(dtype).eval(), ROWS[rows]
    x = random_input(*seq.shape).to(dtype)
    found, expected = mixer.explain(x, seq), mixer(x, seq)
    if dtype == torch.float32:
        exact = build_mixer(MIXERS[name]).double().eval()(x.double(), seq)
        tolerance = max(tolerance, 2 * relative(real(expected.double(), seq), real(exact, seq)))
    assert relative(real(found.output(), seq), real(expected, seq)) <= tolerance
    heads = found.contributions().sum(dim=2)
    bias = 0 if found.bias_D is None else found.bias_D
    assert relative(real(heads + bias, seq), real(expected, seq)) <= tolerance
    assert expected.shape[-1] == WIDTH


@pytest.mark.parametrize("name", EXPLAINED)
@torch.no_grad()
def test_no_weight_goes_to_later_tokens_to_other_documents_or_to_padding(name: str) -> None:
    mixer, seq = build_mixer(MIXERS[name]).double(), ROWS["packed"]
    weight_HTS = mixer.explain(random_input(1, 40).double(), seq).weight_BHTS[0]
    document_T = seq.document_BT[0]
    allowed_TS = (document_T[:, None] == document_T) & torch.ones(40, 40).tril().bool()
    assert (weight_HTS[:, ~allowed_TS & (document_T >= 0)[:, None]] == 0).all()
    assert (weight_HTS[:, 3, :4] != 0).all()


@pytest.mark.parametrize("name", EXPLAINED)
@torch.no_grad()
def test_a_cut_and_the_rest_are_the_output_and_a_cut_edge_is_what_its_value_added(name: str) -> None:
    mixer, seq = build_mixer(MIXERS[name]).double(), ROWS["whole"]
    found = mixer.explain(random_input(2, 40).double(), seq)
    edges = torch.rand(40, 40, generator=torch.Generator().manual_seed(5)) < 0.3
    bias = 0 if found.bias_D is None else found.bias_D
    assert relative(found.cut(edges) + found.cut(~edges) + bias, found.output()) <= 1e-12
    one = torch.zeros(40, 40, dtype=torch.bool)
    one[30, 28] = True
    gain = 1 if found.gain_BTHV is None else found.gain_BTHV[:, 30]
    added = found.weight_BHTS[:, :, 30, 28, None] * found.value_BSHV[:, 28] * gain
    expected = torch.einsum("bhv,hvd->bd", added, found.out_HVD)
    torch.testing.assert_close(found.cut(one)[:, 30], expected)
    assert (found.cut(one)[:, :30] == 0).all()


@pytest.mark.parametrize("name", ["mha", "mha_normed", "swa", "mla", "latent"])
@torch.no_grad()
def test_softmax_weights_are_probabilities(name: str) -> None:
    weight = build_mixer(MIXERS[name]).explain(random_input(2, 40), ROWS["whole"]).weight_BHTS
    assert (weight >= 0).all()
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(weight.shape[:3]))


@torch.no_grad()
def test_a_learned_sink_takes_its_share() -> None:
    found = build_mixer(MIXERS["mha_gated"]).explain(random_input(2, 40), ROWS["whole"]).weight_BHTS
    assert (found.sum(dim=-1) < 1).all()


@torch.no_grad()
def test_implied_weights_of_gated_deltanet_are_those_of_the_closed_form() -> None:
    """K^-½ (QKᵀ ⊙ D) [I + tril(diag(β)(KKᵀ ⊙ D), −1)]⁻¹ diag(β), written out in fp64 for one head."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 30, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k = k / k.norm(dim=-1, keepdim=True)
    log_alpha = -torch.rand(1, 30, 1, generator=generator, dtype=torch.float64)
    beta = torch.rand(1, 30, 1, generator=generator, dtype=torch.float64)
    total = log_alpha[0, :, 0].cumsum(0)
    decay = (total[:, None] - total).tril().exp().tril()
    b, queries, keys = beta[0, :, 0], q[0, :, 0], k[0, :, 0]
    inner = torch.eye(30, dtype=torch.float64) + (b[:, None] * (keys @ keys.T) * decay).tril(-1)
    expected = 8**-0.5 * ((queries @ keys.T) * decay) @ torch.linalg.inv(inner) @ torch.diag(b)
    seq = Layout.one_document_per_row(1, 30)
    found = implied_attention(gated_delta_rule, q, k, log_alpha, beta, seq=seq)
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-10, atol=1e-12)
    by_channel = log_alpha[..., None].expand(1, 30, 1, 8)
    same = implied_attention(kimi_delta_attention, q, k, by_channel, beta, seq=seq)
    torch.testing.assert_close(same[0, 0], expected, rtol=1e-10, atol=1e-12)


def test_a_mixer_without_such_a_sum_says_so() -> None:
    with pytest.raises(UsageError, match="has no `explain`"):
        build_mixer(MIXERS["toy"]).explain(random_input(1, 8), whole(random_input(1, 8)))


@torch.no_grad()
def test_swa_with_a_window_of_all_tokens_has_mhas_weights_to_twelve_digits() -> None:
    """In which order a product adds may depend on where its operands lie in memory."""
    swa = build_mixer(replace(MIXERS["swa"], window=64, sinks=0)).double()
    mha = build_mixer(MIXERS["mha"]).double()
    mha.load_state_dict(swa.state_dict())
    x, seq = random_input(2, 40).double(), ROWS["whole"]
    found, expected = (mixer.explain(x, seq).weight_BHTS for mixer in (swa, mha))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_explanations_of_latent_attention_hold_for_yarn() -> None:
    rope = RopeConfig(scaling=YarnScaling(factor=4.0, original_length=16, mscale_all_dim=0.7))
    config = MLAConfig(n_heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, rope=rope)
    mixer, seq, x = build_mixer(config).double(), ROWS["packed"], random_input(1, 40).double()
    with torch.no_grad():
        assert relative(real(mixer.explain(x, seq).output(), seq), real(mixer(x, seq), seq)) <= 1e-12


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "toy_norm" and not name.startswith("plug")])
@torch.no_grad()
def test_a_frozen_norm_is_the_norm_at_its_input_and_linear_everywhere(norm: str) -> None:
    module, x = NORMS[norm].build(WIDTH).double(), random_input(2, 5).double()
    scramble(module)
    x[0, 0] = 0
    found = NORMS[norm].frozen(module, x)
    bias = 0 if found.bias_D is None else found.bias_D
    torch.testing.assert_close(found.linear(x) + bias, module(x), rtol=1e-12, atol=1e-12)
    a, b, u = (random_input(2, 5, seed).double() for seed in (3, 4, 5))
    torch.testing.assert_close(found.linear(a + 2 * b), found.linear(a) + 2 * found.linear(b))
    torch.testing.assert_close((found.transposed(u) * a).sum(-1), (u * found.linear(a)).sum(-1))


def test_a_norm_without_such_a_map_says_so() -> None:
    with pytest.raises(UsageError, match="has no `frozen`"):
        NORMS["toy_norm"].frozen(NORMS["toy_norm"].build(WIDTH), random_input(1, 2))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "dyt"])
@pytest.mark.parametrize("place", ["pre", "post"])
@pytest.mark.parametrize("name", EXPLAINED)
@torch.no_grad()
def test_a_blocks_explanation_is_what_its_mixer_adds_to_the_stream_convolution_and_norm_included(
    name: str, place: str, norm: str, rows: str
) -> None:
    config = BlockConfig(mixer=MIXERS[name], ffn=NoFFNConfig(), conv=3, norm_place=place)
    block, seq = config.build(WIDTH, NORMS[norm], dropout=0.0).double(), ROWS[rows]
    scramble(block)
    x = random_input(*seq.shape).double()
    explained, frozen = block.explain(x, seq)
    assert (frozen is None) == (place == "pre")
    found = explained.output() if frozen is None else frozen.linear(explained.output())
    bias = 0 if frozen is None or frozen.bias_D is None else frozen.bias_D
    assert relative(real(found + bias, seq), real(block.mix(x, seq) - x, seq)) <= 1e-12


@pytest.mark.parametrize("name", EXPLAINED)
@torch.no_grad()
def test_a_mixer_says_how_many_heads_its_explanation_has(name: str) -> None:
    found = build_mixer(MIXERS[name]).explain(random_input(1, 6), whole(random_input(1, 6)))
    assert found.weight_BHTS.shape == (1, MIXERS[name].explained_heads, 6, 6)
    assert found.value_BSHV.shape[2] == found.out_HVD.shape[0] == MIXERS[name].explained_heads


@pytest.mark.parametrize("name", EXPLAINED)
def test_project_has_one_signature_in_all_mixers(name: str) -> None:
    assert list(inspect.signature(type(build_mixer(MIXERS[name])).project).parameters) == ["self", "x_BTD", "seq"]


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("name", EXPLAINED)
@torch.no_grad()
def test_taps_are_the_filters_of_all_convolutions_the_current_token_first(name: str, conv: int) -> None:
    block = BlockConfig(mixer=MIXERS[name], conv=conv).build(WIDTH, NORMS["rmsnorm"], dropout=0.0)
    scramble(block)
    taps, x = block.taps(), random_input(1, 9)
    assert ("input" in taps) == (conv > 0)
    if conv:
        by_hand = x[:, 8] + sum(taps["input"][:, i] * x[:, 8 - i] for i in range(conv))
        torch.testing.assert_close(block.conv(x, whole(x))[:, 8], by_hand)
    own = [filters for what, filters in taps.items() if what != "input"]
    assert bool(own) == name.startswith(("gdn", "kda"))
    if own:
        filters = torch.cat(own)
        x = torch.randn(1, 9, len(filters))
        mixed = short_conv(x, block.mixer.conv_weight, seq=whole(x), activation="none")
        torch.testing.assert_close(mixed[:, 8], sum(filters[:, i] * x[:, 8 - i] for i in range(filters.shape[1])))


@pytest.mark.parametrize("name", ["mha_gated", "swa_gated"])
@torch.no_grad()
def test_what_a_learned_sink_takes_is_what_the_weights_lack(name: str) -> None:
    mixer = build_mixer(MIXERS[name]).double()
    x, seq = random_input(1, 6).double(), whole(random_input(1, 6))
    q, k, _, _ = mixer.project(x, seq)
    weight = mixer.explain(x, seq).weight_BHTS
    for head in range(4):
        scores = mixer.scale * (q[0, 5, head] @ k[0, :, head // 2].mT)  # all six tokens are in the window
        total = scores.exp().sum() + mixer.sink_logit[head].exp()
        torch.testing.assert_close(weight[0, head, 5], scores.exp() / total)


@torch.no_grad()
def test_the_scores_scale_has_one_home() -> None:
    """With another `scale` a mixer has another explanation, still an equation: µP and YaRN change that alone."""
    for name in ("mha", "swa", "mla", "latent"):
        mixer, x, seq = build_mixer(MIXERS[name]).double(), random_input(1, 12).double(), packed(7, 5)
        before = mixer.explain(x, seq).weight_BHTS
        mixer.scale *= 3.0
        found = mixer.explain(x, seq)
        assert not torch.allclose(found.weight_BHTS, before, rtol=1e-3)
        assert relative(found.output(), mixer(x, seq)) <= 1e-12
    assert MHAConfig(n_heads=4).scale(WIDTH) == (WIDTH // 4) ** -0.5
