"""The model card: exact counts, the data, and the measured losses."""

from pathlib import Path
from typing import Any

from swamla.checkpoint import read_run_config
from swamla.config import from_plain
from swamla.model.accounting import count_parameters, state_bytes
from swamla.model.language_model import LanguageModelConfig
from swamla.version import __version__

_CARD = """\
---
library_name: swamla
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

A language model of {depth} layers of width {width:,}, trained with swamla {version}.
{picture}
| | |
|---|---|
{rows}

## Use it

    pip install swamla 'huggingface_hub>=1.0'
    hf download {repo_id} --local-dir {name}
    swamla generate {name} --prompt "Once"

or, in Python after the download, `model, tokenizer = swamla.load("{name}")`. To continue training on the same data:

    swamla train --hf_repo_id {repo_id} --resume_from_hf --output_dir {name} --data PATH

`model.safetensors` has the weights with the lowest held-out loss. `checkpoints/` has what is needed to resume training:
these weights and the newest ones, each with the states of the optimizer and of the random generators, and a manifest of
SHA-256 sums. `config.json` is the run's complete configuration. No file is a pickle.
"""


def model_card(run_dir: Path, state: dict[str, Any], repo_id: str) -> str:
    """The README.md of a run, whose weights are from the checkpoint with this state."""
    plain = read_run_config(run_dir)
    model = from_plain(LanguageModelConfig, plain["model"], path="model", origin=str(run_dir / "config.json"))
    counted = count_parameters(model)
    kinds = {block.mixer.kind for block in model.blocks.values()}
    kinds |= {block.ffn.kind for block in model.blocks.values() if not block.ffn.is_absent}
    rows = {
        "parameters": f"{counted.total:,}",
        "active per token": f"{counted.active:,}",
        "without embeddings": f"{counted.non_embedding:,}",
        "pattern": " ".join(model.pattern),
        "vocabulary": f"{model.vocab_size:,}, tokenizer `{plain['data']['tokenizer']}`",
        "state at 1,024 tokens": f"{state_bytes(model, 1024):,} bytes (fp32)",
        "data fingerprint": f"`{state['data_fingerprint']}`",
        "trained": f"{state['step']:,} steps, {state['tokens']:,} tokens, {state['seconds'] / 60:,.1f} minutes",
        "precision": state["precision"],
    }
    if state["best_loss"] is not None:
        rows["held-out loss"] = f"{state['best_loss']:.4f} nats per token, after step {state['best_step']:,}"
    return _CARD.format(
        tags=", ".join(["swamla", "hybrid-attention", *sorted(kinds)]),
        name=repo_id.partition("/")[2],
        repo_id=repo_id,
        depth=model.depth,
        width=model.width,
        version=__version__,
        picture="\n![training and held-out loss](loss.png)\n" if (run_dir / "loss.png").exists() else "",
        rows="\n".join(f"| {label} | {value} |" for label, value in rows.items()),
    )
