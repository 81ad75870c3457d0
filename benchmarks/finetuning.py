"""Fine-tuning a model so that it answers in a format: the share of exact answers before and after, over seeds.

    python benchmarks/finetuning.py runs/base --choose --seeds 0 --lr 1e-3    # to choose a rate
    python benchmarks/finetuning.py runs/base --seeds 0,1,2 [--lora 8] [--steps 150]

The conversations are made here: a user names a person, a city and a number in a sentence, and the answer is one line of
JSON with these. No held-out sentence, with its three values, is trained on. Settings are chosen on some of them, and
answers counted on others. Prints one line for each seed; everything else goes to OUT, by default runs/finetuning.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from swamla import generate_text, load
from swamla.data import ChatDataset, DataConfig
from swamla.data.chat import template_of
from swamla.data.tokenizer import Tokenizer
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model import LanguageModel
from swamla.process import processor

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eve",
    "Finn",
    "Gus",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Ola",
    "Pia",
)
CITIES = ("Rome", "Oslo", "Lima", "Bern", "Cairo", "Delhi", "Paris", "Quito", "Seoul", "Tokyo")
SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "In {city} lives {name}, who is {age}.",
    "At {age}, {name} moved to {city}.",
)
ROWS, ASKED, LONGEST, AT_ONCE = 3000, 128, 48, 32


def conversations() -> list[dict[str, str]]:
    """All rows, in an order that is always the same."""
    drawn = list(itertools.product(SENTENCES, NAMES, CITIES, range(20, 90)))
    chosen = random.Random(0).sample(drawn, ROWS)
    return [
        {
            "prompt": sentence.format(name=name, city=city, age=age),
            "completion": json.dumps({"name": name, "city": city, "age": age}),
        }
        for sentence, name, city, age in chosen
    ]


def exact_before(model: LanguageModel, tokenizer: Tokenizer, asked: Sequence[tuple[str, str]]) -> float:
    """The share of questions that a model without conversations answers in the line after the question."""
    texts = [question + "\n" for question, _ in asked]
    greedy = Sampling(temperature=0.0)
    found = [
        each.text.split("\n")[0]
        for begin in range(0, len(texts), AT_ONCE)
        for each in generate_text(
            model, tokenizer, texts[begin : begin + AT_ONCE], LONGEST, sampling=greedy
        ).completions
    ]
    return sum(text == answer for text, (_, answer) in zip(found, asked, strict=True)) / len(asked)


def exact_after(model: LanguageModel, tokenizer: Tokenizer, asked: Sequence[tuple[str, str]]) -> float:
    """The share of questions that are answered exactly, by greedy decoding."""
    template, right = template_of(tokenizer), 0
    for begin in range(0, len(asked), AT_ONCE):
        part = asked[begin : begin + AT_ONCE]
        prompts = [template.prompt([{"role": "user", "content": question}]) for question, _ in part]
        found = Decoder(model).generate(prompts, LONGEST, sampling=Sampling(temperature=0.0), stop_id=template.stop_id)
        right += sum(tokenizer.decode(ids) == answer for ids, (_, answer) in zip(found, part, strict=True))
    return right / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the run to fine-tune")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    parser.add_argument("--steps", type=int, default=150, help="of 2,048 tokens: about three minutes on a core")
    parser.add_argument("--lr", type=float, help="by default 2e-3, and 5e-3 for adapters")
    parser.add_argument(
        "--choose", action="store_true", help="ask the questions that settings are chosen on, not others"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    chat = settings.out / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    data = DataConfig(source=f"chat:{chat}", tokenizer=str(settings.base / "tokenizer.json"), held_out_fraction=0.1)
    held_out = [(row.messages[0]["content"], row.messages[1]["content"]) for row in ChatDataset(data).held_out]
    asked = held_out[:ASKED] if settings.choose else held_out[ASKED : 2 * ASKED]
    before = exact_before(*load(settings.base), asked)
    how = f"lora{settings.lora}" if settings.lora else "all"
    lr = settings.lr or (5e-3 if settings.lora else 2e-3)
    for seed in settings.seeds.split(","):
        run = settings.out / f"{how}-{lr:g}-{seed}"
        command = ["sft", str(settings.base), "--data", str(chat), "--output_dir", str(run), "--seed", seed]
        command += ["--steps", str(settings.steps), "--block_size", "256", "--eval_interval", "none"]
        command += ["--lr", str(lr)]
        command += ["--lora", str(settings.lora)] if settings.lora else []
        with run.with_name(f"{run.name}.log").open("w") as log:
            subprocess.run([sys.executable, "-m", "swamla", *command], stdout=log, stderr=log, check=True)
        after = exact_after(*load(run, "latest"), asked)
        found = {"trained": how, "lr": lr, "steps": settings.steps, "seed": int(seed), "choosing": settings.choose}
        exact = {"asked": len(asked), "exact_before": before, "exact_after": after}
        print(json.dumps({**found, **exact, "processor": processor()}), flush=True)


if __name__ == "__main__":
    main()
