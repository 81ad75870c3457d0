"""Registries: ours and others' are found alike, what cannot be registered is refused, and what is lost is named."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pytest
import torch

from swamla.config import choices_of, from_plain, to_plain
from swamla.data.config import DataConfig
from swamla.data.reading import Notes
from swamla.data.sources import Entry, Files, Hub, Source
from swamla.errors import ConfigError, MissingBackendError, UsageError
from swamla.model import (
    BlockConfig,
    DenseConfig,
    FFNConfig,
    LanguageModel,
    LanguageModelConfig,
    MHAConfig,
    Mixer,
    MixerConfig,
    NormConfig,
    RMSNormConfig,
    SWAConfig,
)
from swamla.model.accounting import parameter_specs
from swamla.model.ffns.experts import check_recordable
from swamla.registry import Registered, members_of, plugin_of, register
from swamla.tasks import Task
from swamla.train.backends import available
from swamla.train.changes import _leaves
from swamla.train.config import TrainConfig
from swamla.train.optim import AdamWConfig, OptimizerConfig
from tests.model.helpers import FFNS, MIXERS, NORMS
from tests.toys import FAMILIES, TOYS, registered
from tests.train.helpers import MIXERS as TRAINED_MIXERS
from tests.train.helpers import OPTIMIZERS

KINDS = {
    MixerConfig: {"gdn", "kda", "latent", "mha", "mla", "swa"},
    FFNConfig: {"dense", "latent_moe", "moe", "none"},
    NormConfig: {"rmsnorm", "layernorm", "dyt"},
    OptimizerConfig: {"adamw", "lion", "muon"},
    Source: {"stdlib", "files", "hf", "shakespeare"},
    Task: {
        *("copy", "dyck", "induction", "mqar", "needle", "ngram", "palindrome", "selective_copy", "state_tracking"),
    },
}
TOY_MODEL = LanguageModelConfig(
    vocab_size=31,
    width=32,
    blocks={"a": BlockConfig(mixer=TOYS["toy"](inner=8), ffn=TOYS["toy_ffn"]())},
    pattern=("a",),
    norm=TOYS["toy_norm"](),
)


@pytest.fixture
def toys() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture
def as_before() -> Iterator[None]:
    """Whatever a test registers is gone behind it."""
    before = {family: dict(members_of(family)) for family in FAMILIES}
    yield
    for family, members in before.items():
        family._members.clear()
        family._members.update(members)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_each_member_has_an_example_that_fits_a_width_of_64(family: Any, toys: None) -> None:
    for cls in members_of(family).values():
        config: Any = cls.example()
        if family is OptimizerConfig:
            assert config.build(TOY_MODEL.build(), lr=1e-3, weight_decay=0.1).stateless()
        elif family is Task:
            assert config.row(0, 0).tokens_T.shape == (config.length,)
        elif family is Source:
            assert list(config.documents(Notes())) == []  # it has no entries before it is opened
        else:
            assert config.n_parameters(64) == sum(p.numel() for p in config.build(64).parameters())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_each_family_family_has_its_members_by_kind(family: type[Registered]) -> None:
    assert set(members_of(family)) == KINDS[family]
    assert all(issubclass(cls, family) and cls.kind == kind for kind, cls in members_of(family).items())
    assert not any(plugin_of(cls) for cls in members_of(family).values())


def test_the_tests_of_the_contract_run_over_all_that_is_registered(toys: None) -> None:
    assert {config.kind for config in MIXERS.values()} == set(members_of(MixerConfig))
    assert {config.kind for config in FFNS.values()} == set(members_of(FFNConfig))
    assert {config.kind for config in NORMS.values()} == set(members_of(NormConfig))
    assert {config.kind for config in OPTIMIZERS.values()} == set(members_of(OptimizerConfig))
    assert {config.kind for config in TRAINED_MIXERS.values()} == set(members_of(MixerConfig))


def test_what_is_registered_later_appears_in_choices_that_were_asked_for_before() -> None:
    mixers = choices_of(MixerConfig)
    assert "toy" not in mixers
    with registered():
        assert list(mixers) == [*sorted(KINDS[MixerConfig]), "toy"]
    assert "toy" not in mixers


@pytest.mark.parametrize("name", ["signs", "outputs"])
def test_members_can_be_told_apart_in_drawings_and_their_outputs_are_there(name: str, toys: None) -> None:
    parts: list[Any] = [*MIXERS.values(), *FFNS.values()]
    if name == "signs":
        signs = {config.kind: config.sign for config in MIXERS.values()}
        assert len(set(signs.values())) == len(signs)
        assert all(len(config.sign) == 1 for config in parts)
        return
    for config in parts:
        names = {name for name, _ in config.build(32).named_parameters()}
        assert set(config.outputs) <= names
        assert set(config.vectors) <= names
        assert config.outputs or config.kind == "none"


def test_which_mixers_see_the_order_of_tokens_and_which_are_local() -> None:
    local = {"swa", "swa_normed", "swa_gated", "gdn", "gdn_latent", "gdn_bounded", "kda", "kda_bounded", "toy"}
    assert {kind for kind, config in MIXERS.items() if config.is_local} == local
    assert {kind for kind, config in MIXERS.items() if not config.sees_order} == {"mla_unrotated", "latent", "toy"}
    assert not MHAConfig(n_heads=2, rope=None).sees_order
    assert SWAConfig(n_heads=2, rope=None).sees_order


@pytest.mark.parametrize("kind", MIXERS)
def test_a_backend_is_given_to_a_mixer_that_leaves_it_open_and_to_no_other(kind: str) -> None:
    config: Any = MIXERS[kind]
    chosen = config.with_backend("reference")
    if kind == "toy":
        assert chosen == config
    else:
        assert chosen == replace(config, backend="reference")
        assert chosen.with_backend("torch") == chosen


@pytest.mark.parametrize("family", [MixerConfig, FFNConfig], ids=lambda family: family.__name__)
def test_the_backends_that_a_kind_names_are_those_that_its_field_takes(family: Any, toys: None) -> None:
    for kind, cls in members_of(family).items():
        named: tuple[str, ...] = cls.BACKENDS  # type: ignore[attr-defined]
        example: Any = cls.example()
        assert bool(named) == ("backend" in {field.name for field in fields(example)}), kind
        if named:
            assert [replace(example, backend=name).backend for name in named] == list(named)
            assert example.backend == named[0] == "auto"
            with pytest.raises(ConfigError, match=f"must be one of {', '.join(named)}"):
                replace(example, backend="no such backend")


def test_the_doctor_asks_every_kind_that_names_backends_for_each_of_them(as_before: None) -> None:
    @register
    @dataclass(frozen=True, kw_only=True)
    class Chosen(TOYS["toy"]):  # type: ignore[misc]
        kind: ClassVar[str] = "chosen"
        BACKENDS: ClassVar[tuple[str, ...]] = ("auto", "slow", "fast")
        backend: str = "auto"

        def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
            if self.backend == "fast":
                raise MissingBackendError('backend = "fast" needs a faster machine')
            return {"mean": self.backend}

    assert available(torch.device("cpu"))["chosen"] == {"slow": "", "fast": "needs a faster machine"}


def test_a_config_with_foreign_kinds_says_their_files_and_comes_back(toys: None) -> None:
    plain = json.loads(json.dumps(to_plain(TOY_MODEL)))
    assert plain["blocks"]["a"]["mixer"] == {"kind": "toy", "plugin": "toy_mixer.py", "inner": 8}
    assert plain["blocks"]["a"]["ffn"] == {"kind": "toy_ffn", "plugin": "toy_ffn.py", "hidden": 64}
    assert plain["norm"] == {"kind": "toy_norm", "plugin": "toy_norm.py", "eps": 1e-5}
    assert from_plain(LanguageModelConfig, plain) == TOY_MODEL
    plain["norm"]["plugin"] = "elsewhere/renamed.py"
    assert from_plain(LanguageModelConfig, plain) == TOY_MODEL


def test_a_config_of_ours_names_no_plugin() -> None:
    config = LanguageModelConfig(width=32, blocks={"a": BlockConfig(mixer=MIXERS["gdn"])}, pattern=("a",))
    assert "plugin" not in json.dumps(to_plain(config))
    assert to_plain(AdamWConfig()) == {"kind": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "moments": "fp32"}


def test_a_plugin_that_was_renamed_makes_no_other_run(toys: None) -> None:
    plain = to_plain(TOY_MODEL)
    before = dict(_leaves(plain))
    plain["norm"]["plugin"] = "renamed.py"
    assert dict(_leaves(plain)) == before
    plain["norm"]["eps"] = 1e-3
    assert dict(_leaves(plain)) != before


@pytest.mark.parametrize(
    ("norm", "told"),
    [
        (
            {"kind": "toy_norm", "plugin": "toy_norm.py"},
            "m.norm.kind = 'toy_norm' (f): is the kind of a plugin: name its file, --plugin toy_norm.py",
        ),
        (
            {"kind": "toy_norm"},
            "m.norm.kind = 'toy_norm' (f): must be one of rmsnorm, layernorm, dyt; or of a plugin: --plugin FILE",
        ),
        ("rmsnrom", "m.norm.kind = 'rmsnrom' (f): must be one of rmsnorm, layernorm, dyt; did you mean \"rmsnorm\"?"),
        ({"eps": 1}, "m.norm.kind = None (f): must be one of rmsnorm, layernorm, dyt"),
        ({"kind": "dyt", "alfa": 1}, 'm.norm.alfa = 1 (f): no such setting; did you mean "alpha"?'),
    ],
)
def test_a_kind_that_is_not_known_is_refused_in_a_line_that_says_what_to_do(norm: Any, told: str) -> None:
    plain = {"width": 32, "blocks": {"a": {"mixer": {"kind": "mha", "n_heads": 2}}}, "pattern": ["a"], "norm": norm}
    with pytest.raises(ConfigError) as caught:
        from_plain(LanguageModelConfig, plain, path="m", origin="f")
    assert str(caught.value) == told


def test_every_family_is_read_through_its_registry(toys: None) -> None:
    optimizer = from_plain(TrainConfig, {"steps": 10, "optimizer": {"kind": "toy_sgd", "momentum": 0.5}}).optimizer
    assert optimizer == TOYS["toy_sgd"](momentum=0.5)
    assert from_plain(BlockConfig, {"mixer": "toy", "ffn": "toy_ffn"}) == BlockConfig(
        mixer=TOYS["toy"](), ffn=TOYS["toy_ffn"]()
    )


class Norm(NormConfig):
    """All that a norm needs, but for a name and fields."""

    def build(self, width: int) -> Any:
        return RMSNormConfig().build(width)

    def n_parameters(self, width: int) -> int:
        return width


@dataclass(frozen=True, kw_only=True)
class Nameless(Norm):
    pass


@dataclass(frozen=True, kw_only=True)
class Spaced(Norm):
    kind: ClassVar[str] = "a norm"


class NoDataclass(Norm):
    kind: ClassVar[str] = "norm"


@dataclass(frozen=True, kw_only=True)
class Half(NormConfig):
    kind: ClassVar[str] = "half"

    @abstractmethod
    def build(self, width: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Reserved(Norm):
    kind: ClassVar[str] = "reserved"
    plugin: str = ""


@dataclass(frozen=True, kw_only=True)
class Taken(Norm):
    kind: ClassVar[str] = "rmsnorm"


@dataclass(frozen=True, kw_only=True)
class Unexampled(Norm):
    kind: ClassVar[str] = "unexampled"
    eps: float


class Stranger:
    kind: ClassVar[str] = "stranger"


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (Nameless, 'Nameless: needs a name of its own: kind: ClassVar[str] = "toy"'),
        (Spaced, 'Spaced: needs a name of its own: kind: ClassVar[str] = "toy"'),
        (NoDataclass, "NoDataclass: put @dataclass(frozen=True, kw_only=True) below @register"),
        (Half, "Half: lacks what every NormConfig has: build, n_parameters"),
        (Reserved, "Reserved: a field cannot be called plugin"),
        (Unexampled, "Unexampled: lacks `example`, a classmethod, as eps has no default"),
        (Taken, "Taken: the kind 'rmsnorm' is taken by swamla.model.norm.RMSNormConfig"),
        (Stranger, "Stranger: derive it from MixerConfig, FFNConfig, NormConfig, OptimizerConfig, Source or Task"),
    ],
)
def test_what_does_not_keep_to_the_contract_is_refused_when_it_is_registered(
    cls: Any, told: str, as_before: None
) -> None:
    known = dict(members_of(NormConfig))
    with pytest.raises((TypeError, ValueError)) as caught:
        register(cls)
    assert str(caught.value) == told
    assert dict(members_of(NormConfig)) == known


def test_a_class_that_is_defined_once_more_takes_the_place_of_the_one_before(as_before: None) -> None:
    def define(start: float) -> type:
        @register
        @dataclass(frozen=True, kw_only=True)
        class Again(Norm):
            kind: ClassVar[str] = "again"
            eps: float = start

        return Again

    define(1.0)
    second = define(2.0)
    assert members_of(NormConfig)["again"] is second
    assert DenseConfig.kind not in members_of(NormConfig)


def test_what_is_loaded_beside_a_model_changes_nothing_of_how_it_is_trained(as_before: None) -> None:
    """A plugin's FFN whose down_proj is a set of vectors, which no block uses."""
    model = LanguageModelConfig(
        vocab_size=31,
        width=32,
        blocks={"a": BlockConfig(mixer=MIXERS["gdn"], ffn=FFNS["moe"]), "b": BlockConfig(mixer=MIXERS["mha"])},
        pattern=("a", "b", "a"),
    )
    before = parameter_specs(model)
    assert {spec.name for spec in before if spec.vectors} == {
        f"blocks.{layer}.{name}" for layer in (0, 2) for name in ("mixer.conv_weight", "ffn.router.weight")
    }

    @register
    @dataclass(frozen=True, kw_only=True)
    class Vectors(DenseConfig):
        kind: ClassVar[str] = "vectors"
        vectors: ClassVar[tuple[str, ...]] = ("down_proj.weight",)

    assert parameter_specs(model) == before
    used = parameter_specs(replace(model, blocks=model.blocks | {"b": BlockConfig(mixer=MIXERS["mha"], ffn=Vectors())}))
    assert {spec.name for spec in used if spec.vectors} - {spec.name for spec in before if spec.vectors} == {
        "blocks.1.ffn.down_proj.weight"
    }


