"""A weight on a uniform grid as nodes that decode it: codes, zero points, scale. Never a DequantizeLinear.

onnxruntime folds none of those, and one in front of a layer makes it compute slower, or in other integers than it was
asked to (`DequantizeLinear -> MatMul` quantizes its activations).
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from qcompress.artifacts import IntegerWeight
from qcompress.artifacts.base import broadcast_scale
from qcompress.artifacts.integer_range import IntegerRange
from qcompress_exporters.onnx_format.encodings.base import GraphWriter, looked_up
from qcompress_exporters.onnx_format.encodings.native import Native
from qcompress_exporters.onnx_format.encodings.palette import choose

_TYPE: Final = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int8): TensorProto.INT8}


def write_uniform(writer: GraphWriter, weight: IntegerWeight, name: str, opset: int) -> str:
    """Write the nodes and initializers that decode a weight into the float32 value `name`.

    Args:
        writer: takes them.
        weight: any weight on a uniform grid.
        name: what the decoded value is called.
        opset: one that the target reads.

    Returns:
        The name of the encoding of its codes; `words` for 8 bits, which are bytes.
    """
    value, encoding = write_codes(writer, weight, np.dtype(np.float32), opset)
    if weight.zero_point is not None and weight.zero_point.any():
        zeros = writer.node("Cast", [writer.tensor(_spread(weight, weight.zero_point))], to=TensorProto.FLOAT)
        value = writer.node("Sub", [value, _repeated(writer, weight, zeros)])
    scale = writer.tensor(_spread(weight, weight.scale))
    writer.node("Mul", [value, _repeated(writer, weight, scale)])
    writer.name_last(name)
    return encoding


def write_codes(
    writer: GraphWriter, weight: IntegerWeight, dtype: "np.dtype[Any]", opset: int, name: str | None = None
) -> tuple[str, str]:
    """Write the nodes and initializers that hold a weight's codes.

    Args:
        writer: takes them.
        weight: any weight on a uniform grid.
        dtype: float32, or int8 where no code is above 127: the type of the value.
        opset: one that the target reads.
        name: what the value is called; None: a short name.

    Returns:
        The value, in the weight's shape, and the name of the encoding.
    """
    encoding = choose(weight.bits, opset)
    if weight.bits == 8 and dtype == np.int8:
        return writer.tensor(weight.codes.astype(np.int8), name), encoding.name
    if weight.bits == 8:
        value = writer.node("Cast", [writer.tensor(weight.codes)], to=_TYPE[dtype])
    elif encoding.name == Native.name:
        packed = writer.packed(weight.codes, weight.bits, weight.shape)
        value = writer.node("Cast", [packed], to=_TYPE[dtype])
    else:
        limits = IntegerRange(weight.bits, weight.signed)
        grid = writer.constant(np.arange(limits.n, limits.p + 1).astype(dtype))
        codes = (weight.codes.astype(np.int16) - limits.n).astype(np.uint8)
        value = looked_up(writer, encoding, codes, weight.bits, grid, weight.shape)
    if name is not None:
        writer.name_last(name)
        value = name
    return value, encoding.name


def _spread(weight: IntegerWeight, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values if weight.block_size is not None else broadcast_scale(values, weight.shape, weight.axis)


def _repeated(writer: GraphWriter, weight: IntegerWeight, values: str) -> str:
    """One value for each element of the axis, of those that there is one of for each block."""
    if weight.block_size is None:
        return values
    assert weight.axis is not None
    if weight.scale.shape[weight.axis] == 1:  # one block: it broadcasts
        return values
    ends = [writer.constant(np.array(v, np.int32)) for v in (0, weight.shape[weight.axis], 1, weight.block_size)]
    block = writer.node("Div", [writer.node("Range", ends[:3]), ends[3]])
    return writer.node("Gather", [values, block], axis=weight.axis)
