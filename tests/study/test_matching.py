"""Matched arms cost the same, by counts of the models that are built."""

import pytest

from swamla.errors import UsageError
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.ffn import FFNConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.registry import members_of
from swamla.study.matching import TOLERANCE, match, matched_steps

LENGTH = 128
MIXERS = {
    "mha": MHAConfig(n_heads=2),
    "swa": SWAConfig(n_heads=2, window=32),
    "mla": MLAConfig(n_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32),
    "gdn": GDNConfig(n_heads=2),
    "kda": KDAConfig(n_heads=2),
    "latent": LatentConfig(n_heads=2),
}
PATTERNS = ("mha", "swa swa mla", "gdn gdn mla", "kda latent swa")


def model_of(pattern: str, ffn: FFNConfig | None = None, width: int = 64) -> LanguageModelConfig:
    """Six layers of this pattern, repeated."""
    names = (pattern.split() * 6)[:6]
    blocks = {name: BlockConfig(mixer=MIXERS[name], ffn=ffn or DenseConfig()) for name in names}
    return LanguageModelConfig(vocab_size=101, width=width, blocks=blocks, pattern=tuple(names))


def built(model: LanguageModelConfig) -> int:
    """Parameters of the built module, without the embedding, which the head shares."""
    return sum(p.numel() for p in model.build(seed=0).parameters()) - model.vocab_size * model.width


@pytest.mark.parametrize("width", [32, 64])
def test_matched_arms_have_the_parameters_of_the_first_within_1_percent_when_built(width: int) -> None:
    arms = {pattern: model_of(pattern, width=width) for pattern in PATTERNS}
    if width == 32:  # the latent of half the width is the least that these heads allow
        arms.pop("kda latent swa")
    found = match(arms, "parameters", length=LENGTH)
    target = built(arms["mha"])
    assert found["mha"].model == arms["mha"]
    for name, one in found.items():
        assert built(one.model) == pytest.approx(target, rel=0.01), name
        assert one.after == built(one.model)
        assert one.before == built(arms[name])


def test_only_ffn_widths_change_and_all_of_them_by_one_factor_and_what_was_done_is_told() -> None:
    arms = {"mha": model_of("mha"), "gdn gdn mla": model_of("gdn gdn mla")}
    matched = match(arms, "parameters", length=LENGTH)["gdn gdn mla"]
    hidden = {name: block.ffn.widths(64)["hidden"] for name, block in matched.model.blocks.items()}
    assert len(set(hidden.values())) == 1
    for name, block in arms["gdn gdn mla"].blocks.items():
        assert matched.model.blocks[name].mixer == block.mixer
    assert matched.changes == {f"{name}.ffn.hidden": (192, width) for name, width in hidden.items()}
    assert f"gdn.ffn.hidden 192 → {hidden['gdn']}, mla.ffn.hidden 192 → {hidden['mla']}: " in matched.words()
    assert "non-embedding parameters, " in matched.words()


def test_no_other_width_is_nearer() -> None:
    arms = {"mha": model_of("mha"), "gdn": model_of("gdn")}
    matched = match(arms, "parameters", length=LENGTH)["gdn"]
    hidden = matched.changes["gdn.ffn.hidden"][1]
    for other in (hidden - 1, hidden + 1):
        assert abs(built(model_of("gdn", DenseConfig(hidden=other))) - matched.target) >= abs(
            matched.after - matched.target
        )


def independent_flops(pattern: str, hidden: int, width: int, length: int) -> float:
    """Training FLOPs a token of mha and swa, written from the equations: 6 per weight, and attention's pairs."""
    layers = 0.0
    for name in pattern.split():
        seen = length if name == "mha" else MIXERS["swa"].window  # type: ignore[attr-defined]
        pairs = sum(min(t + 1, seen) + (max(0, min(4, t + 1 - seen)) if name == "swa" else 0) for t in range(length))
        layers += 2 * (4 * width**2 + 3 * width * hidden) * length + 2 * 2 * width * pairs
    return 3 * (layers + 2 * width * 101 * length) / length


