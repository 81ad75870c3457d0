"""The config of a training run."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from swamla import distributed
from swamla.data.config import DataConfig
from swamla.distributed import TIMEOUT
from swamla.errors import require
from swamla.model.block import Checkpointing
from swamla.model.compiling import Compile
from swamla.model.language_model import LanguageModelConfig
from swamla.train.curriculum import Stages
from swamla.train.optim import AdamWConfig, GroupRates, OptimizerConfig, Role
from swamla.train.parallel.strategy import Parallel
from swamla.train.precision import Precision
from swamla.train.schedule import Budget, Schedule, ScheduleName


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    The run ends after its steps or its time, whichever comes first. The schedule follows whichever is closer to its
    end, so that the run always ends annealed; evaluations and saves count as time.

    steps: optimizer steps of the run; none if only max_minutes bounds it.
    max_minutes: minutes of the run, resumptions included; none if only steps bound it.
    batch_size: rows in one optimizer step, over all processes.
    accumulation: micro-batches that a process splits its rows of a step into; this changes memory only.
    block_size: tokens in a row.
    curriculum: shorter rows first, as in "512:500M,1024:2B,2048:inf": 512 tokens for 500 million, then 1024 for two
        billion, then block_size. Rows are cut, so a step's tokens stay the same; evaluations use block_size. Instead of
        tokens a stage may have a share of the run, as in "128:0.3,512:inf".
    batch_ramp: fewer rows per step first, as in "2:0.1,4:0.3,8:inf": 2 rows for a tenth of the run, then 4 for three
        tenths, then batch_size; or with tokens, as in curriculum.
    batch_rule: how the learning rate follows the rows of a step in batch_ramp: "none", or "sqrt", the root of their
        share of batch_size (arXiv 2006.09092, 2205.10287).
    optimizer: the optimizer.
    lr: peak learning rate, at the end of the warm-up.
    lr_embedding: learning rate of the embeddings, a tied head included, as a multiple of lr.
    lr_head: that of a head of its own, as a multiple of lr.
    lr_scalars: that of gains, biases, A_log, dt_bias, filters of convolutions and routers, as a multiple of lr.
    min_lr_ratio: the last learning rate as a fraction of the peak.
    warmup: below 1 a fraction of the run, from 1 on a number of steps.
    schedule: "cosine", "linear", "wsd" (stable, then decaying) or "constant", each after the warm-up.
    decay: for wsd, the last fraction of the run, in which the rate falls.
    schedule_steps: steps that the schedule spans; afterwards the rate keeps its last value. None for the run's own
        steps. To extend a run beyond its plan, give this or schedule_minutes.
    schedule_minutes: the same in minutes.
    weight_decay: decoupled from the gradient; not on embeddings, biases and gains.
    weight_decay_embedding: weight decay of the embeddings, a tied head included.
    weight_decay_head: weight decay of a head of its own; none for weight_decay.
    grad_clip: largest norm of the gradient; none for no limit.
    ema: decay, e.g. 0.999, of an exponential moving average of the weights, which evaluations then score and
        `swamla.load` returns; none for no average.
    ema_width: instead of ema, an average that is fitted to the run's length: its width as a fraction of the run, e.g.
        0.05 (arXiv 2312.02696).
    eval_interval: steps between evaluations; none for one at the end only.
    eval_seconds: seconds between evaluations, besides or instead of steps.
    eval_tokens: most held-out tokens that an evaluation during the run reads; none for all.
    eval_part: the held-out text that evaluations during the run read: "all", or "validation", a half of it that leaves
        the other, the test part, to be read once at the end of a study.
    save_interval: steps between checkpoints; none for the best and the last only.
    keep_last: number of newest checkpoints kept, besides the best.
    async_save: copy the state and write it while training continues; needs memory for the copy, and keep_last of at
        least 2.
    on_save_error: what to do if a checkpoint cannot be written, e.g. on a full disk: "stop", or "continue" with a
        warning until the next save. A failure at the run's end is always an error.
    max_skipped: steps in a row without a finite gradient (or with a spike) that end the run.
    spike_factor: a loss above this multiple of the mean of about the last 100 losses is a spike: weights and optimizer
        go back to the last checkpoint, and the rows since are not trained on again; none for never.
    rank_timeout_minutes: a rank that sends no heartbeat for so long, or whose step takes longer, is named and ends the
        run.
    log_interval: steps between lines where no progress bar is shown; metrics.jsonl has every step.
    tensorboard: also write TensorBoard event files, to RUN/tensorboard.
    wandb_project: also send the run to this project of Weights & Biases; offline without a key or a network.
    wandb_run_name: the run's name there; by default Weights & Biases draws one.
    hf_repo_id: USER/NAME of a repository on the Hugging Face Hub, to which each new best and the last checkpoint are
        pushed, with all that resuming needs. The token is read from HF_TOKEN.
    hf_private: make the repository private if it has to be created.
    profile: trace the first steps of this process to RUN/profile, and show where the time went.
    profile_steps: number of traced steps.
    profile_warmup: untraced steps before them, because the first steps of a process are slower.
    init_from: a run, one of its checkpoints or an exported folder, whose weights the run starts with, and whose
        tokenizer it uses unless another is named; empty for weights drawn from the seed.
    init_checkpoint: which checkpoint of a run in init_from: "best", "latest" or a step; its averaged weights if it has
        any.
    lora: rank of low-rank adapters (arXiv 2106.09685) on the matrices of all blocks, at most the inputs or outputs of a
        matrix. They alone are trained, and the rows of the special ids of conversations; 0 trains all weights. Of
        several processes each has the whole model.
    lora_alpha: the adapters' products are multiplied by lora_alpha / lora; none for 2 * lora.
    seed: of the initial weights, the order of the data and dropout.
    precision: "fp32"; "bf16", autocast with fp32 weights; or "fp8", which also multiplies the large matrices in fp8, by
        torchao. "auto" is bf16 if the machine has bf16 instructions, else fp32; a CPU with them takes whichever a short
        race finds faster.
    checkpointing: activation checkpointing, which saves memory and changes no number: recompute "none", "attention"
        (the mixers), "ffn" or "all" (whole blocks) in the backward pass.
    compile: "none", or a mode of torch.compile: "default", "reduce-overhead" (CUDA graphs) or "max-autotune". "auto"
        is "default" on a GPU, else "none": on a CPU, compiling delays quickstart's first step by 70 s.
    parallel: data-parallel strategy of several processes: "ddp", each with the whole model; "fsdp", each with a shard
        of it; "hsdp", replicas of `shards` shards each. "auto" is ddp, or plain training in one process.
    shards: processes that hold one replica in hsdp; by default those of one machine.
    expert_parallel: ranks that share the experts of every layer; tokens are sent to the ranks that own their experts.
        Everything else follows `parallel`. 1 to treat experts like other parameters.
    device: "auto" is CUDA if there is a CUDA device, else the CPU.
    threads: CPU threads; none for torch's default.
    """

    steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    block_size: int = 256
    curriculum: str = ""
    batch_ramp: str = ""
    batch_rule: Literal["none", "sqrt"] = "none"
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    lr: float = 1e-3
    lr_embedding: float = 1.0
    lr_head: float = 1.0
    lr_scalars: float = 1.0
    min_lr_ratio: float = 0.1
    warmup: float = 0.02
    schedule: ScheduleName = "cosine"
    decay: float = 0.2
    schedule_steps: int | None = None
    schedule_minutes: float | None = None
    weight_decay: float = 0.1
    weight_decay_embedding: float = 0.0
    weight_decay_head: float | None = None
    grad_clip: float | None = 1.0
    ema: float | None = None
    ema_width: float | None = None
    eval_interval: int | None = 250
    eval_seconds: float | None = None
    eval_tokens: int | None = None
    eval_part: Literal["all", "validation"] = "all"
    save_interval: int | None = 500
    keep_last: int = 2
    async_save: bool = False
    on_save_error: Literal["stop", "continue"] = "stop"
    max_skipped: int = 20
    spike_factor: float | None = None
    rank_timeout_minutes: float = 5.0
    log_interval: int = 10
    tensorboard: bool = False
    wandb_project: str = ""
    wandb_run_name: str = ""
    hf_repo_id: str = ""
    hf_private: bool = True
    profile: bool = False
    profile_steps: int = 5
    profile_warmup: int = 2
    init_from: str = ""
    init_checkpoint: str = "best"
    lora: int = 0
    lora_alpha: float | None = None
    seed: int = 0
    precision: Precision = "auto"
    checkpointing: Checkpointing = "none"
    compile: Compile = "auto"
    parallel: Parallel = "auto"
    shards: int | None = None
    expert_parallel: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        require(self.steps is not None or self.max_minutes is not None, "steps", None, "give `steps` or `max_minutes`")
        for name in (
            "steps",
            "max_minutes",
            "schedule_steps",
            "schedule_minutes",
            "eval_interval",
            "eval_seconds",
            "eval_tokens",
            "save_interval",
            "threads",
            "shards",
        ):
            value = self.__dict__[name]
            require(value is None or value > 0, name, value, "must be > 0, or left out")
        for name in (
            "batch_size",
            "accumulation",
            "expert_parallel",
            "block_size",
            "keep_last",
            "max_skipped",
            "log_interval",
            "profile_steps",
            "profile_warmup",
        ):
            require(self.__dict__[name] >= 1, name, self.__dict__[name], "must be >= 1")
        spikes = self.spike_factor is None or 1 < self.spike_factor < float("inf")
        require(spikes, "spike_factor", self.spike_factor, "must be > 1, e.g. 2, or left out")
        timeout = self.rank_timeout_minutes
        in_time = 0 < timeout < TIMEOUT / 60
        require(
            in_time,
            "rank_timeout_minutes",
            timeout,
            f"must be > 0 and below {TIMEOUT / 60:g}, the limit of torch's collectives",
        )
        kept = self.keep_last > 1 or not self.async_save
        require(
            kept, "keep_last", self.keep_last, "must be >= 2 with async_save: one is complete while another is written"
        )
        accumulates = self.batch_size % self.accumulation == 0
        require(accumulates, "accumulation", self.accumulation, f"must divide batch_size = {self.batch_size}")
        named = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)?", self.hf_repo_id, re.ASCII) is not None
        require(named, "hf_repo_id", self.hf_repo_id, "must be USER/NAME, e.g. me/first-try")
        require(self.seed >= 0, "seed", self.seed, "must be >= 0")
        Stages.lengths(self.curriculum, self.block_size)
        Stages.rows(self.batch_ramp, self.batch_size)
        legal = not set(self.wandb_project) & set("/\\#?%:")
        require(legal, "wandb_project", self.wandb_project, "must not contain / \\ # ? % or :, e.g. swamla")
        named = not self.wandb_run_name or bool(self.wandb_project)
        require(named, "wandb_run_name", self.wandb_run_name, "names a run in a project: give wandb_project too")
        which = self.init_checkpoint
        require(
            which in ("best", "latest") or which.isdigit(), "init_checkpoint", which, "must be best, latest or a step"
        )
        begins = bool(self.init_from) or which == "best"
        require(begins, "init_checkpoint", which, "chooses a checkpoint of init_from: give that too")
        require("\0" not in self.init_from, "init_from", self.init_from, "a path cannot hold NUL")
        self._check_lora()
        self._check_rates()

    def _check_lora(self) -> None:
        require(self.lora >= 0, "lora", self.lora, "must be a rank > 0, e.g. 8, or 0 to train all weights")
        alpha = self.lora_alpha
        require(alpha is None or 0 < alpha < float("inf"), "lora_alpha", alpha, "must be > 0, or none for 2 * lora")
        require(alpha is None or self.lora > 0, "lora_alpha", alpha, "is for adapters: give `lora` too, e.g. lora = 8")
        if self.lora:
            require(
                not self.averages_weights,
                "lora",
                self.lora,
                "adapters are not averaged: leave `ema` and `ema_width` out",
            )
            require(
                self.precision != "fp8", "precision", self.precision, "adapters are not in fp8: must be fp32 or bf16"
            )

    def _check_rates(self) -> None:
        require(0 < self.lr < float("inf"), "lr", self.lr, "must be > 0 and finite, e.g. 3e-4")
        for name in ("lr_embedding", "lr_head", "lr_scalars"):
            multiple = self.__dict__[name]
            require(0 <= multiple < float("inf"), name, multiple, "must be >= 0 and finite: a multiple of lr, e.g. 2")
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "must be between 0 and 1")
        require(0 < self.decay <= 1, "decay", self.decay, "must be above 0, at most 1, e.g. 0.2")
        require(self.warmup >= 0, "warmup", self.warmup, "must be >= 0: a fraction of the run below 1, else steps")
        steps, of = self.horizon.steps, "steps" if self.schedule_steps is None else "schedule_steps"
        require(steps is None or self.warmup <= steps, "warmup", self.warmup, f"must not exceed {of} = {steps}")
        begins = self.warmup_fraction + self.decay <= 1 or self.schedule != "wsd"
        require(begins, "decay", self.decay, "must not begin in the warm-up: lower decay or warmup")
        for name in ("weight_decay", "weight_decay_embedding", "weight_decay_head"):
            decay = self.__dict__[name]
            require(decay is None or 0 <= decay < float("inf"), name, decay, "must be >= 0, e.g. 0.1")
        require(
            self.ema is None or 0 < self.ema < 1, "ema", self.ema, "must be between 0 and 1, e.g. 0.999, or left out"
        )
        fits = self.ema_width is None or 0 < self.ema_width <= 0.25
        require(fits, "ema_width", self.ema_width, "must be above 0, at most 0.25, e.g. 0.05, or left out")
        one = self.ema is None or self.ema_width is None
        require(one, "ema_width", self.ema_width, "is instead of ema: leave one out, e.g. ema = none")
        require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", self.grad_clip, "must be > 0, or left out")

    @property
    def lora_scale(self) -> float:
        """What the adapters' products are multiplied by."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.lora

    @property
    def averages_weights(self) -> bool:
        """True if evaluations score averages of the weights."""
        return self.ema is not None or self.ema_width is not None

    @property
    def warmup_fraction(self) -> float:
        """The warm-up as a fraction of the schedule; 0 if it is a number of steps of a schedule in minutes."""
        if self.warmup < 1:
            return self.warmup
        return 0.0 if self.horizon.steps is None else self.warmup / self.horizon.steps

    @property
    def budget(self) -> Budget:
        """What ends the run."""
        return Budget(steps=self.steps, seconds=None if self.max_minutes is None else 60 * self.max_minutes)

    @property
    def horizon(self) -> Budget:
        """The steps or seconds that the learning rate's schedule spans."""
        minutes = self.max_minutes if self.schedule_minutes is None else self.schedule_minutes
        steps = self.steps if self.schedule_steps is None else self.schedule_steps
        return Budget(steps=steps, seconds=None if minutes is None else 60 * minutes)

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of step `step` (from 0), which will end after `seconds` of training time."""
        return self.lr * self.learning_rate.factor(self.progress(step, seconds), step)

    def progress(self, step: int, seconds: float) -> float:
        """The progress, 0 … 1 of the schedule, at the end of step `step` (from 0) and of `seconds` of training time."""
        return min(1.0, self.horizon.progress(step + 1, seconds))

    @property
    def group_rates(self) -> GroupRates:
        """Learning rates and weight decay by the parameters' roles."""
        decays: dict[Role, float] = {"embedding": self.weight_decay_embedding} if self.weight_decay_embedding else {}
        if self.weight_decay_head is not None:
            decays["head"] = self.weight_decay_head
        multiples: dict[Role, float] = {
            "embedding": self.lr_embedding,
            "head": self.lr_head,
            "scalar": self.lr_scalars,
        }
        return GroupRates(lr=multiples, weight_decay=decays)

    @property
    def lengths(self) -> Stages:
        """The sequence length over the run."""
        return Stages.lengths(self.curriculum, self.block_size)

    @property
    def batches(self) -> Stages:
        """The rows of a step over the run."""
        return Stages.rows(self.batch_ramp, self.batch_size)

    def batch_factor(self, rows: int) -> float:
        """The factor of the learning rate of a step of `rows` rows."""
        return math.sqrt(rows / self.batch_size) if self.batch_rule == "sqrt" else 1.0

    def micro_batches(self, rows: int) -> int:
        """The number of micro-batches of a step of `rows` rows: none has more rows than one of a full batch."""
        return -(-rows * self.accumulation // self.batch_size)

    def require_rows(self) -> None:
        """Raise `UsageError` unless every batch divides evenly among all ranks."""
        distributed.require_rows(self.batch_size, self.accumulation)
        for rows in self.batches.values[:-1]:
            distributed.require_rows(rows, 1, setting="batch_ramp")

    @property
    def learning_rate(self) -> Schedule:
        """The shape of the learning rate over the run."""
        return Schedule(name=self.schedule, warmup=self.warmup, decay=self.decay, floor=self.min_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: its model, its data and its training. Written, fully resolved, to RUN/config.json."""

    model: LanguageModelConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        for name, default in (("lr_head", 1.0), ("weight_decay_head", None)):
            value = self.train.__dict__[name]
            of_its_own = not self.model.tied_head or value == default
            require(
                of_its_own, f"train.{name}", value, f"the head is tied: give {name[:-4]}embedding, or --no_tied_head"
            )
        if (task := self.data.task) is not None:
            length, stages = self.train.block_size, self.train.curriculum
            require(length == task.length, "train.block_size", length, f"must be {task.length}, the task's length")
            require(not stages, "train.curriculum", stages, "is for texts: a row of a task cannot be cut")
