"""The protocol of encodings: ways to write codes; and the shaping that they share."""

from typing import ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from qcompress.artifacts.base import Int8s
from qcompress_exporters.onnx_format.graph_writer import Codes, GraphWriter


class Encoding(Protocol):
    """One way to write codes, and to read them back in the graph.

    `codes` and `lookup` take codes in the order in which the graph shall hold them. They return a value that holds at
    least those, row-major: in exactly the shape of `codes` if `exact(bits)`, else in any shape, padded at the end.
    """

    name: ClassVar[str]
    why: ClassVar[str]  # the reason for choosing it, for reports

    def opset(self, bits: int) -> int | None:
        """Return the lowest opset at which this can write `bits`; None: never."""

    def exact(self, bits: int) -> bool:
        """Return whether the values come back in the shape of the codes."""

    def padding(self, count: int, bits: int) -> int:
        """Return how many elements beyond `count` come back."""

    def codes(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        """Write codes; return them as int32."""

    def cast(self, writer: GraphWriter, codes: Codes | Int8s, bits: int, to: ir.DataType) -> ir.Value | None:
        """Write codes, signed ones too, and return them as numbers of a type; None if that needs a lookup."""

    def lookup(self, writer: GraphWriter, codes: Codes, bits: int, lut: ir.Value) -> ir.Value:
        """Write codes; return lut[codes] for one LUT of 2**bits entries (scalars or vectors) of any type."""


def looked_up(
    writer: GraphWriter,
    encoding: Encoding,
    codes: Codes,
    bits: int,
    lut: ir.Value,
    shape: tuple[int, ...],
    vector_dim: int = 1,
) -> ir.Value:
    """Write lut[codes] in the given shape, which holds the codes (or the vectors that they stand for) row-major."""
    value = encoding.lookup(writer, codes, bits, lut)
    if encoding.exact(bits) and vector_dim == 1:
        return value
    return shaped(writer, value, (codes.size + encoding.padding(codes.size, bits)) * vector_dim, shape)


def shaped(writer: GraphWriter, value: ir.Value, count: int, shape: tuple[int, ...]) -> ir.Value:
    """Write the first elements of a value of `count` elements, in the given shape."""
    wanted = int(np.prod(shape))
    if count != wanted:
        value = writer.node("Reshape", [value, writer.shape([-1])])
        value = writer.node("Slice", [value, writer.shape([0]), writer.shape([wanted])])
    return writer.node("Reshape", [value, writer.shape(shape)])
