"""What a weight costs in an ONNX file: measured on a file of it with zeros as codes, not estimated."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir

from qcompress.artifacts import Artifact, FloatWeight, IntegerWeight, PalettizedWeight, granularity
from qcompress.deployment import Choice, Cost
from qcompress.errors import ConfigError
from qcompress_exporters.onnx_format.digests import tensor_digest
from qcompress_exporters.onnx_format.encodings.table import write_weight
from qcompress_exporters.onnx_format.graph_writer import GraphWriter, sign
from qcompress_exporters.onnx_format.names import ONE_CHARACTER
from qcompress_exporters.onnx_format.opsets import BASE_OPSET, ir_version
from qcompress_exporters.onnx_format.small_integers import shorten_integers

_FIRST, _SECOND = "-", "+"  # names of the two copies: one character, which is taken off again


@lru_cache(maxsize=4096)
def weight_cost(shape: tuple[int, ...], axis: int, choice: Choice) -> Cost:
    """Return the exact bytes of a weight in a file of the base opset, for float compute.

    Two equal weights are written into one graph. What only one of them needs is its own; what both need is paid once
    in a file, whichever weights need it: decode tables, shapes, constants.

    The weight's own name is not counted. Names of inner values count as two characters each, which they have in files
    of 62 to 3,906 values.

    Args:
        shape: of the weight.
        axis: the axis that counts output channels.
        choice: how the weight is compressed.

    Raises:
        ConfigError: an unknown kind of artifact.

    >>> cost = weight_cost((64, 64, 3, 3), 0, Choice(artifact="palette", bits=2))
    >>> cost.nbytes - 64 * 64 * 9 // 4, sum(cost.charges.values())
    (148, 178)
    """
    if choice.artifact not in _EMPTY:
        raise ConfigError(f"Choice.artifact must be one of {', '.join(_EMPTY)}, got {choice.artifact!r}.")
    artifact = _EMPTY[choice.artifact](shape, axis, choice)
    graph = _decoders(artifact)
    given = {name: node for node in graph.node for name in node.output} | {t.name: t for t in graph.initializer}
    needed, shared = (_needed(name, given) for name in (_FIRST, _SECOND))
    nbytes = sum(_field(given[name].ByteSize()) for name in needed - shared) - len(_FIRST)
    charges = {_expression(name, given): _field(given[name].ByteSize()) for name in needed & shared}
    return Cost(nbytes=nbytes, charges=charges)


def _decoders(artifact: Artifact) -> onnx.GraphProto:
    """Return a graph that decodes two copies of an artifact."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": BASE_OPSET})
    writer = GraphWriter(graph, ONE_CHARACTER)
    for name in (_FIRST, _SECOND):
        written = write_weight(writer, artifact, name, BASE_OPSET)
        sign(written.value, tensor_digest(name, np.zeros(0)))
    model = ir.to_proto(ir.Model(graph, ir_version=ir_version(BASE_OPSET)))
    shorten_integers(model)
    return model.graph


def _needed(name: str, given: Mapping[str, Any]) -> set[str]:
    """Return the names of all values that a value is computed from, itself included."""
    found, stack = set[str](), [name]
    while stack:
        name = stack.pop()
        if name not in found:
            found.add(name)
            stack += list(getattr(given[name], "input", ()))
    return found


def _expression(name: str, given: Mapping[str, Any]) -> str:
    """Return what a value is computed from, in a form that is equal for equal values whatever their names."""
    source = given[name]
    if isinstance(source, onnx.TensorProto):
        return f"{onnx.numpy_helper.to_array(source).dtype} {onnx.numpy_helper.to_array(source).tolist()}"
    return f"{source.op_type}({', '.join(_expression(i, given) for i in source.input)})"


def _field(nbytes: int) -> int:
    """Return the bytes of a message in a repeated field: tag, length and content."""
    return 1 + max(1, -(-nbytes.bit_length() // 7)) + nbytes


def _palette(shape: tuple[int, ...], axis: int, choice: Choice) -> PalettizedWeight:
    entries, channels = 1 << choice.bits, shape[axis] if shape else 1
    vectors = choice.vector_dim > 1
    table = (granularity.lut_groups(channels, choice.rows_per_lut), entries) + ((choice.vector_dim,) if vectors else ())
    return PalettizedWeight(
        codes=np.zeros(-(-int(np.prod(shape)) // choice.vector_dim) if vectors else shape, np.uint8),
        lut=np.zeros(table, choice.lut_dtype),
        scale=np.ones(channels, np.float32) if choice.scales else None,
        bits=choice.bits,
        axis=axis,
        rows_per_lut=choice.rows_per_lut,
        weight_shape=shape if vectors else None,
    )


def _uniform(shape: tuple[int, ...], axis: int, choice: Choice) -> IntegerWeight:
    scales: tuple[int, ...] = (shape[axis],) if choice.scales else ()
    if choice.block_size is not None:
        axis = granularity.input_axis(len(shape), axis)
        scales = (*shape[:axis], -(-shape[axis] // choice.block_size), *shape[axis + 1 :])
    return IntegerWeight(
        codes=np.zeros(shape, np.int8),
        scale=np.ones(scales, np.float32),
        bits=choice.bits,
        axis=axis if scales else None,
        block_size=choice.block_size,
    )


def _float(shape: tuple[int, ...], axis: int, choice: Choice) -> FloatWeight:
    return FloatWeight(values=np.zeros(shape, f"float{choice.bits}"), reason="by choice")


_EMPTY: Final[Mapping[str, Callable[[tuple[int, ...], int, Choice], Artifact]]] = {
    PalettizedWeight.kind: _palette,
    IntegerWeight.kind: _uniform,
    FloatWeight.kind: _float,
}
