"""The command line of the original project, for train.py: translates its flags to those of `swamla train`.

Most names are the same. Its MoE flags act on the FFN of the latent-attention blocks, where it had its experts. A flag
without a counterpart is refused, or accepted with a note that says why it has no effect.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from swamla.cli.flags import Flag, parse
from swamla.cli.overrides import flags, naming
from swamla.cli.plain import BLOCK_PARTS, Plain, choice, is_local, mixer_kind
from swamla.cli.reshape import SHAPE, repeat
from swamla.cli.run_config import Written, begun_recipe, written
from swamla.cli.running import resumed_folder
from swamla.cli.train import Arguments, named_folder
from swamla.cli.train import main as train
from swamla.config import choices_of, field_types
from swamla.distributed import is_main
from swamla.errors import SwamlaError, UsageError
from swamla.recipes import ALIASES
from swamla.train.config import TrainConfig

# Original name → name in `swamla train`.
RENAMED = {
    "learning_rate": "lr",
    "max_iters": "steps",
    "warmup_iters": "warmup",
    "tokenizer_name": "tokenizer",
    "ema_decay": "ema",
    "progressive_schedule": "curriculum",
    "compile_mode": "compile",
    "swa_sink_size": "swa_sinks",
    "deltanet_latent_dim": "gdn_latent_dim",
    "deltanet_share_qk": "gdn_share_qk",
    "use_tensorboard": "tensorboard",
    "resume_from": "resume",
}
# Switch → flag and value.
SWITCHES = {
    "gradient_checkpointing": ("checkpointing", "all"),
    "use_fp8": ("precision", "fp8"),
    "use_gated_deltanet": ("local_mixer", "gdn"),
    "use_moe": ("mla_ffn", "moe"),
    "use_latent_moe": ("mla_ffn", "latent_moe"),
    "no_moe": ("mla_ffn", "dense"),
    "use_ema": ("ema", 0.9999),  # only if neither the recipe nor a flag sets the field; so is the next
    "use_progressive": ("curriculum", "512:500M,1024:2B,2048:inf"),
}
# Its optimizers, some named after the dtype of the moments. Weights and gradients are in fp32, as in the original.
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "muon"},
    "fp8_adamw": {"optimizer": "adamw", "adamw_moments": "bf16"},
    "fp8_lion": {"optimizer": "lion", "lion_moments": "bf16"},
}
# Local and latent layers in one cycle of the pattern, with the default numbers.
CYCLE = {
    "swa_layers_per_cycle": ("local", 2),
    "local_layers_per_cycle": ("local", 2),
    "mla_layers_per_cycle": ("mla", 1),
}
# Settings of experts: type, name in the config, whether only LatentMoE has it, help.
EXPERTS: dict[str, tuple[Any, str, bool, str]] = {
    "latent_ratio": (int, "ratio", True, "--latent_moe_ratio, the numbers of experts multiplied with it"),
    "latent_dim": (int, "ratio", True, "the same by the latent's width, width / ratio"),
    "n_experts": (int, "n_experts", False, "experts; of a LatentMoE before its ratio multiplies them"),
    "n_activated": (int, "n_activated", False, "experts of a token; of a LatentMoE before its ratio multiplies them"),
    "latent_n_experts": (int, "n_experts", True, "--latent_moe_n_experts, as it is"),
    "latent_n_activated": (int, "n_activated", True, "--latent_moe_n_activated, as it is"),
    "n_shared_experts": (int, "n_shared", False, "shared experts"),
    "expert_dim": (int, "expert_hidden", False, "hidden width of an expert"),
    "router_z_loss_coef": (float, "z_loss", False, "weight of the router's z-loss"),
    "latent_preserve_expert_dim": (bool, "preserve_expert_dim", True, "--latent_moe_preserve_expert_dim"),
}
OTHERS: dict[str, tuple[Any, str]] = {
    "size": (str, "the recipe"),
    "optimizer_type": (Literal[tuple(OPTIMIZERS)], "--optimizer; fp8_… keeps its moments in bf16"),
    "min_lr": (float, "the last learning rate itself, see --min_lr_ratio"),
    "beta1": (float, "first of the optimizer's betas"),
    "beta2": (float, "second of the optimizer's betas"),
    "gradient_accumulation_steps": (
        int,
        "that many micro-batches of --batch_size rows a step (--accumulation splits --batch_size instead)",
    ),
    "num_workers": (int, "--workers; 0 is one process"),
}
NO_EFFECT = {
    "use_flash_attention": "every mixer's `backend` chooses its kernel, and the choice is printed",
    "use_varlen_attn": "packed documents never see each other, with any kernel",
    "disable_tf32": "swamla never switches TF32 on",
}
REFUSED = {
    r"hf_token|hub_token": "the token is read from HF_TOKEN in the environment, so that it is stored nowhere",
    r".*engram.*": "swamla has no engram memory",
    r".*mup.*": "swamla has no muP; learning rates are given for the model as it is",
    r".*wedlm.*": "swamla has no WeDLM; every model is causal",
    r".*neural_memory.*|.*titans.*": "swamla has no neural memory",
    r".*triton.*": "there is no switch for Triton; a mixer's `backend` names its kernel",
}
# Pairs of which only one may be given.
EITHER = (
    *((name, ours) for name, ours in RENAMED.items() if name != "compile_mode"),
    ("optimizer_type", "optimizer"),
    ("gradient_accumulation_steps", "accumulation"),
    ("min_lr", "min_lr_ratio"),
    ("gradient_checkpointing", "checkpointing"),
    ("use_fp8", "precision"),
    ("use_gated_deltanet", "local_mixer"),
    ("swa_layers_per_cycle", "local_layers_per_cycle"),
    ("latent_dim", "latent_ratio"),
    ("use_moe", "no_moe"),
    ("use_latent_moe", "no_moe"),
)
# Flags that make gated DeltaNet the local mixer; and flags of sliding windows.
GDN = ("use_gated_deltanet", "deltanet_latent_dim", "deltanet_share_qk")
OF_WINDOWS = {"swa_window": "swa_window", "swa_sink_size": "swa_sinks"}
# Flags whose meaning depends on the recipe.
_OF_TRAINING = ("min_lr", "beta1", "beta2", "gradient_accumulation_steps", "use_ema", "use_progressive")
OF_RECIPE = (*GDN, *CYCLE, *EXPERTS, *_OF_TRAINING, "no_moe", "use_moe", "use_latent_moe", "local_mixer")
_GROUP = "flags of the original project, and their counterparts"


def main(argv: list[str]) -> int:
    """Train as `swamla train` does; errors name its flag, and a note the original one."""
    ours, notes, meant = translate(argv)
    for note in notes if is_main() else ():
        print(f"swamla: {note}", file=sys.stderr)
    try:
        return train(ours)
    except SwamlaError as error:
        for name, called in meant.items():
            if re.search(rf"--{called}\b", str(error)):
                error.add_note(f"--{name} is --{called} of swamla train")
        raise


def translate(argv: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """The equivalent command line for `swamla train`; notes about flags without effect; original → new flag names.

    Raises `UsageError` for an unknown flag, two that set the same thing, and one that does not apply to the recipe.
    """
    arguments, said = parse(Arguments, argv, command="train.py", more=_table(), refusal=refusal)
    for pair in EITHER:
        if said.keys() >= set(pair):
            raise UsageError(f"--{pair[0]} and --{pair[1]} say the same thing: give one of them")
    recipe, size = arguments.recipe, said.pop("size", "")
    if recipe and size and ALIASES.get(recipe, recipe) != ALIASES.get(size, size):
        raise UsageError(f"the recipe {recipe} and --size {size} are two models: give one of them")
    arguments = replace(arguments, recipe=recipe or size, resume=arguments.resume or said.get("resume_from", ""))
    notes = [f"--{name} changes nothing: {reason}" for name, reason in NO_EFFECT.items() if name in said]
    given = {name: value for name, value in said.items() if name not in _original()}
    given |= {RENAMED[name]: value for name, value in said.items() if name in RENAMED}
    given |= {SWITCHES[name][0]: SWITCHES[name][1] for name in ("gradient_checkpointing", "use_fp8") if name in said}
    given |= OPTIMIZERS[said["optimizer_type"]] if "optimizer_type" in said else {}
    if "tokenizer_name" in said:
        given["tokenizer"] = _tokenizer(said["tokenizer_name"])
    if "num_workers" in said:
        given["workers"] = _whole(said, "num_workers", "4", least=0) or 1
    if first := next((name for name in said if name in OF_RECIPE), ""):
        base = _base(arguments, given, first)
        if base.has_model:  # otherwise resolving the recipe reports the error
            notes += _of_recipe(said, given, base)
    names = dict(EITHER) | RENAMED | {name: ours for name, (ours, _) in SWITCHES.items()}
    meant = {name: names[name] for name in said if name in names and name != "resume_from"}
    return [*([arguments.recipe] if arguments.recipe else []), *_words(given)], notes, meant


def refusal(name: str) -> str:
    """Why a flag of the original is refused; "" for other names."""
    return next((reason for pattern, reason in REFUSED.items() if re.fullmatch(pattern, name)), "")


def _original() -> dict[str, Flag]:
    """The flags that `swamla train` does not have."""
    known = flags()
    texts: dict[str, tuple[Any, str]] = {
        **{name: (known[ours].annotation if ours in known else str, f"--{ours}") for name, ours in RENAMED.items()},
        **{name: (bool, f"--{ours} {value}") for name, (ours, value) in SWITCHES.items()},
        **{name: (int, f"{kind} layers in a cycle of the pattern, at its depth") for name, (kind, _) in CYCLE.items()},
        **{name: (annotation, text) for name, (annotation, _, _, text) in EXPERTS.items()},
        **OTHERS,
        **{name: (bool, f"changes nothing: {reason}") for name, reason in NO_EFFECT.items()},
    }
    bare = {*SWITCHES, *NO_EFFECT}
    fields = {name: known[ours].field for name, ours in RENAMED.items() if ours in known}
    return {
        name: Flag(
            name=name,
            annotation=annotation,
            help=f"→ {text}",
            group=_GROUP,
            switch=name in bare,
            field=fields.get(name, ""),
        )
        for name, (annotation, text) in texts.items()
    }


def _table() -> dict[str, Flag]:
    """All flags; --help shows the original's, --help all also those of `swamla train`."""
    return _original() | {name: replace(flag, usual=False) for name, flag in flags().items()}


