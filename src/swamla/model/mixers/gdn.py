"""Gated DeltaNet (arXiv 2412.06464): linear attention with a decaying, error-correcting state matrix per head."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.errors import require
from swamla.model.initial import Initializer, constant, reset_parameters, uniform
from swamla.model.mixers.explanation import Explanation, Weights, by_head, mixed
from swamla.model.mixers.mixer import Mixer, MixerConfig, State, without_padding
from swamla.model.norm import inverse_rms
from swamla.ops.gated_delta import BACKENDS, describe_backend, gated_delta_rule, gated_delta_step, prepare_rule
from swamla.ops.implied import implied_attention
from swamla.ops.l2_normalize import l2_normalize
from swamla.ops.layout import Layout
from swamla.ops.linear import matrix_of
from swamla.ops.rms_norm import rms_norm
from swamla.ops.short_conv import prepare_conv, short_conv, short_conv_step
from swamla.ops.short_conv import resolve_backend as resolve_conv
from swamla.registry import register

CHUNK = 64  # tokens per chunk in FLOP counts; the op chooses the fastest size for its device
GATES = ("silu", "sigmoid", "lowrank")
DECAYS = ("softplus", "safe")
SAFE_DECAY = -5.0  # the least log α of decay = "safe", as in Ling 3.0 and GLM-5


@register
@dataclass(frozen=True, kw_only=True)
class GDNConfig(MixerConfig):
    """Gated DeltaNet.

    n_heads: value heads, each with a state matrix.
    n_key_heads: heads of queries and keys, each shared by a group of value heads; as many as n_heads by default.
    head_k_dim: width of a query or key head, width / n_heads by default.
    head_v_dim: width of a value head, width / n_heads by default.
    conv: width of the short causal convolution on queries, keys and values.
    latent_dim: inner width of low-rank projections of queries, keys, values and output (not the gate); 0 for full rank.
    share_qk: whether keys equal the normalised queries.
    beta_max: β = beta_max · sigmoid(b); 2 lets the state's transition have negative eigenvalues (arXiv 2411.12537).
        Above 1 the rule computes in fp32, unless `backend` is "fla": see `rule_in_fp32`.
    gate: what the normalised output is multiplied by: silu, SiLU(z); sigmoid, σ(z); or lowrank, σ(z) with z from a
        projection of inner width head_v_dim, without biases, as in Kimi Linear (arXiv 2510.26692).
    decay: softplus, log α = −exp(A_log) · softplus(a + dt_bias); or safe, log α = −5 · σ(exp(A_log) · (a + dt_bias)),
        which is never below −5, as in Ling 3.0.
    norm_eps: epsilon of the norm of outputs.
    backend: auto, reference, torch, or on CUDA fla: flash-linear-attention.
    """

    kind: ClassVar[str] = "gdn"
    sign: ClassVar[str] = "G"
    ranks: ClassVar[tuple[str, ...]] = ("latent_dim",)
    head_counts: ClassVar[tuple[str, ...]] = ("n_heads", "n_key_heads")
    style: ClassVar[str] = "black on green"
    is_local: ClassVar[bool] = True
    vectors: ClassVar[tuple[str, ...]] = ("conv_weight",)
    only_projects: ClassVar[bool] = True
    BACKENDS: ClassVar[tuple[str, ...]] = BACKENDS
    n_heads: int
    n_key_heads: int | None = None
    head_k_dim: int | None = None
    head_v_dim: int | None = None
    conv: int = 4
    latent_dim: int = 0
    share_qk: bool = False
    beta_max: float = 1.0
    gate: Literal["silu", "sigmoid", "lowrank"] = "silu"
    decay: Literal["softplus", "safe"] = "softplus"
    norm_eps: float = 1e-6
    backend: str = "auto"

    @classmethod
    def example(cls) -> Self:
        """Two heads, for a model of width 64."""
        return cls(n_heads=2)

    def __post_init__(self) -> None:
        require(self.n_heads > 0, "n_heads", self.n_heads, "must be > 0")
        divides = self.key_heads > 0 and self.n_heads % self.key_heads == 0
        require(divides, "n_key_heads", self.n_key_heads, f"must divide n_heads = {self.n_heads}")
        require(self.head_k_dim is None or self.head_k_dim > 0, "head_k_dim", self.head_k_dim, "must be > 0, e.g. 128")
        require(self.head_v_dim is None or self.head_v_dim > 0, "head_v_dim", self.head_v_dim, "must be > 0, e.g. 128")
        require(self.conv > 0, "conv", self.conv, "must be > 0, e.g. 4")
        require(self.latent_dim >= 0, "latent_dim", self.latent_dim, "must be >= 0 (0: not compressed)")
        require(0 < self.beta_max <= 2, "beta_max", self.beta_max, "must be > 0 and <= 2: above, the state may grow")
        require(self.gate in GATES, "gate", self.gate, f"must be one of {', '.join(GATES)}")
        require(self.decay in DECAYS, "decay", self.decay, f"must be one of {', '.join(DECAYS)}")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be > 0, e.g. 1e-6")
        require(self.backend in self.BACKENDS, "backend", self.backend, f"must be one of {', '.join(self.BACKENDS)}")

    @property
    def key_heads(self) -> int:
        """Heads of queries and keys."""
        return self.n_heads if self.n_key_heads is None else self.n_key_heads

    @property
    def rule_in_fp32(self) -> bool:
        """Whether the rule's inputs are widened: with β near 2 and α near 1 rounding to 16 bits adds up over the row.

        A reflection keeps what it is given, so errors do not fade: 5 % of the output after 128 tokens in bf16.
        """
        return self.beta_max > 1 and self.backend != "fla"

    @property
    def explained_heads(self) -> int:
        """Heads of the mixer's explanation."""
        return self.n_heads

    def head_dims(self, width: int) -> tuple[int, int]:
        """Key and value width of a head in a model of `width`. Raises `ConfigError` if the heads do not divide it."""
        if self.head_k_dim is None or self.head_v_dim is None:
            allowed = f"must divide the width {width}, or give `head_k_dim` and `head_v_dim`"
            require(width % self.n_heads == 0, "n_heads", self.n_heads, allowed)
        return self.head_k_dim or width // self.n_heads, self.head_v_dim or width // self.n_heads

    def key_value_dims(self, width: int) -> tuple[int, int]:
        """Total width of all key heads and of all value heads."""
        head_k, head_v = self.head_dims(width)
        return self.key_heads * head_k, self.n_heads * head_v

    def channels(self, width: int) -> dict[str, int]:
        """Channels of the convolution: queries, keys (unless they are shared with the queries), values."""
        keys, values = self.key_value_dims(width)
        return {"q": keys, "v": values} if self.share_qk else {"q": keys, "k": keys, "v": values}

    def build(self, width: int) -> "GDN":
        """The module."""
        return GDN(self, width)

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """Op → backend. Raises `MissingBackendError` for a backend that cannot compute these heads on `device`."""
        key, value = self.head_dims(width)
        sizes = {"heads": self.n_heads, "key": key, "value": value}
        of_rule = torch.float32 if self.rule_in_fp32 else dtype
        rule = {"delta rule": describe_backend(self.backend, device, **sizes, dtype=of_rule)}
        if device.type == "cpu":
            return rule
        return rule | {"convolution": resolve_conv(self.conv_backend, device, taps=self.conv, dtype=dtype)}

    def prepare(self, seq: Layout, width: int) -> None:
        """Build masks and tables eagerly, so that the compiled forward has no graph break."""
        key, value = self.head_dims(width)
        prepare_rule(seq, self.backend, heads=self.n_heads, key=key, value=value)
        prepare_conv(seq, self.conv_backend, taps=self.conv)

    @property
    def conv_backend(self) -> str:
        """Backend of the convolution; flash-linear-attention's is used where it is right, whatever the rule's."""
        return "auto" if self.backend == "fla" else self.backend

    def _projection_weights(self, width: int) -> int:
        values, head_v = self.key_value_dims(width)[1], self.head_dims(width)[1]
        decay_rank, decays = self.decay_dims(width)
        gate = _weights(width, values, head_v if self.gate == "lowrank" else 0)
        gates = width * self.n_heads + _weights(width, decays, decay_rank) + gate
        shapes = [(width, out) for out in self.channels(width).values()] + [(values, width)]
        return gates + sum(_weights(*shape, self.latent_dim) for shape in shapes)

    def decay_dims(self, width: int) -> tuple[int, int]:
        """Inner width of the projection of a (0: full rank), and how many decays a token has: one for each head."""
        return 0, self.n_heads

    def n_parameters(self, width: int) -> int:
        """Parameters of the module. Raises `ConfigError` for a `latent_dim` larger than `width`."""
        allowed = f"a rank larger than the width {width} compresses nothing"
        require(self.latent_dim <= width, "latent_dim", self.latent_dim, allowed)
        convolution = self.conv * sum(self.channels(width).values())
        gains = self.n_heads + self.decay_dims(width)[1] + self.head_dims(width)[1]
        return self._projection_weights(width) + convolution + gains

    def forward_flops(self, width: int, length: int) -> int:
        """Floating-point operations of one forward pass over one sequence of `length` tokens, in chunks of 64.

        Counts projections and the convolution, and for each head and chunk of C tokens (the last may be shorter):
        K Kᵀ and Q Kᵀ, 2 C² K each; the triangular solve, C² for each of its K + V right-hand sides; the output within
        the chunk, 2 C² V; the products W S, Q S and the state's update, 2 C K V each.
        """
        head_k, head_v = self.head_dims(width)
        dense = 2 * (self._projection_weights(width) + self.conv * sum(self.channels(width).values()))
        squares = length // CHUNK * CHUNK**2 + (length % CHUNK) ** 2
        rule = squares * (4 * head_k + head_k + head_v + 2 * head_v) + length * 6 * head_k * head_v
        return length * dense + self.n_heads * rule

    def projections(self, width: int) -> dict[str, dict[str, int]]:
        """Queries, keys, values and the gate z, compressed where they have a latent; β and the decay."""
        channels, (decay_rank, decays) = self.channels(width), self.decay_dims(width)
        values = channels["v"]
        inner = dict.fromkeys(channels, self.latent_dim) if self.latent_dim else channels
        z = self.head_dims(width)[1] if self.gate == "lowrank" else values
        return {
            "qkvz_proj.weight": {**inner, "z": z},
            "ba_proj.weight": {"b": self.n_heads, "a": decay_rank or decays},
        }

    def state_settings(self, width: int) -> dict[str, int]:
        """The width of a value head."""
        return {"head_v_dim": self.head_dims(width)[1]}

    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """Bytes of the state of one sequence of any length: state matrices and the last conv − 1 inputs.

        State matrices are in fp32 (fp64 for fp64 elements).
        """
        head_k, head_v = self.head_dims(width)
        history = (self.conv - 1) * sum(self.channels(width).values())
        return self.n_heads * head_k * head_v * max(4, element_bytes) + history * element_bytes


