"""One graph of ONNX for prompts, decoding and whole sequences: some tokens after a state, with the state in and out."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from swamla.model.language_model import LanguageModel
from swamla.model.mixers.mixer import State
from swamla.model.state import ModelState
from swamla.ops.layout import Layout

PLAIN_OPSET = 20  # of the graphs that torch writes
LINEAR_OPSET = 27  # the first with LinearAttention and CausalConvWithState
OURS = "swamla"  # domain of these two until the whole graph has their opset
WEIGHT = "model."  # before the names of weights, which the tracer finds in `Continuation.model`
EXAMPLE = {"batch": 3, "time": 5, "capacity": 16}  # sizes to trace with


class Continuation(nn.Module):
    """Logits and new state of tokens (B, T) after `length` (B,) tokens in a state, whose tensors are not changed.

    known_ids: only these logits.
    """

    def __init__(self, model: LanguageModel, known_ids: int) -> None:
        super().__init__()
        self.model, self.known_ids = model, known_ids
        self.template = empty_state(model, 1, _capacity(model))

    def forward(self, tokens_BT: Tensor, length_B: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, T, known_ids), and the tensors of the state in the order of `names_of`."""
        given = iter(past)
        layers = [layer.map(lambda _: next(given).clone()) for layer in self.template.layers]
        ngrams = self.template.ngrams and self.template.ngrams.map(lambda _: next(given).clone())
        capacity = self._capacity_of(past)
        state = ModelState(layers, length_B, capacity, ngrams=ngrams)
        seq = Layout.some_more(length_B, tokens_BT.shape[1], capacity)
        x_BTD = self.model.step_hidden_at(tokens_BT, state, seq)
        return self.model.logits(x_BTD)[..., : self.known_ids], state.tensors()

    def _capacity_of(self, past: Sequence[Tensor]) -> int:
        """Tokens that the state has room for; without attention to all of them as many as there are positions."""
        for tensor, axes in zip(past, axes_of(self.model), strict=True):
            if "capacity" in axes.values():
                return tensor.shape[1]
        return self.model.config.learned_positions or torch.iinfo(torch.int32).max


def empty_state(model: LanguageModel, batch: int, capacity: int) -> ModelState:
    """A state's shapes, without storage."""
    return model.init_state(batch, capacity, dtype=torch.float32, device="meta")


def axes_of(model: LanguageModel) -> list[dict[int, str]]:
    """Of every tensor of a state: which axes are the batch, and the capacity."""
    capacity = _capacity(model)
    shapes = [
        [tuple(tensor.shape) for tensor in empty_state(model, batch, size).tensors()]
        for batch, size in ((1, capacity), (2, capacity), (1, capacity - 1))
    ]
    return [
        {axis: "batch" for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b}
        | {axis: "capacity" for axis, (a, b) in enumerate(zip(one, less, strict=True)) if a != b}
        for one, two, less in zip(*shapes, strict=True)
    ]


def _capacity(model: LanguageModel) -> int:
    positions = model.config.learned_positions
    return min(EXAMPLE["capacity"], positions) if positions else EXAMPLE["capacity"]


def names_of(model: LanguageModel) -> list[str]:
    """A name for every tensor of a state, such as "0.k_BSGK": the layer, then the state's own name and axes."""
    state = empty_state(model, 1, _capacity(model))
    names = [name for index, layer in enumerate(state.layers) for name in _fields(layer, f"{index}")]
    return names + (list(_fields(state.ngrams, "ngrams")) if state.ngrams else [])


def _fields(state: State, prefix: str) -> Iterator[str]:
    for field in fields(state):
        part = getattr(state, field.name)
        if isinstance(part, State):
            yield from _fields(part, f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}"


