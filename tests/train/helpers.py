"""What the tests of training share: a tiny run on a tiny text."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.preparing import prepare
from swamla.evaluate import evaluate_split
from swamla.model.block import BlockConfig, MixerConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.train import RunConfig, TrainConfig, TrainState, train
from swamla.train.optim import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig
from swamla.train.tracking.metrics import read_metrics
from tests.toys import TOYS, plugged

MIXERS = {
    "mha": MHAConfig(n_heads=2),
    "swa": SWAConfig(n_heads=2, window=8, sinks=2),
    "mla": MLAConfig(n_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8),
    "gdn": GDNConfig(n_heads=2),
    "gdn_latent": GDNConfig(n_heads=2, latent_dim=6, share_qk=True),
    "kda": KDAConfig(n_heads=2),
    "latent": LatentConfig(n_heads=2, bias=True),
    "toy": TOYS["toy"](inner=12),
    **plugged(MixerConfig),
}


OPTIMIZERS: dict[str, OptimizerConfig] = {
    "adamw": AdamWConfig(),
    "lion": LionConfig(),
    "muon": MuonConfig(),
    "toy_sgd": TOYS["toy_sgd"](),
    **plugged(OptimizerConfig),
}


def model_of(*pattern: str) -> LanguageModelConfig:
    """A tiny model whose layers have these mixers."""
    blocks = {name: BlockConfig(mixer=MIXERS[name], ffn=DenseConfig(hidden=32)) for name in pattern}
    # Dropout draws from torch's generator at every step: a resumed run that forgot its state would be found out.
    return LanguageModelConfig(width=16, blocks=blocks, pattern=pattern, dropout=0.1)


MODEL = model_of("mha")


def tiny_dataset(folder: Path, tokenizer: str = "byte") -> Dataset:
    """Twenty documents of a few hundred bytes."""
    documents = folder / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    for i in range(20):
        text = " ".join(f"{word} {(i * 7 + n) % 31}" for n, word in enumerate(["the", "cat", "sat", "on", "mats"] * 12))
        if not (documents / f"{i}.txt").exists():  # another rank may be reading it
            (documents / f"{i}.txt").write_text(text)
    cache = str(folder / "cache")
    return prepare(DataConfig(source=str(documents), tokenizer=tokenizer, held_out_fraction=0.2, cache_dir=cache))


def tiny_config(model: LanguageModelConfig = MODEL, **settings: Any) -> RunConfig:
    """Six steps of four rows of 32 bytes, everything logged, in fp32."""
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "block_size": 32,
        "lr": 1e-2,
        "precision": "fp32",
        "device": "cpu",
        "eval_interval": None,
        "save_interval": None,
        "log_interval": 1,
    }
    if "max_minutes" not in settings:
        defaults["steps"] = 6
    return RunConfig(model=model, data=DataConfig(), train=TrainConfig(**(defaults | settings)))


def held_out(dataset: Dataset) -> Callable[[LanguageModel], dict[str, float]]:
    """The validation of a run on `dataset`."""

    def score(model: LanguageModel) -> dict[str, float]:
        eos_id = dataset.tokenizer.eos_id
        return evaluate_split(model, dataset.held_out, eos_id=eos_id, block_size=32, batch_size=8).as_dict()

    return score


def run(config: RunConfig, run_dir: Path, dataset: Dataset, **options: Any) -> TrainState:
    """Train without printing."""
    return train(config, run_dir, dataset=dataset, console=Console(file=io.StringIO()), **options)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, training loss) of every record."""
    return [(r["step"], r["loss"]) for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}
