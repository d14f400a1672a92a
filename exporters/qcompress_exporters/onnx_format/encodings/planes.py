"""Byte planes of 4, 2 and 1 bits, added up as integers: any width at any opset.

7 bits are planes of 4 + 2 + 1 everywhere, 3 bits planes of 2 + 1 on targets that are too old for their word.
"""

from functools import reduce
from typing import ClassVar, final

import numpy as np
import onnx_ir as ir

from qcompress.artifacts.base import Int8s
from qcompress.artifacts.packing import pack, to_planes
from qcompress_exporters.onnx_format.graph_writer import Codes, GraphWriter
from qcompress_exporters.onnx_format.targets import BASE_OPSET

_ROW = 8  # codes per row of every plane: one byte of the 1-bit plane


@final
class Planes:
    """Codes as planes of bits; see the module."""

    name: ClassVar[str] = "planes"

    def opset(self, bits: int) -> int | None:
        """Return the lowest opset of all; None for 8 bits: such a code is a byte and needs no planes."""
        return BASE_OPSET if bits < 8 else None

    def exact(self, bits: int) -> bool:
        """Return False: the codes come back in rows of 8."""
        return False

    def padding(self, count: int, bits: int) -> int:
        """Return how many elements the last row has beyond the codes."""
        return -count % _ROW

    def codes(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        """Write codes; return them as int32 [rows, 8]."""
        widths = [width for width in (4, 2, 1) if bits & width]
        padded = np.zeros(codes.size + self.padding(codes.size, bits), np.uint8)
        padded[: codes.size] = codes.ravel()
        values, shift = [], 0
        for plane, width in zip(to_planes(padded, widths), widths, strict=True):
            packed = writer.to_int(writer.tensor(pack(plane, width)))
            value = writer.node("Gather", [writer.table(width, 256, 8 // width, shift), packed])
            values.append(value if width == 1 else writer.node("Reshape", [value, writer.shape([-1, _ROW])]))
            shift += width
        return reduce(lambda a, b: writer.node("Add", [a, b]), values)

    def cast(self, writer: GraphWriter, codes: Codes | Int8s, bits: int, to: ir.DataType) -> ir.Value | None:
        """Return None: codes come from a lookup."""
        return None

    def lookup(self, writer: GraphWriter, codes: Codes, bits: int, lut: ir.Value) -> ir.Value:
        """Write codes; return lut[codes]."""
        return writer.node("Gather", [lut, self.codes(writer, codes, bits)])
