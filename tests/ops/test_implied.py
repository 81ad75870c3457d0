"""Implied weights are the recurrence's answers to unit impulses: a value of 1 at one token alone, and 0 elsewhere."""

import pytest
import torch
from torch import Tensor

from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.ops import gated_delta_rule, kimi_delta_attention, l2_normalize
from swamla.ops.gated_delta.reference import RuleInputs, recurrent_gated_delta_rule
from swamla.ops.implied import Rule, implied_attention
from swamla.ops.kda.reference import KDAInputs, recurrent_kda
from swamla.ops.layout import Layout
from swamla.ops.short_conv import short_conv
from tests.model.helpers import WIDTH, build_mixer, random_input

TIME, HEADS, KEY = 45, 4, 8
LAYOUTS = {
    "whole": Layout.one_document_per_row(2, TIME),
    "packed": Layout.from_documents(
        torch.tensor([[0] * 17 + [1] + [2] * 16 + [3] * 11, [-1] * 3 + [0] * 20 + [1] * 13 + [-1] * 9])
    ),
}
DECAYS = {"none": 0.0, "slow": 0.1, "fast": 2.0, "forgetting": 40.0}


def by_impulses(*inputs: Tensor, seq: Layout) -> Tensor:
    """(B, H, T, S): column s is what the recurrence gives, token by token, for a value of 1 at token s alone.

    Each row is copied S times, so that every copy has one source.
    """
    batch, time = seq.shape
    q, k, log_alpha, beta = (x.repeat_interleave(time, dim=0) for x in inputs)
    copies = Layout.from_documents(seq.document_BT.repeat_interleave(time, dim=0))
    impulse_BT = torch.eye(time, dtype=q.dtype).repeat(batch, 1)
    v = impulse_BT[:, :, None, None].expand(-1, -1, q.shape[2], 1)
    recurrence, given = (recurrent_gated_delta_rule, RuleInputs) if log_alpha.ndim == 3 else (recurrent_kda, KDAInputs)
    o, _ = recurrence(given(q, k, v, log_alpha, beta), None, copies, scale=q.shape[-1] ** -0.5)
    return o[..., 0].unflatten(0, (batch, time)).permute(0, 3, 2, 1)


def random_inputs(rule: Rule, decay: float, beta_max: float, key_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys of fewer heads repeated, log α in [−decay, 0], β in [0, beta_max]."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (
        l2_normalize(normal(2, TIME, key_heads, KEY)).repeat_interleave(HEADS // key_heads, dim=2) for _ in range(2)
    )
    channels = (KEY,) if rule is kimi_delta_attention else ()
    log_alpha = -decay * normal(2, TIME, HEADS, *channels).sigmoid()
    return q, k, log_alpha, beta_max * normal(2, TIME, HEADS).sigmoid()


@pytest.mark.parametrize("rows", LAYOUTS)
@pytest.mark.parametrize(("beta_max", "key_heads"), [(1.0, 4), (2.0, 2), (2.0, 1)])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", [gated_delta_rule, kimi_delta_attention])
def test_each_column_is_what_the_recurrence_makes_of_that_source_alone(
    rule: Rule, decay: str, beta_max: float, key_heads: int, rows: str
) -> None:
    inputs, seq = random_inputs(rule, DECAYS[decay], beta_max, key_heads), LAYOUTS[rows]
    found, expected = implied_attention(rule, *inputs, seq=seq), by_impulses(*inputs, seq=seq)
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-12
    assert (found < 0).any()  # they are signed


@pytest.mark.parametrize("rule", [gated_delta_rule, kimi_delta_attention])
def test_padding_has_no_weights_whatever_it_holds(rule: Rule) -> None:
    inputs, seq = random_inputs(rule, 0.1, 2.0, 2), LAYOUTS["packed"]
    poisoned = [torch.where((seq.document_BT < 0).view(2, TIME, *[1] * (x.ndim - 2)), torch.nan, x) for x in inputs]
    found = implied_attention(rule, *poisoned, seq=seq)
    assert (found - implied_attention(rule, *inputs, seq=seq)).abs().max() <= 1e-14
    assert (found[1, :, :3] == 0).all()
    assert (found[1, :, :, -9:] == 0).all()


@pytest.mark.parametrize("rule", [gated_delta_rule, kimi_delta_attention])
def test_weights_of_inputs_in_16_bits_are_those_of_their_values_to_fp32(rule: Rule) -> None:
    inputs, seq = [x.bfloat16() for x in random_inputs(rule, 0.1, 2.0, 2)], LAYOUTS["packed"]
    found = implied_attention(rule, *inputs, seq=seq)
    assert found.dtype == torch.float32
    expected = by_impulses(*(x.double() for x in inputs), seq=seq)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)


MIXERS = {
    "gdn": GDNConfig(n_heads=4, beta_max=2.0),
    "gdn, fewer key heads": GDNConfig(n_heads=4, n_key_heads=2, beta_max=2.0),
    "gdn, shared keys": GDNConfig(n_heads=4, share_qk=True, beta_max=2.0),
    "kda": KDAConfig(n_heads=4, beta_max=2.0),
    "kda, fewer key heads": KDAConfig(n_heads=4, n_key_heads=2, beta_max=2.0),
    "kda, safe decay": KDAConfig(n_heads=4, decay="safe"),
}


@pytest.mark.parametrize("rows", LAYOUTS)
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_weights_of_a_mixer_are_those_of_its_own_gates_keys_and_queries(name: str, rows: str) -> None:
    """Of its projections and convolution as `forward` has them: only the recurrence is written out."""
    mixer, seq = build_mixer(MIXERS[name]).double(), LAYOUTS[rows]
    x = random_input(2, TIME).double()
    assert x.shape[-1] == WIDTH
    found = mixer.explain(x, seq).weight_BHTS
    qkv, _, log_alpha, beta = mixer.project(x, seq)
    q, k, _ = mixer.heads(short_conv(qkv, mixer.conv_weight, seq=seq, backend="reference"))
    assert beta.max() <= MIXERS[name].beta_max
    expected = by_impulses(q, k, log_alpha, beta, seq=seq)
    assert (found - expected).abs().max() <= 1e-12