def test_matched_arms_have_the_flops_of_the_first_within_2_percent() -> None:
    arms = {"mha": model_of("mha"), "swa": model_of("swa")}
    matched = match(arms, "flops", length=LENGTH)["swa"]
    target = independent_flops("mha " * 6, 192, 64, LENGTH)
    hidden = matched.changes["swa.ffn.hidden"][1]
    assert matched.target == pytest.approx(target, rel=1e-12)
    assert matched.after == pytest.approx(independent_flops("swa " * 6, hidden, 64, LENGTH), rel=1e-12)
    assert matched.after == pytest.approx(target, rel=0.02)
    assert hidden > 192, "a window costs less than attention to everything"


@pytest.mark.parametrize(
    "ffn",
    [
        MoEConfig(n_experts=4, n_activated=1, n_shared=0, expert_hidden=512),
        LatentMoEConfig(n_experts=4, n_activated=1, n_shared=0, expert_hidden=512),
    ],
)
def test_experts_are_matched_in_the_steps_that_their_products_allow(ffn: FFNConfig) -> None:
    arms = {"mha": model_of("mha", ffn, width=256), "gdn": model_of("gdn", ffn, width=256)}
    matched = match(arms, "parameters", length=LENGTH)["gdn"]
    assert matched.changes["gdn.ffn.expert_hidden"][1] % 8 == 0
    assert built(matched.model) == pytest.approx(matched.target, rel=0.01)


def live_state(model: LanguageModelConfig) -> int:
    return model.build(seed=0).init_state(1, LENGTH).nbytes


def test_matched_arms_have_the_state_of_the_first_within_5_percent_and_its_parameters() -> None:
    arms = {
        "swa swa mla": model_of("swa swa mla"),
        "gdn gdn mla": model_of("gdn gdn mla"),
        "latent": model_of("latent"),
    }
    found = match(arms, "state", length=LENGTH)
    target, parameters = live_state(arms["swa swa mla"]), built(arms["swa swa mla"])
    for one in found.values():
        assert live_state(one.model) == one.after == pytest.approx(target, rel=TOLERANCE["state"])
        assert built(one.model) == pytest.approx(parameters, rel=TOLERANCE["parameters"])
    assert found["latent"].changes.keys() == {"latent.mixer.n_latent", "latent.ffn.hidden"}


def test_an_arm_that_cannot_be_matched_is_refused_in_one_line_that_says_why() -> None:
    with pytest.raises(
        UsageError, match=r"arm 'mha': cannot have [\d,]+ bytes of state.*no setting to adjust"
    ) as state:
        match({"swa": model_of("swa"), "mha": model_of("mha")}, "state", length=LENGTH)
    assert "\n" not in str(state.value)
    bare = model_of("gdn", NoFFNConfig())
    with pytest.raises(UsageError, match=r"arm 'gdn': .* within 1%.*its FFNs have no width to adjust"):
        match({"mha": model_of("mha"), "gdn": bare}, "parameters", length=LENGTH)
    with pytest.raises(UsageError, match=r"arm 'gdn': .*adjusting gdn\.ffn\.hidden comes to"):
        match({"bare": model_of("mha", NoFFNConfig()), "gdn": model_of("gdn")}, "parameters", length=LENGTH)


@pytest.mark.parametrize("kind", [kind for kind, cls in members_of(MixerConfig).items()])
def test_settings_of_the_state_are_fields_that_change_its_bytes(kind: str) -> None:
    mixer = members_of(MixerConfig)[kind].example()  # type: ignore[attr-defined]
    for name, value in mixer.state_settings(64).items():
        smaller = type(mixer)(**mixer.__dict__ | {name: value // 2})
        assert smaller.state_bytes(64, LENGTH, 4) < mixer.state_bytes(64, LENGTH, 4)
        assert type(mixer)(**mixer.__dict__ | {name: value}).state_bytes(64, LENGTH, 4) == mixer.state_bytes(
            64, LENGTH, 4
        )


def test_arms_matched_by_seconds_train_as_long_as_the_first() -> None:
    assert matched_steps({"mha": 0.1, "gdn": 0.25, "swa": 0.08}, 500) == {"mha": 500, "gdn": 200, "swa": 625}
