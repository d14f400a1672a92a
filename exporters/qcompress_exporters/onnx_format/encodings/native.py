"""Native UINT4 and UINT2 tensors: Cast(int32) -> Gather(LUT). The smallest, where the runtime knows the type."""

from typing import ClassVar, final

from qcompress_exporters.onnx_format.encodings.base import Codes, GraphWriter
from qcompress_exporters.onnx_format.opsets import UINT2_OPSET, UINT4_OPSET


@final
class Native:
    """See the module. A tensor of such a type can feed a Cast and nothing else, so it has its final shape on disk."""

    name: ClassVar[str] = "native"
    why: ClassVar[str] = "the target has a type of this width"

    def opset(self, bits: int) -> int | None:
        """The opset that has the type."""
        return {4: UINT4_OPSET, 2: UINT2_OPSET}.get(bits)

    def exact(self, bits: int) -> bool:
        """Always: the tensor has the shape of the codes."""
        return True

    def padding(self, count: int, bits: int) -> int:
        """None: odd element counts are legal."""
        return 0

    def codes(self, writer: GraphWriter, codes: Codes, bits: int) -> str:
        """int32 codes."""
        return writer.to_int(writer.packed(codes, bits, codes.shape))

    def lookup(self, writer: GraphWriter, codes: Codes, bits: int, lut: str) -> str:
        """lut[codes]."""
        return writer.node("Gather", [lut, self.codes(writer, codes, bits)])
