"""The command line of the project that swamla replaces: what each of its flags is here.

Most of its names are swamla's own (`SAME`); the others are listed below, each with what it writes into a recipe's plain
data, by the functions of `original_puts`. Its MoE flags act on the FFN of the latent-attention blocks, where it had its
experts. A flag without a counterpart is refused, or accepted with a line that says why it changes nothing: never passed
over in silence.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from swamla.cli import original_puts as puts
from swamla.cli.field_text import metavar, parse_text
from swamla.cli.overrides import Flag, Put, argument, flags, naming
from swamla.cli.reshape import PER_CYCLE, SHAPE, Reshaping
from swamla.config import field_types
from swamla.errors import UsageError
from swamla.recipes import ALIASES, recipe_names
from swamla.train.config import TrainConfig

SAME = (
    *("batch_size", "block_size", "dropout", "weight_decay", "grad_clip", "seed"),
    *("log_interval", "eval_interval", "save_interval", "wandb_project", "wandb_run_name", "swa_window", "hf_repo_id"),
    *("mla_q_lora_rank", "mla_kv_lora_rank", "mla_qk_nope_head_dim", "mla_qk_rope_head_dim", "mla_v_head_dim"),
)
RENAMED = {
    "learning_rate": "lr",
    "max_iters": "steps",
    "warmup_iters": "warmup",
    "swa_sink_size": "swa_sinks",
    "deltanet_latent_dim": "gdn_latent_dim",
    "deltanet_share_qk": "gdn_share_qk",
    "use_tensorboard": "tensorboard",
}
CYCLE = {
    "swa_layers_per_cycle": "local",
    "local_layers_per_cycle": "local",
    "mla_layers_per_cycle": "mla",
}
_EITHER = (
    ("optimizer_type", "optimizer"),
    ("gradient_accumulation_steps", "accumulation"),
    ("min_lr", "min_lr_ratio"),
    ("tokenizer_name", "tokenizer"),
    ("gradient_checkpointing", "checkpointing"),
    ("use_fp8", "precision"),
    ("ema_decay", "ema"),
    ("progressive_schedule", "curriculum"),
    ("use_gated_deltanet", "local_mixer"),
    ("swa_layers_per_cycle", "local_layers_per_cycle"),
    ("latent_dim", "latent_ratio"),
    *((name, "no_moe") for name in ("use_moe", "use_latent_moe")),
)
_FFN = "model.blocks.*.ffn."
_EMA_DECAY = 0.9999
_CURRICULUM = "512:500M,1024:2B,2048:inf"
# Those that make gated DeltaNet the local mixer; and what was said of sliding windows all the same.
_GDN = ("use_gated_deltanet", "deltanet_latent_dim", "deltanet_share_qk")
_OF_WINDOWS = ("swa_window", "swa_sink_size")
NO_EFFECT = {
    "use_flash_attention": "every mixer's `backend` chooses its kernel, and the choice is printed",
    "use_varlen_attn": "packed documents never see each other, whatever the kernel",
    "disable_tf32": "swamla never switches TF32 on",
}
_REFUSED = {
    r"hf_token|hub_token": "the token is read from HF_TOKEN in the environment, so that it is stored nowhere",
    r".*engram.*": "swamla has no engram memory",
    r".*mup.*": "swamla has no muP; learning rates are given for the model as it is",
    r".*wedlm.*": "swamla has no WeDLM; every model is causal",
    r".*neural_memory.*|.*titans.*": "swamla has no neural memory",
    r".*triton.*": "there is no switch for Triton; a mixer's `backend` names its kernel",
}


def refusal(name: str) -> str:
    """Why a flag of the original is refused; empty for a name that it did not have."""
    return next((reason for pattern, reason in _REFUSED.items() if re.fullmatch(pattern, name)), "")


def choosing_flags() -> dict[str, Flag]:
    """Flags that choose a kind, whose settings other flags then fill in: they go first."""
    return _by_name(
        _flag("optimizer_type", "train.optimizer", "--optimizer; fp8_… keeps its moments in bf16", str, puts.optimizer),
        _switch("no_moe", "model.blocks.*.ffn", "dense FFNs in mla blocks", puts.ffn("dense")),
        _switch("use_moe", "model.blocks.*.ffn", "experts in the FFNs of mla blocks", puts.ffn("moe")),
        _switch("use_latent_moe", "model.blocks.*.ffn", "the same, behind a down-projection", puts.ffn("latent_moe")),
    )


def setting_flags() -> dict[str, Flag]:
    """Flags that set a value, in the order in which they build on each other."""
    known = flags()
    ours = [replace(known[same], name=name, help=f"--{same}", default=MISSING) for name, same in RENAMED.items()]
    scaled, final = "; of a LatentMoE before its ratio multiplies them", ", as it is"
    return _by_name(
        *ours,
        _flag("min_lr", "train.min_lr_ratio", "the last learning rate itself, see --min_lr_ratio", float, puts.min_lr),
        _flag("beta1", "train.optimizer.betas", "first of the optimizer's betas", float, puts.beta(0)),
        _flag("beta2", "train.optimizer.betas", "second of the optimizer's betas", float, puts.beta(1)),
        _flag(
            "gradient_accumulation_steps",
            "train.accumulation",
            "that many micro-batches of --batch_size rows a step (--accumulation splits --batch_size instead)",
            int,
            puts.accumulation,
            "train.batch_size",
        ),
        _switch(
            "gradient_checkpointing",
            "train.checkpointing",
            "--checkpointing all",
            puts.training("checkpointing", "all"),
        ),
        _flag("compile_mode", "train.compile", "--compile MODE", str, puts.training("compile")),
        _switch("use_fp8", "train.precision", "--precision fp8", puts.training("precision", "fp8")),
        _flag("tokenizer_name", "data.tokenizer", "--tokenizer; other names are the hub's", str, puts.tokenizer),
        _flag("ema_decay", "train.ema", "--ema", float, puts.training("ema")),
        _switch("use_ema", "train.ema", f"--ema {_EMA_DECAY}", puts.unless_set("ema", _EMA_DECAY)),
        _flag("progressive_schedule", "train.curriculum", "--curriculum", str, puts.training("curriculum")),
        _switch(
            "use_progressive",
            "train.curriculum",
            f"--curriculum {_CURRICULUM}",
            puts.unless_set("curriculum", _CURRICULUM),
        ),
        _flag("latent_ratio", _FFN + "ratio", "--latent_moe_ratio, experts multiplied with it", int, puts.ratio),
        _flag("latent_dim", _FFN + "ratio", "the same by the latent's width, width / ratio", int, puts.latent_dim),
        _flag("n_experts", _FFN + "n_experts", f"experts{scaled}", int, puts.scaled("n_experts")),
        _flag("n_activated", _FFN + "n_activated", f"experts of a token{scaled}", int, puts.scaled("n_activated")),
        _flag("latent_n_experts", _FFN + "n_experts", f"--latent_moe_n_experts{final}", int, puts.final("n_experts")),
        _flag(
            "latent_n_activated",
            _FFN + "n_activated",
            f"--latent_moe_n_activated{final}",
            int,
            puts.final("n_activated"),
        ),
        _flag("n_shared_experts", _FFN + "n_shared", "shared experts", int, puts.expert("n_shared")),
        _flag("expert_dim", _FFN + "expert_hidden", "hidden width of an expert", int, puts.expert("expert_hidden")),
        _flag("router_z_loss_coef", _FFN + "z_loss", "weight of the router's z-loss", float, puts.expert("z_loss")),
        _flag(
            "latent_preserve_expert_dim",
            _FFN + "preserve_expert_dim",
            "--latent_moe_preserve_expert_dim",
            bool,
            puts.expert("preserve_expert_dim", "latent_moe"),
        ),
        *(_switch(name, "", f"changes nothing: {reason}", puts.nothing) for name, reason in NO_EFFECT.items()),
    )


def other_flags() -> dict[str, tuple[str, str]]:
    """Flags that no field of a config answers to, metavar and help: of the pattern, and of how data is read."""
    cycle = {name: ("INT", f"{kind} layers in a cycle of the pattern, at its depth") for name, kind in CYCLE.items()}
    return cycle | {
        "use_gated_deltanet": ("", "--local_mixer gdn"),
        "num_workers": ("INT", "processes that tokenize large data; 0 is one, by default as many as there are cores"),
    }


def workers(arguments: Any, given: frozenset[str]) -> int | None:
    """What --num_workers asks for; None where it was not given."""
    if "num_workers" not in given:
        return None
    text = arguments.original.num_workers
    count = parse_text(text, int)
    if not isinstance(count, int) or count < 0:
        raise UsageError(f"--num_workers {text}: must be a whole number >= 0, e.g. 4")
    return max(count, 1)


def add_original_flags(cls: type) -> Any:
    """The dataclass `cls` with the flags of the original in a group of their own, the field `original`."""
    added = [
        argument(name, str if shape else bool, shape, f"→ {text}", None, switch=not shape)
        for name, (shape, text) in other_flags().items()
    ]
    for flag in (choosing_flags() | setting_flags()).values():
        added.append(
            argument(flag.name, flag.annotation, metavar(flag.annotation), f"→ {flag.help}", None, switch=flag.switch)
        )
    group: Any = make_dataclass("Original", added, frozen=True, kw_only=True)
    group.__doc__ = "Names of the project that swamla replaces"
    field_of_group = ("original", Annotated[group, tyro.conf.OmitArgPrefixes], field(default_factory=group))
    made = make_dataclass(cls.__name__, [field_of_group], bases=(cls,), frozen=True, kw_only=True)
    made.__doc__ = cls.__doc__
    return made


def bare_compile(argv: list[str]) -> list[str]:
    """A bare --compile, followed by a flag, a recipe or nothing, is --compile default: written out for the parser."""
    modes = get_args(field_types(TrainConfig).get("compile"))

    def is_bare(behind: list[str]) -> bool:
        return not behind or (behind[0] not in modes and (behind[0].startswith("-") or _is_recipe(behind[0])))

    return [
        "--compile=default" if token == "--compile" and is_bare(argv[index + 1 : index + 2]) else token
        for index, token in enumerate(argv)
    ]


def _is_recipe(text: str) -> bool:
    return text in (*recipe_names(), *ALIASES) or text.endswith((".toml", ".json")) or Path(text).exists()


def check_conflicts(given: frozenset[str]) -> None:
    """Raise `UsageError` for two flags that say the same thing, be it differently."""
    for pair in (*RENAMED.items(), *_EITHER):
        if given.issuperset(pair):
            raise UsageError(f"--{pair[0]} and --{pair[1]} say the same thing: give one of them")


def reshaping(values: Mapping[str, Any], given: frozenset[str]) -> Reshaping:
    """What the flags in `given`, ours among them, want of the model's shape."""
    wanted, cycle = {}, {}
    for name in (name for name in SHAPE if name in given):
        wanted[name] = (values[name], f"--{name} {values[name]}")
    if "use_gated_deltanet" in given:
        wanted["local_mixer"] = ("gdn", "--use_gated_deltanet")
    implied = next((f"--{name}" for name in _GDN if name in given), "")
    for name, kind in CYCLE.items():
        if name in given:
            with naming(name, values[name]):
                count = parse_text(values[name], int)
                if not isinstance(count, int) or count < 0:
                    raise UsageError(f"must be a whole number >= 0, e.g. {PER_CYCLE[kind]}")
            cycle[kind] = (count, f"--{name} {values[name]}")
    return Reshaping(wanted=wanted, cycle=cycle, implied="" if "local_mixer" in wanted else implied)


