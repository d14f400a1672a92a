"""Native UINT4 and UINT2 tensors: Cast(int32) -> Gather(LUT). The smallest, where the runtime knows the type."""

from typing import ClassVar, final

import onnx_ir as ir

from qcompress.artifacts.base import Int8s
from qcompress_exporters.onnx_format.graph_writer import Codes, GraphWriter
from qcompress_exporters.onnx_format.opsets import UINT2_OPSET, UINT4_OPSET


@final
class Native:
    """Codes as a tensor of their own type. Such a tensor can feed a Cast only, so it has its final shape on disk."""

    name: ClassVar[str] = "native"
    why: ClassVar[str] = "the target has a type of this width"

    def opset(self, bits: int) -> int | None:
        """Return the opset that has the type."""
        return {4: UINT4_OPSET, 2: UINT2_OPSET}.get(bits)

    def exact(self, bits: int) -> bool:
        """Return True: the tensor has the shape of the codes."""
        return True

    def padding(self, count: int, bits: int) -> int:
        """Return 0: odd element counts are legal."""
        return 0

    def codes(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        """Write codes; return them as int32."""
        return writer.to_int(writer.packed(codes, bits, codes.shape))

    def cast(self, writer: GraphWriter, codes: Codes | Int8s, bits: int, to: ir.DataType) -> ir.Value | None:
        """Write codes; return them as numbers of a type."""
        return writer.node("Cast", [writer.packed(codes, bits, codes.shape)], to=to)

    def lookup(self, writer: GraphWriter, codes: Codes, bits: int, lut: ir.Value) -> ir.Value:
        """Write codes; return lut[codes]."""
        return writer.node("Gather", [lut, self.codes(writer, codes, bits)])