def _base(arguments: Arguments, given: Mapping[str, Any], flag: str) -> Written:
    """The recipe, or the config of the resumed run, to which the flags apply."""
    if arguments.resume_from_hf:
        raise UsageError(
            f"--{flag}: its meaning depends on the run, which is not here yet; its config.json has the setting"
        )
    if "resume" in given:
        folder, name = named_folder(arguments, arguments.recipe or "quickstart")
        return written(str(resumed_folder(arguments.resume, folder, name) / "config.json"), given)
    unnamed = "init_from" in given and not arguments.recipe
    recipe = begun_recipe(given["init_from"]) if unnamed else arguments.recipe or "quickstart"
    return written(recipe, given, new=True, unnamed=unnamed)


def _of_recipe(said: Mapping[str, Any], given: dict[str, Any], base: Written) -> list[str]:
    """Add to `given` the flags that depend on the recipe, applying each to `base`; returns notes."""
    _reshape(said, given, base)
    base.apply({name: value for name, value in given.items() if name in SHAPE})
    notes = _leave_out_windows(said, given, base)
    _choose_ffn(said, given, base.plain)
    base.apply({name: value for name, value in given.items() if name in flags() and name not in SHAPE})
    for name in ("use_ema", "use_progressive"):
        ours, value = SWITCHES[name]
        if name in said and base.plain["train"].get(ours) in (None, "", "none"):
            given[ours] = value
    _train_settings(said, given, base.plain)
    for name in (name for name in EXPERTS if name in said):
        with naming(name, said[name]):
            _expert_setting(name, said[name], given, base.plain)
    return notes


