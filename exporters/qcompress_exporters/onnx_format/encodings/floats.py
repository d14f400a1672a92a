"""Tensors that are left in float, and buffers, as initializers."""

from typing import final

import onnx_ir as ir

from qcompress.artifacts import FloatWeight
from qcompress.errors import ConfigError
from qcompress_exporters.onnx_format.encodings.formats import Written
from qcompress_exporters.onnx_format.graph_writer import GraphWriter


@final
class Float:
    """Writes a tensor in its own type; 16-bit floats are widened in the graph."""

    def write(self, writer: GraphWriter, weight: FloatWeight, opset: int) -> Written:
        """Write a tensor; see `WeightFormat`."""
        value = writer.tensor(weight.values)
        if weight.values.dtype != weight.decoded_dtype:
            value = writer.node("Cast", [value], to=ir.DataType.FLOAT)
        return Written(value, str(weight.values.dtype))

    def write_int8(self, writer: GraphWriter, weight: FloatWeight, opset: int) -> Written:
        """Raise a ConfigError: floats have no int8 codes."""
        raise ConfigError(f"A {weight.kind} artifact must have int8 codes to be written as such, and it has floats.")
