"""Sizes: arms widened by one factor, each size a study of its own in one folder; without them files are as ever."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from swamla.cli.compare import Arguments, _asked
from swamla.cli.flags import parse
from swamla.config import from_plain, to_plain
from swamla.data.dataset import Dataset
from swamla.errors import ConfigError, UsageError
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.ffn import FFNConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.registry import members_of
from swamla.study.folder import begin, opened, read_outcomes
from swamla.study.plan import Asked, Study, resolve_study
from swamla.study.running import run_study
from swamla.study.runs import describe, predict, ready
from swamla.study.sizes import at_sizes, resized, widths_of
from swamla.train import RunConfig
from tests.train.helpers import tiny_dataset

from .helpers import FakeRun, arm_of, sized, study_of

MIXERS, FFNS = members_of(MixerConfig), members_of(FFNConfig)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("texts"))


def configs() -> dict[str, RunConfig]:
    return {name: arm_of(name).config for name in ("mha", "gdn")}


def resolved(dataset: Dataset, found: dict[str, RunConfig] | None = None, **asked) -> Study:
    found = found or configs()
    measured = lambda configs, _: {name: 0.001 * config.model.width for name, config in configs.items()}  # noqa: E731
    return resolve_study(Asked(arms=dict.fromkeys(found, ""), **asked), found, dataset, measure=measured)


def model_of(mixer: MixerConfig, ffn: FFNConfig | None = None) -> LanguageModelConfig:
    blocks = {"a": BlockConfig(mixer=mixer, ffn=ffn or DenseConfig(), conv=3)}
    return LanguageModelConfig(vocab_size=100, width=64, blocks=blocks, pattern=("a", "a"))


@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(model_of(kind.example()), id=name) for name, kind in MIXERS.items()),
        *(pytest.param(model_of(MHAConfig(n_heads=2), kind.example()), id=name) for name, kind in FFNS.items()),
    ],
)
def test_twice_the_width_is_twice_as_many_heads_of_the_same_size_and_every_dimension_at_most_doubles(
    model: LanguageModelConfig,
) -> None:
    wide = resized(model, Fraction(2))
    assert (wide.width, wide.depth, wide.vocab_size) == (128, 2, 100)
    before, after = (dict(each.skeleton().named_parameters()) for each in (model, wide))
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        ratios = [now / then for now, then in zip(after[name].shape, parameter.shape, strict=True)]
        assert all(1 <= ratio <= 2 for ratio in ratios), name  # a fused matrix may have rows that stay
    mixer, wider = (each.blocks["a"].mixer.__dict__ for each in (model, wide))
    assert wider["n_heads"] == 2 * mixer["n_heads"]
    assert resized(model, Fraction(1)) == model
    assert resized(wide, Fraction(1, 2)) == model


def test_ranks_key_heads_and_hidden_widths_that_are_given_follow_and_head_widths_and_experts_stay() -> None:
    mla = resized(model_of(MLAConfig(n_heads=2, kv_lora_rank=24, qk_nope_head_dim=16)), Fraction(3, 2))
    assert mla.blocks["a"].mixer == MLAConfig(n_heads=3, kv_lora_rank=36, qk_nope_head_dim=16)
    gdn = resized(model_of(GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, latent_dim=7)), Fraction(3, 2))
    assert gdn.blocks["a"].mixer == GDNConfig(n_heads=6, n_key_heads=3, head_k_dim=8, latent_dim=11)
    assert resized(model_of(MHAConfig(n_heads=2), DenseConfig(hidden=101)), Fraction(3, 2)).blocks[
        "a"
    ].ffn == DenseConfig(hidden=152)
    experts = resized(model_of(MHAConfig(n_heads=2), MoEConfig(n_experts=4, expert_hidden=24)), Fraction(3, 2))
    assert experts.blocks["a"].ffn == MoEConfig(n_experts=4, expert_hidden=40)  # of 36 the nearest multiple of 8


def test_a_width_that_cuts_a_head_is_refused_and_weights_or_a_base_of_one_width() -> None:
    with pytest.raises(
        UsageError, match=r"arm 'mha' at size 40: mha.mixer.n_heads = 2 becomes 2.5: must be whole, name"
    ):
        list(at_sizes(configs(), (32, 40)))
    begun = {name: replace(one, train=replace(one.train, init_from="run")) for name, one in configs().items()}
    with pytest.raises(UsageError, match="arm 'mha' at size 48: `init_from` is of one width"):
        list(at_sizes(begun, (32, 48)))
    mup = {name: replace(one, model=replace(one.model, mup_base_width=32)) for name, one in configs().items()}
    with pytest.raises(UsageError, match="arm 'mha' at size 48: `mup_base_width` is for wider heads"):
        list(at_sizes(mup, (32, 48)))


def test_a_number_of_sizes_doubles_the_width_and_arms_that_are_wider_stay_so_by_the_same_factor() -> None:
    assert widths_of(3, 32) == (32, 64, 128)
    found = configs()
    found["gdn"] = replace(found["gdn"], model=resized(found["gdn"].model, Fraction(2)))
    sizes = {size: [one.model.width for one in each.values()] for size, each in at_sizes(found, (16, 48))}
    assert sizes == {16: [16, 32], 48: [48, 96]}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"sizes": 1}, "sizes = 1: must be 2 to 6, each twice as wide as the last, or widths"),
        ({"sizes": 128}, "sizes = 128: must be 2 to 6"),
        ({"sizes": (128,)}, "must be two or more widths, rising"),
        ({"sizes": (128, 64)}, "must be two or more widths, rising"),
        ({"larger_seeds": 3}, "in a study of several `sizes`"),
        ({"sizes": 2, "larger_seeds": 1}, "larger_seeds = 1: must be 2 to seeds = 5"),
        ({"sizes": 2, "larger_seeds": 6}, "larger_seeds = 6: must be 2 to seeds = 5"),
    ],
)
def test_sizes_that_cannot_be_are_refused(asked: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Asked(arms={"a": "", "b": ""}, **asked)


@pytest.mark.parametrize(("words", "sizes"), [("2", 2), ("32,48", (32, 48))])
def test_the_flag_and_the_file_say_sizes_alike(words: str, sizes: int | tuple, tmp_path: Path) -> None:
    of_flag, _ = _asked(*parse(Arguments, ["mha", "gdn", "--sizes", words], command="swamla compare"))
    file = tmp_path / "study.toml"
    written = sizes if isinstance(sizes, int) else list(sizes)
    file.write_text(f'sizes = {written}\n[arms]\nmha = ""\ngdn = ""\n')
    of_file, _ = _asked(*parse(Arguments, [str(file)], command="swamla compare"))
    assert of_flag.sizes == of_file.sizes == sizes
    over, _ = _asked(*parse(Arguments, [str(file), "--sizes", "64,96"], command="swamla compare"))
    assert over.sizes == (64, 96)


def test_every_size_is_matched_with_its_own_first_arm(dataset: Dataset) -> None:
    study = resolved(dataset, sizes=(32, 48))
    assert [arm.name for arm in study.arms] == ["mha@32", "gdn@32", "mha@48", "gdn@48"]
    assert [arm.slug for arm in study.arms] == ["mha-w32", "gdn-w32", "mha-w48", "gdn-w48"]
    assert study.sizes == (32, 48)
    for size in study.sizes:
        first, other = study.at(size).arms
        assert (first.name, other.name) == ("mha", "gdn")
        assert first.config.model.width == other.config.model.width == size
        assert study.reference_of(study.arm(f"gdn@{size}")).costs == first.costs
        assert abs(other.costs.parameters / first.costs.parameters - 1) <= 0.01
        assert other.changes.keys() == {"gdn.ffn.hidden"}
    alone = resolved(dataset)
    small = study.at(32).arms
    assert [(arm.config, arm.costs, arm.matched) for arm in small] == [
        (arm.config, arm.costs, arm.matched) for arm in alone.arms
    ], "the size of the flags is the study that it would be alone"
    assert from_plain(Study, study.as_plain()) == study


def test_an_arm_that_cannot_be_matched_names_the_size(dataset: Dataset) -> None:
    found = configs()
    found["gdn"] = replace(found["gdn"], model=replace(found["gdn"].model, pattern=("gdn",) * 6))
    with pytest.raises(UsageError, match="at size 32: arm 'gdn': cannot have"):
        resolved(dataset, found, sizes=2)


def test_steps_matched_by_seconds_are_those_of_the_sizes_first_arm(dataset: Dataset) -> None:
    found = configs()
    found["gdn"] = replace(found["gdn"], model=resized(found["gdn"].model, Fraction(2)))
    study = resolved(dataset, found, match="seconds", sizes=(32, 48))
    assert [arm.steps for arm in study.arms] == [20, 10, 20, 10]


def test_larger_sizes_may_have_fewer_seeds(dataset: Dataset) -> None:
    study = resolved(dataset, sizes=(32, 48), seeds=5, larger_seeds=3)
    assert [study.seeds_of(arm) for arm in study.arms] == [5, 5, 3, 3]


def test_a_study_without_sizes_is_written_as_before_there_were_any(dataset: Dataset) -> None:
    plain = resolved(dataset).as_plain()
    assert not {"sizes", "larger_seeds"} & plain["asked"].keys()
    assert not [arm for arm in plain["arms"] if "size" in arm]
    assert from_plain(Study, plain) == resolved(dataset)
    assert to_plain(resolved(dataset))["asked"] == plain["asked"] | {
        "sizes": [], "larger_seeds": None, "published": [],
    }  # fmt: skip


def test_all_sizes_run_in_one_folder_each_with_a_search_of_its_own_and_go_on_after_a_stop(tmp_path: Path) -> None:
    study = sized(study_of(seeds=3), 32, 48, larger_seeds=2)
    begin(tmp_path / "study", study)
    assert opened(tmp_path / "study", study.asked) == study
    (tmp_path / "study" / "runs").mkdir()
    with pytest.raises(UsageError, match="holds another study, whose sizes is"):
        opened(tmp_path / "study", replace(study.asked, sizes=(32, 64)))

    class Stopped(Exception):
        pass

    def twice(words: list[str], log: Path) -> FakeRun:
        if len(read_outcomes(tmp_path / "study")) == 9:
            raise Stopped
        return FakeRun(words, log)

    with pytest.raises(Stopped):
        run_study(tmp_path / "study", launch=twice)
    assert predict(study, read_outcomes(tmp_path / "study"), 1).runs > 0
    outcomes = run_study(tmp_path / "study", launch=FakeRun)
    assert not ready(study, outcomes)
    for arm in study.arms:
        own = [one for one in outcomes.values() if one.arm == arm.name]
        assert sum(one.purpose == "rate" for one in own) >= 5
        assert sorted(one.seed for one in own if one.purpose == "seed") == list(range(1, study.seeds_of(arm) + 1))
    lines = (tmp_path / "study" / "results.jsonl").read_text().splitlines()
    assert len({json.loads(line)["run"] for line in lines}) == len(lines) == len(outcomes)


def test_the_plan_says_the_sizes_and_counts_the_runs_of_all(tmp_path: Path) -> None:
    said = dict(describe(sized(study_of(seeds=5), 32, 48, larger_seeds=3), tmp_path, {}, 1))
    at_each = "matched, searched for its learning rates and compared by itself, with seeds 1 to 3"
    assert said["sizes"].startswith(f"widths 32, 48, each {at_each}")
    assert said["runs"].startswith("36 or a few more")
    assert "sizes" not in dict(describe(study_of(), tmp_path, {}, 1))
    plain = sized(study_of(rates="recipe", match="none"), 32, 48)
    assert dict(describe(plain, tmp_path, {}, 1))["sizes"] == "widths 32, 48, each compared by itself"
