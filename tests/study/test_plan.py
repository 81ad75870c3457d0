"""A study is resolved once, so that all of its runs are alike: budget, data, precision, backends, matched sizes."""

from dataclasses import replace

import pytest

from swamla.config import from_plain, to_plain
from swamla.data.dataset import Dataset
from swamla.errors import ConfigError, UsageError
from swamla.study import plan
from swamla.study.caveats import differing
from swamla.study.plan import TOKENS, Asked, Study, budget, resolve_study, slug_of
from swamla.train import RunConfig
from tests.train.helpers import tiny_dataset

from .helpers import arm_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("texts"))


def configs(**changes) -> dict[str, RunConfig]:
    """Two arms whose training has these changes."""
    found = {name: arm_of(name).config for name in ("mha", "gdn")}
    return {name: replace(config, train=replace(config.train, **changes)) for name, config in found.items()}


def resolved(dataset: Dataset, found: dict[str, RunConfig] | None = None, **asked) -> Study:
    arms = dict.fromkeys(("mha", "gdn"), "")
    seconds = {"mha": 0.1, "gdn": 0.25}
    return resolve_study(Asked(arms=arms, **asked), found or configs(), dataset, measure=lambda *_: seconds)


def test_runs_end_after_steps_are_scored_once_on_the_validation_part_and_publish_nothing() -> None:
    busy = configs(
        max_minutes=3.0, eval_interval=2, eval_seconds=1.0, eval_tokens=64, tensorboard=True, hf_repo_id="me/x", seed=7
    )["mha"]
    train = budget(busy, Asked(arms={"a": "", "b": ""})).train
    assert (train.steps, train.max_minutes, train.seed, train.threads) == (20, None, 0, 1)
    assert (train.eval_interval, train.eval_seconds, train.eval_tokens, train.eval_part) == (
        None, None, None, "validation",
    )  # fmt: skip
    assert not train.tensorboard
    assert not train.hf_repo_id
    assert train.save_interval == 5
    assert train.lr == busy.train.lr


def test_the_budget_is_the_studys_tokens_or_the_recipes_steps_or_a_default() -> None:
    timed = configs(steps=None, max_minutes=3.0)["mha"]
    asked = Asked(arms={"a": "", "b": ""})
    assert budget(configs()["mha"], asked).train.steps == 20
    assert budget(timed, asked).train.steps == round(TOKENS / 128)
    assert budget(configs()["mha"], replace(asked, tokens=1280)).train.steps == 10


def test_precision_and_backends_are_chosen_once_for_all_runs(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "fastest_paths", lambda *_, **__: (dict.fromkeys(("mha", "gdn"), "reference"), []))
    monkeypatch.setattr(plan, "resolve_precision", lambda asked, _: "bf16" if asked == "auto" else asked)
    study = resolved(dataset, configs(precision="auto"))
    assert {arm.config.train.precision for arm in study.arms} == {"bf16"}
    for arm in study.arms:
        assert arm.config.model.blocks[arm.name].mixer.__dict__["backend"] == "reference"
    assert study.arms[0].config.model.vocab_size == dataset.tokenizer.vocab_size


def test_arms_are_matched_and_what_it_changed_is_part_of_the_study(dataset: Dataset) -> None:
    reference, gdn = resolved(dataset).arms
    assert abs(gdn.costs.parameters / reference.costs.parameters - 1) <= 0.01
    assert gdn.changes.keys() == {"gdn.ffn.hidden"}
    assert gdn.matched.startswith("gdn.ffn.hidden 64 → ")
    assert (reference.seconds_per_step, gdn.seconds_per_step) == pytest.approx((0.1, 0.25))
    assert resolved(dataset, match="none").arms[1].changes == {}


def test_arms_matched_by_seconds_have_steps_that_take_as_long(dataset: Dataset) -> None:
    reference, gdn = resolved(dataset, match="seconds").arms
    assert (reference.steps, gdn.steps) == (20, 8)
    assert gdn.changes == {"train.steps": (20, 8)}


def test_a_study_is_the_same_after_it_was_written(dataset: Dataset) -> None:
    study = resolved(dataset, question="Which?")
    assert from_plain(Study, to_plain(study)) == study
    assert int(study.data["validation_bytes"]) + int(study.data["test_bytes"]) == dataset.held_out.n_bytes
    text = dataset.train
    counts = {"documents": text.n_documents, "bytes": text.n_bytes, "tokens": text.n_tokens + text.n_documents}
    assert {what: int(study.data[f"train_{what}"]) for what in counts} == counts
    decoded = [
        dataset.tokenizer.decode(dataset.held_out.document(i).tolist()) for i in range(dataset.held_out.n_documents)
    ]
    counted = int(study.data["validation_bytes"]) + int(study.data["test_bytes"])
    assert int(study.data["bytes_apart"]) == counted - len("".join(decoded).encode()) == 0


def test_what_arms_differ_in_is_found(dataset: Dataset) -> None:
    found = differing(resolved(dataset))
    assert found["model.pattern"] == {"mha": ["mha"], "gdn": ["gdn"]}
    assert found["model.blocks.gdn.mixer.conv"] == {"mha": None, "gdn": 4}
    assert not [name for name in found if name.startswith(("train.", "data."))]


def test_arms_that_do_not_see_the_same_rows_are_refused(dataset: Dataset) -> None:
    found = configs()
    found["gdn"] = replace(found["gdn"], train=replace(found["gdn"].train, block_size=64))
    with pytest.raises(UsageError, match="arms 'mha' and 'gdn' differ in `block_size`: arms see the same rows of text"):
        resolved(dataset, found)


def test_arms_of_one_file_name_are_refused(dataset: Dataset) -> None:
    found = {"a b": configs()["mha"], "a/b": configs()["mha"]}
    with pytest.raises(UsageError, match="two arms have the same name for files, 'a-b': name them apart"):
        resolve_study(
            Asked(arms=dict.fromkeys(found, "")), found, dataset, measure=lambda *_: dict.fromkeys(found, 1.0)
        )
    found = {"MHA": configs()["mha"], "mha": configs()["mha"]}
    with pytest.raises(UsageError, match="two arms have the same name for files, 'mha': name them apart"):
        resolve_study(
            Asked(arms=dict.fromkeys(found, "")), found, dataset, measure=lambda *_: pytest.fail("timed in vain")
        )
    assert slug_of("swa swa mla") == "swa-swa-mla"
    assert slug_of("../..") == "arm"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"arms": {"a": ""}}, "arms = 'a': must be two or more"),
        ({"margin": 0.0}, "margin = 0.0: must be > 0"),
        ({"seeds": 1}, "seeds = 1: must be >= 2"),
        ({"tokens": 0}, "tokens = 0: must be > 0"),
        ({"threads": 0}, "threads = 0: must be >= 1"),
    ],
)
def test_a_study_that_cannot_be_is_refused(asked: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Asked(**{"arms": {"a": "", "b": ""}} | asked)
