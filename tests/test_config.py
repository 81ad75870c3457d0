"""Configs and plain data: what goes in comes back, and what is wrong is named with its place."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from swamla.config import field_types, from_plain, load_file, load_toml, to_plain, within
from swamla.errors import ConfigError, UsageError, require


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: ClassVar[str] = "circle"
    radius: float

    def __post_init__(self) -> None:
        require(self.radius > 0, "radius", self.radius, "must be > 0, e.g. 1.5")


@dataclass(frozen=True, kw_only=True)
class Square:
    kind: ClassVar[str] = "square"
    side: int = 2


@dataclass(frozen=True, kw_only=True)
class Plain:
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    name: str = "untitled"
    shapes: dict[str, Circle | Square] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    limit: float | None = None
    mode: Literal["fast", "slow"] = "fast"
    tied: bool = False
    inner: Plain = field(default_factory=Plain)
    frame: Square | None = None


FULL = Drawing(
    name="x",
    shapes={"a": Circle(radius=2.5), "b": Square(side=3)},
    order=("a", "b", "a"),
    pair=(0.5, 2.0),
    limit=4.0,
    mode="slow",
    tied=True,
    inner=Plain(count=7),
    frame=Square(side=9),
)


@pytest.mark.parametrize("config", [Drawing(), FULL])
def test_a_config_comes_back_unchanged_through_json(config: Drawing) -> None:
    assert from_plain(Drawing, json.loads(json.dumps(to_plain(config)))) == config


def test_every_field_of_the_plain_form_matters() -> None:
    plain, default = to_plain(FULL), to_plain(Drawing())
    for name in field_types(Drawing):
        changed = {**plain, name: default[name]}
        assert from_plain(Drawing, changed) != FULL, name


def test_whole_numbers_serve_as_floats_and_become_floats() -> None:
    limit = from_plain(Drawing, {"limit": 3}).limit
    assert limit == 3.0
    assert type(limit) is float


def test_none_can_be_written_in_toml_as_the_word() -> None:
    assert from_plain(Drawing, {"limit": "none", "frame": "none"}) == Drawing(limit=None, frame=None)


def test_a_choice_may_be_written_as_its_kind_alone() -> None:
    assert from_plain(Drawing, {"shapes": {"s": "square"}}).shapes == {"s": Square()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nam": "x"}, "d.nam = 'x' (f): no such setting; did you mean \"name\"?"),
        ({"inner": {"cont": 1}}, 'd.inner.cont = 1 (f): no such setting; did you mean "count"?'),
        ({"inner": 3}, "d.inner = 3 (f): must be a table"),
        ({"tied": 1}, "d.tied = 1 (f): must be true or false"),
        ({"inner": {"count": True}}, "d.inner.count = True (f): must be a whole number"),
        ({"inner": {"count": 1.0}}, "d.inner.count = 1.0 (f): must be a whole number"),
        ({"inner": {"count": "1"}}, "d.inner.count = '1' (f): must be a whole number"),
        ({"limit": True}, "d.limit = True (f): must be a number"),
        ({"limit": float("nan")}, "d.limit = nan (f): must be a finite number"),
        ({"limit": 1e400}, "d.limit = inf (f): must be a finite number"),
        ({"limit": 10**400}, "must be a finite number"),
        ({"name": None}, "d.name = None (f): must be text"),
        ({"mode": "quick"}, "d.mode = 'quick' (f): must be one of fast, slow"),
        ({"mode": ["fast"]}, "d.mode = ['fast'] (f): must be one of fast, slow"),
        ({"order": "a b"}, "d.order = 'a b' (f): must be a list"),
        ({"order": ["a", 2]}, "d.order[1] = 2 (f): must be text"),
        ({"pair": [1, 2, 3]}, "d.pair = [1, 2, 3] (f): must have 2 items"),
        ({"shapes": []}, "d.shapes = [] (f): must be a table"),
        ({"shapes": {"a": {"radius": 1}}}, "d.shapes.a.kind = None (f): must be one of circle, square"),
        ({"shapes": {"a": {"kind": "sqare"}}}, "d.shapes.a.kind = 'sqare' (f): must be one of circle, square"),
        ({"shapes": {"a": {"kind": ["square"]}}}, "d.shapes.a.kind = ['square'] (f): must be one of circle, square"),
        ({"shapes": {"a": {"kind": "circle"}}}, "d.shapes.a.radius = None (f): must be given"),
        ({"shapes": {"a": {"kind": "circle", "radius": -1}}}, "d.shapes.a.radius = -1.0 (f): must be > 0, e.g. 1.5"),
        ({"frame": {"kind": "circle", "radius": 1}}, "d.frame.kind = 'circle' (f): must be one of square"),
        ([], "d = [] (f): must be a table"),
    ],
)
def test_a_refusal_names_field_value_place_and_what_is_allowed(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_plain(Drawing, data, path="d", origin="f")
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [{"name": "hf_" + "A1" * 12}, {"hf_token": "a1b2c3"}, {"wandb_api_key": "a1b2c3"}])
def test_what_looks_like_a_secret_is_refused_and_not_repeated(data: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="use the environment") as caught:
        from_plain(Drawing, data)
    assert next(iter(data.values())) not in str(caught.value)


def test_within_puts_the_path_before_the_field() -> None:
    with pytest.raises(ConfigError, match=r"^blocks\.a\.radius = -1: must be > 0"), within("blocks.a"):
        Circle(radius=-1)


TOML = '''# a drawing
name = """
[limit]
radius = 7
"""
order = [
    "a",
    "b",
]
frame = { kind = "square", side = 4 }

[shapes.a]  # a table
kind = "circle"
radius = 1.0

[shapes]
"b".kind = "square"
'''


def test_the_line_of_every_toml_key_is_known(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    data, place = load_toml(file)
    lines = {"name": 2, "order": 6, "frame": 10, "frame.side": 10, "shapes.a": 12, "shapes.a.radius": 14}
    assert {key: place(key) for key in lines} == {key: f"{file}:{line}" for key, line in lines.items()}
    assert place("shapes.b.kind") == f"{file}:17"
    assert place("limit") == ""
    assert from_plain(Drawing, data, origin=place).order == ("a", "b")
    data["shapes"]["a"]["radius"] = -1
    with pytest.raises(ConfigError, match=r"shapes\.a\.radius = -1\.0 \(.*run\.toml:14\): must be > 0"):
        from_plain(Drawing, data, origin=place)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "x = 1\nx = 2\n", "not TOML: Cannot overwrite a value (at line 2"),
        ("a.toml", "x = ", "not TOML"),
        ("a.json", '{"x": 1, "x": 2}', 'the key "x" is given twice'),
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "must hold a JSON object"),
        ("a.yaml", "x: !!python/object 1", "configs are .toml or .json files"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        load_file(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in str(caught.value)


def test_a_missing_or_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_bytes(b"x = '\xff'")
    with pytest.raises(UsageError, match=r"b\.toml: not UTF-8 text \(byte 5\)"):
        load_file(tmp_path / "b.toml")
    with pytest.raises(UsageError, match=r"none\.toml: No such file"):
        load_file(tmp_path / "none.toml")