class Conv(Mixer[Any]):
    """A projection and a filter of three dimensions, by other names than ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(width, width, 4, groups=width)
        self.out = torch.nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Any, seq: Any) -> Any: ...

    def init_state(self, batch: int, max_len: int, *, dtype: Any, device: Any) -> Any: ...

    def step(self, x_BTD: Any, state: Any, seq: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class ConvConfig(type(TOYS["toy"]())):  # type: ignore[misc]
    kind: ClassVar[str] = "conv"

    def build(self, width: int) -> Conv:
        return Conv(width)


@dataclass(frozen=True, kw_only=True)
class NamedConvConfig(ConvConfig):
    kind: ClassVar[str] = "named_conv"
    outputs: ClassVar[tuple[str, ...]] = ("out.weight",)


def test_a_mixer_without_the_outputs_that_it_names_is_refused() -> None:
    with pytest.raises(UsageError, match=r"conv: `outputs` names no parameter of its module: o_proj.weight; it has "):
        BlockConfig(mixer=ConvConfig()).build(32, RMSNormConfig(), 0.0)
    assert BlockConfig(mixer=NamedConvConfig()).build(32, RMSNormConfig(), 0.0).mixer


def test_a_parameter_of_three_dimensions_is_no_expert_by_that() -> None:
    blocks = {"a": BlockConfig(mixer=NamedConvConfig())}
    config = LanguageModelConfig(vocab_size=31, width=32, blocks=blocks, pattern=("a",))
    with torch.device("meta"):
        model = LanguageModel(config)
    check_recordable(model)
    with torch.device("meta"):
        experts = LanguageModel(replace(config, blocks={"a": replace(blocks["a"], ffn=FFNS["moe"])}))
    with pytest.raises(UsageError, match=r"blocks\.0\.ffn\.experts are in torch\.float32"):
        check_recordable(experts)


def test_spans_of_another_source_stay_what_it_made_them() -> None:
    source = TOYS["toy_text"](name="toy_text")
    assert source.last_span(Entry("a", "a", 900, ()), (10, 20)) == (10, 20)
    assert source.pinned(DataConfig(source="toy_text"))
    files = Files(name="x")
    assert files.last_span(Entry("a.jsonl", "a", 900, ()), (10, 20)) == (10, 900)
    assert files.last_span(Entry("a.parquet", "a", 900, ()), (10, 20)) == (10, 20)
    assert not Hub(name="x").pinned(DataConfig(source="hf:a/b", hub_revision="main"))