def of_no_use(given: frozenset[str], values: Mapping[str, Any], mixers: set[str]) -> frozenset[str]:
    """Flags in `given` that say more about sliding windows, where gated DeltaNet was chosen for every local layer."""
    chosen = not given.isdisjoint(_GDN) or ("local_mixer" in given and values["local_mixer"] == "gdn")
    return given.intersection(_OF_WINDOWS) if chosen and "swa" not in mixers else frozenset()


def notes(given: frozenset[str], unused: frozenset[str] = frozenset()) -> list[str]:
    """A line for each flag in `given` that changes nothing, and one for all that are `unused`, see `of_no_use`."""
    found = [f"--{name} changes nothing: {reason}" for name, reason in NO_EFFECT.items() if name in given]
    if unused:
        named = " and ".join(f"--{name}" for name in _OF_WINDOWS if name in unused)
        verb = "changes" if len(unused) == 1 else "change"
        found.append(f"{named} {verb} nothing: every local layer is gated DeltaNet, which has no window")
    return found


def _by_name(*made: Flag) -> dict[str, Flag]:
    return {flag.name: flag for flag in made}


def _flag(name: str, path: str, text: str, annotation: Any, put: Put, besides: str = "") -> Flag:
    return Flag(name=name, field=path, annotation=annotation, help=text, default=MISSING, put=put, besides=besides)


def _switch(name: str, path: str, text: str, put: Put) -> Flag:
    return replace(_flag(name, path, text, bool, put), switch=True)
