"""The command line of the project that swamla replaces: what each of its flags is here.

Most of its names are swamla's own (`SAME`); the others are listed below, each with what it writes into a recipe's plain
data. Its MoE flags act on the FFN of the latent-attention blocks, where it had its experts. A flag without a
counterpart is refused, or accepted with a line that says why it changes nothing: never passed over in silence.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from swamla.cli.field_text import metavar, parse_text
from swamla.cli.overrides import Flag, argument, flags
from swamla.cli.plain import BLOCK_PARTS, Plain, choice, mixer_kind
from swamla.cli.reshape import PER_CYCLE
from swamla.config import choices_of, field_types
from swamla.errors import UsageError
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
# What it called a number format of the optimizer's moments; weights and gradients were, and are, kept in fp32.
_OPTIMIZERS = {
    "adamw": {"kind": "adamw"},
    "lion": {"kind": "lion"},
    "muon": {"kind": "muon"},
    "fp8_adamw": {"kind": "adamw", "moments": "bf16"},
    "fp8_lion": {"kind": "lion", "moments": "bf16"},
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
    *((name, "no_moe") for name in ("use_moe", "use_latent_moe")),
)
_FFN = "model.blocks.*.ffn."
_EMA_DECAY = 0.9999
_CURRICULUM = "512:500M,1024:2B,2048:inf"
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

Put = Callable[[Plain, Any], None]


def refusal(name: str) -> str:
    """Why a flag of the original is refused; empty for a name that it did not have."""
    return next((reason for pattern, reason in _REFUSED.items() if re.fullmatch(pattern, name)), "")


def choosing_flags() -> dict[str, Flag]:
    """Flags that choose a kind, whose settings other flags then fill in: they go first."""
    return _by_name(
        _flag("optimizer_type", "train.optimizer", "--optimizer; fp8_… keeps its moments in bf16", str, _put_optimizer),
        _switch("no_moe", "model.blocks.*.ffn", "dense FFNs in mla blocks", _put_ffn("dense")),
        _switch("use_moe", "model.blocks.*.ffn", "experts in the FFNs of mla blocks", _put_ffn("moe")),
        _switch("use_latent_moe", "model.blocks.*.ffn", "the same, behind a down-projection", _put_ffn("latent_moe")),
    )


def setting_flags() -> dict[str, Flag]:
    """Flags that set a value, in the order in which they build on each other."""
    known = flags()
    ours = [replace(known[same], name=name, help=f"--{same}", default=MISSING) for name, same in RENAMED.items()]
    scaled = "; of a LatentMoE before its ratio multiplies them"
    return _by_name(
        *ours,
        _flag("min_lr", "train.min_lr_ratio", "the last learning rate itself, see --min_lr_ratio", float, _put_min_lr),
        _flag("beta1", "train.optimizer.betas", "first of the optimizer's betas", float, _put_beta(0)),
        _flag("beta2", "train.optimizer.betas", "second of the optimizer's betas", float, _put_beta(1)),
        _flag(
            "gradient_accumulation_steps",
            "train.accumulation",
            "that many micro-batches of --batch_size rows a step (--accumulation splits --batch_size instead)",
            int,
            _put_accumulation,
        ),
        _switch("gradient_checkpointing", "train.checkpointing", "--checkpointing all", _put("checkpointing", "all")),
        _flag("compile_mode", "train.compile", "--compile MODE", str, _put("compile")),
        _switch("use_fp8", "train.precision", "--precision fp8", _put("precision", "fp8")),
        _flag("tokenizer_name", "data.tokenizer", "--tokenizer; other names are the hub's", str, _put_tokenizer),
        _flag("ema_decay", "train.ema", "--ema", float, _put("ema")),
        _switch("use_ema", "train.ema", f"--ema {_EMA_DECAY}", _put_unless_set("ema", _EMA_DECAY)),
        _flag("progressive_schedule", "train.curriculum", "--curriculum", str, _put("curriculum")),
        _switch(
            "use_progressive",
            "train.curriculum",
            f"--curriculum {_CURRICULUM}",
            _put_unless_set("curriculum", _CURRICULUM),
        ),
        _flag("latent_ratio", _FFN + "ratio", "--latent_moe_ratio, experts multiplied with it", int, _put_ratio),
        _flag("n_experts", _FFN + "n_experts", f"experts{scaled}", int, _put_scaled("n_experts")),
        _flag("n_activated", _FFN + "n_activated", f"experts of a token{scaled}", int, _put_scaled("n_activated")),
        _flag("n_shared_experts", _FFN + "n_shared", "shared experts", int, _put_expert("n_shared")),
        _flag("expert_dim", _FFN + "expert_hidden", "hidden width of an expert", int, _put_expert("expert_hidden")),
        _flag("router_z_loss_coef", _FFN + "z_loss", "weight of the router's z-loss", float, _put_expert("z_loss")),
        _flag(
            "latent_preserve_expert_dim",
            _FFN + "preserve_expert_dim",
            "--latent_moe_preserve_expert_dim",
            bool,
            _put_preserve,
        ),
        *(_switch(name, "", f"changes nothing: {reason}", _leave_alone) for name, reason in NO_EFFECT.items()),
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
    """A bare --compile, without one of the modes behind it, is --compile default: written out for the parser."""
    modes = get_args(field_types(TrainConfig).get("compile"))
    return [
        "--compile=default" if token == "--compile" and not {*argv[index + 1 : index + 2]} & {*modes} else token
        for index, token in enumerate(argv)
    ]


def check_conflicts(given: frozenset[str]) -> None:
    """Raise `UsageError` for two flags that say the same thing, be it differently."""
    for pair in (*RENAMED.items(), *_EITHER):
        if given.issuperset(pair):
            raise UsageError(f"--{pair[0]} and --{pair[1]} say the same thing: give one of them")


def reshaping(values: Mapping[str, Any], given: frozenset[str]) -> tuple[dict[str, str], dict[str, int]]:
    """What `reshape` wants to know: the flags it has from here, and the layers of a cycle."""
    wanted = {"local_mixer": "gdn"} if "use_gated_deltanet" in given else {}
    cycle = {}
    for name, kind in CYCLE.items():
        if name in given:
            count = parse_text(values[name], int)
            if not isinstance(count, int) or count < 0:
                raise UsageError(f"--{name} {values[name]}: must be a whole number >= 0, e.g. {PER_CYCLE[kind]}")
            cycle[kind] = count
    return wanted, cycle


def notes(given: frozenset[str]) -> list[str]:
    """A line for each flag in `given` that changes nothing."""
    return [f"--{name} changes nothing: {reason}" for name, reason in NO_EFFECT.items() if name in given]


def _by_name(*made: Flag) -> dict[str, Flag]:
    return {flag.name: flag for flag in made}


def _flag(name: str, path: str, text: str, annotation: Any, put: Put) -> Flag:
    return Flag(name=name, field=path, annotation=annotation, help=text, default=MISSING, put=put)


def _switch(name: str, path: str, text: str, put: Put) -> Flag:
    return replace(_flag(name, path, text, bool, put), switch=True)


def _leave_alone(plain: Plain, value: Any) -> None:
    """For what is accepted and changes nothing."""


def _put(name: str, constant: Any = None) -> Put:
    def put(plain: Plain, value: Any) -> None:
        plain["train"][name] = value if constant is None else constant

    return put


def _put_unless_set(name: str, constant: Any) -> Put:
    def put(plain: Plain, value: Any) -> None:
        if plain["train"].get(name) in (None, "", "none"):
            plain["train"][name] = constant

    return put


def _put_optimizer(plain: Plain, name: str) -> None:
    if name not in _OPTIMIZERS:
        raise UsageError(f"--optimizer_type {name}: must be one of {', '.join(_OPTIMIZERS)}")
    wanted = _OPTIMIZERS[name]
    same = choice(plain["train"], "optimizer").get("kind") == wanted["kind"]
    plain["train"]["optimizer"] = (plain["train"]["optimizer"] if same else {}) | wanted


def _put_min_lr(plain: Plain, value: Any) -> None:
    peak = plain["train"].get("lr", TrainConfig.lr)
    usable = isinstance(value, float) and isinstance(peak, int | float) and peak > 0
    plain["train"]["min_lr_ratio"] = value / peak if usable else value


def _put_beta(index: int) -> Put:
    def put(plain: Plain, value: Any) -> None:
        optimizers = choices_of(field_types(TrainConfig)["optimizer"])
        optimizer = choice(plain["train"], "optimizer")
        default: Any = optimizers[optimizer.setdefault("kind", next(iter(optimizers)))]
        betas = list(optimizer.get("betas", default.betas))
        optimizer["betas"] = [value if i == index else beta for i, beta in enumerate(betas)]

    return put


def _put_accumulation(plain: Plain, value: Any) -> None:
    rows = plain["train"].get("batch_size", TrainConfig.batch_size)
    plain["train"]["accumulation"] = value
    if isinstance(value, int) and isinstance(rows, int):
        plain["train"]["batch_size"] = rows * value


def _put_tokenizer(plain: Plain, name: str) -> None:
    ours = name in ("byte", "char", "gpt2") or ":" in name or Path(name).expanduser().exists()
    gpt2 = name == "openai-community/gpt2"
    plain.setdefault("data", {})["tokenizer"] = name if ours else "gpt2" if gpt2 else f"hub:{name}"


def _ffns(plain: Plain) -> list[Plain]:
    """The FFNs of the latent-attention blocks."""
    blocks = [block for block in plain["model"]["blocks"].values() if mixer_kind(block) == "mla"]
    if not blocks:
        raise UsageError("MoE flags act on the FFNs of mla blocks, and the pattern has none")
    return [choice(block, "ffn") for block in blocks]


def _put_ffn(kind: str) -> Put:
    def put(plain: Plain, value: Any) -> None:
        for ffn in _ffns(plain):
            is_one = kind == "moe" and ffn.get("kind") == "latent_moe"  # which has experts too
            if ffn.get("kind", "dense") != kind and not is_one:
                ffn.clear()
                ffn["kind"] = kind

    return put


def _experts(plain: Plain, flag: str, *kinds: str) -> list[Plain]:
    """The FFNs among `_ffns` that are of these kinds."""
    found = [ffn for ffn in _ffns(plain) if ffn.get("kind") in kinds]
    if not found:
        mend = " or ".join(f"--use_{kind}" for kind in kinds)
        raise UsageError(f"--{flag}: no mla block of the model has such an FFN; add {mend}")
    return found


def _setting(ffn: Plain, name: str) -> Any:
    """A setting of an FFN, its default where the recipe does not say."""
    return ffn.get(name, BLOCK_PARTS["ffn"][ffn["kind"]].__dict__[name])


def _put_ratio(plain: Plain, ratio: Any) -> None:
    for ffn in _experts(plain, "latent_ratio", "latent_moe"):
        before = _setting(ffn, "ratio")
        for name in ("n_experts", "n_activated"):
            if isinstance(ratio, int):
                ffn[name] = _setting(ffn, name) * ratio // before
        ffn["ratio"] = ratio


def _put_scaled(name: str) -> Put:
    def put(plain: Plain, value: Any) -> None:
        for ffn in _experts(plain, name, "moe", "latent_moe"):
            scale = _setting(ffn, "ratio") if ffn["kind"] == "latent_moe" else 1
            ffn[name] = value * scale if isinstance(value, int) and isinstance(scale, int) else value

    return put


def _put_expert(name: str) -> Put:
    def put(plain: Plain, value: Any) -> None:
        for ffn in _experts(plain, name, "moe", "latent_moe"):
            ffn[name] = value

    return put


def _put_preserve(plain: Plain, value: Any) -> None:
    for ffn in _experts(plain, "latent_preserve_expert_dim", "latent_moe"):
        ffn["preserve_expert_dim"] = value
