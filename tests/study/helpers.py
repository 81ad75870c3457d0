"""What the tests of studies share: a tiny study without data, and a trainer that costs nothing."""

import json
import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from swamla.data.config import DataConfig
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.study.matching import Costs
from swamla.study.plan import Arm, Asked, Study
from swamla.study.sizes import resized
from swamla.study.statistics import Axis
from swamla.train import RunConfig, TrainConfig

MIXERS: dict[str, MixerConfig] = {"mha": MHAConfig(n_heads=2), "gdn": GDNConfig(n_heads=2)}


def arm_of(name: str, steps: int = 20, seconds: float = 0.1) -> Arm:
    """A one-layer arm of width 32."""
    blocks = {name: BlockConfig(mixer=MIXERS[name], ffn=DenseConfig(hidden=64))}
    model = LanguageModelConfig(vocab_size=257, width=32, blocks=blocks, pattern=(name,))
    train = TrainConfig(steps=steps, batch_size=4, block_size=32, lr=1e-2, device="cpu", precision="fp32")
    config = RunConfig(model=model, data=DataConfig(source="stdlib", tokenizer="byte"), train=train)
    return Arm(
        name=name,
        slug=name,
        flags=f"--pattern {name}",
        config=config,
        costs=Costs.of(model, 32),
        seconds_per_step=seconds,
    )


def study_of(*names: str, seeds: int = 2, **asked) -> Study:
    """A study of such arms."""
    names = names or ("mha", "gdn")
    return Study(
        asked=Asked(arms=dict.fromkeys(names, ""), seeds=seeds, **asked),
        axis=Axis(margin=0.01),
        arms=tuple(arm_of(name) for name in names),
        data={"source": "text", "validation_tokens": "1280", "validation_bytes": "1280", "test_bytes": "1290"},
        machine={},
    )


def sized(study: Study, *sizes: int, larger_seeds: int | None = None) -> Study:
    """The study at these widths."""
    arms = []
    for size in sizes:
        for arm in study.arms:
            model = resized(arm.config.model, Fraction(size, 32))
            config = replace(arm.config, model=model)
            name, slug, costs = f"{arm.name}@{size}", f"{arm.slug}-w{size}", Costs.of(model, 32)
            seeds = larger_seeds if size > sizes[0] else None
            arms.append(replace(arm, name=name, slug=slug, config=config, costs=costs, size=size, seeds=seeds))
    asked = replace(study.asked, sizes=sizes, larger_seeds=larger_seeds)
    return replace(study, asked=asked, arms=tuple(arms))


def score_of(run: str) -> float:
    """Bits per byte of a run of the fake trainer, by its name: a bowl over the rate, whose bottom differs by arm."""
    slug, lr, seed = run.split("-lr")[0], float(run.split("-lr")[1].split("-seed")[0]), int(run.rsplit("seed", 1)[1])
    bottom = {"mha": 1e-2, "gdn": 1e-1}[slug.split("-w")[0]]
    return 2.0 + 0.1 * math.log10(lr / bottom) ** 2 + 0.003 * math.sin(7 * seed) + 0.0001 * len(slug) * seed


class FakeRun:
    """A process of the fake trainer, which takes a few looks: its folder, a half of its work, then its end."""

    def __init__(self, words: list[str], log: Path, status: int = 0, last: dict | None = None) -> None:
        self.status, self.last, self.polls = status, last, 0
        where = words[words.index("--resume" if "--resume" in words else "--output_dir") + 1]
        self.folder = Path(where)
        with log.open("a") as out:
            out.write(" ".join(words) + "\n")
        if "--resume" in words:
            assert (self.folder / "config.json").exists()
        else:
            assert not self.folder.exists()
            self.folder.mkdir(parents=True)

    def poll(self) -> int | None:
        self.polls += 1
        if self.polls == 1:
            (self.folder / "config.json").write_text("{}")
            return None
        if self.polls == 2:
            (self.folder / "metrics.jsonl").write_text('{"step": 10, "loss": 3.0, "tokens": 1280, "elapsed": 1.0}\n')
            return None
        if self.polls == 3:
            end = self.last or {"held_out_bits_per_byte": score_of(self.folder.name), "elapsed": 2.0}
            with (self.folder / "metrics.jsonl").open("a") as out:
                out.write('{"step": 20, "loss": 2.5, "tokens": 2560, "elapsed": 2.0}\n')
                out.write(json.dumps({"step": 20, **end}) + "\n")
        return self.status

    def terminate(self) -> None:
        pass

    def wait(self) -> int:
        return self.status


def clear(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
