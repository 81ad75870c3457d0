"""The whole model: how it starts, what it trains on, what its loss is."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from swamla.errors import ConfigError, UsageError
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import LayerNormConfig, NormConfig
from swamla.ops.layout import Layout

from .helpers import MIXERS, NORMS, WIDTH, assert_close, build_model, gradients_of, hybrid_config, packed, random_tokens


def wide_config(**changes) -> LanguageModelConfig:
    """Wide enough for a standard deviation to be measured."""
    blocks = {
        "mha": BlockConfig(mixer=MHAConfig(n_heads=4, bias=True), ffn=DenseConfig(activation="gelu", bias=True)),
        "swa": BlockConfig(mixer=SWAConfig(n_heads=4)),
        "mla": BlockConfig(mixer=MLAConfig(n_heads=2, kv_lora_rank=64, q_lora_rank=64)),
        "gdn": BlockConfig(mixer=GDNConfig(n_heads=8)),
        "gdn_latent": BlockConfig(mixer=GDNConfig(n_heads=8, latent_dim=64, share_qk=True)),
        "latent": BlockConfig(mixer=LatentConfig(n_heads=4, bias=True)),
    }
    settings = {
        "vocab_size": 100,
        "width": 128,
        "blocks": blocks,
        "pattern": tuple(blocks),
        "norm": LayerNormConfig(),
        "learned_positions": 64,
    }
    return LanguageModelConfig(**{**settings, **changes})


@pytest.mark.parametrize("init_std", [0.02, 0.006])
def test_weights_start_normal_and_output_projections_are_scaled_by_depth(init_std: float) -> None:
    torch.manual_seed(0)
    model = wide_config(init_std=init_std, tied_head=False).build()
    checked = set()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith("conv_weight"):
            continue
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = init_std / math.sqrt(2 * model.config.depth) if is_output else init_std
        tolerance = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a measured standard deviation
        assert parameter.std().item() == pytest.approx(expected, rel=tolerance), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name
        checked.add(is_output)
    assert checked == {True, False}


def test_biases_start_at_zero_and_gains_at_one() -> None:
    for name, parameter in wide_config().build().named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name


def test_the_delta_rules_gates_start_over_the_published_ranges() -> None:
    torch.manual_seed(0)
    mixer = GDNConfig(n_heads=512, head_k_dim=1, head_v_dim=1).build(8)
    dt, rate = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 0.999e-3 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.3)  # uniform in the logarithm
    assert 1 <= rate.min() < 1.5
    assert 15 < rate.max() <= 16
    inside_a_model = wide_config().build().blocks[3].mixer
    for convolution in (mixer.conv_weight, inside_a_model.conv_weight):  # uniform in ±1/√width, as torch's own
        assert (convolution.abs() <= 0.5).all()
        assert convolution.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.1)


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(torch.cat([p.detach().flatten() for p in wide_config().build().parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_untrained_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model, tokens = hybrid_config().build(), random_tokens(4, 50)
    total, _ = model.loss(tokens, tokens.roll(-1, dims=1))
    assert total.item() / tokens.numel() == pytest.approx(math.log(31), abs=0.05)


FFNS = [DenseConfig(hidden=24), DenseConfig(activation="gelu", bias=True)]


@pytest.mark.parametrize("norm", NORMS.values(), ids=lambda norm: norm.kind)
@pytest.mark.parametrize("ffn", FFNS, ids=lambda ffn: ffn.activation)
@pytest.mark.parametrize("tied_head", [True, False])
def test_every_parameter_gets_a_gradient(norm: NormConfig, ffn: DenseConfig, tied_head: bool) -> None:
    blocks = {name: BlockConfig(mixer=mixer, ffn=ffn) for name, mixer in MIXERS.items()}
    config = LanguageModelConfig(
        vocab_size=31,
        width=WIDTH,
        blocks=blocks,
        pattern=tuple(MIXERS),
        norm=norm,
        tied_head=tied_head,
        learned_positions=30,
    )
    torch.manual_seed(0)
    model, tokens = config.build(), random_tokens(2, 30)
    total, _ = model.loss(tokens, tokens.roll(-1, dims=1))
    total.backward()
    for name, gradient in gradients_of(model).items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient"
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("tied_head", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_logits_summed_in_nats(tied_head: bool) -> None:
    model = build_model(replace(hybrid_config(), tied_head=tied_head))
    tokens = random_tokens(2, 40)
    labels = tokens.roll(-1, dims=1)
    labels[0, 7:19] = -100
    seq = Layout.from_documents(torch.tensor([[0] * 15 + [1] * 25, [2] * 40]))
    total, statistics = model.loss(tokens, labels, seq)
    total.backward()
    found = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    model.zero_grad()
    expected = F.cross_entropy(model(tokens, seq).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    expected.backward()
    assert statistics == {}
    assert_close(total.detach(), expected.detach(), 1e-5, "loss")
    for name, gradient in gradients_of(model).items():
        assert_close(found[name], gradient, 1e-4, f"gradient of {name}")


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = wide_config(tied_head=True).build(), wide_config(tied_head=False).build()
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


def test_dropout_acts_in_training_keeps_the_mean_and_is_off_in_evaluation() -> None:
    config = replace(hybrid_config(pattern=("mha",)), ngram_buckets=(), dropout=0.2)
    model, tokens = build_model(config), random_tokens(1, 12)
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        mean = torch.stack([model.hidden(tokens)[0] for _ in range(200)]).mean(0)
        model.eval()
        assert torch.equal(model(tokens), model(tokens))
        exact = model.hidden(tokens)[0]
    assert F.cosine_similarity(mean, exact, dim=-1).min() > 0.9


@pytest.mark.parametrize("where", ["embedding", "mixer", "ffn"])
def test_dropout_falls_on_the_embedding_and_on_both_branches(where: str) -> None:
    """With all other contributions zeroed, a fifth of what is left is dropped and the rest grows by 1/0.8."""
    config = replace(hybrid_config(pattern=("mha",)), ngram_buckets=(), dropout=0.2)
    model, tokens = build_model(config), random_tokens(8, 100)
    with torch.no_grad():
        if where != "mixer":
            model.blocks[0].mixer.o_proj.weight.zero_()
        if where != "ffn":
            model.blocks[0].ffn.down_proj.weight.zero_()
        found = {}
        model.norm = torch.nn.Identity()
        for training in (False, True):
            model.train(training)
            torch.manual_seed(0)
            base = F.dropout(model.embedding(tokens), 0.2, training)  # the same draw as the model's first
            torch.manual_seed(0)
            branch = model.hidden(tokens)[0] - (0 if where == "embedding" else base)
            found[training] = (branch.abs() < 1e-6).float().mean().item()
    assert found[False] < 0.01
    assert found[True] == pytest.approx(0.2, abs=0.02)


def test_step_never_drops_out() -> None:
    model, tokens = build_model(replace(hybrid_config(), dropout=0.5)), random_tokens(1, 9)
    model.eval()
    expected = model(tokens)
    model.train()
    assert_close(model.step(tokens, model.init_state(1, 9)), expected, 1e-4)


def test_documents_beyond_the_learned_positions_are_refused_but_longer_rows_of_shorter_ones_are_not() -> None:
    model = build_model(replace(hybrid_config(), learned_positions=10))
    assert model(random_tokens(1, 19), packed(10, 9)).shape == (1, 19, 31)
    with pytest.raises(UsageError, match=r"a document of 11 tokens is longer than the model's 10 learned positions"):
        model(random_tokens(1, 19), packed(11, 8))
    with pytest.raises(UsageError, match=r"11 tokens are more than the model's 10 learned positions"):
        model.init_state(1, 11)


def test_weights_that_are_saved_and_loaded_give_the_same_logits() -> None:
    model, other = build_model(hybrid_config(), seed=0), build_model(hybrid_config(), seed=1)
    tokens = random_tokens(1, 20)
    assert not torch.equal(model(tokens), other(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), other(tokens))
    assert other.head.weight is other.embedding.weight


@pytest.mark.filterwarnings("error")
def test_bfloat16_autocast_stays_within_a_hundredth_of_fp32() -> None:
    model, tokens = build_model(hybrid_config()).eval(), random_tokens(2, 100)
    with torch.no_grad():
        exact = model.hidden(tokens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.hidden(tokens)[0]
    assert (rounded.float() - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_a_model_in_another_dtype_computes_in_it_and_its_steps_too(dtype: torch.dtype, tolerance: float) -> None:
    exact, other = build_model(hybrid_config()).eval(), build_model(hybrid_config()).eval().to(dtype)
    tokens = random_tokens(2, 40)
    expected = exact(tokens)
    state = other.init_state(2, 40)
    stepped = torch.cat((other.step(tokens[:, :30], state), other.step(tokens[:, 30:], state)), dim=1)
    for found in (other(tokens), stepped):
        assert found.dtype == dtype
        assert (found.float() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("shape", [(5,), (1, 0), (0, 5), (1, 2, 3)])
def test_tokens_that_are_no_batch_of_rows_are_refused(shape: tuple[int, ...]) -> None:
    model = build_model(hybrid_config())
    with pytest.raises(UsageError, match=r"must be \(batch, time\), one token at least"):
        model(torch.zeros(shape, dtype=torch.int64))


def test_the_residual_stream_is_in_the_dtype_of_autocast_only_under_it_and_only_where_asked() -> None:
    config = hybrid_config()
    rounded = replace(config, residual="autocast")
    tokens = random_tokens(2, 24)
    models = [build_model(c) for c in (config, rounded)]
    models[1].load_state_dict(models[0].state_dict())
    whole, same = (model(tokens) for model in models)
    assert torch.equal(whole, same)
    seen: list[torch.dtype] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out[0].dtype)) for block in models[1].blocks]
    gradients = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens, tokens)[0]
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for hook in hooks:
        hook.remove()
    assert set(seen) == {torch.bfloat16}
    assert gradients[1].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


def test_with_a_rounded_residual_stream_steps_equal_the_whole_under_autocast() -> None:
    model = build_model(replace(hybrid_config(), residual="autocast"))
    tokens = random_tokens(2, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens)
        state = model.init_state(2, 24)
        steps = torch.cat([model.step(tokens[:, i : i + 4], state) for i in range(0, 24, 4)], dim=1)
    assert (steps - whole).norm() < 0.02 * whole.norm()


def test_with_labels_the_model_gives_their_mean_loss() -> None:
    model = build_model(hybrid_config())
    tokens, labels = random_tokens(2, 24), random_tokens(2, 24)
    labels[:, ::3] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(tokens, labels=labels), expected)
    assert model(tokens, labels=torch.full_like(labels, -100)) == 0
    with pytest.raises(ConfigError, match=r"labels.shape = \(2, 23\): must be that of the tokens, \(2, 24\)"):
        model(tokens, labels=labels[:, 1:])


def test_a_printed_model_shows_what_its_mixers_and_ffns_are() -> None:
    config = hybrid_config(pattern=("swa", "gdn"))
    shown = str(build_model(config))
    assert f"mixer: swa(n_heads={config.blocks['swa'].mixer.n_heads}, " in shown
    assert f"window={config.blocks['swa'].mixer.window}, sinks={config.blocks['swa'].mixer.sinks})" in shown
    assert "mixer: gdn(" in shown
    assert "ffn: dense(" in shown
