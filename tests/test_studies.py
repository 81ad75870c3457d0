"""The shipped studies: each says what it asks and expects, and its arms resolve, see the same rows and are matched."""

from dataclasses import replace
from pathlib import Path

import pytest

from swamla.cli.compare import config_of, flags_of, main
from swamla.config import from_plain, load_file
from swamla.errors import UsageError
from swamla.model.accounting import count_parameters
from swamla.recipes import recipe_names
from swamla.studies import study_names, study_path
from swamla.study.matching import TOLERANCE, cost, match
from swamla.study.plan import Asked

SHIPPED = {"hybrid-or-not", "what-recall-costs", "which-local-mixer", "long-rows", "latent-moe"}


def asked_of(name: str) -> Asked:
    plain, place = load_file(study_path(name))
    return from_plain(Asked, plain, origin=place)


def test_the_shipped_studies_are_these_and_no_recipe_has_such_a_name() -> None:
    assert set(study_names()) == SHIPPED
    assert not SHIPPED & set(recipe_names())


@pytest.mark.parametrize("name", study_names())
def test_a_shipped_study_says_what_it_asks_and_expects_and_its_arms_can_be_compared(name: str) -> None:
    asked = asked_of(name)
    assert asked.question.endswith("?")
    assert asked.expectation.endswith(".")
    assert asked.seeds == 5
    assert asked.rates == "search"
    configs = {arm: config_of(asked, arm, flags) for arm, flags in flags_of(asked).items()}
    first = next(iter(configs.values()))
    for config in configs.values():
        assert (config.data, config.train.block_size, config.train.batch_size) == (
            (first.data, first.train.block_size, first.train.batch_size)
        )
    models = {arm: replace(config.model, vocab_size=config.model.vocab_size or 4096) for arm, config in configs.items()}
    if asked.match == "none":
        return
    length = first.train.block_size
    found = {arm: one.model for arm, one in match(models, asked.match, length=length).items()}
    target = cost(next(iter(found.values())), asked.match, length)
    for model in found.values():
        assert cost(model, asked.match, length) == pytest.approx(target, rel=TOLERANCE[asked.match])
        built = sum(parameter.numel() for parameter in model.build().parameters())
        assert built == count_parameters(model).total


def test_a_report_of_a_shipped_study_is_looked_for_where_compare_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^studies/hybrid-or-not: holds no study"):
        main(["hybrid-or-not", "--report"])
