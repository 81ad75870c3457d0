"""`save_onnx`: a model and its tokenizer as one file that onnxruntime runs alone."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swamla.data.tokenizer import Tokenizer
from swamla.errors import MissingBackendError, UsageError
from swamla.files import fsync
from swamla.interop.onnx.graph import graph_of
from swamla.interop.tokenizer import with_document_start
from swamla.model.language_model import LanguageModel
from swamla.ops.rounding import GROUP, Rounded

INT4_OPSET = 21  # the first whose Cast has integers of 4 bits
MOST_BYTES = 2**31 - 2**20  # of a file of protobuf; larger weights go into a file beside it


def save_onnx(
    model: LanguageModel,
    file: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    rounded: Mapping[str, Rounded | Any] | None = None,
    one_token: bool = False,
) -> int:
    """Write a model as a file of ONNX in fp32; returns its opset.

    The graph computes `logits` (B, T, ids) and `present.NAME` of `tokens` (B, T), `length` (B,) and `past.NAME`: T new
    tokens after the `length` tokens of each row in a state, for any B and T and any capacity of the state. From an
    empty state (zeros) whole sequences or prompts, with T = 1 a decoding step.
    tokenizer: is written into the metadata, as `tokenizer` the JSON of the `tokenizers` library, as `document_id` the
    id that begins and ends texts. Ids that only pad the vocabulary have no logits.
    rounded: weights as `swamla.checkpoint.quantize` gives them; those in int8 and int4 are made of these in the graph.
    one_token: T = 1 alone, by operators of opset 20, for runtimes without LinearAttention and CausalConvWithState.
    Weights of more than 2 GB are in FILE.data beside it. Raises `UsageError` for either file that exists,
    `MissingBackendError` without the packages of the extra `onnx`.
    """
    file = Path(file)
    if file.exists():
        raise UsageError(f"{file}: exists: choose another name")
    try:
        import onnx_ir
        import onnxscript  # noqa: F401 - what torch.onnx writes graphs with
    except ImportError:
        raise MissingBackendError("ONNX needs onnx and onnxscript: pip install 'swamla[onnx]'") from None
    model = copy.deepcopy(model).cpu().float().eval()
    known_ids = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
    graph = graph_of(model, known_ids=known_ids, one_token=one_token)
    if rounded is not None:
        _quantize(graph, rounded)
    if tokenizer is not None:
        metadata = {"document_id": str(tokenizer.eos_id), "tokenizer": with_document_start(tokenizer)}
        graph.metadata_props.update(metadata)
    graph.producer_name = "swamla"
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    staging, beside = file.with_name(f".{file.name}.new"), file.with_name(f"{file.name}.data")
    is_apart = size > MOST_BYTES
    if is_apart and beside.exists():
        raise UsageError(f"{beside}: exists, and the weights have to go there: choose another name")
    written = [staging, beside] if is_apart else [staging]
    try:
        onnx_ir.save(graph, staging, external_data=beside.name if is_apart else None)
        for each in written:
            fsync(each)
        staging.replace(file)
        fsync(file.parent)
    except BaseException:
        for each in written:
            each.unlink(missing_ok=True)
        raise
    return int(graph.opset_imports[""])


def _quantize(graph: Any, weights: Mapping[str, Rounded | Any]) -> None:
    """Replace weights by their integers and scales, and by operators that make the weights of them.

    Not DequantizeLinear: onnxruntime would compute it anew in every call, but folds these when it loads the file.
    """
    import onnx_ir

    initializers = graph.graph.initializers
    for name, weight in weights.items():
        if name not in initializers or not isinstance(weight, Rounded):
            continue
        old = initializers.pop(name)
        *nodes, last = _product(name, weight, initializers)
        last.outputs[0].name = f"{name}_weight"
        last.outputs[0].dtype, last.outputs[0].shape = old.dtype, old.shape
        old.replace_all_uses_with(last.outputs[0])
        graph.graph.insert_before(graph.graph[0], [*nodes, last])
        if weight.format == "int4":
            graph.opset_imports[""] = max(graph.opset_imports[""], INT4_OPSET)
    onnx_ir.passes.common.NameFixPass()(graph)


def _product(name: str, weight: Rounded, initializers: Any) -> list[Any]:
    """Operators for integers times scales, a group's scale repeated for all of the group."""
    import ml_dtypes
    import numpy as np
    import onnx_ir

    def constant(suffix: str, array: Any) -> Any:
        value = onnx_ir.Value(name=f"{name}_{suffix}", const_value=onnx_ir.tensor(array, name=f"{name}_{suffix}"))
        initializers[value.name] = value
        return value

    nodes: list[Any] = []

    def then(kind: str, *inputs: Any, **attributes: Any) -> Any:
        nodes.append(onnx_ir.node(kind, inputs, attributes=attributes, num_outputs=1))
        return nodes[-1].outputs[0]

    integers, scale = weight.plain_integers().numpy(), weight.scale.float().numpy()[..., None]
    if weight.format == "int8":
        scales = constant("scale", scale)
    else:
        integers, (*rows, groups, _) = integers.astype(ml_dtypes.int4), scale.shape
        shape = np.array([*rows, groups, GROUP]), np.array([*rows, groups * GROUP])
        scales = then("Expand", constant("scale", scale), constant("groups", shape[0]))
        scales = then("Reshape", scales, constant("row", shape[1]))
        if groups * GROUP > weight.shape[-1]:
            ends = [np.array([number]) for number in (0, weight.shape[-1], len(rows))]
            scales = then("Slice", scales, *(constant(f"slice_{n}", end) for n, end in enumerate(ends)))
    numbers = then("Cast", constant("integers", integers), to=onnx_ir.DataType.FLOAT.value)
    then("Mul", numbers, scales)
    return nodes
