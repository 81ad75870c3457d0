"""Generation of all arms, timed in turns after two prompts, once, by the decoder of `swamla generate`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swamla.inference.decoding import Decoder
from swamla.model.accounting import state_bytes
from swamla.study import decoding
from swamla.study.decoding import NEW, ROUNDS, measure_decoding, prompt_lengths, read_decoding
from swamla.study.plan import Study
from tests.train.helpers import tiny_dataset

from .helpers import sized, study_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    return tiny_dataset(tmp_path_factory.mktemp("texts"))


def with_positions(study: Study, count: int) -> Study:
    """The study with learned positions in its last arm."""
    *others, last = study.arms
    model = replace(last.config.model, learned_positions=count)
    return replace(study, arms=(*others, replace(last, config=replace(last.config, model=model))))


def test_arms_take_turns_after_every_prompt_and_figures_are_of_all_rounds(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of()
    asked: list[tuple[str, int, int]] = []

    def seconds(decoder: Decoder, prompt: list[int], new: int) -> list[float]:
        kind = decoder.model.config.pattern[0]
        asked.append((kind, len(prompt), new))
        slower = 1.0 if kind == "mha" else 2.0
        return [slower * len(prompt), *(slower * (1 + at) for at in range(new))]

    monkeypatch.setattr(decoding, "_seconds", seconds)
    found = measure_decoding(tmp_path, study, dataset)
    warm_up, rounds = asked[:2], asked[2:]
    assert [kind for kind, *_ in warm_up] == ["mha", "gdn"]
    a_round = [("mha", 32, NEW), ("gdn", 32, NEW), ("mha", 128, NEW), ("gdn", 128, NEW)]
    assert rounds == a_round * ROUNDS
    for name, slower in (("mha", 1.0), ("gdn", 2.0)):
        assert [one.prompt for one in found[name]] == [32, 128]
        for one in found[name]:
            assert (one.first, one.median) == (slower * one.prompt, slower * (NEW + 1) / 2)
            assert one.low < one.median < one.high
            assert one.tokens == ROUNDS * NEW
            model = study.arm(name).config.model
            assert one.state == state_bytes(model, one.prompt + NEW, element_bytes=4)


def test_a_round_is_at_least_done_and_no_other_begins_when_time_is_up(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SECONDS", 0.0)
    found = measure_decoding(tmp_path, study_of(), dataset)
    assert {one.tokens for ones in found.values() for one in ones} == {NEW}
    assert all(0 < one.low <= one.median <= one.high for ones in found.values() for one in ones)


def test_it_is_measured_once_and_read_again_and_draws_no_random_number(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SECONDS", 0.0)
    study = sized(study_of(), 32, 48)
    assert read_decoding(tmp_path) == {}
    before = torch.random.get_rng_state()
    found = measure_decoding(tmp_path, study, dataset)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(found) == ["mha@32", "gdn@32", "mha@48", "gdn@48"]
    monkeypatch.setattr(decoding, "_in_turns", lambda *_: pytest.fail("measured again"))
    assert measure_decoding(tmp_path, study, dataset) == read_decoding(tmp_path) == found


@pytest.mark.parametrize(("positions", "lengths", "new"), [(512, (32, 128), 32), (100, (32, 68), 32), (32, (16,), 16)])
def test_prompts_and_what_follows_fit_learned_positions_of_any_arm(
    positions: int, lengths: tuple[int, ...], new: int, dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = with_positions(study_of(), positions)
    assert prompt_lengths(study) == (lengths, new)
    monkeypatch.setattr(decoding, "SECONDS", 0.0)
    found = measure_decoding(tmp_path, study, dataset)
    assert {tuple(one.prompt for one in ones) for ones in found.values()} == {lengths}
