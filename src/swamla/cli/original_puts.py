"""What a flag of the project that swamla replaces writes into a recipe's plain data, where no field has its meaning.

Each function of the table in `original_flags` takes the plain data and the flag's value, and raises `UsageError` for a
value that makes no sense and for a model that has no use for it. Numbers are checked here, not by the field they end up
in, which may be called otherwise and hold another number.
"""

from pathlib import Path
from typing import Any

from swamla.cli.overrides import Put
from swamla.cli.plain import BLOCK_PARTS, Plain, choice, mixer_kind
from swamla.config import choices_of, field_types
from swamla.errors import UsageError
from swamla.train.config import TrainConfig

# What it called a number format of the optimizer's moments; weights and gradients were, and are, kept in fp32.
_OPTIMIZERS = {
    "adamw": {"kind": "adamw"},
    "lion": {"kind": "lion"},
    "muon": {"kind": "muon"},
    "fp8_adamw": {"kind": "adamw", "moments": "bf16"},
    "fp8_lion": {"kind": "lion", "moments": "bf16"},
}


def nothing(plain: Plain, value: Any) -> None:
    """For what is accepted and changes nothing."""


def training(name: str, constant: Any = None) -> Put:
    """A setting of [train], or `constant` in it."""

    def put(plain: Plain, value: Any) -> None:
        plain["train"][name] = value if constant is None else constant

    return put


def unless_set(name: str, constant: Any) -> Put:
    """`constant` in [train], where the recipe and the flags before say nothing."""

    def put(plain: Plain, value: Any) -> None:
        if plain["train"].get(name) in (None, "", "none"):
            plain["train"][name] = constant

    return put


def optimizer(plain: Plain, name: str) -> None:
    """An optimizer, perhaps with the format of its moments; settings of the same kind stay."""
    if name not in _OPTIMIZERS:
        raise UsageError(f"must be one of {', '.join(_OPTIMIZERS)}")
    wanted = _OPTIMIZERS[name]
    same = choice(plain["train"], "optimizer").get("kind") == wanted["kind"]
    plain["train"]["optimizer"] = (plain["train"]["optimizer"] if same else {}) | wanted


def min_lr(plain: Plain, value: Any) -> None:
    """The last learning rate, as a fraction of the peak."""
    peak = plain["train"].get("lr", TrainConfig.lr)
    if not isinstance(peak, int | float) or not peak > 0:
        return  # refused when it is read
    if not isinstance(value, float) or not 0 <= value <= peak:
        raise UsageError(f"must be a number between 0 and the learning rate, {peak:g}")
    plain["train"]["min_lr_ratio"] = value / peak


def beta(index: int) -> Put:
    """One of the optimizer's betas."""

    def put(plain: Plain, value: Any) -> None:
        if not isinstance(value, float) or not 0 <= value < 1:
            raise UsageError("must be a number of at least 0 and below 1, e.g. 0.9")
        optimizers = choices_of(field_types(TrainConfig)["optimizer"])
        chosen = choice(plain["train"], "optimizer")
        default: Any = optimizers[chosen.setdefault("kind", next(iter(optimizers)))]
        betas = list(chosen.get("betas", default.betas))
        chosen["betas"] = [value if i == index else beta for i, beta in enumerate(betas)]

    return put


def accumulation(plain: Plain, value: Any) -> None:
    """So many micro-batches, each of the batch size so far."""
    plain["train"]["accumulation"] = count = whole(value, "4")
    rows = plain["train"].get("batch_size", TrainConfig.batch_size)
    if isinstance(rows, int):
        plain["train"]["batch_size"] = rows * count


def tokenizer(plain: Plain, name: str) -> None:
    """A tokenizer of ours, or one of the hub's."""
    ours = name in ("byte", "char", "gpt2") or ":" in name or Path(name).expanduser().exists()
    gpt2 = name == "openai-community/gpt2"
    plain.setdefault("data", {})["tokenizer"] = name if ours else "gpt2" if gpt2 else f"hub:{name}"


def whole(value: Any, example: str) -> int:
    """A whole number above 0; `UsageError` for anything else."""
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"must be a whole number > 0, e.g. {example}")
    return value


def ffn(kind: str) -> Put:
    """Another kind of FFN in the latent-attention blocks."""

    def put(plain: Plain, value: Any) -> None:
        for ffn in _ffns(plain):
            is_one = kind == "moe" and ffn.get("kind") == "latent_moe"  # which has experts too
            if ffn.get("kind", "dense") != kind and not is_one:
                ffn.clear()
                ffn["kind"] = kind

    return put


def ratio(plain: Plain, value: Any) -> None:
    """The ratio of a LatentMoE, the numbers of its experts with it."""
    wanted = whole(value, "4")
    for ffn in _experts(plain, "latent_moe"):
        before = _setting(ffn, "ratio")
        for name in ("n_experts", "n_activated"):
            ffn[name] = _setting(ffn, name) * wanted // before
        ffn["ratio"] = wanted


def latent_dim(plain: Plain, value: Any) -> None:
    """The ratio of a LatentMoE by the width of its latent."""
    width, latent = plain["model"].get("width"), whole(value, "256")
    if isinstance(width, int):
        if width % latent:
            raise UsageError(f"must divide the width {width}")
        ratio(plain, width // latent)


def scaled(name: str) -> Put:
    """A number of experts, which the ratio of a LatentMoE multiplies."""

    def put(plain: Plain, value: Any) -> None:
        count = whole(value, "8")
        for ffn in _experts(plain, "moe", "latent_moe"):
            ffn[name] = count * (_setting(ffn, "ratio") if ffn["kind"] == "latent_moe" else 1)

    return put


def expert(name: str, *kinds: str) -> Put:
    """A setting of the FFNs of these kinds, by default of all with experts."""

    def put(plain: Plain, value: Any) -> None:
        for ffn in _experts(plain, *(kinds or ("moe", "latent_moe"))):
            ffn[name] = value

    return put


def final(name: str) -> Put:
    """A number of experts of a LatentMoE as it is."""

    def put(plain: Plain, value: Any) -> None:
        expert(name, "latent_moe")(plain, whole(value, "32"))

    return put


def _ffns(plain: Plain) -> list[Plain]:
    """The FFNs of the latent-attention blocks."""
    blocks = [block for block in plain["model"]["blocks"].values() if mixer_kind(block) == "mla"]
    if not blocks:
        raise UsageError("MoE flags act on the FFNs of mla blocks, and the pattern has none")
    return [choice(block, "ffn") for block in blocks]


def _experts(plain: Plain, *kinds: str) -> list[Plain]:
    """The FFNs among `_ffns` that are of these kinds."""
    found = [ffn for ffn in _ffns(plain) if ffn.get("kind") in kinds]
    if not found:
        mend = " or ".join(f"--use_{kind}" for kind in kinds)
        raise UsageError(f"no mla block of the model has such an FFN; add {mend}")
    return found


def _setting(ffn: Plain, name: str) -> Any:
    """A setting of an FFN, its default where the recipe does not say."""
    return ffn.get(name, BLOCK_PARTS["ffn"][ffn["kind"]].__dict__[name])
