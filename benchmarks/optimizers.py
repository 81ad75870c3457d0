"""One step of each optimizer on the model of a recipe: .venv/bin/python benchmarks/optimizers.py [RECIPE] [VOCABULARY]

Contenders take turns (A B A B …) in one process; printed are the median of each in milliseconds, and the bytes of its
state for each parameter. Runs on the GPU where there is one; needs the extra `fp8`, which `.[dev]` includes.
"""

import os
import sys
import time
from dataclasses import replace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does

import torch
from torch import nn

from swamla.config import from_plain, load_file
from swamla.model.config import LanguageModelConfig
from swamla.recipes import recipe_path
from swamla.train.optim import AdamWConfig, LionConfig, MuonConfig, NamedOptimizer, OptimizerConfig

CONFIGS: dict[str, OptimizerConfig] = {
    "AdamW, fused": AdamWConfig(),
    "AdamW, bf16": AdamWConfig(moments="bf16"),
    "AdamW, 8 bits": AdamWConfig(moments="8bit"),
    "Lion": LionConfig(),
    "Lion, bf16": LionConfig(moments="bf16"),
    "Lion, 8 bits": LionConfig(moments="8bit"),
    "Muon": MuonConfig(),
}
ROUNDS = 15
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gradients(recipe: str, vocabulary: int) -> nn.Module:
    """The recipe's model, with gradients."""
    plain, _ = load_file(recipe_path(recipe))
    model = replace(from_plain(LanguageModelConfig, plain["model"]), vocab_size=vocabulary).build().to(DEVICE)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def timed(optimizer: NamedOptimizer) -> float:
    """Milliseconds of one step."""
    start = time.perf_counter()
    optimizer.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def main(recipe: str = "quickstart", vocabulary: str = "4096") -> None:
    model = gradients(recipe, int(vocabulary))
    optimizers = {name: config.build(model, lr=1e-3, weight_decay=0.1) for name, config in CONFIGS.items()}
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    times: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for _ in range(2 + ROUNDS):
        for name, optimizer in optimizers.items():
            times[name].append(timed(optimizer))
    numbers = sum(torch.Size(shape).numel() for _, shape in shapes)
    print(f"{recipe}: {numbers:,} parameters on {DEVICE}, {torch.get_num_threads()} threads")
    for name, config in CONFIGS.items():
        median = sorted(times[name][2:])[ROUNDS // 2]
        print(f"{name:15} {median:8.2f} ms   {config.state_bytes(shapes) / numbers:5.2f} bytes a parameter")


if __name__ == "__main__":
    main(*sys.argv[1:])