def _reshape(said: Mapping[str, Any], given: dict[str, Any], base: Written) -> None:
    """Turn cycles into a pattern; make gated DeltaNet the local mixer if a flag of it is given and no layer has it."""
    blocks = base.spare | base.plain["model"]["blocks"]
    pattern = given.get("pattern", " ".join(base.plain["model"]["pattern"])).replace(",", " ").split()

    def kind(name: str) -> str:
        return mixer_kind(blocks[name]) if name in blocks else name

    asked = any(name in said for name in GDN) and "local_mixer" not in given
    if "use_gated_deltanet" in said or (asked and "gdn" not in map(kind, pattern)):
        given["local_mixer"] = "gdn"
    if cycle := [name for name in CYCLE if name in said]:
        counts = dict(CYCLE.values()) | {
            CYCLE[name][0]: _whole(said, name, str(CYCLE[name][1]), least=0) for name in cycle
        }
        local = next((name for name in pattern if is_local(kind(name))), "swa")
        latent = next((name for name in pattern if kind(name) == "mla"), "mla")
        depth = given.pop("n_layers") if given.get("n_layers", 0) > 0 else len(pattern)
        if not any(counts.values()):
            named = ", ".join(f"--{name} {said[name]}" for name in cycle)
            raise UsageError(f"{named}: a cycle without any layer: one of them must be above 0")
        given["pattern"] = " ".join(repeat([local] * counts["local"] + [latent] * counts["mla"], depth))


def _leave_out_windows(said: Mapping[str, Any], given: dict[str, Any], base: Written) -> list[str]:
    """Drop flags of sliding windows if every local layer is gated DeltaNet; returns notes."""
    mixers = {mixer_kind(block) for block in base.plain["model"]["blocks"].values()}
    chosen = any(name in said for name in GDN) or given.get("local_mixer") == "gdn"
    unused = [name for name in OF_WINDOWS if name in said] if chosen and "swa" not in mixers else []
    for name in unused:
        del given[OF_WINDOWS[name]]
    named, verb = " and ".join(f"--{name}" for name in unused), "changes" if len(unused) == 1 else "change"
    why = "every local layer is gated DeltaNet, which has no window"
    return [f"{named} {verb} nothing: {why}"] if unused else []


