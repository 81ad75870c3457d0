"""Which path of a CPU computes each mixer of a run: measured once a machine, and stored with the run."""

import torch

from swamla.data.dataset import Dataset
from swamla.model.language_model import LanguageModelConfig
from swamla.ops.layout import Layout
from swamla.train.precision import Chosen
from swamla.train.racing import Choice, choose, races_on


def fastest_paths(
    model: LanguageModelConfig, device: torch.device, precision: Chosen, *, length: int
) -> tuple[dict[str, str], list[Choice]]:
    """Block → the backend of its mixer, for blocks that leave it to "auto"; and how it came.

    length: of the documents, about. What this machine has raced before is read from the cache; none where it does not
    race.
    """
    if not races_on(device):
        return {}, []
    trials = {
        name: trial for name, block in model.blocks.items() if (trial := block.mixer.trial(model.width)) is not None
    }
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    choices = choose(set(trials.values()), dtype, length=length)
    paths = {name: choices[trial].chosen for name, trial in trials.items()}
    return paths, sorted(choices.values(), key=str)


def usual_length(dataset: Dataset, block_size: int) -> int:
    """Length of the document that a token of a row stands in, in the mean over the first rows."""
    runs = Layout.from_documents(dataset.rows(block_size, 0).batch(0, 32).document_BT).runs
    return round(sum(count * length**2 for count, length in runs) / sum(count * length for count, length in runs))
