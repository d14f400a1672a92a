"""Adds nodes and initializers to a graph; equal constants and decode tables are written once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompress.artifacts.base import Int8s
from qcompress.artifacts.packing import pack
from qcompress_exporters.onnx_format.names import ShortNames

Codes = npt.NDArray[np.uint8]

_PACKED_TYPE: Final = {
    (4, False): ir.DataType.UINT4,
    (2, False): ir.DataType.UINT2,
    (4, True): ir.DataType.INT4,
    (2, True): ir.DataType.INT2,
}


class GraphWriter:
    """Writes into one graph.

    Values that are computed from constants (`node`) stand in front of the graph's own nodes, in the order of their
    writing. Others (`add`) go to the end; sort the graph when all are written.

    Args:
        graph: is added to.
        reserved: names that no value gets unless it is given one.
    """

    def __init__(self, graph: ir.Graph, reserved: Iterable[str] = ()) -> None:
        self.graph = graph
        self._names = ShortNames({*names_in(graph), *reserved})
        self._last: ir.Node | None = None
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._shared: dict[tuple[str, tuple[ir.Value, ...]], ir.Value] = {}

    def tensor(self, values: npt.NDArray[Any], name: str | None = None) -> ir.Value:
        """Write an initializer of its own."""
        return self._initializer(ir.tensor(np.asarray(values, order="C")), name)

    def packed(self, codes: Codes | Int8s, bits: int, shape: Sequence[int]) -> ir.Value:
        """Write an initializer of type UINT4 or UINT2, or INT4 or INT2 for int8 codes; its bytes are our packing."""
        data = pack(codes.view(np.uint8) & np.uint8((1 << bits) - 1), bits)
        data_type = _PACKED_TYPE[bits, codes.dtype == np.int8]
        return self._initializer(ir.PackedTensor(data, data_type, shape=ir.Shape(shape)), None)

    def constant(self, values: npt.NDArray[Any]) -> ir.Value:
        """Return a constant that all who ask for the same values share."""
        key = values.dtype.str, values.shape, values.tobytes()
        if key not in self._constants:
            self._constants[key] = self.tensor(values)
        return self._constants[key]

    def shape(self, dims: Sequence[int]) -> ir.Value:
        """Return a shape operand, shared."""
        return self.constant(np.array(dims, np.int64))

    def node(self, op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """Write a node that computes from constants; return its output."""
        node = ir.node(op_type, inputs, attributes, outputs=[ir.Value(name=self._names.new())], name="")
        if self._last is not None:
            self.graph.insert_after(self._last, node)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.append(node)
        self._last = node
        return node.outputs[0]

    def add(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str | None = None, **attributes: Any
    ) -> ir.Value:
        """Write a node anywhere in the graph; return its output, which is called `name`."""
        return self.add_many(op_type, inputs, [name], **attributes)[0]

    def add_many(
        self, op_type: str, inputs: Sequence[ir.Value | None], names: Sequence[str | None], **attributes: Any
    ) -> Sequence[ir.Value]:
        """Write a node with several outputs anywhere in the graph; return these."""
        outputs = [ir.Value(name=name or self._names.new()) for name in names]
        node = ir.node(op_type, inputs, attributes, outputs=outputs, name="")
        self.graph.append(node)
        return node.outputs

    def add_like(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Write a node with the operator and the attributes of another anywhere in the graph; return its output."""
        output = ir.Value(name=self._names.new())
        self.graph.append(ir.node(node.op_type, inputs, node.attributes, outputs=[output], name=""))
        return output

    def insert_behind(self, value: ir.Value, op_type: str, others: Sequence[ir.Value]) -> ir.Value:
        """Write a node that takes a value and others; let all users of the value take its output instead."""
        uses = value.uses()
        result = self.add(op_type, [value, *others])
        for node, position in uses:
            node.replace_input_with(position, result)
        self._take_outputs(value, result)
        return result

    def supersede(self, old: ir.Value, new: ir.Value) -> None:
        """Let a new value, written by this writer, stand for an old one, with its name and type."""
        new.name, old.name = old.name, new.name
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def _take_outputs(self, old: ir.Value, new: ir.Value) -> None:
        """Let a new value be the outputs of the graph that an old one was, with their name and type."""
        if not old.is_graph_output():
            return
        for position, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[position] = new
        new.name, old.name = old.name, new.name
        new.shape, new.type, old.shape, old.type = old.shape, old.type, None, None

    def to_int(self, value: ir.Value) -> ir.Value:
        """Cast to int32, the narrowest type that can index."""
        return self.node("Cast", [value], to=ir.DataType.INT32)

    def shared(self, op_type: str, inputs: Sequence[ir.Value]) -> ir.Value:
        """Return the output of a node that all who ask for the same share; its inputs are shared, too."""
        key = op_type, tuple(inputs)
        if key not in self._shared:
            self._shared[key] = self.node(op_type, inputs)
        return self._shared[key]

    def table(self, bits: int, words: int, shape: tuple[int, ...], shift: int = 0) -> ir.Value:
        """Return int32 [words, *shape], shared: the codes in each word, LSB first, each shifted left by `shift`.

        Computed in the graph (Range, Unsqueeze, Div, Mod) and folded when the file is loaded: stored, the table of a
        12-bit word would be 16 kB in a file of 100.
        """
        span = [self.constant(np.array(v, np.int32)) for v in (0, words, 1)]
        column = self.shared("Unsqueeze", [self.shared("Range", span), self.shape(range(1, 1 + len(shape)))])
        steps = self.constant((1 << bits * np.arange(np.prod(shape), dtype=np.int32)).reshape(shape))
        codes = self.shared("Mod", [self.shared("Div", [column, steps]), self.constant(np.array(1 << bits, np.int32))])
        return self.shared("Mul", [codes, self.constant(np.array(1 << shift, np.int32))]) if shift else codes

    def _initializer(self, tensor: ir.TensorProtocol, name: str | None) -> ir.Value:
        tensor.name = name or self._names.new()
        value = ir.Value(name=tensor.name, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def names_in(graph: ir.Graph) -> Iterator[str]:
    """Yield the name of every value of a graph and its subgraphs: they share one name space."""
    for part in (graph, *graph.subgraphs()):
        for value in (*part.inputs, *part.outputs, *part.initializers.values(), *(o for n in part for o in n.outputs)):
            if value.name:
                yield value.name


def sign(value: ir.Value, digest: str) -> None:
    """Let the node or initializer that gives a value carry a digest as its doc string."""
    node = value.producer()
    if node is not None:
        node.doc_string = digest
    else:
        assert value.const_value is not None
        value.const_value.doc_string = digest