def _choose_ffn(said: Mapping[str, Any], given: dict[str, Any], plain: Plain) -> None:
    """Choose the kind of FFN of the latent-attention blocks."""
    if not (asked := [name for name in ("no_moe", "use_moe", "use_latent_moe") if name in said]):
        return
    kinds = [ffn.get("kind", "dense") for ffn in _ffns(plain)]
    wanted = SWITCHES[asked[-1]][1]
    if wanted != "moe" or "latent_moe" not in kinds:  # LatentMoE has experts too
        given["mla_ffn"] = wanted


def _train_settings(said: Mapping[str, Any], given: dict[str, Any], plain: Plain) -> None:
    """Translate flags whose counterparts have other units."""
    train = plain["train"]
    peak = train.get("lr", TrainConfig.lr)
    if "min_lr" in said and isinstance(peak, int | float) and peak > 0:  # else reading it reports the error
        with naming("min_lr", said["min_lr"]):
            if not 0 <= said["min_lr"] <= peak:
                raise UsageError(f"must be a number between 0 and the learning rate, {peak:g}")
        given["min_lr_ratio"] = said["min_lr"] / peak
    optimizers = choices_of(field_types(TrainConfig)["optimizer"])
    for index, name in enumerate(("beta1", "beta2")):
        if name not in said:
            continue
        with naming(name, said[name]):
            if not 0 <= said[name] < 1:
                raise UsageError("must be a number of at least 0 and below 1, e.g. 0.9")
        chosen = choice(train, "optimizer")
        kind = chosen.setdefault("kind", next(iter(optimizers)))
        default: Any = optimizers[kind]
        if "betas" not in field_types(default):
            raise UsageError(f"--{name}: the optimizer {kind} has no betas")
        betas = [*given.get(f"{kind}_betas", chosen.get("betas", default.betas))]
        betas[index] = said[name]
        given[f"{kind}_betas"] = betas
    if "gradient_accumulation_steps" in said:
        count = _whole(said, "gradient_accumulation_steps", "4")
        rows = train.get("batch_size", TrainConfig.batch_size)
        given |= {"accumulation": count, "batch_size": rows * count if isinstance(rows, int) else rows}


def _expert_setting(name: str, value: Any, given: dict[str, Any], plain: Plain) -> None:
    """Set a field of the experts of the latent-attention blocks."""
    _, field, latent_only, _ = EXPERTS[name]
    kinds = ("latent_moe",) if latent_only else ("moe", "latent_moe")
    ffn = next((ffn for ffn in _ffns(plain) if ffn.get("kind") in kinds), None)
    if ffn is None:
        mend = " or ".join(f"--use_{kind}" for kind in kinds)
        raise UsageError(f"no mla block of the model has such an FFN; add {mend}")
    kind = ffn["kind"]
    settings = BLOCK_PARTS["ffn"][kind].__dict__ | ffn
    if field in ("ratio", "n_experts", "n_activated"):
        value = _whole({name: value}, name, "4")
    if name == "latent_dim":
        width = plain["model"]["width"]
        if width % value:
            raise UsageError(f"must divide the width {width}")
        value = width // value
    if field == "ratio":
        scaled = {n: settings[n] * value // settings["ratio"] for n in ("n_experts", "n_activated")}
        changed = {**scaled, "ratio": value}
    elif name in ("n_experts", "n_activated") and kind == "latent_moe":
        changed = {field: value * settings["ratio"]}
    else:
        changed = {field: value}
    ffn |= changed
    given |= {f"{kind}_{setting}": new for setting, new in changed.items()}


def _ffns(plain: Plain) -> list[Plain]:
    """The FFNs of the latent-attention blocks."""
    blocks = [block for block in plain["model"]["blocks"].values() if mixer_kind(block) == "mla"]
    if not blocks:
        raise UsageError("MoE flags act on the FFNs of mla blocks, and the pattern has none")
    return [choice(block, "ffn") for block in blocks]


def _tokenizer(name: str) -> str:
    """The tokenizer: a local name or path, or one on the hub."""
    ours = name in ("byte", "char", "gpt2") or ":" in name or Path(name).expanduser().exists()
    return name if ours else "gpt2" if name == "openai-community/gpt2" else f"hub:{name}"


def _whole(said: Mapping[str, Any], name: str, example: str, *, least: int = 1) -> int:
    """The value of a flag that is a count, checked."""
    if said[name] < least:
        bound = "> 0" if least else ">= 0"
        raise UsageError(f"--{name} {said[name]}: must be a whole number {bound}, e.g. {example}")
    return said[name]


def _words(given: Mapping[str, Any]) -> list[str]:
    """Flags as words of a command line."""
    words = []
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else value
            words.append(f"--{name}={shown}")
    return words
