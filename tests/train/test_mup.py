"""µP: activations, and how far a few steps move them, stay of one size over widths, where they otherwise grow."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import swamla
from swamla.errors import ConfigError, UsageError
from swamla.interop import equal_architecture
from swamla.interop.architectures.gpt2 import GPT2
from swamla.model.accounting import parameter_specs
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.ops.layout import Layout
from swamla.train.optim import AdamWConfig, GroupRates, LionConfig, MuonConfig
from tests.toys import TOYS

from .helpers import model_of, run, tiny_config

BASE = 64
WIDTHS = (64, 128, 256)
MODEL = LanguageModelConfig(
    vocab_size=97,
    width=BASE,
    blocks={
        "mha": BlockConfig(mixer=MHAConfig(n_heads=2)),
        "swa": BlockConfig(mixer=SWAConfig(n_heads=2, window=8)),
        "gdn": BlockConfig(mixer=GDNConfig(n_heads=2)),
        "mla": BlockConfig(
            mixer=MLAConfig(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)
        ),
    },
    pattern=("gdn", "swa", "mla", "mha"),
)
OPTIMIZERS = {"adamw": AdamWConfig(), "lion": LionConfig(), "muon": MuonConfig()}
RATES = {"adamw": 1e-2, "lion": 3e-3, "muon": 1e-2}


def multiples(config, optimizer):
    """As a run computes them."""
    base = config.base_shapes()
    return {s.name: optimizer.width_multiple(s, base[s.name]) for s in (parameter_specs(config) if base else ())}


@cache
def movement(kind, width, base, tied=True):
    """RMS of what three steps change at the residual stream, the logits; of three seeds the mean."""
    config = replace(MODEL, width=width, mup_base_width=base, tied_head=tied)
    tokens = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for seed in range(3):
        model, seen = config.build(seed), []
        optimizer = OPTIMIZERS[kind].build(model, lr=RATES[kind], weight_decay=0.0)
        optimizer.set_rates(GroupRates(lr={}, weight_decay={}), multiples(config, OPTIMIZERS[kind]))
        optimizer.set_lr(RATES[kind])
        stream = []
        hook = model.blocks[-1].register_forward_hook(lambda module, given, out, to=stream: to.append(out[0].detach()))
        for step in range(4):
            with torch.no_grad():
                logits = model(tokens)
            seen.append((stream[-1], logits))
            if step < 3:
                model(tokens, labels=tokens.roll(-1, 1)).backward()
                optimizer.step()
                optimizer.zero_grad()
        hook.remove()
        found.append(
            [float((after - before).square().mean().sqrt()) for before, after in zip(seen[0], seen[-1], strict=True)]
        )
    return torch.tensor(found).mean(0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_few_steps_move_activations_equally_far_at_every_width(kind, tied):
    """The coordinate check of arXiv 2203.03466, appendix D.1."""
    at = torch.stack([movement(kind, width, BASE, tied) for width in WIDTHS])
    assert (at / at[0]).max() < 1.6, at
    assert (at / at[0]).min() > 0.6, at


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_under_the_standard_parametrization_they_move_further_the_wider_the_model(kind):
    narrow, wide = movement(kind, 64, None), movement(kind, 256, None)
    assert (wide / narrow)[1] > 2, (narrow, wide)


def test_the_initial_outputs_of_softmax_mixers_are_of_one_size():
    """Not gdn's, whose norm of outputs has an epsilon above what it norms before any training."""
    tokens = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))
    layer = {}
    for width in WIDTHS:
        model = replace(MODEL, width=width, mup_base_width=BASE).build(0)
        with torch.no_grad():
            seen = [
                block.mixer(model.embedding(tokens) / model.embedding.weight.std(), Layout.one_document_per_row(4, 32))
                for block in model.blocks[1:]
            ]
        layer[width] = torch.stack([out.square().mean().sqrt() for out in seen])
    assert (layer[256] / layer[64]).log().abs().max() < 0.5


def test_at_the_base_width_nothing_changes():
    plain, same = MODEL.build(3), replace(MODEL, mup_base_width=BASE).build(3)
    tokens = torch.arange(64).view(2, 32)
    assert torch.equal(plain(tokens), same(tokens))
    for optimizer in OPTIMIZERS.values():
        assert set(multiples(same.config, optimizer).values()) == {1.0}