@torch.no_grad()
def graph_of(model: LanguageModel, *, known_ids: int, one_token: bool) -> Any:
    """The model as an `onnx_ir.Model`, its weights under their own names, each stored once.

    Inputs are `tokens` (B, T), `length` (B,) and `past.NAME` for the names of `names_of`, outputs `logits` and
    `present.NAME`. one_token: T = 1, of operators of opset 20 alone.
    """
    from onnxscript.optimizer import optimize_ir  # loads onnx

    module, names = Continuation(model, known_ids).eval(), names_of(model)
    dims = {name: torch.export.Dim(name, min=1) for name in ("batch", "time")}
    positions = model.config.learned_positions or None
    dims["capacity"] = torch.export.Dim("capacity", min=1, max=positions)
    sizes = EXAMPLE | {"capacity": _capacity(model), "time": 1 if one_token else EXAMPLE["time"]}
    past = model.init_state(sizes["batch"], sizes["capacity"], dtype=torch.float32, device="cpu").tensors()
    tokens_BT = torch.zeros(sizes["batch"], sizes["time"], dtype=torch.int64)
    length_B = torch.zeros(sizes["batch"], dtype=torch.int64)
    shapes = [{axis: dims[name] for axis, name in axes.items()} for axes in axes_of(model)]
    time = {} if one_token else {1: dims["time"]}
    with _quiet():
        program = torch.export.export(
            module,
            (tokens_BT, length_B, past),
            dynamic_shapes=({0: dims["batch"]} | time, {0: dims["batch"]}, shapes),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # shapes of other sizes are computed by the same graph
        )
        written = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=["tokens", "length", *(f"past.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            custom_translation_table=_translations(),
        )
        assert written is not None
        graph = written.model
        # A weight that is folded, such as by its transposition, would be stored under no name, and a tied one twice.
        optimize_ir(graph, should_fold=lambda node: False if any(map(_is_weight, node.inputs)) else None)
    _as_standard(graph)
    _name(graph, [{0: "batch", 1: "time"}, {0: "batch"}, *axes_of(model)])
    return graph


def _is_weight(value: Any) -> bool:
    return value is not None and value.name.startswith(WEIGHT)


def _name(graph: Any, axes: Sequence[dict[int, str]]) -> None:
    """Weights by their own names, and axes by what they are, without the tracer's notes on every node.

    axes: of the graph's inputs; those of its outputs are the same.
    """
    initializers = graph.graph.initializers
    for name in [name for name in initializers if name.startswith(WEIGHT)]:
        value = initializers.pop(name)
        value.name = name.removeprefix(WEIGHT)
        initializers[value.name] = value
    ends = [(graph.graph.inputs, axes), (graph.graph.outputs, [axes[0], *axes[2:]])]
    for value, named in (pair for values, names in ends for pair in zip(values, names, strict=True)):
        sizes = enumerate(value.shape)
        value.shape = type(value.shape)([size if isinstance(size, int) else named[axis] for axis, size in sizes])
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.outputs, *initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()


def _translations() -> dict[Any, Any]:
    """Our ops → what stands for them in ONNX. The two operators of opset 27 are in a domain of ours at first."""
    from onnx.defs import OpSchema, get_schema
    from onnxscript import opset18 as op
    from onnxscript import values

    def new(name: str) -> Any:
        of = get_schema(name, LINEAR_OPSET)
        types = [(each.type_param_str, each.allowed_type_strs, each.description) for each in of.type_constraints]
        schema = OpSchema(
            name,
            OURS,
            1,
            inputs=of.inputs,
            outputs=of.outputs,
            type_constraints=types,
            attributes=list(of.attributes.values()),
        )
        return values.Op(values.Opset(OURS, 1), name, schema)

    def packed(x_BTHX: Any) -> Any:
        return op.Reshape(x_BTHX, op.Constant(value_ints=[0, 0, -1]))

    def linear_attention(q: Any, k: Any, v: Any, state: Any, log_alpha: Any, beta: Any, scale: float) -> Any:
        heads = int(k.shape[2])
        y, final = new("LinearAttention")(
            *(packed(x) for x in (q, k, v)),
            state,
            packed(log_alpha),
            beta,
            q_num_heads=heads,
            kv_num_heads=heads,
            scale=scale,
            update_rule="gated_delta",
            _outputs=2,
        )
        return op.Reshape(y, op.Constant(value_ints=[0, 0, heads, -1])), final

    def causal_conv(x_BTD: Any, weight_DW: Any, history_BWD: Any, activation: str) -> Any:
        y, _ = new("CausalConvWithState")(
            op.Transpose(x_BTD, perm=[0, 2, 1]),
            op.Unsqueeze(weight_DW, op.Constant(value_ints=[1])),
            None,
            None if history_BWD is None else op.Transpose(history_BWD, perm=[0, 2, 1]),
            activation=activation,
            _outputs=2,
        )
        return op.Transpose(y, perm=[0, 2, 1])

    return {
        torch.ops.swamla.linear_attention.default: linear_attention,
        torch.ops.swamla.causal_conv.default: causal_conv,
    }


def _as_standard(graph: Any) -> None:
    """Put our two operators into ONNX's own domain, with the first opset that has them if the graph has one of them.

    torch and its converter know opsets up to 23. The others' operators mean the same in opset 27.
    """
    opset = PLAIN_OPSET
    for node in graph.graph.all_nodes():
        if node.domain == OURS:
            node.domain, opset = "", LINEAR_OPSET
    graph.opset_imports.pop(OURS, None)
    graph.opset_imports[""] = opset


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings and log lines, which are about its own doings."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
