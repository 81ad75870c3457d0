"""A held-out text of another kind than the training text is told at preparing, in one line, and any other is not."""

import os
import random
import warnings
from pathlib import Path

import pytest

from swamla.data.config import DataConfig
from swamla.data.likeness import FEW, describe_unlike, unseen_shares
from swamla.data.preparing import prepare
from swamla.data.shards import is_held_out

HINDI = "भारत एक विशाल देश है जहाँ अनेक भाषाएँ बोली जाती हैं। लोग यहाँ मिल-जुल कर रहते हैं और पर्व मनाते हैं। "
WORDS = """
the a of and to in is was he for it with as his on be at by i this had not are but from or have an they which
one you were her all she there would their we him been has when who will more no if out so said what up its
about into than them can only other new some could time these two may then do first any my now such like our
over man me even most made after also did many before must through back years where much your way well down
should because each just those people how too little state good very make world still own see men work long
get here between both life being
""".split()  # noqa: SIM905


def english(seed: int, words: int = 1500) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + ".\n"


def on_a_side(text: str, *, held_out: bool) -> str:
    """The text, with a number at its end that puts it on this side of the split."""
    return next(one for n in range(10_000) if is_held_out(one := f"{text}{n}\n", 0.05) == held_out)


def written(folder: Path, *, held_out: list[str], train: list[str]) -> Path:
    """A folder of these files."""
    folder.mkdir()
    for index, text in enumerate(held_out):
        (folder / f"held-{index}.txt").write_text(on_a_side(text, held_out=True))
    for index, text in enumerate(train):
        (folder / f"train-{index}.txt").write_text(on_a_side(text, held_out=False))
    return folder


def told(folder: Path, tokenizer: str = "byte") -> list[str]:
    """What is warned of when the folder is prepared, the second time from the cache."""
    found = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepare(DataConfig(source=str(folder), tokenizer=tokenizer))
        found.append([str(one.message) for one in caught if "unlike" in str(one.message)])
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:300"])
def test_the_only_file_in_another_language_is_told_if_it_is_held_out(tokenizer: str, tmp_path: Path) -> None:
    texts = [english(seed) for seed in range(28)]
    folder = written(tmp_path / "held", held_out=[HINDI * 30, english(99)], train=texts)
    (line,) = told(folder, tokenizer)
    assert line.startswith(f"{folder}: the held-out text is unlike the training text: ")
    assert line.endswith(
        "so held-out losses say little about the rest; a larger `held_out_fraction` adds other documents"
    )
    assert told(written(tmp_path / "trained", held_out=[english(98), english(99)], train=[HINDI * 30, *texts])) == []


@pytest.mark.filterwarnings("ignore:.* are held out")
def test_the_shares_are_those_of_a_count_by_sets(tmp_path: Path) -> None:
    train, held_out = [english(1, 60), english(2, 90), HINDI], [english(3, 80), "0123456789" * 9]
    folder = written(tmp_path / "text", held_out=held_out, train=train)
    dataset = prepare(DataConfig(source=str(folder), tokenizer="byte"))
    texts = {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}

    def sequences(text: bytes) -> list[bytes]:
        return [text[i : i + 3] for i in range(len(text) - 2)]

    training = {name: sequences(text) for name, text in texts.items() if name.startswith("train")}
    known = {one for found in training.values() for one in found}
    tested = [one for name, text in texts.items() if name.startswith("held") for one in sequences(text)]
    alone = [
        not any(one in other for name, other in training.items() if name != own)
        for own, found in training.items()
        for one in found
    ]
    shares = dataset.meta["unseen"]  # type: ignore[attr-defined]
    assert shares["held_out"] == pytest.approx(sum(one not in known for one in tested) / len(tested), abs=1e-4)
    assert shares["training"] == pytest.approx(sum(alone) / len(alone), abs=1e-4)
    assert unseen_shares(dataset.path, dataset.tokenizer) == shares


def test_text_of_one_kind_is_not_warned_of_however_little_there_is(tmp_path: Path) -> None:
    for number, (files, words) in enumerate([(2, 30), (4, 100), (9, 20), (29, 400)]):
        texts = [english(100 * number + seed, words) for seed in range(files)]
        assert told(written(tmp_path / str(number), held_out=[english(7 + number, words)], train=texts)) == []
    (tmp_path / "one.txt").write_text("".join(english(seed, 40) for seed in range(30)))
    assert told(tmp_path / "one.txt") == []


def test_an_only_document_that_ends_in_another_kind_of_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(english(1, 6000) + HINDI * 10)
    (line,) = told(tmp_path / "book.txt")
    assert "unlike the training text" in line


def test_nothing_is_measured_of_many_documents_of_little_text_or_where_all_is_held_out(tmp_path: Path) -> None:
    assert told(written(tmp_path / "little", held_out=[HINDI[:30]], train=[english(1), english(2)])) == []
    many = written(
        tmp_path / "many", held_out=[f"{HINDI}{seed}" for seed in range(FEW)], train=[english(s) for s in range(9)]
    )
    assert told(many) == []
    everything = prepare(DataConfig(source=str(many), tokenizer="byte", held_out_fraction=1.0))
    assert "unseen" not in everything.meta  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("held_out", "training", "warned"),
    [(0.5, 0.05, True), (0.5, 0.2, False), (0.09, 0.001, False), (0.11, 0.036, True), (1.0, 0.3, True)],
)
def test_much_is_a_tenth_and_three_times_what_is_usual(held_out: float, training: float, warned: bool) -> None:
    assert bool(describe_unlike({"held_out": held_out, "training": training})) == warned
    assert describe_unlike({}) == ""
