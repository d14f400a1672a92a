"""What the ways to write a weight have in common: a small graph writer with shared constants and decode tables."""

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompress.artifacts.base import Int8s
from qcompress.artifacts.packing import pack
from qcompress_exporters.onnx_format.names import ShortNames

Codes = npt.NDArray[np.uint8]

_PACKED_TYPE: Final = {
    (4, False): TensorProto.UINT4,
    (2, False): TensorProto.UINT2,
    (4, True): TensorProto.INT4,
    (2, True): TensorProto.INT2,
}


class GraphWriter:
    """Collects nodes and initializers; equal constants and decode tables are written once.

    Args:
        names: where short names come from.
    """

    def __init__(self, names: ShortNames) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._last: onnx.NodeProto | onnx.TensorProto | None = None
        self.initializers: list[onnx.TensorProto] = []
        self._names = names
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._shared: dict[tuple[str, ...], str] = {}

    def tensor(self, values: npt.NDArray[Any], name: str | None = None) -> str:
        """An initializer of its own."""
        return self._add(numpy_helper.from_array(np.array(values, order="C")), name)

    def packed(self, codes: Codes | Int8s, bits: int, shape: Sequence[int]) -> str:
        """An initializer of type UINT4 or UINT2, of INT4 or INT2 for int8 codes; its bytes are our own packing."""
        data_type = _PACKED_TYPE[bits, codes.dtype == np.int8]
        data = pack(codes.view(np.uint8) & np.uint8((1 << bits) - 1), bits).tobytes()
        return self._add(TensorProto(data_type=data_type, dims=shape, raw_data=data), None)

    def constant(self, values: npt.NDArray[Any]) -> str:
        """A constant that is shared by all who ask for the same."""
        key = values.dtype.str, values.shape, values.tobytes()
        if key not in self._constants:
            self._constants[key] = self.tensor(values)
        return self._constants[key]

    def shape(self, dims: Sequence[int]) -> str:
        """A shape operand, shared."""
        return self.constant(np.array(dims, np.int64))

    def node(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        output = self._names.new()
        self._last = helper.make_node(op_type, inputs, [output], **attributes)
        self.nodes.append(self._last)
        return output

    def name_last(self, name: str) -> None:
        """Let the value that the last node computes be called `name`."""
        self.nodes[-1].output[0] = name

    def sign_last(self, digest: str) -> None:
        """Let the node or initializer that was written last carry a digest, as its doc string."""
        assert self._last is not None
        self._last.doc_string = digest

    def to_int(self, value: str) -> str:
        """Cast to int32, the narrowest type that can index."""
        return self.node("Cast", [value], to=TensorProto.INT32)

    def shared(self, op_type: str, inputs: Sequence[str]) -> str:
        """A node that is shared by all who ask for the same; its inputs are shared, too."""
        key = op_type, *inputs
        if key not in self._shared:
            self._shared[key] = self.node(op_type, inputs)
        return self._shared[key]

    def table(self, bits: int, words: int, shape: tuple[int, ...], shift: int = 0) -> str:
        """int32 [words, *shape]: the codes in each word, LSB first, each shifted left by `shift`; shared.

        Computed in the graph (Range, Unsqueeze, Div, Mod) and folded when the file is loaded: stored, the table of a
        12-bit word would be 16 kB in a file of 100.
        """
        span = [self.constant(np.array(v, np.int32)) for v in (0, words, 1)]
        column = self.shared("Unsqueeze", [self.shared("Range", span), self.shape(range(1, 1 + len(shape)))])
        steps = self.constant((1 << bits * np.arange(np.prod(shape), dtype=np.int32)).reshape(shape))
        codes = self.shared("Mod", [self.shared("Div", [column, steps]), self.constant(np.array(1 << bits, np.int32))])
        return self.shared("Mul", [codes, self.constant(np.array(1 << shift, np.int32))]) if shift else codes

    def _add(self, tensor: onnx.TensorProto, name: str | None) -> str:
        tensor.name = name or self._names.new()
        self._last = tensor
        self.initializers.append(tensor)
        return str(tensor.name)


class Encoding(Protocol):
    """One way to write codes, and to read them back in the graph.

    Both methods take codes in the order in which the graph shall hold them, and return a value that holds at least
    those, row-major: in exactly the shape of `codes` if `exact(bits)`, else in any shape, with padding at the end.
    """

    name: ClassVar[str]
    why: ClassVar[str]  # it is chosen, for reports

    def opset(self, bits: int) -> int | None:
        """The lowest opset at which this can write `bits`; None: never."""

    def exact(self, bits: int) -> bool:
        """Whether the values come back in the shape of the codes."""

    def padding(self, count: int, bits: int) -> int:
        """How many elements beyond `count` come back."""

    def codes(self, writer: GraphWriter, codes: Codes, bits: int) -> str:
        """int32 codes."""

    def lookup(self, writer: GraphWriter, codes: Codes, bits: int, lut: str) -> str:
        """lut[codes] for one LUT of 2**bits entries (scalars or vectors) of any type."""


def looked_up(
    writer: GraphWriter,
    encoding: Encoding,
    codes: Codes,
    bits: int,
    lut: str,
    shape: tuple[int, ...],
    vector_dim: int = 1,
) -> str:
    """lut[codes] in the given shape, which holds the codes (or the vectors that they stand for) row-major."""
    value = encoding.lookup(writer, codes, bits, lut)
    if encoding.exact(bits) and vector_dim == 1:
        return value
    return shaped(writer, value, (codes.size + encoding.padding(codes.size, bits)) * vector_dim, shape)


def shaped(writer: GraphWriter, value: str, count: int, shape: tuple[int, ...]) -> str:
    """The first elements of a value of `count` elements, in the given shape."""
    wanted = int(np.prod(shape))
    if count != wanted:
        value = writer.node("Reshape", [value, writer.shape([-1])])
        value = writer.node("Slice", [value, writer.shape([0]), writer.shape([wanted])])
    return writer.node("Reshape", [value, writer.shape(shape)])
