"""Bytes that hold whole codes of 1, 2, 4 or 8 bits: Gather(LUT, table) -> Gather(that, byte).

One lookup yields all codes of a byte, so this loads fastest. Every runtime reads it.
"""

from typing import ClassVar, final

import numpy as np
import onnx_ir as ir

from qcompress.artifacts.base import Int8s
from qcompress.artifacts.packing import pack
from qcompress_exporters.onnx_format.graph_writer import Codes, GraphWriter
from qcompress_exporters.onnx_format.opsets import BASE_OPSET


@final
class Words:
    """See the module."""

    name: ClassVar[str] = "words"
    why: ClassVar[str] = "codes pack evenly into bytes"

    def opset(self, bits: int) -> int | None:
        """Return the base opset for widths that divide a byte; None for others."""
        return BASE_OPSET if 8 % bits == 0 else None

    def exact(self, bits: int) -> bool:
        """Return whether a code is a byte."""
        return bits == 8

    def padding(self, count: int, bits: int) -> int:
        """Return how many codes fill the last byte."""
        return -count % (8 // bits)

    def codes(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        """Write codes; return them as int32."""
        byte = self._byte(writer, codes, bits)
        return byte if bits == 8 else writer.node("Gather", [writer.table(bits, 256, (8 // bits,)), byte])

    def cast(self, writer: GraphWriter, codes: Codes | Int8s, bits: int, to: ir.DataType) -> ir.Value | None:
        """Write bytes and return them as numbers of a type; None where a byte holds several codes."""
        if bits < 8:
            return None
        if to == ir.DataType.INT8:  # no byte is above 127
            return writer.tensor(codes.astype(np.int8))
        return writer.node("Cast", [writer.tensor(codes)], to=to)

    def lookup(self, writer: GraphWriter, codes: Codes, bits: int, lut: ir.Value) -> ir.Value:
        """Write codes; return lut[codes]."""
        byte = self._byte(writer, codes, bits)
        if bits < 8:
            lut = writer.node("Gather", [lut, writer.table(bits, 256, (8 // bits,))])
        return writer.node("Gather", [lut, byte])

    def _byte(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        return writer.to_int(writer.tensor(np.asarray(codes) if bits == 8 else pack(codes, bits)))
