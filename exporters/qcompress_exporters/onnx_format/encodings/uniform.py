"""A weight on an even grid as nodes that decode it: codes, zero points, scale. Never a DequantizeLinear.

onnxruntime does not fold a DequantizeLinear. In front of a layer it makes the layer slower, or computes it in other
integers than it was asked to (`DequantizeLinear -> MatMul` quantizes its activations).
"""

from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompress.artifacts import IntegerWeight
from qcompress.artifacts.base import broadcast_scale
from qcompress.artifacts.integer_range import IntegerRange
from qcompress_exporters.onnx_format.encodings.base import looked_up
from qcompress_exporters.onnx_format.encodings.codes import choose
from qcompress_exporters.onnx_format.encodings.formats import Written
from qcompress_exporters.onnx_format.graph_writer import GraphWriter


@final
class Uniform:
    """Writes weights on even grids."""

    def write(self, writer: GraphWriter, weight: IntegerWeight, opset: int) -> Written:
        """Write a weight; see `WeightFormat`."""
        value, encoding = _codes(writer, weight, ir.DataType.FLOAT, opset)
        if weight.zero_point is not None and weight.zero_point.any():
            zeros = writer.tensor(_broadcast(weight, weight.zero_point))
            zeros = writer.node("Cast", [zeros], to=ir.DataType.FLOAT)
            value = writer.node("Sub", [value, _per_element(writer, weight, zeros)])
        scale = writer.tensor(_broadcast(weight, weight.scale))
        return Written(writer.node("Mul", [value, _per_element(writer, weight, scale)]), encoding)

    def write_int8(self, writer: GraphWriter, weight: IntegerWeight, opset: int) -> Written:
        """Write a weight's codes, all at most 127; see `WeightFormat`."""
        return _codes(writer, weight, ir.DataType.INT8, opset)


def _codes(writer: GraphWriter, weight: IntegerWeight, to: ir.DataType, opset: int) -> Written:
    """Write a weight's codes as numbers of a type, in the weight's shape."""
    encoding = choose(weight.bits, opset)
    value = encoding.cast(writer, weight.codes, weight.bits, to)
    if value is None:
        limits = IntegerRange(weight.bits, weight.signed)
        numbers = writer.constant(np.arange(limits.n, limits.p + 1).astype(to.numpy()))
        codes = (weight.codes.astype(np.int16) - limits.n).astype(np.uint8)
        value = looked_up(writer, encoding, codes, weight.bits, numbers, weight.shape)
    return Written(value, encoding.name)


def _broadcast(weight: IntegerWeight, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values if weight.block_size is not None else broadcast_scale(values, weight.shape, weight.axis)


def _per_element(writer: GraphWriter, weight: IntegerWeight, values: ir.Value) -> ir.Value:
    """Write one value for each element of the axis, from one for each block."""
    if weight.block_size is None:
        return values
    assert weight.axis is not None
    if weight.scale.shape[weight.axis] == 1:  # one block: it broadcasts
        return values
    ends = [writer.constant(np.array(v, np.int32)) for v in (0, weight.shape[weight.axis], 1, weight.block_size)]
    block = writer.node("Div", [writer.node("Range", ends[:3]), ends[3]])
    return writer.node("Gather", [values, block], axis=weight.axis)
