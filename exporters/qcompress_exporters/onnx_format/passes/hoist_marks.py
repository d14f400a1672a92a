"""Marks move in front of operators that only reshape: there stands the operator that a quantizer fuses with."""

from collections.abc import Container
from typing import Final, final

import onnx_ir as ir

from qcompress_exporters.onnx_format.marks import is_mark
from qcompress_exporters.onnx_format.passes.replace import input_of

RESHAPES: Final = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity")


@final
class HoistMarks(ir.passes.InPlacePass):
    """Turns mark(reshape(x)) into reshape(mark(x)) where nothing else takes reshape(x).

    Args:
        weights: names of values that no mark moves to.
    """

    def __init__(self, weights: Container[str]) -> None:
        super().__init__()
        self._weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        modified = False
        for mark in [node for node in model.graph if is_mark(node)]:
            while (reshape := self._reshape_before(mark)) is not None:
                _swap(model.graph, reshape, mark)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _reshape_before(self, mark: ir.Node) -> ir.Node | None:
        value = input_of(mark, 0)
        node = value.producer()
        if node is None or node.op_type not in RESHAPES or node.domain or node.graph is not mark.graph:
            return None
        if value.is_graph_output() or len(value.uses()) > 1 or input_of(node, 0).name in self._weights:
            return None
        return node


def _swap(graph: ir.Graph, reshape: ir.Node, mark: ir.Node) -> None:
    source, reshaped, marked = input_of(reshape, 0), reshape.outputs[0], mark.outputs[0]
    mark.replace_input_with(0, source)
    if marked.is_graph_output():
        reshaped.name, marked.name = marked.name, reshaped.name
        reshaped.shape, reshaped.type, marked.shape, marked.type = marked.shape, marked.type, None, None
    marked.replace_all_uses_with(reshaped, replace_graph_outputs=True)
    reshape.replace_input_with(0, marked)
    graph.remove(mark)
    graph.insert_before(reshape, mark)