def test_learning_rates_and_initial_weights_follow_table_8():
    """Written out for width 128 at base 64 (ratio 2), a router's outputs and MLA's latent being fixed."""
    experts = MoEConfig(n_experts=8, n_activated=2, shared_gate="sigmoid")
    wide = replace(
        MODEL,
        width=128,
        mup_base_width=64,
        tied_head=False,
        blocks=MODEL.blocks | {"mha": BlockConfig(mixer=MHAConfig(n_heads=2), ffn=experts)},
    )
    adam = multiples(wide, AdamWConfig())
    muon = multiples(wide, MuonConfig())
    std = {name: p.std().item() for name, p in wide.build(0).named_parameters()}
    expected = {  # Adam, Muon, initial standard deviation
        "embedding.weight": (1, 1, 0.02),
        "head.weight": (1, 1, 0.02),
        "blocks.3.mixer.qkv_proj.weight": (1 / 2, 2**-0.5, 0.02 * 2**-0.5),
        "blocks.3.mixer.o_proj.weight": (1 / 2, 2**-0.5, 0.02 * 2**-0.5 * 8**-0.5),
        "blocks.3.ffn.experts.gate_up": (1 / 2, 2**-0.5, 0.02 * 2**-0.5),
        "blocks.3.ffn.router.weight": (1 / 2, 1 / 2, 0.02 / 2),
        "blocks.3.ffn.shared_gate": (1 / 2, 1 / 2, None),
        "blocks.0.mixer.conv_weight": (1, 1, None),
        "blocks.0.norm.weight": (1, 1, None),
    }
    for name, (of_adam, of_muon, deviation) in expected.items():
        if name not in adam:
            continue
        assert adam[name] == pytest.approx(of_adam), name
        assert muon[name] == pytest.approx(of_muon), name
        assert deviation is None or std[name] == pytest.approx(deviation, rel=0.1), name
    assert wide.build(0).output_multiplier == 0.5


MUP_MIXERS = [
    *(MHAConfig(n_heads=2), SWAConfig(n_heads=2, window=4), LatentConfig(n_heads=2)),
    MHAConfig(n_heads=2, softmax_scale=0.3),
]


@pytest.mark.parametrize("mixer", MUP_MIXERS)
def test_scores_are_divided_by_the_heads_width_and_steps_equal_the_whole(mixer):
    config = LanguageModelConfig(
        vocab_size=50, width=128, blocks={"a": BlockConfig(mixer=mixer, ffn=DenseConfig(hidden=32))}, pattern=("a",)
    )
    base, wide = (replace(config, width=w, mup_base_width=64).build(0).blocks[0].mixer.scale for w in (64, 128))
    assert wide == pytest.approx(base / 2)  # heads twice as wide
    model = replace(config, mup_base_width=64, init_std=0.2).build(0)
    tokens = torch.arange(12).view(1, 12)
    state = model.init_state(1, 12)
    parts = [model.step(tokens[:, at], state) for at in (slice(0, 5), slice(5, 6), slice(6, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=0)
    assert not torch.allclose(model(tokens), replace(config, init_std=0.2).build(0)(tokens), atol=1e-3)


def test_a_run_by_mup_trains_at_its_rates_and_its_config_alone_rebuilds_it(tmp_path, dataset):
    model = replace(model_of("mha", "gdn"), dropout=0.0, width=32, mup_base_width=16)
    state = run(tiny_config(model, optimizer=MuonConfig()), tmp_path / "run", dataset)
    rates = {group["lr_multiple"] for part in state.optimizer.optimizers for group in part.param_groups}
    # √2 is of the FFN's down-projection, from a hidden width that is fixed here to more outputs.
    assert sorted(rates) == pytest.approx([0.5, 2**-0.5, 1.0, 2**0.5])
    loaded, _ = swamla.load(tmp_path / "run")
    tokens = torch.arange(32)[None]
    assert loaded.output_multiplier == 0.5
    torch.testing.assert_close(loaded(tokens), state.model.eval()(tokens))


def test_what_has_no_rule_is_refused(tmp_path, dataset):
    with pytest.raises(ConfigError, match="optimizer = 'toy_sgd': has no rule for µP"):
        run(
            tiny_config(replace(model_of("mha"), mup_base_width=8), optimizer=TOYS["toy_sgd"]()),
            tmp_path / "r",
            dataset,
        )
    with pytest.raises(ConfigError, match=r"mup_base_width = 0"):
        replace(MODEL, mup_base_width=0)
    with pytest.raises(ConfigError, match=r"blocks\.\w+\.mixer\.n_heads = 2: .*base model of µP .*mup_base_width = 63"):
        replace(MODEL, mup_base_width=63)
    gpt2 = GPT2(vocab_size=50, n_positions=16, n_embd=64, n_layer=1, n_head=2)
    with pytest.raises(UsageError, match="mup_base_width = 32: gpt2 does not have it"):
        equal_architecture(replace(gpt2.language_model(), mup_base_width=32), "gpt2")