@dataclass
class GDNState(State):
    """Each head's state matrix (B, H, K, V), fp32 at least; the convolution's last inputs (B, conv − 1, channels)."""

    state_BHKV: Tensor
    conv_BWD: Tensor


class GDN(Mixer[GDNState]):
    """Short convolution, gated delta rule, gated RMSNorm: the layer of Qwen3-Next with fused projections.

    With `latent_dim` every projection of queries, keys, values and output is a product of two matrices of that rank.
    The projection of the gate z does not follow `latent_dim`, because z scales every element of the output
    independently (`gate` decides its rank). With `share_qk` keys have neither a projection nor a convolution.
    """

    rule: ClassVar[Callable[..., tuple[Tensor, Tensor]]] = staticmethod(gated_delta_rule)
    rule_step: ClassVar[Callable[..., Tensor]] = staticmethod(gated_delta_step)

    def __init__(self, config: GDNConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.head_k, self.head_v = config.head_dims(width)
        channels, rank = config.channels(width), config.latent_dim
        self.channels, values = tuple(channels.values()), channels["v"]
        self.inner = (rank,) * len(channels) if rank else self.channels  # widths before expansion
        self.inner_z = self.head_v if config.gate == "lowrank" else values
        self.qkvz_proj = nn.Linear(width, sum(self.inner) + self.inner_z, bias=False)
        decay_rank, decays = config.decay_dims(width)
        self.ba_proj = nn.Linear(width, config.n_heads + (decay_rank or decays), bias=False)
        if config.gate == "lowrank":
            self.expand_z = nn.Linear(self.head_v, values, bias=False)
        if rank:
            self.expand = nn.ModuleDict({name: nn.Linear(rank, out, bias=False) for name, out in channels.items()})
        self.conv_weight = nn.Parameter(torch.empty(sum(self.channels), config.conv))
        self.A_log = nn.Parameter(torch.empty(config.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(decays))
        self.norm_weight = nn.Parameter(torch.empty(self.head_v))
        self.compress_o = nn.Linear(values, rank, bias=False) if rank else nn.Identity()
        self.o_proj = nn.Linear(rank or values, width, bias=False)
        reset_parameters(self)

    def initializers(self) -> dict[str, Initializer]:
        """Decay rates uniform in [1, 16], time steps log-uniform in [1e-3, 1e-1], as in Mamba-2 (arXiv 2405.21060).

        With decay = "safe" all rates are 1: a larger one would multiply a time step's logit until σ has no gradient.
        """
        rates = constant(0.0) if self.config.decay == "safe" else _draw_decay_rates
        gates: dict[str, Initializer] = {"A_log": rates, "dt_bias": _draw_time_steps}
        return {**gates, "conv_weight": uniform(self.config.conv**-0.5), "norm_weight": constant(1.0)}

    def project(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the convolution (B, T, channels), gate z (B, T, H, V), and the `gates` log α and β.

        Behind a state log α = β = 0 for padding, which so neither decays the state nor writes to it.
        """
        qkv, z = self.qkvz_proj(x_BTD).split((sum(self.inner), self.inner_z), dim=-1)
        if self.config.latent_dim:
            latents = qkv.split(self.inner, dim=-1)
            expanded = [expand(latent) for expand, latent in zip(self.expand.values(), latents, strict=True)]
            qkv = torch.cat(expanded, dim=-1)
        if self.config.gate == "lowrank":
            z = self.expand_z(z)
        log_alpha, beta = self.gates(x_BTD)
        if seq.continues and seq.padded:
            real_BT1 = seq.real_BT.unsqueeze(-1)
            decays = real_BT1 if log_alpha.ndim == 3 else real_BT1.unsqueeze(-1)
            log_alpha, beta = log_alpha.where(decays, 0), beta.where(real_BT1, 0)
        return qkv, z.unflatten(-1, (-1, self.head_v)), log_alpha, beta

    def gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """log α and β (B, T, H), in fp32 (fp64 in an fp64 model)."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        b, a = self.ba_proj(x_BTD).to(dtype).chunk(2, dim=-1)
        return self.log_decay(a + self.dt_bias.to(dtype), self.A_log.to(dtype).exp()), self.write_strength(b)

    def log_decay(self, time_step: Tensor, rate: Tensor) -> Tensor:
        """log α <= 0 of a + dt_bias and exp(A_log), which broadcast."""
        if self.config.decay == "safe":
            return SAFE_DECAY * torch.sigmoid(rate * time_step)
        return -rate * F.softplus(time_step)

    def write_strength(self, b: Tensor) -> Tensor:
        """β in [0, beta_max]."""
        return b.sigmoid() if self.config.beta_max == 1 else self.config.beta_max * b.sigmoid()

    def heads(self, qkv_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys (B, T, H, K) and values (B, T, H, V) from the convolution's output."""
        if self.config.rule_in_fp32:
            qkv_BTD = qkv_BTD.to(torch.promote_types(qkv_BTD.dtype, torch.float32))
        *qk, v = qkv_BTD.split(self.channels, dim=-1)
        qk = [l2_normalize(x.unflatten(-1, (-1, self.head_k))) for x in qk]
        repeats = self.config.n_heads // self.config.key_heads
        if repeats > 1:
            qk = [x.repeat_interleave(repeats, dim=2) for x in qk]
        return qk[0], qk[-1], v.unflatten(-1, (-1, self.head_v))

    def gate_of(self, z_BTHV: Tensor) -> Tensor:
        """What the normalised outputs are multiplied by."""
        return F.silu(z_BTHV) if self.config.gate == "silu" else z_BTHV.sigmoid()

    def output(self, o_BTHV: Tensor, z_BTHV: Tensor) -> Tensor:
        """Per-head RMSNorm gated by SiLU(z) or σ(z), then the output projection."""
        gated_BTHV = rms_norm(o_BTHV, self.norm_weight, self.config.norm_eps) * self.gate_of(z_BTHV)
        return self.o_proj(self.compress_o(gated_BTHV.flatten(2)))

    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        qkv, z, log_alpha, beta = self.project(x_BTD, seq)
        q, k, v = self.heads(short_conv(qkv, self.conv_weight, seq=seq, backend=self.config.conv_backend))
        o, _ = self.rule(q, k, v, log_alpha, beta, seq=seq, backend=self.config.backend)
        return self.output(o.to(z.dtype), z)

    def taps(self) -> dict[str, Tensor]:
        names = ("queries and keys", "values") if self.config.share_qk else ("queries", "keys", "values")
        return dict(zip(names, self.conv_weight.detach().flip(-1).split(self.channels), strict=True))

    def explain(self, x_BTD: Tensor, seq: Layout) -> Explanation:
        qkv, z, log_alpha, beta = self.project(without_padding(x_BTD, seq), seq)
        q, k, v = self.heads(short_conv(qkv, self.conv_weight, seq=seq, backend="reference"))

        def implied(heads: slice) -> Tensor:
            return implied_attention(self.rule, *(x[:, :, heads] for x in (q, k, log_alpha, beta)), seq=seq)

        batch, time = seq.shape
        weights = Weights(implied, (batch, self.config.n_heads, time, time))
        matrix = matrix_of(self.o_proj)
        if self.config.latent_dim:
            matrix = matrix @ matrix_of(self.compress_o)
        return Explanation(
            weights=weights,
            value_BSHV=v,
            gain_BTHV=self.norm_weight * self.gate_of(z) * inverse_rms(mixed(weights, v), self.config.norm_eps),
            out_HVD=by_head(matrix, self.config.n_heads),
            bias_D=None,
        )

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> GDNState:
        shape, wide = (batch, self.config.n_heads, self.head_k, self.head_v), torch.promote_types(dtype, torch.float32)
        state_matrices = torch.zeros(shape, dtype=wide, device=device)
        history = torch.zeros(batch, self.config.conv - 1, sum(self.channels), dtype=dtype, device=device)
        return GDNState(state_matrices, history)

    def step(self, x_BTD: Tensor, state: GDNState, seq: Layout) -> Tensor:
        qkv, z, log_alpha, beta = self.project(without_padding(x_BTD, seq), seq)
        backend = self.config.conv_backend
        q, k, v = self.heads(short_conv_step(qkv, self.conv_weight, state.conv_BWD, seq, backend=backend))
        if x_BTD.shape[1] == 1:
            o = self.rule_step(*(x[:, 0] for x in (q, k, v, log_alpha, beta)), state.state_BHKV).unsqueeze(1)
        else:
            initial = state.state_BHKV
            o, final = self.rule(q, k, v, log_alpha, beta, initial_state_BHKV=initial, backend=self.config.backend)
            initial.copy_(final)
        return self.output(o.to(z.dtype), z)


def _weights(into: int, out: int, rank: int) -> int:
    """Parameters of a projection, of two with `rank` numbers between them unless that is 0."""
    return rank * (into + out) if rank else into * out


def _draw_decay_rates(A_log: Tensor, generator: torch.Generator | None) -> None:
    A_log.uniform_(1, 16, generator=generator).log_()


def _draw_time_steps(dt_bias: Tensor, generator: torch.Generator | None) -> None:
    dt = dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
