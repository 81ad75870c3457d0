"""A small LatentMoE model against a dense model of equal active parameters: .venv/bin/python benchmarks/moe.py

Both train on the same tokens of Python's standard library, in the same order, with the same optimizer, learning rate
and schedule; the seed sets the initial weights and the order. Prints bits per byte of every seed on all held-out text,
and the median training speed. It takes about twelve minutes on two idle cores.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from swamla import process

process.prepare()  # as the command line does

from rich.console import Console

from swamla.data import prepare
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.evaluate import validation
from swamla.model import BlockConfig, DenseConfig, LanguageModelConfig, LatentMoEConfig, MLAConfig, SWAConfig
from swamla.model.accounting import count_parameters
from swamla.model.block import FFNConfig
from swamla.model.language_model import LanguageModel
from swamla.train import RunConfig, TrainConfig, train
from swamla.train.optim import MuonConfig
from swamla.train.run_folder import resolve_vocabulary
from swamla.train.tracking.metrics import read_metrics

WIDTH, ROWS, LENGTH = 128, 8, 512
DATA = DataConfig(source="stdlib", tokenizer="bpe:4096")
EXPERTS = LatentMoEConfig(n_experts=32, n_activated=4, ratio=2, expert_hidden=64, shared_hidden=128, bias_rate=1e-2)
TOLERANCE = 0.02  # largest relative difference between the twins' active parameters


def model(ffn: FFNConfig) -> LanguageModelConfig:
    """`swa swa mla` with this FFN in every layer."""
    swa = SWAConfig(n_heads=4, window=128)
    mla = MLAConfig(n_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64)
    blocks = {"swa": BlockConfig(mixer=swa, ffn=ffn), "mla": BlockConfig(mixer=mla, ffn=ffn)}
    return LanguageModelConfig(width=WIDTH, blocks=blocks, pattern=("swa", "swa", "mla"))


def dense_twin(ffn: LatentMoEConfig) -> DenseConfig:
    """A SwiGLU with the active parameters of `ffn`, its width rounded to a multiple of 8."""
    return DenseConfig(hidden=round(ffn.n_active_parameters(WIDTH) / (3 * WIDTH) / 8) * 8)


def run_config(model: LanguageModelConfig, arguments: argparse.Namespace, seed: int) -> RunConfig:
    """A run over `arguments.tokens`; all but model and seed is the quickstart recipe's."""
    settings = TrainConfig(
        steps=max(1, arguments.tokens // (ROWS * LENGTH)),
        batch_size=ROWS,
        block_size=LENGTH,
        optimizer=MuonConfig(),
        lr=arguments.lr,
        schedule="linear",
        min_lr_ratio=0.0,
        warmup=0.05,
        eval_interval=None,
        save_interval=None,
        seed=seed,
        device="cpu",
        threads=arguments.threads,
    )
    return RunConfig(model=model, data=DATA, train=settings)


def held_out_after(config: RunConfig, dataset: Dataset, max_tokens: int | None) -> tuple[float, float]:
    """Train; returns held-out bits per byte at the end, and the median over steps of tokens per second."""
    found: dict[str, float] = {}
    score = validation(dataset, config.train.block_size, max_tokens)

    def evaluate(model: LanguageModel) -> dict[str, float]:
        found.update(score(model))
        return found

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        run = Path(folder) / "run"
        train(config, run, dataset=dataset, evaluate=evaluate, console=Console(file=nowhere))
        speeds = [r["tokens_per_second"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    return found["bits_per_byte"], median(speeds)


def counted(name: str, config: RunConfig, dataset: Dataset) -> int:
    """Print the exact parameters of a twin; returns the active ones."""
    count = count_parameters(resolve_vocabulary(config, dataset).model)
    components = ", ".join(f"{part} {number:,}" for part, number in count.by_component.items())
    print(f"{name}: {count.active:,} active of {count.total:,} parameters ({components})")
    return count.active


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, default=1_500_000, help="training tokens of each run (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--experts", type=int, default=EXPERTS.n_experts, help="routed experts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of both (default: %(default)s)")
    parser.add_argument("--eval_tokens", type=int, default=None, help="held-out tokens scored (default: all)")
    arguments = parser.parse_args()

    dataset = prepare(DATA)
    experts = replace(EXPERTS, n_experts=arguments.experts)
    twins = {"latent_moe": model(experts), "dense": model(dense_twin(experts))}
    first = {name: run_config(config, arguments, arguments.seeds[0]) for name, config in twins.items()}
    sparse, dense = (counted(name, config, dataset) for name, config in first.items())
    if abs(sparse - dense) > TOLERANCE * dense:
        raise SystemExit(f"the twins differ by {sparse / dense - 1:+.1%} in active parameters")
    steps = first["dense"].train.steps
    print(f"{steps} steps of {ROWS} × {LENGTH} tokens, Muon {arguments.lr:g}, linear to 0; held-out bits per byte\n")
    print(f"| seed | {' | '.join(twins)} | difference | tokens/s {' | tokens/s '.join(twins)} |")
    print("|---" * (2 * len(twins) + 2) + "|")
    scores: dict[str, list[float]] = {name: [] for name in twins}
    speeds: dict[str, list[float]] = {name: [] for name in twins}
    for seed in arguments.seeds:
        for name, config in twins.items():
            score, speed = held_out_after(run_config(config, arguments, seed), dataset, arguments.eval_tokens)
            scores[name].append(score)
            speeds[name].append(speed)
        row(str(seed), [found[-1] for found in scores.values()], [found[-1] for found in speeds.values()])
    row("mean", [mean(found) for found in scores.values()], [mean(found) for found in speeds.values()])


def row(label: str, scores: list[float], speeds: list[float]) -> None:
    """Print a line of the table."""
    cells = [f"{score:.4f}" for score in scores] + [f"{scores[0] - scores[1]:+.4f}"] + [f"{s:,.0f}" for s in speeds]
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
